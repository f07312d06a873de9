// C = A·B for small m, with the rows of A in the lanes of vectors. B is contiguous in k.
//
// A is packed with its rows in the lanes, and elements of B are broadcast, from where they are or, where they must be
// widened, from a line of each column on the stack. The n·m sums are then transposed, not the n·k elements of B.
#pragma once
#include "gemm.h"

namespace fastlm {

// Transposing B in registers costs as much as packing it from here on.
inline constexpr int64_t MaxTransposedRows = 24;
// Columns that are multiplied before their results are written, with rows in the lanes or B transposed: the epilogue
// then writes whole cache lines.
inline constexpr int64_t LaneColumns = 48;

// Whether the lanes that the arithmetic multiplies are B's memory as it is.
template <class Arithmetic, class T> inline constexpr bool LanesAreMemory =
    storage<T>::Bits * Arithmetic::PerLane == 32;

// Whether the roles are swapped: up to NRVecs vectors of rows, whose lanes are used well where a square of B would be
// transposed otherwise. The bounds are measured: with 8 lanes transposing takes more of the time, and lanes that are
// widened on the way are written and read once more. Lanes that are B's memory must be whole and aligned.
template <class Arithmetic, class T> bool rows_in_lanes(int64_t m, int64_t k, operand<T> b) {
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  constexpr bool Direct = LanesAreMemory<Arithmetic, T>;
  if constexpr (!FusesMultiplyAdd) return false;
  const int64_t vecs = ceil_div(m, L), most_vecs = L > 8 && !Direct ? 2 : NRVecs;
  const int64_t least_eighths = L == 8 ? (vecs == 1 ? 1 : 6) : Direct ? 6 : 7;
  if (b.stride == 1 || vecs > most_vecs) return false;
  if (Direct && (b.stride % Per != 0 || k % Per != 0 || reinterpret_cast<uintptr_t>(b.data) % 4 != 0)) return false;
  return m > MaxTransposedRows || 8 * m >= least_eighths * vecs * L;
}

// With 8 lanes and one vector of rows each multiply-add needs an element of its own, and the loads, not the
// multiply-adds, are the limit. The elements of some columns are therefore loaded as quads.
template <int Vecs> inline constexpr int QuadColumns = vec::Lanes == 8 && Vecs == 1 ? 3 : 0;

// sums (Columns × Vecs·Lanes) = b·rows, or += where `accumulate`, in one chain of `depth` multiply-adds over the k
// elements of b's columns: rows[d] holds the lanes d of all rows. Lanes that are not b's memory are written to the
// stack, the next Line of each column while one is multiplied. The same part of `ahead` is prefetched.
template <class Arithmetic, int Columns, int Vecs, class T>
FASTLM_INLINE void multiply_columns(int64_t depth, int64_t k, operand<T> b, operand<T> ahead, const float* rows,
                                    float* sums, bool accumulate) {
  using accumulator = typename Arithmetic::accumulator;
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane, Line = 16;
  static_assert(Columns <= Line);
  accumulator sum[Columns][Vecs];
#pragma GCC unroll 16
  for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 3
    for (int v = 0; v < Vecs; ++v) sum[c][v] = accumulator::zero();
  auto multiply = [&](int64_t d, auto element) __attribute__((always_inline)) {
    vec at[Vecs];
#pragma GCC unroll 3
    for (int v = 0; v < Vecs; ++v) at[v] = vec::load(rows + (d * Vecs + v) * L, full{});
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) {
      const vec value = element(c);
#pragma GCC unroll 3
      for (int v = 0; v < Vecs; ++v) sum[c][v] = Arithmetic::multiply_add(sum[c][v], at[v], value);
    }
  };
  auto multiply_four = [&](int64_t d, const float* lanes, int64_t stride) __attribute__((always_inline)) {
    constexpr int Quads = std::min(Columns, QuadColumns<Vecs>);
    quad quads[Quads + 1];
#pragma GCC unroll 4
    for (int c = 0; c < Quads; ++c) quads[c] = quad::load(lanes + c * stride + d);
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i)
      multiply(d + i, [&](int c) __attribute__((always_inline)) {
        return c < Quads ? quads[c].all(i) : vec::all(lanes[c * stride + d + i]);
      });
  };
  auto multiply_some = [&](int64_t count, const float* lanes, int64_t stride) {
    for (int64_t d = 0; d < count; ++d) multiply(d, [&](int c) { return vec::all(lanes[c * stride + d]); });
  };
  auto advance = [&]() __attribute__((always_inline)) {
    depth -= Line, k -= Line * Per, rows += Line * Vecs * L;
    b = b.from(0, Line * Per), ahead = ahead.from(0, Line * Per);
  };
  if constexpr (LanesAreMemory<Arithmetic, T>) {
    const int64_t stride = b.stride / Per;
    auto lanes = [&] { return reinterpret_cast<const float*>(b.data); };
    for (; depth >= Line; advance()) {
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) __builtin_prefetch(ahead.at(c, 0));
#pragma GCC unroll 1
      for (int64_t d = 0; d < Line; d += 4) multiply_four(d, lanes(), stride);
    }
    multiply_some(depth, lanes(), stride);
  } else {
    alignas(64) float written[2][Columns * Line];
    float *lanes = written[0], *next = written[1];
    auto write = [&](int c, operand<T> from, int64_t left, float* to) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int64_t d = 0; d < Line; d += L)
        Arithmetic::along_k(from.at(c, d * Per), left - d * Per).store(to + c * Line + d, full{});
    };
    for (int c = 0; c < Columns; ++c) write(c, b, k, lanes);
    for (; depth >= 2 * Line; advance()) {
#pragma GCC unroll 16
      for (int d = 0; d < Line; ++d) {
        if (d < Columns) {
          __builtin_prefetch(ahead.at(d, 0));
          write(d, b.from(0, Line * Per), Line * Per, next);
        }
        if (d % 4 == 3) multiply_four(d - 3, lanes, Line);
      }
      std::swap(lanes, next);
    }
    multiply_some(std::min(depth, Line), lanes, Line);
    if (depth > Line) {
      advance();
      for (int c = 0; c < Columns; ++c) write(c, b, k, next);
      multiply_some(depth, next, Line);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 3
    for (int v = 0; v < Vecs; ++v) {
      float* at = sums + (c * Vecs + v) * L;
      (accumulate ? accumulator::load(at, full{}) + sum[c][v] : sum[c][v]).store(at, full{});
    }
}

