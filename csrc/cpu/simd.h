// The vector types. This file and the simd_*.h beside it are the only ones with knowledge of instruction sets. A kernel
// is written once over `vec`, a register of Lanes fp32 values. Everything is compiled once per ISA module (see
// setup.py), so `vec` is as wide as the module's instruction set allows.
//
// Each simd_*.h provides:
//   vec     fp32 lanes: zero, all, iota, load, store (fp32, bf16 and fp16 in memory), arithmetic, sqrt, sum, max_lane
//   uvec    the same number of 32-bit unsigned integers
//   lanes   one truth value per lane: comparisons, &, |, select
//   quad    four consecutive fp32 values: load, all(i) for the vec of one of them. A register that is shuffled with 8
//           lanes, otherwise their address
//   transpose(vec[Lanes])
//   FusesMultiplyAdd: whether fma rounds once
//   rounded(vec): the same value, which the compiler does not fuse with an addition that follows; no instruction
//   with the bf16 dot product: dot_bf16, load_pairs, make_pairs, interleave_pairs (two bf16 in a 32-bit lane)
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define FASTLM_INLINE inline __attribute__((always_inline))

namespace fastlm {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

struct full {};  // a whole register
struct tail {
  size_t count;
};  // the first `count` elements, 1…Lanes−1; the rest is loaded as zero and not stored

}  // namespace fastlm

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace fastlm {

// Calls body(i, span) for each vector of n elements: full vectors, then one masked tail. No kernel has a
// scalar tail loop.
template <class Body> FASTLM_INLINE void sweep(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + vec::Lanes <= n; i += vec::Lanes) body(i, full{});
  if (i < n) body(i, tail{size_t(n - i)});
}

// The vector itself, or with zero in the lanes beyond the tail.
FASTLM_INLINE vec inside(full, vec v) { return v; }
FASTLM_INLINE vec inside(tail span, vec v) { return select(vec::iota() < vec::all(float(span.count)), v, vec::zero()); }

// The sum of term(i, span) over n elements, with four accumulators to hide the latency of the additions.
template <class Term> FASTLM_INLINE float sum_over(int64_t n, Term term) {
  vec a = vec::zero(), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * vec::Lanes <= n; i += 4 * vec::Lanes) {
    a = a + term(i, full{});
    b = b + term(i + vec::Lanes, full{});
    c = c + term(i + 2 * vec::Lanes, full{});
    d = d + term(i + 3 * vec::Lanes, full{});
  }
  for (; i + vec::Lanes <= n; i += vec::Lanes) a = a + term(i, full{});
  if (i < n) b = b + term(i, tail{size_t(n - i)});
  return ((a + b) + (c + d)).sum();
}

}  // namespace fastlm
