// C = A·B for at most 16 rows of bf16 by AMX: a decode step, a small batch. Bound by reading B, which is read once and
// not packed. Included by gemm_small.h.
//
// Where B is contiguous in k, its memory has the layout of an instruction's first operand, [column][pair of k]: tiles
// are loaded from it, A is the second operand, and the sums are those of the transpose of C. Where B is contiguous
// along its columns, pairs of its rows are interleaved to a second operand in the L1 cache. Each element of C is the
// same chain of sums as in gemm(): c += the sums of 16 even and of 16 odd elements of k.
#pragma once
#include "gemm.h"

namespace fastlm {

inline constexpr int64_t AmxRows = 16, AmxTile = 16 * 16;  // fp32 of a tile of sums
inline constexpr int64_t AmxColumns = 512;                 // 32 kB of sums

// A tile of B whose rows are columns of it: [column][pair of k], for `columns` columns and `k` elements that exist.
inline void amx_copy_tile(operand<bf16> b, int64_t columns, int64_t k, float* out) {
  for (int64_t j = 0; j < 16; ++j)
    (j < columns ? amx_arithmetic::along_k(b.at(j, 0), k) : vec::zero()).store(out + j * 16, full{});
}

// sums[r·16 + j] = Σ_k A[r, k]·B[k, j] for up to 16 columns of B, which is contiguous in k. a is packed [pair of
// k][row]. One tile of columns at a time: its memory is contiguous and read from start to end. Four would hide the
// latency of the multiply-adds, but read 64 places at a time.
inline void amx_sums_along_k(int64_t columns, int64_t k, const float* a, operand<bf16> b, float* sums) {
  constexpr int64_t Step = 2 * amx_arithmetic::KStep, Ahead = 8 * Step;
  alignas(64) float edge[AmxTile], transposed[AmxTile];
  _tile_zero(0);
  for (int64_t from = 0; from < k; from += Step, a += AmxTile) {
    const bf16* tile = b.at(0, from);
    int64_t stride = 2 * b.stride;  // bytes
    if (columns >= 16 && from + Step <= k) {
      // Ahead in these columns, and at their end in the next ones; harmless past the end of B.
      const operand<bf16> next = from + Ahead < k ? b.from(0, from + Ahead) : b.from(16, from + Ahead - k);
      for (int64_t j = 0; j < 16; ++j) __builtin_prefetch(next.at(j, 0));
    } else {
      amx_copy_tile(b.from(0, from), columns, k - from, edge);
      tile = reinterpret_cast<const bf16*>(edge);
      stride = 64;
    }
    __asm__ volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
    _tile_loadd(4, a, 64);
    _tile_loadd(5, tile, stride);
    _tile_dpbf16ps(0, 5, 4);
  }
  _tile_stored(0, transposed, 64);
  vec w[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) w[j] = vec::load(transposed + j * 16, full{});
  transpose(w);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) w[r].store(sums + r * 16, full{});
}

// The same for a B that is contiguous along its columns. a is packed row-major, a_stride apart. The sums of all columns
// are updated for 32 k at a time, so that long parts of the rows of B are read.
inline void amx_sums_along_i(int64_t columns, int64_t k, const float* a, int64_t a_stride, operand<bf16> b,
                             float* sums) {
  alignas(64) float pairs[2][AmxTile];
  for (int64_t from = 0; from < k; from += 32) {
    __asm__ volatile("" ::: "memory");
    _tile_loadd(2, a + from / 2, 4 * a_stride);
    int64_t next = 0;
    sweep(columns, [&](int64_t j, auto span) {
      float *tile = pairs[next], *c = sums + j / 16 * AmxTile;
      next = 1 - next;
      for (int64_t d = 0; d < 16; ++d) {
        const int64_t at = from + 2 * d;
        __builtin_prefetch(b.at(j, at + 32));
        __builtin_prefetch(b.at(j, at + 33));
        (at >= k ? vec::zero() : amx_arithmetic::along_i(b.at(j, at), at + 1 < k ? b.at(j, at + 1) : nullptr, span))
            .store(tile + d * 16, full{});
      }
      __asm__ volatile("" ::: "memory");
      if (from > 0) _tile_loadd(0, c, 64);
      else _tile_zero(0);
      _tile_loadd(1, tile, 64);
      _tile_dpbf16ps(0, 2, 1);
      _tile_stored(0, c, 64);
    });
  }
}

// Flushes denormals to zero, operands and results, as AMX does.
class flushed_denormals {
  const unsigned before = _mm_getcsr();

 public:
  flushed_denormals() { _mm_setcsr(before | 0x8040); }
  ~flushed_denormals() { _mm_setcsr(before); }
  flushed_denormals(const flushed_denormals&) = delete;
  flushed_denormals& operator=(const flushed_denormals&) = delete;
};

