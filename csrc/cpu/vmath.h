// Functions of a whole register: exp, and the GELU with its derivative. Coefficients are our own least-maximum fits;
// the errors stated were measured against mpmath.
#pragma once
#include "simd.h"

namespace fastlm {

// e^x, relative error below 1.2e-7. −inf (and everything below −87.33) gives exactly 0, NaN stays NaN, above 88.37 the
// result stays at 2.4e38.
FASTLM_INLINE vec exp(vec x) {
  const vec magic =
      vec::all(12582912.0f);  // 1.5·2^23: adding it rounds to an integer, which then stands in the low mantissa bits
  vec clamped = min(vec::all(88.37f), x);
  vec shifted = fma(clamped, vec::all(1.44269504f), magic);
  vec n = shifted - magic;
  vec r = fma(n, vec::all(-0.693145752f), clamped);  // ln 2 in two parts, so that r is exact to the last bit
  r = fma(n, vec::all(-1.42860677e-6f), r);
  vec p = fma(vec::all(1.381443131e-3f), r, vec::all(8.368799904e-3f));
  p = fma(p, r, vec::all(4.166839605e-2f));
  p = fma(p, r, vec::all(1.666651995e-1f));
  p = fma(p, r, vec::all(4.999999340e-1f));
  p = vec::all(1) +
      fma(r * r, p, r);  // the large term last: one rounding of its size, with and without a fused multiply-add
  return zero_where(clamped < vec::all(-87.33f), from_bits(bits_of(p) + (bits_of(shifted) << 23)));
}

// e^x in place for the weights of a softmax, x ≤ 0 but for rounding: relative error below 9e-8 + 1.3e-8·|x|, of which
// the second is less than x's own rounding makes. What exp promises for 0, −inf and NaN holds. Each step is made for
// all N vectors before the next: those of one vector wait for each other, and one vector after another would fill the
// scheduler with steps that wait.
template <int N> FASTLM_INLINE void exp_below(vec (&x)[N]) {
  if constexpr (!FusesMultiplyAdd) {  // x·log2 e would be rounded
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

struct gelu_value {
  vec value, slope;
};

// Exact GELU: x·Φ(x), slope Φ(x) + x·φ(x), Φ the normal distribution. With t = |x|/√2:
// Φ(−|x|) = ½·e^(−x²/2)·erfcx(t), erfcx(t) = u·P(u) with u = 1/(1 + 0.475·t), relative error 1e-8 before rounding. φ
// shares the exponential.
FASTLM_INLINE gelu_value gelu_erf(vec x) {
  vec magnitude = max(x, vec::zero() - x);
  vec power = x * x * vec::all(-0.5f);
  // Far out it is 0: products with it would be subnormal numbers, which cost a hundred times as much.
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

// GELU by tanh (GPT-2): x·σ(2w), w = √(2/π)·(x + 0.044715·x³), since ½(1 + tanh w) = σ(2w). Slope σ + x·σ(1 − σ)·2w'.
FASTLM_INLINE gelu_value gelu_tanh(vec x) {
  const float twice = 1.59576912f;  // 2·√(2/π)
  vec square = x * x;
  vec w = x * fma(square, vec::all(twice * 0.044715f), vec::all(twice));
  // Past 85 the sigmoid, or x times it, would be a subnormal number, which costs a hundred times as much and is as good
  // as this.
  vec e = exp(min(vec::all(85.0f), vec::zero() - w)), sigmoid = vec::all(1) / (vec::all(1) + e);
  vec w_slope = fma(square, vec::all(3 * twice * 0.044715f), vec::all(twice));
  return {x * sigmoid, fma(x * sigmoid * (e * sigmoid), w_slope, sigmoid)};
}

}  // namespace fastlm
