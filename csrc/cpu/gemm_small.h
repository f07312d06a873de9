// C = A·B for small m (a decode step, a small batch; GEMV-like) and for small k (gradients of weights), and the choice
// between these and the packed product.
//
// 2·m·n·k FLOP. With small m each of the n·k elements of B is used m times only: up to some sixteen rows the product is
// bound by reading B, and packing B would cost more than the multiplication. gemm_small_m therefore reads B once,
// unpacked and in its storage type. A square of Lanes × Lanes elements is loaded into Lanes registers, widened or
// paired as the arithmetic wants and transposed where B is contiguous in k; all rows of A, which stay in the L2 cache,
// are multiplied by it. Where B is contiguous in k and the rows of A fill most of their vectors, the roles are swapped
// (gemm_small_lanes.h).
// With small k the m·n results bound the product: gemm_small_k writes them from the registers.
// Each element of C is the same chain of sums as in gemm(), so the bits do not depend on the choice.
#pragma once
#include "gemm_small_lanes.h"
#if defined(__AMX_BF16__)
#include "gemm_small_amx.h"
#endif

namespace fastlm {

inline constexpr int64_t MaxSmallMElements = 1 << 18;  // elements of A: packed, they stay in the L2 cache
inline constexpr int64_t SmallK = 64;
// Accumulators that are group_columns at a time, 32 kB. With fewer, short parts of each row of B would be read, which
// hardware prefetchers do not follow.
inline constexpr int64_t MaxSmallMSums = 8192;

// A square of B in registers: w[d] holds Lanes columns of the k in lane d, zero where B ends.
template <class Arithmetic, class T> struct rhs_registers {
  static constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  // bf16 that is contiguous in k and is to be widened is transposed as pairs: the square then has
  // twice the depth.
  static constexpr bool AsPairs = std::is_same_v<T, bf16> && Per == 1;
  static constexpr int64_t Depth = AsPairs ? 2 * L : L;

  // B is contiguous along its columns; `k` elements of depth exist.
  template <class Span> static FASTLM_INLINE void along_i(operand<T> b, int64_t k, Span span, vec (&w)[L]) {
    const bool whole = k >= L * Per;
#pragma GCC unroll 16
    for (int64_t d = 0; d < L; ++d) {
      const T* row = b.at(0, d * Per);
      for (int64_t i = 0; i < Per; ++i)
        __builtin_prefetch(b.at(0, (d + 2 * L) * Per + i), 0, 2);  // into L2; harmless past the end
      w[d] = whole || d * Per < k
                 ? Arithmetic::along_i(row, whole || d * Per + 1 < k ? b.at(0, d * Per + 1) : nullptr, span)
                 : vec::zero();
    }
  }

  // B is contiguous in k; `columns` columns with `k` elements each exist. The lines of `ahead` are prefetched.
  static FASTLM_INLINE void along_k(operand<T> b, operand<T> ahead, int64_t columns, int64_t k, vec (&w)[L]) {
    const bool whole = columns >= L && k >= Depth * Per;
#pragma GCC unroll 16
    for (int64_t j = 0; j < L; ++j) {
      const T* column = b.at(j, 0);
      __builtin_prefetch(ahead.at(j, 0));
      w[j] = whole ? lanes(column, Depth * Per) : j < columns ? lanes(column, k) : vec::zero();
    }
    transpose(w);
  }

  // The first or the second half of w, widened.
  static FASTLM_INLINE void widen(const vec (&w)[L], int64_t half, vec (&wide)[L]) {
#pragma GCC unroll 8
    for (int64_t d = 0; d < L / 2; ++d) {
      const uvec pair = bits_of(w[half * L / 2 + d]);
      wide[2 * d] = from_bits(pair << 16);
      wide[2 * d + 1] = from_bits(pair & uvec::all(0xffff0000u));
    }
  }

 private:
  static FASTLM_INLINE vec lanes(const T* p, int64_t k) {
    if constexpr (!AsPairs) return Arithmetic::along_k(p, k);
    if (k >= Depth) return vec::load(reinterpret_cast<const float*>(p), full{});
    alignas(64) T pairs[Depth] = {};
    std::copy_n(p, std::max<int64_t>(k, 0), pairs);
    return vec::load(reinterpret_cast<const float*>(pairs), full{});
  }
};

// sums[r] += Σ_d a[r][d]·w[d] for the rows r < m, of Lanes values each. Rows at a time are accumulated in registers, to
// hide the latency of the additions.
template <class Arithmetic, int Rows> FASTLM_INLINE void add_rows(int64_t m, int64_t& r, const float* a,
                                                                  const vec (&w)[vec::Lanes], float* sums) {
  using accumulator = typename Arithmetic::accumulator;
  for (; r + Rows <= m; r += Rows) {
    accumulator sum[Rows];
#pragma GCC unroll 8
    for (int64_t i = 0; i < Rows; ++i) sum[i] = accumulator::load(sums + (r + i) * vec::Lanes, full{});
#pragma GCC unroll 16
    for (int64_t d = 0; d < vec::Lanes; ++d)
#pragma GCC unroll 8
      for (int64_t i = 0; i < Rows; ++i)
        sum[i] = Arithmetic::multiply_add(sum[i], vec::all(a[(r + i) * vec::Lanes + d]), w[d]);
#pragma GCC unroll 8
    for (int64_t i = 0; i < Rows; ++i) sum[i].store(sums + (r + i) * vec::Lanes, full{});
  }
}

// Inlined, so that w stays in registers.
template <class Arithmetic> FASTLM_INLINE void add_rows(int64_t m, const float* a, const vec (&w)[vec::Lanes],
                                                        float* sums) {
  int64_t r = 0;
  add_rows<Arithmetic, MR>(m, r, a, w, sums);
  add_rows<Arithmetic, MR / 2>(m, r, a, w, sums);
  add_rows<Arithmetic, 1>(m, r, a, w, sums);
}

template <class Accumulator> void add(float* sums, const float* more, int64_t count) {
  sweep(count, [=](int64_t i, auto span) {
    (Accumulator::load(sums + i, span) + Accumulator::load(more + i, span)).store(sums + i, span);
  });
}

// totals[j·m + r·Lanes + …] = Σ_k A[r, k]·B[k, j + …] for `columns` columns of B, at most MaxSmallMSums / m. Not
// inlined, so that all epilogues share one copy.
template <class Arithmetic, class T> __attribute__((noinline)) void small_m_sums(int64_t m, int64_t columns, int64_t k,
                                                                                 const float* packed_a, operand<T> b,
                                                                                 float* totals) {
  using registers = rhs_registers<Arithmetic, T>;
  using accumulator = typename Arithmetic::accumulator;
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  const small_m_depth<Arithmetic> depth(k);
  const bool along_k = b.stride != 1;
  const int64_t size = m * ceil_div(columns, L) * L;
  alignas(64) float of_block[MaxSmallMSums], chain[MaxSmallMSums];
  for (int64_t block = 0; block < depth.blocks; ++block) {
    const int64_t lanes = depth.begin(block + 1) - depth.begin(block),
                  k_end = std::min(k, depth.begin(block + 1) * Per);
    float* block_sums = block > 0 ? of_block : totals;
    for (int64_t first = 0; first < lanes; first += Chain) {
      float* sums = first > 0 ? chain : block_sums;
      std::fill_n(sums, size, 0.0f);
      for (int64_t d = first; d < std::min(lanes, first + Chain); d += along_k ? registers::Depth : L) {
        const float* rows = packed_a + (block * Arithmetic::KC + d) * m;
        const int64_t from = (depth.begin(block) + d) * Per;
        const operand<T> at = b.from(0, from);
        vec w[L];
        if (!along_k) {
          sweep(columns, [&](int64_t j, auto span) {
            registers::along_i({storage<T>::at(at.data, j), 1, at.k_stride}, k_end - from, span, w);
            add_rows<Arithmetic>(m, rows, w, sums + j * m);
          });
          continue;
        }
        // 256 bytes ahead in these columns, and at their end in the next ones; harmless past the end of B.
        constexpr int64_t Ahead = 2048 / storage<T>::Bits;
        const operand<T> ahead = from + Ahead < k ? b.from(0, from + Ahead) : b.from(L, from + Ahead - k);
        registers::along_k(at, ahead, columns, k_end - from, w);
        if constexpr (registers::AsPairs) {
          for (int64_t half = 0; half < 2; ++half) {
            vec wide[L];
            registers::widen(w, half, wide);
            add_rows<Arithmetic>(m, rows + half * L * m, wide, sums);
          }
        } else {
          add_rows<Arithmetic>(m, rows, w, sums);
        }
      }
      if (sums == chain) add<accumulator>(block_sums, chain, size);
    }
    if (block_sums == of_block) add<accumulator>(totals, of_block, size);
  }
}

// The product for small m; arguments as of gemm(). A is contiguous in k.
template <class Arithmetic, class TA, class TB, size_t Count, class Epilogue>
void gemm_small_m(int64_t m, int64_t n, int64_t k, operand<TA> a, const operands<TB, Count>& b, int threads,
                  Epilogue epilogue) {
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane, RegisterDepth = rhs_registers<Arithmetic, TB>::Depth;
  const small_m_depth<Arithmetic> depth(k);
  const int64_t col_vecs = ceil_div(n, L);
  const bool along_k = std::any_of(b.begin(), b.end(), [](const auto& source) { return source.stride != 1; });

  // A is packed once, for all threads: lane of k by lane of k, or k block by k block, Lanes of k of all rows after each
  // other, with zeros up to the last square of B.
  static_assert(Arithmetic::KC % (2 * L) == 0);
  const bool in_lanes =
      std::all_of(b.begin(), b.end(), [=](auto source) { return rows_in_lanes<Arithmetic>(m, k, source); });
  const int64_t width = ceil_div(m, L) * L;
  float* packed_a = scratch(depth.blocks * Arithmetic::KC * (in_lanes ? width : m));
  if (in_lanes) pack_rows_in_lanes<Arithmetic>(a, m, k, packed_a);
  for (int64_t block = 0; block < (in_lanes ? 0 : depth.blocks); ++block)
    for (int64_t r = 0; r < m; ++r)
      for (int64_t d = 0; d < ceil_div(depth.begin(block + 1) - depth.begin(block), RegisterDepth) * RegisterDepth;
           d += L) {
        const int64_t from = (depth.begin(block) + d) * Per, left = std::min(k, depth.begin(block + 1) * Per) - from;
        Arithmetic::along_k(a.at(r, from), left).store(packed_a + (block * Arithmetic::KC + d) * m + r * L, full{});
      }

  // A part reads at least 64 kB of B. Several parts per thread end at nearly the same time on all of them; where B is
  // contiguous along its columns, long parts of its rows are worth more.
  const int64_t most = along_k ? 8 * threads : threads, wanted = int64_t(Count) * n * k * storage<TB>::Bits / 8 / 65536;
  const int64_t parts = std::min(col_vecs, parts_of_threads(wanted, most, threads));
  const int64_t most_columns = MaxSmallMSums / (m * L) * L;
  const int64_t group_columns = along_k ? std::min(LaneColumns, most_columns) : most_columns;
  const int64_t step = along_k && !in_lanes ? L : group_columns;
  parallel_parts(parts, threads, [=](int64_t part) {
    // Of each product: group_columns columns of all rows, then the next ones.
    alignas(64) float totals[Count][MaxSmallMSums];
    const int64_t end = std::min(n, col_vecs * (part + 1) / parts * L);
    for (int64_t column = col_vecs * part / parts * L; column < end; column += group_columns) {
      const int64_t columns = std::min(group_columns, end - column);
      for (size_t source = 0; source < Count; ++source)
        for (int64_t j = 0; j < columns; j += step)
          (in_lanes ? sums_in_lanes<Arithmetic, TB>
                    : small_m_sums<Arithmetic, TB>)(m, std::min(step, columns - j), k, packed_a,
                                                    b[source].from(column + j, 0), totals[source] + j * m);
      for (int64_t r = 0; r < m; ++r)
        sweep(columns, [&](int64_t j, auto span) {
          finish_vector<Arithmetic, Count>(totals[0] + j * m + r * L, MaxSmallMSums, r, column + j, span, epilogue);
        });
    }
  });
}

// A tile of a·b, both packed k-major, depth ≤ SmallK. Calls write(row, vector, value) from the registers. The order of
// the sums is that of multiply_tile.
template <class Arithmetic, class Write>
FASTLM_INLINE void write_tile(int64_t depth, const float* a, const float* b, Write write) {
  constexpr int64_t Width = NRVecs * vec::Lanes;
  using accumulator = typename Arithmetic::accumulator;
  accumulator total[MR][NRVecs];
  sum_chain<Arithmetic, false>(std::min(depth, Chain), a, PanelRows, b, Width, total);
  for (int64_t first = Chain; SmallK > Chain && first < depth; first += Chain) {
    accumulator sum[MR][NRVecs];
    sum_chain<Arithmetic, false>(std::min(depth - first, Chain), a + first * PanelRows, PanelRows, b + first * Width,
                                 Width, sum);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < NRVecs; ++v) total[r][v] = total[r][v] + sum[r][v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < NRVecs; ++v) write(r, v, Arithmetic::value(total[r][v]));
}

// The product for small k: gradients of weights. A is contiguous along its rows and at most SmallK deep. Results
// are written straight from the registers. B is packed for GroupColumns columns at a time, by which each panel of
// A is multiplied.
template <class Arithmetic, class TA, class TB, class Epilogue>
void gemm_small_k(int64_t m, int64_t n, int64_t k, operand<TA> a, operand<TB> b, int threads, Epilogue epilogue,
                  float* a_sums, float* b_sums) {
  constexpr int64_t L = vec::Lanes, Panel = NRVecs * L, GroupColumns = 768;
  static_assert(GroupColumns % Panel == 0);
  const int64_t depth = packed_depth<Arithmetic>(k), row_panels = ceil_div(m, PanelRows);
  const int64_t parts =
      threads == 1 ? 1 : std::clamp<int64_t>(m * n / 32768, 1, std::min<int64_t>(4 * threads, row_panels));
  parallel_parts(parts, threads, [=](int64_t part) {
    alignas(64) float edge[MR * Panel];  // a tile at an edge of C
    float *packed_a = scratch(Arithmetic::KC * (PanelRows + GroupColumns)),
          *packed_b = packed_a + Arithmetic::KC * PanelRows;
    const int64_t end = std::min(m, row_panels * (part + 1) / parts * PanelRows);
    for (int64_t first = 0; first < n; first += GroupColumns) {
      const int64_t last = std::min(n, first + GroupColumns);
      for (int64_t column = first; column < last; column += Panel) {
        const int64_t columns = std::min(Panel, n - column), width = ceil_div(columns, L) * L;
        float* to = packed_b + (column - first) * depth;
        pack<Arithmetic>(b.from(column, 0), columns, k, width, to);
        if (b_sums && part == 0) add_panel_sums<Arithmetic>(to, depth, width, columns, b_sums + column);
      }
      for (int64_t panel = row_panels * part / parts * PanelRows; panel < end; panel += PanelRows) {
        const int64_t rows = std::min(PanelRows, end - panel);
        pack_lhs<Arithmetic>(operand<TA>{a.at(panel, 0), 1, a.k_stride}, rows, k, false, packed_a);
        if (a_sums && first == 0) add_panel_sums<Arithmetic>(packed_a, depth, PanelRows, rows, a_sums + panel);
        for (int64_t r = 0; r < rows; r += MR)
          for (int64_t column = first; column < last; column += Panel) {
            const int64_t tile_rows = std::min<int64_t>(MR, rows - r), columns = std::min(Panel, last - column);
            const float* columns_of_b = packed_b + (column - first) * depth;
            if (tile_rows == MR && columns == Panel) {
              write_tile<Arithmetic>(depth, packed_a + r, columns_of_b, [=](int i, int v, vec value) {
                epilogue(panel + r + i, column + v * L, value, full{});
              });
              continue;
            }
            const int64_t vecs = ceil_div(columns, L), width = vecs * L;
            multiply_tile<Arithmetic>(vecs, depth, packed_a + r, PanelRows, columns_of_b, width, edge, width, false);
            for (int64_t i = 0; i < tile_rows; ++i)
              sweep(columns, [&](int64_t j, auto span) {
                const auto sum = Arithmetic::accumulator::load(edge + i * width + j, full{});
                epilogue(panel + r + i, column + j, Arithmetic::value(sum), span);
              });
          }
      }
    }
  });
}

// The products of a with each b, by the algorithm that suits their sizes; A is contiguous in k.
template <class Arithmetic, class TA, class TB, size_t Count, class Epilogue>
void multiply(int64_t m, int64_t n, int64_t k, operand<TA> a, const operands<TB, Count>& b, int threads,
              Epilogue epilogue) {
  if constexpr (!Arithmetic::RowMajorOnly) {
    const bool is_small = m <= (b[0].stride == 1 ? 32 : MaxTransposedRows) || rows_in_lanes<Arithmetic>(m, k, b[0]);
    if (is_small && m * k <= MaxSmallMElements) return gemm_small_m<Arithmetic>(m, n, k, a, b, threads, epilogue);
  }
#if defined(__AMX_BF16__)
  else if constexpr (std::is_same_v<TB, bf16>) {
    if (m <= AmxRows && AmxRows * k <= MaxSmallMElements) return amx_small_m(m, n, k, a, b, threads, epilogue);
  }
#endif
  gemm<Arithmetic>(m, n, k, a, b, threads, epilogue);
}
template <class Arithmetic, class TA, class TB, class Epilogue>
void multiply(int64_t m, int64_t n, int64_t k, operand<TA> a, operand<TB> b, int threads, Epilogue epilogue) {
  multiply<Arithmetic>(m, n, k, a, operands<TB, 1>{b}, threads, epilogue);
}

// The same of one product; A is contiguous along its rows.
template <class Arithmetic, class TA, class TB, class Epilogue>
void multiply_transposed(int64_t m, int64_t n, int64_t k, operand<TA> a, operand<TB> b, int threads, Epilogue epilogue,
                         float* a_sums, float* b_sums) {
  if constexpr (!Arithmetic::RowMajorOnly)
    if (k <= SmallK) return gemm_small_k<Arithmetic>(m, n, k, a, b, threads, epilogue, a_sums, b_sums);
  gemm<Arithmetic>(m, n, k, a, operands<TB, 1>{b}, threads, epilogue, a_sums, b_sums);
}

// Compiled once, with the linear operator, for the types whose arithmetic has a small-m product.
#define FASTLM_SMALL_M_SUMS(prefix, T)                                                                         \
  prefix template void small_m_sums<arithmetic_for<T>, T>(int64_t, int64_t, int64_t, const float*, operand<T>, \
                                                          float*);                                             \
  prefix template void sums_in_lanes<arithmetic_for<T>, T>(int64_t, int64_t, int64_t, const float*, operand<T>, float*);
#if defined(__AMX_BF16__)
#define FASTLM_SMALL_M(prefix) FASTLM_SMALL_M_SUMS(prefix, float) FASTLM_SMALL_M_SUMS(prefix, fp16)
#else
#define FASTLM_SMALL_M(prefix) \
  FASTLM_SMALL_M_SUMS(prefix, float) FASTLM_SMALL_M_SUMS(prefix, fp16) FASTLM_SMALL_M_SUMS(prefix, bf16)
#endif
FASTLM_SMALL_M(extern)

}  // namespace fastlm
