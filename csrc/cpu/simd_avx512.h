// 16 lanes: AVX-512 F, BW, VL and DQ, and the bf16 dot product in modules that have it. Included by simd.h.
#pragma once
#include <immintrin.h>

namespace fastlm {

struct lanes {
  __mmask16 m;
  friend lanes operator&(lanes a, lanes b) { return {__mmask16(a.m & b.m)}; }
  friend lanes operator|(lanes a, lanes b) { return {__mmask16(a.m | b.m)}; }
};

inline __mmask16 mask_of(tail t) { return __mmask16((1u << t.count) - 1); }

struct uvec {
  __m512i v;
  static uvec all(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
  static uvec iota() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
  friend uvec operator+(uvec a, uvec b) { return {_mm512_add_epi32(a.v, b.v)}; }
  friend uvec operator-(uvec a, uvec b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  friend uvec operator^(uvec a, uvec b) { return {_mm512_xor_si512(a.v, b.v)}; }
  friend uvec operator&(uvec a, uvec b) { return {_mm512_and_si512(a.v, b.v)}; }
  friend uvec operator|(uvec a, uvec b) { return {_mm512_or_si512(a.v, b.v)}; }
  friend uvec operator<<(uvec a, int n) { return {_mm512_slli_epi32(a.v, unsigned(n))}; }
  friend uvec operator>>(uvec a, int n) { return {_mm512_srli_epi32(a.v, unsigned(n))}; }
  friend lanes operator>=(uvec a, uvec b) { return {_mm512_cmpge_epu32_mask(a.v, b.v)}; }
};

// The high and low halves of the 64-bit products a·b.
inline void multiply_wide(uvec a, uvec b, uvec& high, uvec& low) {
  __m512i even = _mm512_mul_epu32(a.v, b.v),
          odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  low.v = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
  high.v = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}

struct vec {
  static constexpr int64_t Lanes = 16;
  __m512 v;
  static vec zero() { return {_mm512_setzero_ps()}; }
  static vec all(float x) { return {_mm512_set1_ps(x)}; }
  static vec iota() { return {_mm512_cvtepi32_ps(uvec::iota().v)}; }

  static vec load(const float* p, full) { return {_mm512_loadu_ps(p)}; }
  static vec load(const float* p, tail t) { return {_mm512_maskz_loadu_ps(mask_of(t), p)}; }
  static vec load(const bf16* p, full) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static vec load(const bf16* p, tail t) { return widen(_mm256_maskz_loadu_epi16(mask_of(t), p)); }
  static vec load(const fp16* p, full) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static vec load(const fp16* p, tail t) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask_of(t), p))}; }
  // 0 where the byte is 0, otherwise 1
  static vec load(const bool* p, full) { return truth(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static vec load(const bool* p, tail t) { return truth(_mm_maskz_loadu_epi8(mask_of(t), p)); }

  void store(float* p, full) const { _mm512_storeu_ps(p, v); }
  void store(float* p, tail t) const { _mm512_mask_storeu_ps(p, mask_of(t), v); }
  void store(bf16* p, full) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  void store(bf16* p, tail t) const { _mm256_mask_storeu_epi16(p, mask_of(t), narrow()); }
  void store(fp16* p, full) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half()); }
  void store(fp16* p, tail t) const { _mm256_mask_storeu_epi16(p, mask_of(t), half()); }

  float sum() const { return _mm512_reduce_add_ps(v); }
  float max_lane() const { return _mm512_reduce_max_ps(v); }
  friend vec operator+(vec a, vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend vec operator-(vec a, vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend vec operator*(vec a, vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend vec operator/(vec a, vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend lanes operator<(vec a, vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
  friend lanes operator<=(vec a, vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
  friend lanes operator==(vec a, vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }

 private:
  static vec widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
  static vec truth(__m128i b) { return {_mm512_maskz_mov_ps(_mm_test_epi8_mask(b, b), _mm512_set1_ps(1))}; }
  __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  __m256i narrow() const {  // round to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(r);
#endif
  }
};

struct quad {
  const float* p;
  static quad load(const float* p) { return {p}; }
  vec all(int64_t i) const { return vec::all(p[i]); }
};

FASTLM_INLINE vec fma(vec a, vec b, vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTLM_INLINE vec max(vec a, vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
FASTLM_INLINE vec min(vec a, vec b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTLM_INLINE vec sqrt(vec a) { return {_mm512_sqrt_ps(a.v)}; }
FASTLM_INLINE vec select(lanes m, vec a, vec b) { return {_mm512_mask_mov_ps(b.v, m.m, a.v)}; }
FASTLM_INLINE vec zero_where(lanes m, vec a) { return {_mm512_mask_mov_ps(a.v, m.m, _mm512_setzero_ps())}; }
FASTLM_INLINE uvec bits_of(vec a) { return {_mm512_castps_si512(a.v)}; }
FASTLM_INLINE vec from_bits(uvec a) { return {_mm512_castsi512_ps(a.v)}; }

FASTLM_INLINE void transpose(vec (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // pairs of rows: 2×2 blocks
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // 4×4 blocks: r[4i + c] holds column c, c+4, c+8, c+12 of rows 4i…4i+3
    auto pd = [](__m512 x) { return _mm512_castps_pd(x); };
    auto ps = [](__m512d x) { return _mm512_castpd_ps(x); };
    r[4 * i].v = ps(_mm512_unpacklo_pd(pd(t[4 * i]), pd(t[4 * i + 2])));
    r[4 * i + 1].v = ps(_mm512_unpackhi_pd(pd(t[4 * i]), pd(t[4 * i + 2])));
    r[4 * i + 2].v = ps(_mm512_unpacklo_pd(pd(t[4 * i + 1]), pd(t[4 * i + 3])));
    r[4 * i + 3].v = ps(_mm512_unpackhi_pd(pd(t[4 * i + 1]), pd(t[4 * i + 3])));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // 128-bit quarters across the four groups of rows
    __m512 a = _mm512_shuffle_f32x4(r[c].v, r[c + 4].v, 0x88), b = _mm512_shuffle_f32x4(r[c].v, r[c + 4].v, 0xdd);
    __m512 e = _mm512_shuffle_f32x4(r[c + 8].v, r[c + 12].v, 0x88),
           f = _mm512_shuffle_f32x4(r[c + 8].v, r[c + 12].v, 0xdd);
    t[c] = _mm512_shuffle_f32x4(a, e, 0x88);
    t[c + 8] = _mm512_shuffle_f32x4(a, e, 0xdd);
    t[c + 4] = _mm512_shuffle_f32x4(b, f, 0x88);
    t[c + 12] = _mm512_shuffle_f32x4(b, f, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i].v = t[i];
}

// The lanes of a and b in turn: a0 b0 a1 b1 …
FASTLM_INLINE void interleave(vec a, vec b, vec (&halves)[2]) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  halves[0].v = _mm512_permutex2var_ps(a.v, first, b.v);
  halves[1].v = _mm512_permutex2var_ps(a.v, second, b.v);
}

#if defined(__AVX512BF16__)
// acc + a.low·b.low + a.high·b.high; each lane of a and b is a pair of bf16
FASTLM_INLINE vec dot_bf16(vec acc, vec a, vec b) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)}; }

// 2·Lanes consecutive elements as pairs; `count` elements exist, the rest is zero
FASTLM_INLINE vec load_pairs(const bf16* p, int64_t count) {
  return {_mm512_castsi512_ps(count >= 32 ? _mm512_loadu_si512(p)
                                          : _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << count) - 1), p))};
}
FASTLM_INLINE vec load_pairs(const float* p, int64_t count) {
  vec low = count >= 16 ? vec::load(p, full{}) : vec::load(p, tail{size_t(count)});
  vec high = count >= 32  ? vec::load(p + 16, full{})
             : count > 16 ? vec::load(p + 16, tail{size_t(count - 16)})
                          : vec::zero();
  return {(__m512)_mm512_cvtne2ps_pbh(high.v, low.v)};
}

FASTLM_INLINE vec make_pairs(vec low, vec high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v)))};
}

// Lane i: (low[i], high[i])
template <class T, class Span> FASTLM_INLINE vec interleave_pairs(const T* low, const T* high, Span span) {
  if constexpr (sizeof(T) == 2) {
    return from_bits((bits_of(vec::load(low, span)) >> 16) | bits_of(vec::load(high, span)));
  } else {
    return make_pairs(vec::load(low, span), vec::load(high, span));
  }
}
template <class T, class Span> FASTLM_INLINE vec interleave_pairs(const T* low, std::nullptr_t, Span span) {
  if constexpr (sizeof(T) == 2) {
    return from_bits(bits_of(vec::load(low, span)) >> 16);
  } else {
    return make_pairs(vec::load(low, span), vec::zero());
  }
}
#endif

inline constexpr bool FusesMultiplyAdd = true;

FASTLM_INLINE vec rounded(vec a) {
  asm("" : "+v"(a.v));
  return a;
}

}  // namespace fastlm
