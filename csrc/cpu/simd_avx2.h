// 8 lanes: AVX2, FMA and F16C. Included by simd.h.
#pragma once
#include <immintrin.h>

namespace fastlm {

struct lanes {
  __m256 m;
  friend lanes operator&(lanes a, lanes b) { return {_mm256_and_ps(a.m, b.m)}; }
  friend lanes operator|(lanes a, lanes b) { return {_mm256_or_ps(a.m, b.m)}; }
};

inline __m256i mask_of(tail t) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(t.count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct uvec {
  __m256i v;
  static uvec all(uint32_t x) { return {_mm256_set1_epi32(int(x))}; }
  static uvec iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
  friend uvec operator+(uvec a, uvec b) { return {_mm256_add_epi32(a.v, b.v)}; }
  friend uvec operator-(uvec a, uvec b) { return {_mm256_sub_epi32(a.v, b.v)}; }
  friend uvec operator^(uvec a, uvec b) { return {_mm256_xor_si256(a.v, b.v)}; }
  friend uvec operator&(uvec a, uvec b) { return {_mm256_and_si256(a.v, b.v)}; }
  friend uvec operator|(uvec a, uvec b) { return {_mm256_or_si256(a.v, b.v)}; }
  friend uvec operator<<(uvec a, int n) { return {_mm256_slli_epi32(a.v, n)}; }
  friend uvec operator>>(uvec a, int n) { return {_mm256_srli_epi32(a.v, n)}; }
  friend lanes operator>=(uvec a, uvec b) {
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a.v, b.v), a.v))};
  }
};

// The high and low halves of the 64-bit products a·b.
inline void multiply_wide(uvec a, uvec b, uvec& high, uvec& low) {
  __m256i even = _mm256_mul_epu32(a.v, b.v),
          odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
  low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

struct vec {
  static constexpr int64_t Lanes = 8;
  __m256 v;
  static vec zero() { return {_mm256_setzero_ps()}; }
  static vec all(float x) { return {_mm256_set1_ps(x)}; }
  static vec iota() { return {_mm256_cvtepi32_ps(uvec::iota().v)}; }

  static vec load(const float* p, full) { return {_mm256_loadu_ps(p)}; }
  static vec load(const float* p, tail t) { return {_mm256_maskload_ps(p, mask_of(t))}; }
  static vec load(const bf16* p, full) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static vec load(const bf16* p, tail t) { return widen(some(p, t)); }
  static vec load(const fp16* p, full) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static vec load(const fp16* p, tail t) { return {_mm256_cvtph_ps(some(p, t))}; }
  // 0 where the byte is 0, otherwise 1
  static vec load(const bool* p, full) { return truth(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static vec load(const bool* p, tail t) { return truth(some(p, t)); }

  void store(float* p, full) const { _mm256_storeu_ps(p, v); }
  void store(float* p, tail t) const { _mm256_maskstore_ps(p, mask_of(t), v); }
  void store(bf16* p, full) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow()); }
  void store(bf16* p, tail t) const { put(p, t, narrow()); }
  void store(fp16* p, full) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half()); }
  void store(fp16* p, tail t) const { put(p, t, half()); }

  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  float max_lane() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  friend vec operator+(vec a, vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend vec operator-(vec a, vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend vec operator*(vec a, vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend vec operator/(vec a, vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend lanes operator<(vec a, vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
  friend lanes operator<=(vec a, vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
  friend lanes operator==(vec a, vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }

 private:
  template <class T> static __m128i some(const T* p, tail t) {
    alignas(16) char buffer[16] = {};
    std::memcpy(buffer, p, t.count * sizeof(T));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
  }
  template <class T> static void put(T* p, tail t, __m128i h) {
    alignas(16) char buffer[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(buffer), h);
    std::memcpy(p, buffer, t.count * sizeof(T));
  }
  static vec widen(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
  static vec truth(__m128i b) {
    __m256i zero = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(b), _mm256_setzero_si256());
    return {_mm256_andnot_ps(_mm256_castsi256_ps(zero), _mm256_set1_ps(1))};
  }
  __m128i half() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  __m128i narrow() const {  // round to nearest even; NaN stays NaN
    __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
};

struct quad {
  __m256 v;
  static quad load(const float* p) { return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))}; }
  FASTLM_INLINE vec all(int64_t i) const {  // the shuffle's operand is a constant once the caller's loop is unrolled
    return {i == 0   ? _mm256_permute_ps(v, 0x00)
            : i == 1 ? _mm256_permute_ps(v, 0x55)
            : i == 2 ? _mm256_permute_ps(v, 0xaa)
                     : _mm256_permute_ps(v, 0xff)};
  }
};

FASTLM_INLINE vec fma(vec a, vec b, vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTLM_INLINE vec max(vec a, vec b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where either is NaN
FASTLM_INLINE vec min(vec a, vec b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTLM_INLINE vec sqrt(vec a) { return {_mm256_sqrt_ps(a.v)}; }
FASTLM_INLINE vec select(lanes m, vec a, vec b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
FASTLM_INLINE vec zero_where(lanes m, vec a) { return {_mm256_andnot_ps(m.m, a.v)}; }
FASTLM_INLINE uvec bits_of(vec a) { return {_mm256_castps_si256(a.v)}; }
FASTLM_INLINE vec from_bits(uvec a) { return {_mm256_castsi256_ps(a.v)}; }

FASTLM_INLINE void transpose(vec (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // r[4i + c]: columns c and c+4 of rows 4i…4i+3
    r[4 * i].v = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1].v = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2].v = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3].v = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm256_permute2f128_ps(r[c].v, r[c + 4].v, 0x20);
    t[c + 4] = _mm256_permute2f128_ps(r[c].v, r[c + 4].v, 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i].v = t[i];
}

inline constexpr bool FusesMultiplyAdd = true;

FASTLM_INLINE vec rounded(vec a) {
  asm("" : "+x"(a.v));
  return a;
}

}  // namespace fastlm
