// C = A·B for small m, with the rows of A in the lanes of vectors. B is contiguous in k.
//
// A is packed with its rows in the lanes, and elements of B are broadcast, from where they are or, where they must be
// widened, from a block of some columns on the stack. More rows than registers have sums for are multiplied in groups
// by the same block, which stays in L1. The n·m sums are then transposed, not the n·k elements of B.
#pragma once
#include <numeric>
#include "gemm.h"

namespace fastlm {

// Transposing B in registers costs as much as packing it from here on.
inline constexpr int64_t MaxTransposedRows = 24;
// Vectors of rows. With 8 lanes, three groups of them still take less time than packing B.
inline constexpr int64_t MaxLaneVecs = vec::Lanes == 8 ? 3 * NRVecs : NRVecs;
// Columns that are multiplied before their results are written, with rows in the lanes or B transposed: the epilogue
// then writes whole cache lines.
inline constexpr int64_t LaneColumns = 48;
// Lanes of k of a column that are prefetched, or widened, at a time.
inline constexpr int64_t Line = 16;
// Bytes of the next columns that are prefetched while some are multiplied.
inline constexpr int64_t MaxBytesAhead = 48 << 10;

// Whether the lanes that the arithmetic multiplies are B's memory as it is.
template <class Arithmetic, class T> inline constexpr bool LanesAreMemory =
    storage<T>::Bits * Arithmetic::PerLane == 32;

// Whether the roles are swapped: up to MaxLaneVecs vectors of rows, whose lanes are used well where a square of B would
// be transposed otherwise. The bounds are measured: with 8 lanes transposing takes more of the time, and lanes that are
// widened on the way are written and read once more. Lanes that are B's memory must be whole and aligned.
template <class Arithmetic, class T> bool rows_in_lanes(int64_t m, int64_t k, operand<T> b) {
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  constexpr bool Direct = LanesAreMemory<Arithmetic, T>;
  if constexpr (!FusesMultiplyAdd) return false;
  const int64_t vecs = ceil_div(m, L), most_vecs = L > 8 && !Direct ? 2 : MaxLaneVecs;
  const int64_t least_eighths = L == 8 ? (vecs == 1 ? 1 : 6) : Direct ? 6 : 7;
  if (b.stride == 1 || vecs > most_vecs) return false;
  if (Direct && (b.stride % Per != 0 || k % Per != 0 || reinterpret_cast<uintptr_t>(b.data) % 4 != 0)) return false;
  return m > MaxTransposedRows || 8 * m >= least_eighths * vecs * L;
}

// With 8 lanes and one vector of rows each multiply-add needs an element of its own, and the loads, not the
// multiply-adds, are the limit. The elements of some columns are therefore loaded as quads.
template <int Vecs> inline constexpr int QuadColumns = vec::Lanes == 8 && Vecs == 1 ? 3 : 0;

// Some columns of B in a block of k.
template <class T> struct lane_columns {
  operand<T> b;
  int64_t lanes, k;  // of k: lanes of the block, elements up to the end of B
  float* widened;    // the lanes of column c at c·KC, where they are not B's memory
  // What is prefetched: the next elements of a sequence, or the same part of columns like b's.
  bool sequence;
  const T* ahead;
};

// sums (Columns × Vecs·Lanes) = b·rows, or += where `accumulate`, in one chain of multiply-adds over the lanes of k:
// rows[d] holds the lanes d of all rows. With Widen, each Line of the columns is widened while the one before is
// multiplied; without, the lanes are B's memory or were widened for a group of rows before.
template <class Arithmetic, int Columns, int Vecs, bool Widen, class T>
FASTLM_INLINE void multiply_columns(const lane_columns<T>& of, const float* rows, float* sums, bool accumulate) {
  using accumulator = typename Arithmetic::accumulator;
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  constexpr bool Direct = LanesAreMemory<Arithmetic, T>;
  static_assert(Columns <= Line && !(Widen && Direct));
  int64_t depth = of.lanes, k = of.k;
  operand<T> b = of.b, ahead{of.ahead, of.sequence ? Line * Per : b.stride, 1};
  const int64_t stride = Direct ? b.stride / Per : Arithmetic::KC,
                step = of.sequence ? Columns * Line * Per : Line * Per;
  std::conditional_t<Widen, float*, const float*> lanes;
  if constexpr (Direct) lanes = reinterpret_cast<const float*>(b.data);
  else lanes = of.widened;
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
  auto multiply_four = [&](int64_t d) __attribute__((always_inline)) {
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
  auto advance = [&]() __attribute__((always_inline)) {
    depth -= Line, k -= Line * Per, lanes += Line, rows += Line * Vecs * L;
    b = b.from(0, Line * Per), ahead = ahead.from(0, step);
  };
  if constexpr (Widen) {
    auto widen = [&](int c, int64_t line, int64_t room) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int64_t d = line; d < line + Line; d += L)
        Arithmetic::along_k(b.at(c, d * Per), room - d * Per).store(lanes + c * stride + d, full{});
    };
    for (int c = 0; c < Columns; ++c) widen(c, 0, k);
    for (; depth >= 2 * Line; advance())
#pragma GCC unroll 16
      for (int d = 0; d < Line; ++d) {
        if (d < Columns) {
          __builtin_prefetch(ahead.at(d, 0));
          widen(d, Line, 2 * Line * Per);
        }
        if (d % 4 == 3) multiply_four(d - 3);
      }
    if (depth > Line)
      for (int c = 0; c < Columns; ++c) widen(c, Line, k);
  } else {
    for (; depth >= Line; advance()) {
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) __builtin_prefetch(ahead.at(c, 0));
#pragma GCC unroll 1
      for (int64_t d = 0; d < Line; d += 4) multiply_four(d);
    }
  }
  for (int64_t d = 0; d < depth; ++d) multiply(d, [&](int c) { return vec::all(lanes[c * stride + d]); });
