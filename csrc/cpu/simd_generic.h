// 4 lanes in the compilers' portable vector types: SSE2 on x86-64, NEON on Arm, and any other target.
// Included by simd.h.
#pragma once

namespace fastlm {

typedef float float4 __attribute__((vector_size(16)));
typedef uint32_t uint4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));

struct lanes {
  int4 m;  // all ones where true
  friend lanes operator&(lanes a, lanes b) { return {a.m & b.m}; }
  friend lanes operator|(lanes a, lanes b) { return {a.m | b.m}; }
};

struct uvec {
  uint4 v;
  static uvec all(uint32_t x) { return {uint4{x, x, x, x}}; }
  static uvec iota() { return {uint4{0, 1, 2, 3}}; }
  friend uvec operator+(uvec a, uvec b) { return {a.v + b.v}; }
  friend uvec operator-(uvec a, uvec b) { return {a.v - b.v}; }
  friend uvec operator^(uvec a, uvec b) { return {a.v ^ b.v}; }
  friend uvec operator&(uvec a, uvec b) { return {a.v & b.v}; }
  friend uvec operator|(uvec a, uvec b) { return {a.v | b.v}; }
  friend uvec operator<<(uvec a, int n) { return {a.v << uint32_t(n)}; }
  friend uvec operator>>(uvec a, int n) { return {a.v >> uint32_t(n)}; }
  friend lanes operator>=(uvec a, uvec b) { return {(int4)(a.v >= b.v)}; }
};

// The high and low halves of the 64-bit products a·b.
inline void multiply_wide(uvec a, uvec b, uvec& high, uvec& low) {
  for (int i = 0; i < 4; ++i) {
    uint64_t product = uint64_t(a.v[i]) * b.v[i];
    high.v[i] = uint32_t(product >> 32);
    low.v[i] = uint32_t(product);
  }
}

struct vec {
  static constexpr int64_t Lanes = 4;
  float4 v;
  static vec zero() { return all(0); }
  static vec all(float x) { return {float4{x, x, x, x}}; }
  static vec iota() { return {float4{0, 1, 2, 3}}; }

  template <class T> static vec load(const T* p, full) { return load(p, tail{4}); }
  static vec load(const float* p, full) {
    vec r;
    std::memcpy(&r, p, 16);
    return r;
  }
  static vec load(const float* p, tail t) {
    vec r = zero();
    for (size_t i = 0; i < t.count; ++i) r.v[i] = p[i];
    return r;
  }
  static vec load(const bf16* p, tail t) { return {(float4)(gather(p, t) << 16u)}; }
  static vec load(const fp16* p, tail t) {
    uint4 h = gather(p, t), magnitude = (h & 0x7fffu) << 13u;
    float4 f = (float4)magnitude * 0x1p112f;  // changes the exponent bias from 15 to 127, also of subnormals
    uint4 special = (uint4)(magnitude >= 0x0f800000u) & 0x7f800000u;  // infinity and NaN: exponent of all ones
    return {(float4)((uint4)f | special | ((h & 0x8000u) << 16u))};
  }
  // 0 where the byte is 0, otherwise 1
  static vec load(const bool* p, tail t) {
    vec r = zero();
    for (size_t i = 0; i < t.count; ++i) r.v[i] = p[i] ? 1.0f : 0.0f;
    return r;
  }

  template <class T> void store(T* p, full) const { store(p, tail{4}); }
  void store(float* p, full) const { std::memcpy(p, &v, 16); }
  void store(float* p, tail t) const {
    for (size_t i = 0; i < t.count; ++i) p[i] = v[i];
  }
  void store(bf16* p, tail t) const {  // round to nearest even; NaN stays NaN
    uint4 u = (uint4)v, r = (u + 0x7fffu + ((u >> 16u) & 1u)) >> 16u, nan = (uint4)(v != v);
    scatter(p, t, (r & ~nan) | (nan & 0x7fc0u));
  }
  void store(fp16* p, tail t) const {
    uint4 u = (uint4)v, magnitude = u & 0x7fffffffu;
    // Normal numbers: change the bias and round to nearest even. Small numbers: adding 0.5 aligns the mantissa with the
    // subnormal step 2^-24 and rounds.
    uint4 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13u) & 1u)) >> 13u;
    uint4 small = (uint4)((float4)magnitude + 0.5f) - 0x3f000000u;
    uint4 is_small = (uint4)(magnitude < 0x38800000u), is_large = (uint4)(magnitude >= 0x477ff000u),
          is_nan = (uint4)(magnitude > 0x7f800000u);
    uint4 r = (small & is_small) | (normal & ~is_small);
    r = (r & ~is_large) | (is_large & 0x7c00u);
    r = (r & ~is_nan) | (is_nan & 0x7e00u);
    scatter(p, t, r | ((u >> 16u) & 0x8000u));
  }

  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  float max_lane() const {
    float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
  friend vec operator+(vec a, vec b) { return {a.v + b.v}; }
  friend vec operator-(vec a, vec b) { return {a.v - b.v}; }
  friend vec operator*(vec a, vec b) { return {a.v * b.v}; }
  friend vec operator/(vec a, vec b) { return {a.v / b.v}; }
  friend lanes operator<(vec a, vec b) { return {a.v < b.v}; }
  friend lanes operator<=(vec a, vec b) { return {a.v <= b.v}; }
  friend lanes operator==(vec a, vec b) { return {a.v == b.v}; }

 private:
  template <class T> static uint4 gather(const T* p, tail t) {
    uint4 r{};
    for (size_t i = 0; i < t.count; ++i) r[i] = p[i].bits;
    return r;
  }
  template <class T> static void scatter(T* p, tail t, uint4 bits) {
    for (size_t i = 0; i < t.count; ++i) p[i].bits = uint16_t(bits[i]);
  }
};

struct quad {
  const float* p;
  static quad load(const float* p) { return {p}; }
  vec all(int64_t i) const { return vec::all(p[i]); }
};

FASTLM_INLINE vec fma(vec a, vec b, vec c) { return {a.v * b.v + c.v}; }  // rounds once where the target has FMA
FASTLM_INLINE vec sqrt(vec a) {
  return {float4{__builtin_sqrtf(a.v[0]), __builtin_sqrtf(a.v[1]), __builtin_sqrtf(a.v[2]), __builtin_sqrtf(a.v[3])}};
}
FASTLM_INLINE uvec bits_of(vec a) { return {(uint4)a.v}; }
FASTLM_INLINE vec from_bits(uvec a) { return {(float4)a.v}; }
FASTLM_INLINE vec select(lanes m, vec a, vec b) { return {(float4)(((int4)a.v & m.m) | ((int4)b.v & ~m.m))}; }
FASTLM_INLINE vec zero_where(lanes m, vec a) { return {(float4)((int4)a.v & ~m.m)}; }
FASTLM_INLINE vec max(vec a, vec b) { return select(b < a, a, b); }  // b where either is NaN
FASTLM_INLINE vec min(vec a, vec b) { return select(a < b, a, b); }

FASTLM_INLINE void transpose(vec (&r)[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      float x = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = x;
    }
}

#if defined(__FP_FAST_FMAF) || defined(__aarch64__)
inline constexpr bool FusesMultiplyAdd = true;
#else
inline constexpr bool FusesMultiplyAdd = false;  // SSE2
#endif

FASTLM_INLINE vec rounded(vec a) {
#if defined(__aarch64__)
  asm("" : "+w"(a.v));
#else
  if constexpr (FusesMultiplyAdd) asm("" : "+m"(a.v));
#endif
  return a;
}

}  // namespace fastlm
