// The register tile of all matrix products (the microkernel), and the arithmetic that it uses.
//
// A tile is MR rows × NRVecs vectors. With 32 vector registers it is 8 × 3 (24 accumulators, 3 vectors of B, 1 of A):
// 24 multiply-adds for 11 loads. With 16 registers it is 4 × 3: 12 multiply-adds for 7 loads.
#pragma once
#include "operand.h"

namespace fastlm {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int MR = 8;  // 32 vector registers
#else
inline constexpr int MR = 4;  // 16 vector registers
#endif
inline constexpr int NRVecs = 3;
// A small tile is too short to hide a cache miss at its end. Its accumulators of earlier k blocks and the lines that
// its epilogue writes are therefore prefetched at its start.
inline constexpr bool SmallTiles = MR == 4;
// Rows of A that are packed together: whole registers, one tile or two.
inline constexpr int64_t PanelRows = MR > vec::Lanes ? MR : vec::Lanes;

// An arithmetic says what one 32-bit lane of a packed panel holds, and how panels are multiplied.
struct fma_arithmetic {                  // a lane is one fp32 value
  static constexpr int64_t PerLane = 1;  // elements of k in a lane
  static constexpr int64_t KC = 192;     // lanes of k in a block: with three vectors of columns most of the L1 cache
  static constexpr int64_t MR = fastlm::MR;     // rows of the lhs that are multiplied at once
  static constexpr int64_t KStep = 1;           // the lanes of a block are a multiple of this, padded with zeros
  static constexpr bool RowMajorOnly = false;   // whether the lhs must be row-major
  static constexpr bool CheapProducts = false;  // whether a product takes little of the time of attention
  struct session {};                            // exists while a thread multiplies
  using accumulator = vec;                      // a register of sums; value() converts it to fp32 for the epilogue
  static FASTLM_INLINE accumulator multiply_add(accumulator sum, vec a, vec b) { return fma(a, b, sum); }
  static FASTLM_INLINE vec value(accumulator sum) { return sum; }
  // Lanes along the rows (or columns) i: of one k, or of a pair of k that lie at p and next.
  template <class T, class Span> static FASTLM_INLINE vec along_i(const T* p, const T*, Span span) {
    return storage<T>::load(p, span);
  }
  // Lanes along k. `count` elements exist; the rest is zero.
  template <class T> static FASTLM_INLINE vec along_k(const T* p, int64_t count) {
    return count >= vec::Lanes ? storage<T>::load(p, full{})
           : count > 0         ? storage<T>::load(p, tail{size_t(count)})
                               : vec::zero();
  }
  // The sum of a lane's elements.
  static FASTLM_INLINE vec lane_sum(vec lanes) { return lanes; }
};

#if defined(__AVX512BF16__)
struct dot_arithmetic {  // a lane is two bf16 values, consecutive in k
  static constexpr int64_t PerLane = 2, KC = 192, MR = fastlm::MR, KStep = 1;
  static constexpr bool RowMajorOnly = false, CheapProducts = false;
  struct session {};
  using accumulator = vec;
  static FASTLM_INLINE accumulator multiply_add(accumulator sum, vec a, vec b) { return dot_bf16(sum, a, b); }
  static FASTLM_INLINE vec value(accumulator sum) { return sum; }
  template <class T, class Span> static FASTLM_INLINE vec along_i(const T* p, const T* next, Span span) {
    return next ? interleave_pairs(p, next, span) : interleave_pairs(p, nullptr, span);
  }
  template <class T> static FASTLM_INLINE vec along_k(const T* p, int64_t count) {
    return count > 0 ? load_pairs(p, count) : vec::zero();
  }
  static FASTLM_INLINE vec pair(vec value, vec next) { return make_pairs(value, next); }
  static FASTLM_INLINE vec lane_sum(vec lanes) {
    return from_bits(bits_of(lanes) << 16) + from_bits(bits_of(lanes) & uvec::all(0xffff0000u));
  }
};
#endif

#if defined(__AMX_BF16__)
}  // namespace fastlm
#include "tiles_amx.h"
namespace fastlm {
template <class T, class W = T>
using arithmetic_for =
    std::conditional_t<std::is_same_v<T, bf16> && std::is_same_v<W, bf16>, amx_arithmetic, fma_arithmetic>;
#elif defined(__AVX512BF16__)
template <class T, class W = T>
using arithmetic_for =
    std::conditional_t<std::is_same_v<T, bf16> && std::is_same_v<W, bf16>, dot_arithmetic, fma_arithmetic>;
#else
template <class T, class W = T> using arithmetic_for = fma_arithmetic;
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of lanes that k elements take.
template <class Arithmetic> inline int64_t packed_depth(int64_t k) {
  return ceil_div(k, Arithmetic::PerLane * Arithmetic::KStep) * Arithmetic::KStep;
}

// The longest chain of additions in one register. It bounds the rounding error: every chain starts from zero, and
// chains are then added to each other. Without a fused multiply-add every step rounds twice, so chains are shorter.
inline constexpr int64_t Chain = FusesMultiplyAdd ? 192 : 8;

// sum = a·b, one chain of `depth` multiply-adds each. a is packed k-major, with a_stride between consecutive k, or with
// RowMajor consists of rows a_stride apart.
template <class Arithmetic, bool RowMajor, int Vecs>
FASTLM_INLINE void sum_chain(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                             typename Arithmetic::accumulator (&sum)[MR][Vecs]) {
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < Vecs; ++v) sum[r][v] = Arithmetic::accumulator::zero();
  for (int64_t d = depth; d > 0; --d) {
    vec bv[Vecs];
#pragma GCC unroll 3
    for (int v = 0; v < Vecs; ++v) bv[v] = vec::load(b + v * vec::Lanes, full{});
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      vec av = vec::all(RowMajor ? a[r * a_stride] : a[r]);
#pragma GCC unroll 3
      for (int v = 0; v < Vecs; ++v) sum[r][v] = Arithmetic::multiply_add(sum[r][v], av, bv[v]);
    }
    a += RowMajor ? 1 : a_stride;
    b += b_stride;
  }
}