// The k blocks of a product, of nearly equal depth.
template <class Arithmetic> struct small_m_depth {
  int64_t lanes, blocks;
  explicit small_m_depth(int64_t k)
      : lanes(packed_depth<Arithmetic>(k)), blocks(std::max<int64_t>(1, ceil_div(lanes, Arithmetic::KC))) {}
  int64_t begin(int64_t block) const { return lanes * block / blocks; }
};

// totals[j·m + r·Lanes + …] = Σ_k A[r, k]·B[k, j + …] for at most LaneColumns columns of B, of rows_in_lanes. packed_a:
// lane of k by lane of k, that of all rows.
template <class Arithmetic, class T> __attribute__((noinline)) void sums_in_lanes(int64_t m, int64_t columns, int64_t k,
                                                                                  const float* packed_a, operand<T> b,
                                                                                  float* totals) {
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  static_assert(Chain >= Arithmetic::KC || !FusesMultiplyAdd);
  const small_m_depth<Arithmetic> depth(k);
  with_vecs(ceil_div(m, L), [&](auto vecs) {
    constexpr int64_t Width = vecs * L;
    // As many as there are registers for, and to hide latencies.
    constexpr int Columns = vecs == 1 ? 8 * Per : vecs == 2 && MR == 4 ? 6 : MR;
    alignas(64) float sums[LaneColumns * Width];
    int64_t column = 0;
    auto multiply = [&]<int Count>(std::integral_constant<int, Count>) {
      for (; column + Count <= columns; column += Count)
        for (int64_t block = 0; block < depth.blocks; ++block) {
          const int64_t from = depth.begin(block), lanes = depth.begin(block + 1) - from;
          const operand<T> at = b.from(column, from * Per),
                           ahead = block + 1 < depth.blocks ? at.from(0, lanes * Per) : b.from(column + Count, 0);
          multiply_columns<Arithmetic, Count, vecs>(lanes, k - from * Per, at, ahead, packed_a + from * Width,
                                                    sums + column * Width, block > 0);
        }
    };
    multiply(std::integral_constant<int, Columns>{});
    multiply(std::integral_constant<int, Columns / 2>{});
    multiply(std::integral_constant<int, 1>{});
    for (int64_t j = 0; j < columns; j += L)
      for (int64_t first = 0; first < m; first += L) {
        vec square[L];
#pragma GCC unroll 16
        for (int64_t c = 0; c < L; ++c)
          square[c] = j + c < columns ? vec::load(sums + (j + c) * Width + first, full{}) : vec::zero();
        transpose(square);
        for (int64_t r = 0; r < std::min(L, m - first); ++r) square[r].store(totals + j * m + (first + r) * L, full{});
      }
  });
}

}  // namespace fastlm
