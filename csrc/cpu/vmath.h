// Elementary functions of vectors: exp, tanh, and activations with their derivatives. The polynomials are minimax fits
// of our own; the stated errors were measured against mpmath.
#pragma once
#include "../activation.h"
#include "simd.h"

namespace fastlm {

// e^x, relative error below 1.2e-7. Exactly 0 below −87.33 and for −inf; NaN for NaN; 2.4e38 above 88.37.
FASTLM_INLINE vec exp(vec x) {
  // 1.5·2^23: adding it rounds to an integer, in the low bits of the mantissa.
  const vec magic = vec::all(12582912.0f);
  vec clamped = min(vec::all(88.37f), x);
  vec shifted = fma(clamped, vec::all(1.44269504f), magic);
  vec n = shifted - magic;
  vec r = fma(n, vec::all(-0.693145752f), clamped);  // ln 2 in two parts, which makes r exact to the last bit
  r = fma(n, vec::all(-1.42860677e-6f), r);
  vec p = fma(vec::all(1.381443131e-3f), r, vec::all(8.368799904e-3f));
  p = fma(p, r, vec::all(4.166839605e-2f));
  p = fma(p, r, vec::all(1.666651995e-1f));
  p = fma(p, r, vec::all(4.999999340e-1f));
  p = vec::all(1) + fma(r * r, p, r);  // the largest term last, so that there is one rounding of its size
  return zero_where(clamped < vec::all(-87.33f), from_bits(bits_of(p) + (bits_of(shifted) << 23)));
}

// e^x in place, for x ≤ 0 up to rounding: the weights of a softmax. Relative error below 9e-8 + 1.3e-8·|x|, of which
// the second term is less than the effect of rounding x. 0, −inf and NaN as in exp. Each step is done for all N vectors
// before the next, to hide its latency.
template <int N> FASTLM_INLINE void exp_nonpositive(vec (&x)[N]) {
  if constexpr (!FusesMultiplyAdd) {  // x·log2 e would round
    for (vec& each : x) each = exp(each);
    return;
  }
  const vec magic = vec::all(12582912.0f), log2e = vec::all(1.44269504f);
  const float powers[] = {1.339887502e-3f, 9.618436918e-3f, 5.550332367e-2f, 2.402264774e-1f, 6.931471825e-1f, 1};
  vec shifted[N], f[N], p[N];
  auto each = [](auto step) {
#pragma GCC unroll 3
    for (int i = 0; i < N; ++i) step(i);
  };
  each([&](int i) { shifted[i] = fma(x[i], log2e, magic); });
  each([&](int i) { f[i] = fma(x[i], log2e, magic - shifted[i]); });
  each([&](int i) { p[i] = vec::all(1.535336196e-4f); });
  for (float power : powers) each([&](int i) { p[i] = fma(p[i], f[i], vec::all(power)); });  // 2^f
  each([&](int i) {
    x[i] = zero_where(x[i] < vec::all(-87.33f), from_bits(bits_of(p[i]) + (bits_of(shifted[i]) << 23)));
  });
}

// tanh(x), relative error below 1.4e-7. Exactly ±1 far out; NaN for NaN.
FASTLM_INLINE vec tanh(vec x) {
  const vec square = x * x, magnitude = max(x, vec::zero() - x);
  vec p = fma(vec::all(-5.515159739e-3f), square, vec::all(2.046941607e-2f));
  p = fma(p, square, vec::all(-5.368802192e-2f));
  p = fma(p, square, vec::all(1.333083033e-1f));
  p = fma(p, square, vec::all(-3.333325985e-1f));
  const vec small = fma(x * square, p, x);
  // 1 − 2 / (e^(2|x|) + 1) would cancel near 0.
  const vec large = vec::all(1) - vec::all(2) / (exp(magnitude + magnitude) + vec::all(1));
  return select(magnitude < vec::all(0.65f), small, select(x < vec::zero(), vec::zero() - large, large));
}

struct activation_value {
  vec value, slope;
};

// Exact GELU: x·Φ(x), derivative Φ(x) + x·φ(x), Φ the normal distribution. With t = |x|/√2: Φ(−|x|) =
// ½·e^(−x²/2)·erfcx(t), erfcx(t) = u·P(u) with u = 1/(1 + 0.475·t), relative error 1e-8 before rounding. φ uses
// the same exponential.
FASTLM_INLINE activation_value gelu_erf(vec x) {
  vec magnitude = max(x, vec::zero() - x);
  vec power = x * x * vec::all(-0.5f);
  // Exactly 0 far out: products with subnormal numbers cost a hundred times as much.
  vec density = exp(select(power < vec::all(-80.0f), vec::all(-1e30f), power));
  vec u = vec::all(1) / fma(magnitude, vec::all(0.335875721f), vec::all(1));
  vec p = fma(vec::all(-5.340479291e-02f), u, vec::all(2.924110409e-01f));
  p = fma(p, u, vec::all(-5.962864307e-01f));
  p = fma(p, u, vec::all(4.836072303e-01f));
  p = fma(p, u, vec::all(-1.395723710e-01f));
  p = fma(p, u, vec::all(2.528529183e-01f));
  p = fma(p, u, vec::all(2.228261846e-01f));
  p = fma(p, u, vec::all(2.696564611e-01f));
  p = fma(p, u, vec::all(2.679097675e-01f));
  vec lower = vec::all(0.5f) * density * p * u;
  vec probability = select(x < vec::zero(), lower, vec::all(1) - lower);
  return {x * probability, fma(x * vec::all(0.39894228f), density, probability)};
}

// Tanh GELU (GPT-2): x·σ(2w), w = √(2/π)·(x + 0.044715·x³), as ½(1 + tanh w) = σ(2w). Derivative σ + x·σ(1 − σ)·2w'.
FASTLM_INLINE activation_value gelu_tanh(vec x) {
  const float twice = 1.59576912f;  // 2·√(2/π)
  vec square = x * x;
  vec w = x * fma(square, vec::all(twice * 0.044715f), vec::all(twice));
  // Clamped at 85: beyond it the sigmoid, or its product with x, would be a subnormal number.
  vec e = exp(min(vec::all(85.0f), vec::zero() - w)), sigmoid = vec::all(1) / (vec::all(1) + e);
  vec w_slope = fma(square, vec::all(3 * twice * 0.044715f), vec::all(twice));
  return {x * sigmoid, fma(x * sigmoid * (e * sigmoid), w_slope, sigmoid)};
}

// SiLU: x·σ(x), derivative σ + x·σ(1 − σ).
FASTLM_INLINE activation_value silu(vec x) {
  // Clamped at 85, as above.
  vec e = exp(min(vec::all(85.0f), vec::zero() - x)), sigmoid = vec::all(1) / (vec::all(1) + e);
  vec value = x * sigmoid;
  return {value, fma(value, e * sigmoid, sigmoid)};
}

// ReLU; the derivative at 0 is 0, as PyTorch's.
FASTLM_INLINE activation_value relu(vec x) {
  const vec positive = max(vec::zero(), x);  // in this order NaN stays NaN
  return {positive, select(vec::zero() < x, vec::all(1), vec::zero())};
}

FASTLM_INLINE activation_value activate(activation_kind activation, vec x) {
  switch (activation) {
    case activation_kind::silu: return silu(x);
    case activation_kind::gelu: return gelu_erf(x);
    case activation_kind::gelu_tanh: return gelu_tanh(x);
    default: return relu(x);
  }
}

}  // namespace fastlm