// c (MR × Vecs·Lanes, rows c_stride apart) = a·b, or += where `accumulate`. Where b and c are as wide as the tile,
// Stride is an integral constant, so that the addresses of c are not computed from a variable.
template <class Arithmetic, int Vecs, bool RowMajor, class Stride>
void multiply_tile(int64_t depth, const float* a, int64_t a_stride, const float* b, Stride b_stride, float* c,
                   Stride c_stride, bool accumulate, int64_t chain) {
  constexpr int64_t L = vec::Lanes;
  using accumulator = typename Arithmetic::accumulator;
  if constexpr (!FusesMultiplyAdd) {  // the short chains of a block are summed before they are added to c
    if (accumulate && depth > chain) {
      alignas(64) float block[MR * Vecs * L];
      multiply_tile<Arithmetic, Vecs, RowMajor, int64_t>(depth, a, a_stride, b, b_stride, block, Vecs * L, false,
                                                         chain);
      for (int64_t r = 0; r < MR; ++r)
        sweep(Vecs * L, [=, &block](int64_t j, auto) {
          (accumulator::load(c + r * c_stride + j, full{}) + accumulator::load(block + r * Vecs * L + j, full{}))
              .store(c + r * c_stride + j, full{});
        });
      return;
    }
  }
  if (SmallTiles && accumulate && c_stride == Vecs * L)
    for (int i = 0; i < MR * Vecs * L; i += 16) __builtin_prefetch(c + i, 1, 3);
  for (int64_t first = 0; first < depth; first += chain) {
    accumulator sum[MR][Vecs];
    sum_chain<Arithmetic, RowMajor>(std::min(chain, depth - first), a + first * (RowMajor ? 1 : a_stride), a_stride,
                                    b + first * b_stride, b_stride, sum);
    const bool add = accumulate || first > 0;
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < Vecs; ++v) {
        float* at = c + r * c_stride + v * L;
        (add ? accumulator::load(at, full{}) + sum[r][v] : sum[r][v]).store(at, full{});
      }
  }
}

// body(vecs as a std::integral_constant).
template <class Body> FASTLM_INLINE void with_vecs(int64_t vecs, Body body) {
  if (vecs == NRVecs) body(std::integral_constant<int, NRVecs>{});
  else if (vecs == 2) body(std::integral_constant<int, 2>{});
  else body(std::integral_constant<int, 1>{});
}

template <class Arithmetic, bool RowMajor = false>
FASTLM_INLINE void multiply_tile(int64_t vecs, int64_t depth, const float* a, int64_t a_stride, const float* b,
                                 int64_t b_stride, float* c, int64_t c_stride, bool accumulate, int64_t chain = Chain) {
#if defined(__AMX_BF16__)
  if constexpr (Arithmetic::RowMajorOnly) {
    static_assert(RowMajor);
    with_vecs(vecs,
              [=](auto count) { amx_multiply_tile<count>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate); });
  } else
#endif
    with_vecs(vecs, [=](auto count) {
      constexpr std::integral_constant<int64_t, count * vec::Lanes> width;
      if (b_stride == width && c_stride == width)
        multiply_tile<Arithmetic, count, RowMajor>(depth, a, a_stride, b, width, c, width, accumulate, chain);
      else multiply_tile<Arithmetic, count, RowMajor>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate, chain);
    });
}

// Σ_d a[d]·b[d] in every lane, for vectors `stride` apart, summed in the order of multiply_tile.
template <class Arithmetic> FASTLM_INLINE vec column_products(int64_t depth, const float* a, const float* b,
                                                              int64_t stride, int64_t chain) {
#if defined(__AMX_BF16__)
  if constexpr (Arithmetic::RowMajorOnly) return amx_column_products(depth, a, b, stride);
#endif
  vec sum = vec::zero();
  for (int64_t first = 0; first < depth; first += chain) {
    vec part = vec::zero();
    for (int64_t d = first; d < std::min(depth, first + chain); ++d)
      part = Arithmetic::multiply_add(part, vec::load(a + d * stride, full{}), vec::load(b + d * stride, full{}));
    sum = sum + part;
  }
  return sum;
}

}  // namespace fastlm
