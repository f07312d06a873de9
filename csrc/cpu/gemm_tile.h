// The register tile under every product, and the arithmetic that it is made of.
//
// The tile of 8 × 3 vectors (AVX-512: 24 sums, 3 of B, 1 of A) does 24 multiply-adds for 11 loads; with 16 registers it
// is 4 × 3, 12 for 7.
#pragma once
#include "operand.h"

namespace fastlm {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int TileRows = 8;  // 32 vector registers
#else
inline constexpr int TileRows = 4;  // 16
#endif
inline constexpr int TileVecs = 3;
// Tiles that are done within a thousand cycles wait at their end for what is not in L1: the sums of earlier blocks and
// the lines that the epilogue writes are asked for at their beginning. (With 32 registers, where a tile takes twice as
// long, fetching those lines made most products slower: docs/cpu.md.)
inline constexpr bool SmallTiles = TileRows == 4;
inline constexpr int64_t PanelRows =
    TileRows > vec::Lanes ? TileRows : vec::Lanes;  // rows of A packed together: whole registers, one tile or two

// What one 32-bit lane of a packed panel holds, and how two panels are multiplied.
struct by_fma {  // one fp32 value
  static constexpr int64_t PerLane = 1;
  static constexpr int64_t BlockDepth =
      192;  // lanes of k per packed block: with three vectors of columns most of the L1 cache
  static constexpr int64_t
      Rows = TileRows,
      DepthStep = 1;  // of the first operand, multiplied at once; lanes of k come in steps, zeros at their end
  static constexpr bool RowsOnly = false;  // whether the first operand may not be k-major
  static constexpr bool Cheap = false;     // whether products cost little beside what is done around them
  struct session {};                       // lives while a thread multiplies
  using accumulator = vec;                 // a register of sums; value() makes it fp32 for the epilogue
  static FASTLM_INLINE accumulator multiply_add(accumulator sum, vec a, vec b) { return fma(a, b, sum); }
  static FASTLM_INLINE vec value(accumulator sum) { return sum; }
  template <class T, class Span> static FASTLM_INLINE vec along_i(const T* p, const T*, Span span) {
    return storage<T>::load(p, span);
  }
  template <class T> static FASTLM_INLINE vec along_k(const T* p, int64_t count) {
    return count >= vec::Lanes ? storage<T>::load(p, full{})
           : count > 0         ? storage<T>::load(p, tail{size_t(count)})
                               : vec::zero();
  }
  static FASTLM_INLINE vec total(vec lane) { return lane; }
};

#if defined(__AVX512BF16__)
struct by_dot {  // two bf16 values, consecutive in k
  static constexpr int64_t PerLane = 2, BlockDepth = 192, Rows = TileRows, DepthStep = 1;
  static constexpr bool RowsOnly = false, Cheap = false;
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
  static FASTLM_INLINE vec join(vec value, vec next) { return make_pairs(value, next); }
  static FASTLM_INLINE vec total(vec lane) {
    return from_bits(bits_of(lane) << 16) + from_bits(bits_of(lane) & uvec::all(0xffff0000u));
  }
};
#endif

#if defined(__AMX_BF16__)
}  // namespace fastlm
#include "tiles_amx.h"
namespace fastlm {
template <class T, class W = T>
using arithmetic_for = std::conditional_t<std::is_same_v<T, bf16> && std::is_same_v<W, bf16>, by_tiles, by_fma>;
#elif defined(__AVX512BF16__)
template <class T, class W = T>
using arithmetic_for = std::conditional_t<std::is_same_v<T, bf16> && std::is_same_v<W, bf16>, by_dot, by_fma>;
#else
template <class T, class W = T> using arithmetic_for = by_fma;
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lanes that k values take.
template <class Arithmetic> inline int64_t packed_depth(int64_t k) {
  return ceil_div(k, Arithmetic::PerLane * Arithmetic::DepthStep) * Arithmetic::DepthStep;
}

// The longest chain of additions in one register, which is what bounds the rounding error: chains are summed from zero.
// Without a fused multiply-add every step rounds twice, and a chain as long as elsewhere would lose what the others
// keep.
inline constexpr int64_t Chain = FusesMultiplyAdd ? 192 : 8;

// sum = a·b, one chain of `depth` multiply-adds each. a is packed (k-major, a_stride between successive k) or, with
// RowMajor, lies as rows a_stride apart.
template <class Arithmetic, bool RowMajor, int Vecs>
FASTLM_INLINE void sum_chain(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                             typename Arithmetic::accumulator (&sum)[TileRows][Vecs]) {
#pragma GCC unroll 8
  for (int r = 0; r < TileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < Vecs; ++v) sum[r][v] = Arithmetic::accumulator::zero();
  for (int64_t d = depth; d > 0; --d) {
    vec bv[Vecs];
#pragma GCC unroll 3
    for (int v = 0; v < Vecs; ++v) bv[v] = vec::load(b + v * vec::Lanes, full{});
#pragma GCC unroll 8
    for (int r = 0; r < TileRows; ++r) {
      vec av = vec::all(RowMajor ? a[r * a_stride] : a[r]);
#pragma GCC unroll 3
      for (int v = 0; v < Vecs; ++v) sum[r][v] = Arithmetic::multiply_add(sum[r][v], av, bv[v]);
    }
    a += RowMajor ? 1 : a_stride;
    b += b_stride;
  }
}

// c (TileRows × Vecs·Lanes, rows c_stride apart) = a·b, or += where `accumulate`. Where b and c are just as wide as the
// tile the strides are constants, `Stride` a type: c's 24 addresses, made anew from a variable at the end of every
// tile, took 2–3 % of a product.
template <class Arithmetic, int Vecs, bool RowMajor, class Stride>
void multiply_tile(int64_t depth, const float* a, int64_t a_stride, const float* b, Stride b_stride, float* c,
                   Stride c_stride, bool accumulate, int64_t chain) {
  constexpr int64_t L = vec::Lanes;
  using accumulator = typename Arithmetic::accumulator;
  if constexpr (!FusesMultiplyAdd) {  // the many short chains of a block are added to each other before they are to
                                      // what was there
    if (accumulate && depth > chain) {
      alignas(64) float block[TileRows * Vecs * L];
      multiply_tile<Arithmetic, Vecs, RowMajor, int64_t>(depth, a, a_stride, b, b_stride, block, Vecs * L, false,
                                                         chain);
      for (int64_t r = 0; r < TileRows; ++r)
        sweep(Vecs * L, [=, &block](int64_t j, auto) {
          (accumulator::load(c + r * c_stride + j, full{}) + accumulator::load(block + r * Vecs * L + j, full{}))
              .store(c + r * c_stride + j, full{});
        });
      return;
    }
  }
  if (SmallTiles && accumulate && c_stride == Vecs * L)
    for (int i = 0; i < TileRows * Vecs * L; i += 16) __builtin_prefetch(c + i, 1, 3);
  for (int64_t first = 0; first < depth; first += chain) {
    accumulator sum[TileRows][Vecs];
    sum_chain<Arithmetic, RowMajor>(std::min(chain, depth - first), a + first * (RowMajor ? 1 : a_stride), a_stride,
                                    b + first * b_stride, b_stride, sum);
    const bool add = accumulate || first > 0;
#pragma GCC unroll 8
    for (int r = 0; r < TileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < Vecs; ++v) {
        float* at = c + r * c_stride + v * L;
        (add ? accumulator::load(at, full{}) + sum[r][v] : sum[r][v]).store(at, full{});
      }
  }
}

// body(std::integral_constant of the number of vectors that a tile is wide).
template <class Body> FASTLM_INLINE void with_vecs(int64_t vecs, Body body) {
  if (vecs == TileVecs) body(std::integral_constant<int, TileVecs>{});
  else if (vecs == 2) body(std::integral_constant<int, 2>{});
  else body(std::integral_constant<int, 1>{});
}

template <class Arithmetic, bool RowMajor = false>
FASTLM_INLINE void multiply_tile(int64_t vecs, int64_t depth, const float* a, int64_t a_stride, const float* b,
                                 int64_t b_stride, float* c, int64_t c_stride, bool accumulate, int64_t chain = Chain) {
#if defined(__AMX_BF16__)
  if constexpr (Arithmetic::RowsOnly) {
    static_assert(RowMajor);
    with_vecs(vecs,
              [=](auto count) { multiply_tiles<count>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate); });
  } else
#endif
    with_vecs(vecs, [=](auto count) {
      constexpr std::integral_constant<int64_t, count * vec::Lanes> width;
      if (b_stride == width && c_stride == width)
        multiply_tile<Arithmetic, count, RowMajor>(depth, a, a_stride, b, width, c, width, accumulate, chain);
      else multiply_tile<Arithmetic, count, RowMajor>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate, chain);
    });
}

// Σ_d a[d]·b[d] in every lane, d counting vectors `stride` apart: the sums of multiply_tile, in its order.
template <class Arithmetic> FASTLM_INLINE vec column_products(int64_t depth, const float* a, const float* b,
                                                              int64_t stride, int64_t chain) {
#if defined(__AMX_BF16__)
  if constexpr (Arithmetic::RowsOnly) return tile_column_products(depth, a, b, stride);
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