// The same by multiply-adds, in the order of AMX: for so few rows interleaving pairs would take longer than reading B.
// The bits are the same too, but for the sign of a sum that is flushed to zero. Not inlined, so that no arithmetic
// moves out of the mode.
inline constexpr int64_t FmaRows = 4;
template <int Rows> __attribute__((noinline)) void fma_sums_along_i(int64_t columns, int64_t k, const float* a,
                                                                    int64_t a_stride, operand<bf16> b, float* sums) {
  const flushed_denormals mode;
  const uvec high = uvec::all(0xffff0000u);
  for (int64_t from = 0; from < k; from += 32) {
    alignas(64) float x[2][Rows][16];  // of even and of odd k
    for (int r = 0; r < Rows; ++r) {
      const uvec pairs = bits_of(vec::load(a + r * a_stride + from / 2, full{}));
      from_bits(pairs << 16).store(x[0][r], full{});
      from_bits(pairs & high).store(x[1][r], full{});
    }
    const int64_t count = std::min<int64_t>(32, k - from);
    for (int64_t j = 0; j < columns; j += 32) {
      vec sum[2][Rows][2] = {};  // of even and of odd k, in even and in odd columns
      const operand<bf16> next = from + 32 < k ? b.from(j, from + 32) : b.from(j + columns, 0);
      auto add = [&](int64_t d, vec(&to)[Rows][2], const float (&with)[Rows][16]) {
        const uvec pairs = bits_of(load_pairs(b.at(j, from + d), columns - j));
        __builtin_prefetch(next.at(0, d));  // harmless past the end of B
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const vec value = vec::all(with[r][d / 2]);
          to[r][0] = fma(value, from_bits(pairs << 16), to[r][0]);
          to[r][1] = fma(value, from_bits(pairs & high), to[r][1]);
        }
      };
      for (int64_t d = 0; d < count; d += 2) {
        add(d, sum[0], x[0]);
        if (d + 1 < count) add(d + 1, sum[1], x[1]);
      }
      for (int r = 0; r < Rows; ++r) {
        vec halves[2];
        interleave(sum[0][r][0] + sum[1][r][0], sum[0][r][1] + sum[1][r][1], halves);
        for (int64_t half = 0; half < (columns - j > 16 ? 2 : 1); ++half) {
          float* const c = sums + (j / 16 + half) * AmxTile + r * 16;
          ((from > 0 ? vec::load(c, full{}) : vec::zero()) + halves[half]).store(c, full{});
        }
      }
    }
  }
}

// Arguments as of gemm(). m ≤ AmxRows; A is contiguous in k.
template <class TA, size_t Count, class Epilogue>
void amx_small_m(int64_t m, int64_t n, int64_t k, operand<TA> a, const operands<bf16, Count>& b, int threads,
                 Epilogue epilogue) {
  static_assert(vec::Lanes == 16);
  const int64_t depth = packed_depth<amx_arithmetic>(k), col_vecs = ceil_div(n, 16);
  const bool along_k = std::any_of(b.begin(), b.end(), [](const auto& source) { return source.stride != 1; }),
             along_i = std::any_of(b.begin(), b.end(), [](const auto& source) { return source.stride == 1; });
  float *pairs_of_rows = scratch(2 * depth * AmxRows), *rows = pairs_of_rows + depth * AmxRows;
  if (along_k) pack<amx_arithmetic>(a, m, k, AmxRows, pairs_of_rows);
  if (along_i) copy_rows<amx_arithmetic>(a, m, k, depth, rows);

  const int64_t most = along_k ? 8 * threads : threads, wanted = int64_t(Count) * n * k / 32768;
  const int64_t parts = std::min(col_vecs, parts_of_threads(wanted, most, threads));
  parallel_parts(parts, threads, [=](int64_t part) {
    const amx_tile_config multiplying;
    alignas(64) float sums[Count][AmxColumns * AmxRows];
    const int64_t end = std::min(n, col_vecs * (part + 1) / parts * 16);
    for (int64_t column = col_vecs * part / parts * 16; column < end; column += AmxColumns) {
      const int64_t columns = std::min(AmxColumns, end - column);
      for (size_t source = 0; source < Count; ++source) {
        const operand<bf16> from = b[source].from(column, 0);
        if (from.stride == 1) {
          constexpr decltype(&amx_sums_along_i) By[] = {fma_sums_along_i<1>, fma_sums_along_i<2>, fma_sums_along_i<3>,
                                                        fma_sums_along_i<4>};
          (m <= FmaRows ? By[m - 1] : amx_sums_along_i)(columns, k, rows, depth, from, sums[source]);
          continue;
        }
        for (int64_t j = 0; j < columns; j += 16)
          amx_sums_along_k(columns - j, k, pairs_of_rows, from.from(j, 0), sums[source] + j * AmxRows);
      }
      for (int64_t r = 0; r < m; ++r)
        sweep(columns, [&](int64_t j, auto span) {
          finish_vector<amx_arithmetic, Count>(sums[0] + j * AmxRows + r * 16, AmxColumns * AmxRows, r, column + j,
                                               span, epilogue);
        });
    }
  });
}

}  // namespace fastlm