#pragma GCC unroll 16
  for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 3
    for (int v = 0; v < Vecs; ++v) {
      float* at = sums + (c * Vecs + v) * L;
      (accumulate ? accumulator::load(at, full{}) + sum[c][v] : sum[c][v]).store(at, full{});
    }
}

// The columns that are multiplied at a time: as many as there are registers for, and to hide latencies.
template <class Arithmetic> constexpr int columns_at_a_time(int64_t vecs) {
  return vecs == 1 ? 8 * Arithmetic::PerLane : vecs == 2 && MR == 4 ? 6 : MR;
}

// The same for any number of columns. Not inlined, so that the loops keep what they read in registers.
template <class Arithmetic, int Vecs, bool Widen, class T>
__attribute__((noinline)) void multiply_columns(int64_t columns, const lane_columns<T>& of, const float* rows,
                                                float* sums, bool accumulate) {
  constexpr int Most = columns_at_a_time<Arithmetic>(Vecs);
  const int64_t ahead_step = of.sequence ? of.lanes * Arithmetic::PerLane : of.b.stride;
  int64_t c = 0;
  auto multiply = [&]<int Count>(std::integral_constant<int, Count>) __attribute__((always_inline)) {
    for (; c + Count <= columns; c += Count)
      multiply_columns<Arithmetic, Count, Vecs, Widen>(
          lane_columns<T>{of.b.from(c, 0), of.lanes, of.k, of.widened + c * Arithmetic::KC, of.sequence,
                          storage<T>::at(of.ahead, c * ahead_step)},
          rows, sums + c * Vecs * vec::Lanes, accumulate);
  };
  multiply(std::integral_constant<int, Most>{});
  multiply(std::integral_constant<int, Most / 2>{});
  multiply(std::integral_constant<int, 1>{});
}

// The k blocks of a product, of nearly equal depth.
template <class Arithmetic> struct small_m_depth {
  int64_t lanes, blocks;
  explicit small_m_depth(int64_t k)
      : lanes(packed_depth<Arithmetic>(k)), blocks(std::max<int64_t>(1, ceil_div(lanes, Arithmetic::KC))) {}
  int64_t begin(int64_t block) const { return lanes * block / blocks; }
};

// Rows, in groups of at most NRVecs vectors and of nearly equal size.
struct row_groups {
  int64_t count, first_vec[MaxLaneVecs / NRVecs + 1] = {};
  explicit row_groups(int64_t m) {
    const int64_t vecs = ceil_div(m, vec::Lanes);
    count = ceil_div(vecs, NRVecs);
    for (int64_t group = 0; group <= count; ++group) first_vec[group] = vecs * group / count;
  }
  int64_t vecs(int64_t group) const { return first_vec[group + 1] - first_vec[group]; }
};

// A with its rows in the lanes: group by group, lane of k by lane of k.
template <class Arithmetic, class T> void pack_rows_in_lanes(operand<T> a, int64_t m, int64_t k, float* packed) {
  constexpr int64_t L = vec::Lanes;
  const row_groups groups(m);
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t first = groups.first_vec[group] * L, width = groups.vecs(group) * L;
    pack<Arithmetic>(a.from(first, 0), std::min(width, m - first), k, width,
                     packed + first * packed_depth<Arithmetic>(k));
  }
}

// totals[j·m + r·Lanes + …] = Σ_k A[r, k]·B[k, j + …] for at most LaneColumns columns of B, of rows_in_lanes. packed_a:
// of pack_rows_in_lanes.
template <class Arithmetic, class T> __attribute__((noinline)) void sums_in_lanes(int64_t m, int64_t columns, int64_t k,
                                                                                  const float* packed_a, operand<T> b,
                                                                                  float* totals) {
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane, KC = Arithmetic::KC;
  constexpr bool Direct = LanesAreMemory<Arithmetic, T>;
  static_assert(Chain >= KC || !FusesMultiplyAdd);
  // Of several groups each has two or three vectors of rows.
  constexpr int64_t GroupColumns = std::lcm(columns_at_a_time<Arithmetic>(2), columns_at_a_time<Arithmetic>(3)),
                    MaxColumns = std::max<int64_t>(GroupColumns, columns_at_a_time<Arithmetic>(1));
  const small_m_depth<Arithmetic> depth(k);
  const row_groups groups(m);
  alignas(64) float sums[LaneColumns * MaxLaneVecs * L], widened[Direct ? 1 : MaxColumns * KC];
  // The next columns are prefetched as one sequence, if they are one: hardware prefetchers follow it as well. Of long
  // columns the next block is.
  const int64_t step = groups.count > 1 ? GroupColumns : columns_at_a_time<Arithmetic>(groups.vecs(0));
  const bool sequence = b.stride == k && step * k * storage<T>::Bits <= 8 * MaxBytesAhead;
  for (int64_t column = 0; column < columns; column += step)
    for (int64_t block = 0, from = 0, next; block < depth.blocks; ++block, from = next) {
      next = depth.begin(block + 1);
      const T* ahead = sequence                   ? b.at(column + step, step * from * Per)
                       : block + 1 < depth.blocks ? b.at(column, next * Per)
                                                  : b.at(column + step, 0);
      const lane_columns<T> of{b.from(column, from * Per), next - from, k - from * Per, widened, sequence, ahead};
      for (int64_t group = 0; group < groups.count; ++group)
        with_vecs(groups.vecs(group), [&](auto vecs) {
          const int64_t first = groups.first_vec[group] * L;
          const float* rows = packed_a + first * depth.lanes + from * vecs * L;
          float* to = sums + LaneColumns * first + column * vecs * L;
          const bool widen = !Direct && group == 0;
          (widen ? multiply_columns<Arithmetic, vecs, !Direct, T>
                 : multiply_columns<Arithmetic, vecs, false, T>)(std::min(step, columns - column), of, rows, to,
                                                                 block > 0);
        });
    }
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t vecs = groups.vecs(group);
    for (int64_t v = 0; v < vecs; ++v) {
      const int64_t first = (groups.first_vec[group] + v) * L;
      const float* from = sums + LaneColumns * L * groups.first_vec[group] + v * L;
      for (int64_t j = 0; j < columns; j += L) {
        vec square[L];
#pragma GCC unroll 16
        for (int64_t c = 0; c < L; ++c)
          square[c] = j + c < columns ? vec::load(from + (j + c) * vecs * L, full{}) : vec::zero();
        transpose(square);
        for (int64_t r = 0; r < std::min(L, m - first); ++r) square[r].store(totals + j * m + (first + r) * L, full{});
      }
    }
  }
}

}  // namespace fastlm
