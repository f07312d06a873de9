// C = A·B with an epilogue, the matrix product under every operator. 2·m·n·k FLOP; compute bound from a few dozen rows on.
//
// A block of C (up to 512 rows) is one part of the work. Its rows of A are packed once and stay in the L2 cache; then, panel after panel of up to three vectors of
// columns (with 8 lanes, where such a panel ends within a cache line, two beside each other), a block of B (≤ 192 deep) is packed into L1 and all the rows pass
// by it. Operands are read from where they lie, in either orientation, 16-bit types being widened (or paired, for the bf16 dot product and for AMX) on the way;
// while one block of B is multiplied the next is fetched from memory. Packing costs 0.1–0.4 cycle an element and serves hundreds of rows or columns: 1–3 % of the
// multiplication.
// The register tile of 8 × 3 vectors (AVX-512: 24 sums, 3 of B, 1 of A) does 24 multiply-adds for 11 loads; with 16 registers it is 4 × 3.
// The epilogue sees each finished vector of C once, while it is in the cache: bias, activation and residual cost no pass over memory.
#pragma once
#include <numeric>
#include <type_traits>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#include "simd.h"
#include "threads.h"

namespace fastlm {

// A matrix operand: element (i, k) at data[i·stride + k·k_stride], k being the dimension that is summed over. One of the strides is 1.
template <class T> struct operand {
  const T* data;
  int64_t stride, k_stride;
};

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int TileRows = 8;  // 32 vector registers
#else
inline constexpr int TileRows = 4;  // 16
#endif
inline constexpr int TileVecs = 3;
// Tiles that are done within a thousand cycles wait at their end for what is not in L1: the sums of earlier blocks and the lines that the epilogue writes are asked
// for at their beginning. (With 32 registers, where a tile takes twice as long, fetching those lines made most products slower: docs/cpu.md.)
inline constexpr bool SmallTiles = TileRows == 4;
inline constexpr int64_t PanelRows = TileRows > vec::Lanes ? TileRows : vec::Lanes;  // rows of A packed together: whole registers, one tile or two

// What one 32-bit lane of a packed panel holds, and how two panels are multiplied.
struct by_fma {  // one fp32 value
  static constexpr int64_t PerLane = 1;
  static constexpr int64_t BlockDepth = 192;                // lanes of k per packed block: with three vectors of columns most of the L1 cache
  static constexpr int64_t Rows = TileRows, DepthStep = 1;  // of the first operand, multiplied at once; lanes of k come in steps, zeros at their end
  static constexpr bool RowsOnly = false;                   // whether the first operand may not be k-major
  static constexpr bool Cheap = false;                      // whether products cost little beside what is done around them
  struct session {};                                        // lives while a thread multiplies
  static FASTLM_INLINE vec multiply_add(vec sum, vec a, vec b) { return fma(a, b, sum); }
  template <class T, class Span> static FASTLM_INLINE vec along_i(const T* p, const T*, Span span) { return vec::load(p, span); }
  template <class T> static FASTLM_INLINE vec along_k(const T* p, int64_t count) {
    return count >= vec::Lanes ? vec::load(p, full{}) : count > 0 ? vec::load(p, tail{size_t(count)}) : vec::zero();
  }
  static FASTLM_INLINE vec total(vec lane) { return lane; }
};

#if defined(__AVX512BF16__)
struct by_dot {  // two bf16 values, consecutive in k
  static constexpr int64_t PerLane = 2, BlockDepth = 192, Rows = TileRows, DepthStep = 1;
  static constexpr bool RowsOnly = false, Cheap = false;
  struct session {};
  static FASTLM_INLINE vec multiply_add(vec sum, vec a, vec b) { return dot_bf16(sum, a, b); }
  template <class T, class Span> static FASTLM_INLINE vec along_i(const T* p, const T* next, Span span) {
    return next ? interleave_pairs(p, next, span) : interleave_pairs(p, nullptr, span);
  }
  template <class T> static FASTLM_INLINE vec along_k(const T* p, int64_t count) { return count > 0 ? load_pairs(p, count) : vec::zero(); }
  static FASTLM_INLINE vec join(vec value, vec next) { return make_pairs(value, next); }
  static FASTLM_INLINE vec total(vec lane) { return from_bits(bits_of(lane) << 16) + from_bits(bits_of(lane) & uvec::all(0xffff0000u)); }
};
#endif

#if defined(__AMX_BF16__)
}  // namespace fastlm
#include "tiles_amx.h"
namespace fastlm {
template <class T> using arithmetic_for = std::conditional_t<std::is_same_v<T, bf16>, by_tiles, by_fma>;
#elif defined(__AVX512BF16__)
template <class T> using arithmetic_for = std::conditional_t<std::is_same_v<T, bf16>, by_dot, by_fma>;
#else
template <class T> using arithmetic_for = by_fma;
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lanes that k values take.
template <class Arithmetic> inline int64_t packed_depth(int64_t k) { return ceil_div(k, Arithmetic::PerLane * Arithmetic::DepthStep) * Arithmetic::DepthStep; }

// out[d·width + i] = source (i, k) for i < count, 0 beyond; d counts lanes of k.
template <class Arithmetic, class T> void pack(operand<T> source, int64_t count, int64_t k, int64_t width, float* out) {
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  const int64_t depth = packed_depth<Arithmetic>(k);
  auto put = [=](vec v, float* at, int64_t room) {
    if (room >= L) v.store(at, full{});
    else v.store(at, tail{size_t(room)});
  };
  if (source.stride == 1) {
    for (int64_t d = 0; d < depth; ++d) {
      const T* row = source.data + d * Per * source.k_stride;
      const T* next = d * Per + 1 < k ? row + source.k_stride : nullptr;
      for (int64_t ahead = 0; ahead < Per; ++ahead)  // rows lie pages apart: no hardware follows them. Past the end a prefetch is harmless
        for (int64_t i = 0; i < width; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + (8 * Per + ahead) * source.k_stride + i);
      if (count == TileVecs * L && width == count && (Per == 1 || next)) {  // most panels of B
#pragma GCC unroll 3
        for (int64_t i = 0; i < TileVecs * L; i += L) Arithmetic::along_i(row + i, Per == 1 ? nullptr : next + i, full{}).store(out + d * width + i, full{});
        continue;
      }
      for (int64_t i = 0; i < width; i += L) {
        const T* after = next ? next + i : nullptr;
        vec v = i >= count || d * Per >= k ? vec::zero()
                : i + L <= count           ? Arithmetic::along_i(row + i, after, full{})
                                           : Arithmetic::along_i(row + i, after, tail{size_t(count - i)});
        put(v, out + d * width + i, width - i);
      }
    }
    return;
  }
  for (int64_t i = 0; i < width; i += L) {
    const T* rows = source.data + i * source.stride;
    for (int64_t d = 0; d < depth; d += L) {
      vec block[L];
      if (i + L <= count && (d + L) * Per <= k && i + L <= width) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < L; ++r) block[r] = Arithmetic::along_k(rows + r * source.stride + d * Per, L * Per);
        transpose(block);
#pragma GCC unroll 16
        for (int64_t r = 0; r < L; ++r) block[r].store(out + (d + r) * width + i, full{});
      } else {
        for (int64_t r = 0; r < L; ++r) block[r] = i + r < count ? Arithmetic::along_k(rows + r * source.stride + d * Per, k - d * Per) : vec::zero();
        transpose(block);
        for (int64_t r = 0; r < L && d + r < depth; ++r) put(block[r], out + (d + r) * width + i, width - i);
      }
    }
  }
}

// sums[i] += Σ_k of a packed panel. In runs of 32, so that the error grows with the square root of neither many additions nor large partial sums.
template <class Arithmetic> void add_panel_sums(const float* panel, int64_t depth, int64_t width, int64_t count, float* sums) {
  sweep(count, [=](int64_t i, auto span) {
    vec all = vec::zero();
    for (int64_t d = 0; d < depth; d += 32) {
      vec run = vec::zero();
      for (int64_t e = d; e < depth && e < d + 32; ++e) run = run + Arithmetic::total(vec::load(panel + e * width + i, span));
      all = all + run;
    }
    (vec::load(sums + i, span) + all).store(sums + i, span);
  });
}

// The same of `count` rows that lie row_stride apart.
template <class Arithmetic> void add_row_sums(const float* rows, int64_t depth, int64_t row_stride, int64_t count, float* sums) {
  for (int64_t r = 0; r < count; ++r)
    sums[r] += sum_over(depth, [=](int64_t d, auto span) { return Arithmetic::total(vec::load(rows + r * row_stride + d, span)); });
}

// The longest chain of additions in one register, which is what bounds the rounding error: chains are summed from zero. Without a fused multiply-add every step
// rounds twice, and a chain as long as elsewhere would lose what the others keep.
inline constexpr int64_t Chain = FusesMultiplyAdd ? 192 : 8;

// c (TileRows × Vecs·Lanes, rows c_stride apart) = a·b, or += where `accumulate`. a is packed (k-major, a_stride between successive k) or, with RowMajor, lies as rows a_stride apart.
template <class Arithmetic, int Vecs, bool RowMajor = false>
void multiply_tile(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, bool accumulate,
                   int64_t chain) {
  if constexpr (!FusesMultiplyAdd) {  // the many short chains of a block are added to each other before they are to what was there
    if (accumulate && depth > chain) {
      constexpr int64_t Width = Vecs * vec::Lanes;
      alignas(64) float block[TileRows * Width];
      multiply_tile<Arithmetic, Vecs, RowMajor>(depth, a, a_stride, b, b_stride, block, Width, false, chain);
      for (int64_t r = 0; r < TileRows; ++r)
        sweep(Width, [=, &block](int64_t j, auto) {
          (vec::load(c + r * c_stride + j, full{}) + vec::load(block + r * Width + j, full{})).store(c + r * c_stride + j, full{});
        });
      return;
    }
  }
  if (SmallTiles && accumulate && c_stride == Vecs * vec::Lanes)
    for (int i = 0; i < TileRows * Vecs * vec::Lanes; i += 16) __builtin_prefetch(c + i, 1, 3);
  for (int64_t first = 0; first < depth; first += chain) {
    vec sum[TileRows][Vecs];
#pragma GCC unroll 8
    for (int r = 0; r < TileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < Vecs; ++v) sum[r][v] = vec::zero();
    for (int64_t d = std::min(chain, depth - first); d > 0; --d) {
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
    const bool add = accumulate || first > 0;
#pragma GCC unroll 8
    for (int r = 0; r < TileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < Vecs; ++v) {
        float* at = c + r * c_stride + v * vec::Lanes;
        (add ? vec::load(at, full{}) + sum[r][v] : sum[r][v]).store(at, full{});
      }
  }
}

template <class Arithmetic, bool RowMajor = false>
FASTLM_INLINE void multiply_tile(int64_t vecs, int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                                 bool accumulate, int64_t chain = Chain) {
#if defined(__AMX_BF16__)
  if constexpr (Arithmetic::RowsOnly) {
    static_assert(RowMajor);
    switch (vecs) {
      case 1: return multiply_tiles<1>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
      case 2: return multiply_tiles<2>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
      default: return multiply_tiles<3>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
    }
  } else
#endif
  {
    switch (vecs) {
      case 1: return multiply_tile<Arithmetic, 1, RowMajor>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate, chain);
      case 2: return multiply_tile<Arithmetic, 2, RowMajor>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate, chain);
      default: return multiply_tile<Arithmetic, 3, RowMajor>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate, chain);
    }
  }
}

// Σ_d a[d]·b[d] in every lane, d counting vectors `stride` apart: the sums of multiply_tile, in its order.
template <class Arithmetic> FASTLM_INLINE vec column_products(int64_t depth, const float* a, const float* b, int64_t stride, int64_t chain) {
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

// `total` vectors in panels of at most TileVecs, as equal as they can be (4 = 2 + 2: a panel of one vector would waste two thirds of its loads).
struct panels {
  int64_t total, count;
  explicit panels(int64_t vecs) : total(vecs), count(ceil_div(vecs, TileVecs)) {}
  int64_t begin(int64_t p) const { return total * p / count; }  // in vectors
};

// So many panels beside each other are multiplied by some rows of A before the next rows: together their rows of C are whole cache lines. One by one, a line at an
// edge would have left the cache when the next panel writes its other half.
inline constexpr int64_t PanelBytes = TileVecs * vec::Lanes * 4, Abreast = std::lcm(64, PanelBytes) / PanelBytes;
inline constexpr int64_t PartRows = 512, PartColumns = 768;  // of C, at most: what one packing serves, and sums that stay near

// Bytes of the L2 cache that rows of A may take: the rest is for what streams by. Where the system does not tell its size, that of a small server's.
inline int64_t cache_for_rows() {
  int64_t size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
  size = reported;
#endif
  return (size > 0 ? std::clamp<int64_t>(size, 256 << 10, 4 << 20) : 1 << 20) * 9 / 20;
}

// How C is cut. Only the order of the work follows from it and no result: an element is the same chain of sums however C is cut.
struct blocking {
  int64_t row_blocks, col_blocks;
  blocking(int64_t m, int64_t n, int64_t k, int threads) : row_blocks(ceil_div(m, PartRows)), col_blocks(ceil_div(n, PartColumns)) {
    for (;;) {
      const int64_t parts = row_blocks * col_blocks, rows = m / row_blocks, cols = n / col_blocks;
      const bool by_cols = cols > 48 && (cols >= rows || rows <= 64);
      if (parts >= 4 * threads || threads == 1 || (!by_cols && rows <= 64)) break;
      const double work = double(m) * double(n) * double(k) / double(parts);
      // A part for each thread, from 50 µs of work on. More of them, so that a late one holds up little, where they are worth half a millisecond and stay
      // large: an element that is read serves rows·cols / (rows + cols) multiply-adds, and memory gives one in the time of a hundred.
      const double served = by_cols ? rows * (cols / 2.0) / (rows + cols / 2.0) : (rows / 2.0) * cols / (rows / 2.0 + cols);
      if (work < 4e6 || (parts >= threads && (work < 4e7 || served < 170))) break;
      (by_cols ? col_blocks : row_blocks) *= 2;
    }
    while (row_blocks * col_blocks > threads && row_blocks * col_blocks < 4 * threads && row_blocks * col_blocks % threads && m / row_blocks > 64)
      ++row_blocks;  // few parts are shared out evenly
    row_blocks = std::min(row_blocks, ceil_div(m, PanelRows));
    col_blocks = std::min(col_blocks, ceil_div(n, vec::Lanes));
  }
};

// Between rows of A that are packed as they lie: no power of two, which would crowd a few sets of the cache.
template <class Arithmetic> inline constexpr int64_t RowStride = Arithmetic::BlockDepth + 16;
inline constexpr int64_t RowsAbreast = Abreast > 1 ? 64 : PartRows;
inline constexpr int64_t PackedFrom = 8;      // panels of B: with so many columns
inline constexpr int64_t PackedTogether = 8;  // k-major panels of A: so many read whole cache lines, and each page, once

// Rows as they lie, row_stride (whole vectors) apart; zeros up to the last tile.
template <class Arithmetic, class T> void copy_rows(operand<T> source, int64_t rows, int64_t k, int64_t row_stride, float* out) {
  constexpr int64_t Per = Arithmetic::PerLane;
  const int64_t depth = packed_depth<Arithmetic>(k);
  for (int64_t r = 0; r < ceil_div(rows, Arithmetic::Rows) * Arithmetic::Rows; ++r) {
    float* to = out + r * row_stride;
    const T* from = source.data + r * source.stride;
    if (r >= rows) std::fill_n(to, depth, 0.0f);
    else sweep(depth, [=](int64_t d, auto) { Arithmetic::along_k(from + d * Per, k - d * Per).store(to + d, full{}); });
  }
}

// out[i·row_stride + d] = source (i, k) for i < count, zeros up to whole vectors; source is contiguous in i.
template <class Arithmetic, class T> void pack_as_rows(operand<T> source, int64_t count, int64_t k, int64_t row_stride, float* out) {
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  for (int64_t first = 0; first < packed_depth<Arithmetic>(k); first += L)
    for (int64_t i = 0; i < count; i += L) {
      vec block[L];
#pragma GCC unroll 16
      for (int64_t r = 0; r < L; ++r) {
        const int64_t at = (first + r) * Per;
        const T *row = source.data + at * source.k_stride + i, *next = at + 1 < k ? row + source.k_stride : nullptr;
        block[r] = at >= k ? vec::zero() : i + L <= count ? Arithmetic::along_i(row, next, full{}) : Arithmetic::along_i(row, next, tail{size_t(count - i)});
      }
      transpose(block);
#pragma GCC unroll 16
      for (int64_t r = 0; r < L; ++r) block[r].store(out + (i + r) * row_stride + first, full{});
    }
}

// `rows` rows of A, one block of k deep, in rows RowStride apart or in k-major panels of PanelRows.
template <class Arithmetic, class T> void pack_left(operand<T> source, int64_t rows, int64_t k, bool in_rows, float* out) {
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  const int64_t depth = packed_depth<Arithmetic>(k);
  const bool along_k = source.stride != 1;
  if (in_rows && along_k) return copy_rows<Arithmetic>(source, rows, k, RowStride<Arithmetic>, out);
  if constexpr (Arithmetic::RowsOnly) return pack_as_rows<Arithmetic>(source, rows, k, RowStride<Arithmetic>, out);
  if (along_k) {
    for (int64_t i = 0; i < rows; i += PanelRows)
      pack<Arithmetic>(operand<T>{source.data + i * source.stride, source.stride, 1}, std::min(PanelRows, rows - i), k, PanelRows,
                       out + i * Arithmetic::BlockDepth);
    return;
  }
  for (int64_t d = 0; d < depth; ++d) {
    const T* row = source.data + d * Per * source.k_stride;
    const T* next = d * Per + 1 < k ? row + source.k_stride : nullptr;
    float* to = out + d * PanelRows;
    for (int64_t i = 0; i < ceil_div(rows, PanelRows) * PanelRows; i += L) {
      const T* after = next ? next + i : nullptr;
      vec v = i + L <= rows ? Arithmetic::along_i(row + i, after, full{})
              : i < rows    ? Arithmetic::along_i(row + i, after, tail{size_t(rows - i)})
                            : vec::zero();
      v.store(to + i / PanelRows * PanelRows * Arithmetic::BlockDepth + i % PanelRows, full{});
    }
  }
}

// The cache lines of a block of B, a few at a time while another block is multiplied: what memory takes then costs little.
class prefetcher {
  const char *row = nullptr, *at = nullptr;
  int64_t rows = 0, row_bytes = 0, stride_bytes = 0;

 public:
  prefetcher() = default;
  template <class T> prefetcher(operand<T> source, int64_t count, int64_t k) {
    const bool along_k = source.stride != 1;
    row = at = reinterpret_cast<const char*>(source.data);
    rows = along_k ? count : k;
    row_bytes = (along_k ? k : count) * int64_t(sizeof(T));
    stride_bytes = (along_k ? source.stride : source.k_stride) * int64_t(sizeof(T));
  }
  int64_t lines() const { return rows * (row_bytes / 64 + 1); }
  FASTLM_INLINE void fetch(int64_t count) {
    for (; count > 0 && rows > 0; --count) {
      __builtin_prefetch(at, 0, 2);
      at += 64;
      if (at >= row + row_bytes + 63) {  // the row's last byte may lie in one line more
        row += stride_bytes, at = row;
        --rows;
      }
    }
  }
};

// An epilogue that writes C[i, j] to out[i·stride + j], and says so: where that pays, its cache lines are fetched while the tile is multiplied.
template <class T, class Write> struct writing : Write {
  T* out;
  int64_t stride;
  FASTLM_INLINE void prefetch(int64_t i, int64_t j) const {
    for (int64_t ahead = 0; ahead < TileVecs * vec::Lanes; ahead += 64 / int64_t(sizeof(T))) __builtin_prefetch(out + i * stride + j + ahead, 1, 3);
  }
};
template <class T, class Write> writing<T, Write> writing_to(T* out, int64_t stride, Write write) { return {write, out, stride}; }
template <class T> FASTLM_INLINE auto store_to(T* out, int64_t stride) {
  return writing_to(out, stride, [=](int64_t i, int64_t j, vec value, auto span) { value.store(out + i * stride + j, span); });
}

// epilogue(i, j, value, span): value holds C[i, j…]. a_sums (m; A contiguous along m) and b_sums (n), where given, are increased by the sums over k of A and of B.
template <class Arithmetic, class TA, class TB, class Epilogue>
void gemm(int64_t m, int64_t n, int64_t k, operand<TA> a, operand<TB> b, int threads, Epilogue epilogue, float* a_sums = nullptr, float* b_sums = nullptr) {
  constexpr int64_t L = vec::Lanes;
  const blocking cut(m, n, k, threads);
  const int64_t row_panels = ceil_div(m, PanelRows), col_vecs = ceil_div(n, L);
  const int64_t depth = packed_depth<Arithmetic>(k), depth_blocks = std::max<int64_t>(1, ceil_div(depth, Arithmetic::BlockDepth));
  const bool along_k = a.stride != 1;
  // Rows that hold what the lanes shall hold need no packing, unless they lie whole pages apart and would crowd a few sets of the cache.
  constexpr int64_t step = Arithmetic::PerLane * Arithmetic::DepthStep;
  const bool as_is = sizeof(TA) * Arithmetic::PerLane == 4 && along_k && a.stride % (1024 * Arithmetic::PerLane) != 0 && a.stride % Arithmetic::PerLane == 0 &&
                     k % step == 0 && reinterpret_cast<uintptr_t>(a.data) % 4 == 0;

  parallel_parts(cut.row_blocks * cut.col_blocks, threads, [=](int64_t part) {
    [[maybe_unused]] const typename Arithmetic::session multiplying;
    const int64_t row_block = part % cut.row_blocks, col_block = part / cut.row_blocks;  // neighbours in time share columns of B
    const int64_t first_row = row_panels * row_block / cut.row_blocks * PanelRows,
                  rows = std::min(m, row_panels * (row_block + 1) / cut.row_blocks * PanelRows) - first_row;
    const int64_t first_vec = col_vecs * col_block / cut.col_blocks, vecs = col_vecs * (col_block + 1) / cut.col_blocks - first_vec;
    const panels split(vecs);
    // Small tiles read k-major panels faster than pieces of long rows, which is worth packing them for so many columns.
    const bool in_rows = Arithmetic::RowsOnly || (along_k && !(SmallTiles && depth_blocks > 1 && split.count >= PackedFrom));
    const int64_t padded = ceil_div(rows, PanelRows) * PanelRows, row_size = in_rows ? RowStride<Arithmetic> : Arithmetic::BlockDepth;
    // As many blocks of k at a time as the cache holds of A. If that is all of them, sums are kept for one panel only.
    const int64_t together = std::clamp<int64_t>(cache_for_rows() / (4 * padded * row_size), 1, depth_blocks);
    constexpr int64_t PackedPanel = Arithmetic::BlockDepth * TileVecs * L;
    float* packed_a = scratch(together * padded * row_size + Abreast * PackedPanel + padded * (together < depth_blocks ? vecs : Abreast * TileVecs) * L);
    float* packed_b = packed_a + together * padded * row_size;
    float* sums = packed_b + Abreast * PackedPanel;  // C so far: panel by panel, each tile's rows one after another; a tile's alone, if one block is all of k
    const bool at_once = depth_blocks == 1;

    struct block_of_k {
      int64_t first, count, lanes;
    };
    auto deep = [=](int64_t block) {
      const int64_t steps = depth / Arithmetic::DepthStep, from = steps * block / depth_blocks * Arithmetic::DepthStep,
                    lanes = steps * (block + 1) / depth_blocks * Arithmetic::DepthStep - from;
      return block_of_k{from * Arithmetic::PerLane, std::min(k - from * Arithmetic::PerLane, lanes * Arithmetic::PerLane), lanes};
    };
    auto right = [=](int64_t p, int64_t k_first) {
      return operand<TB>{b.data + (first_vec + split.begin(p)) * L * b.stride + k_first * b.k_stride, b.stride, b.k_stride};
    };
    auto columns_of = [=](int64_t p, int64_t end) { return std::min((split.begin(end) - split.begin(p)) * L, n - (first_vec + split.begin(p)) * L); };

    for (int64_t group = 0; group < depth_blocks; group += together)
      for (int64_t p0 = 0; p0 < split.count; p0 += Abreast) {
        const int64_t p1 = std::min(split.count, p0 + Abreast);
        for (int64_t block = group; block < std::min(depth_blocks, group + together); ++block) {
          const auto [k_first, k_count, count] = deep(block);
          for (int64_t p = p0; p < p1; ++p) {
            const int64_t column = (first_vec + split.begin(p)) * L, columns = columns_of(p, p + 1), width = (split.begin(p + 1) - split.begin(p)) * L;
            float* to = packed_b + (p - p0) * PackedPanel;
            pack<Arithmetic>(right(p, k_first), columns, k_count, width, to);
            if (b_sums && row_block == 0) add_panel_sums<Arithmetic>(to, count, width, columns, b_sums + column);
          }
          const bool last = block + 1 == std::min(depth_blocks, group + together);
          const int64_t next_p = last ? p1 : p0;
          prefetcher next;
          if (next_p < split.count) {
            const auto [next_k, next_count, lanes] = deep(last ? group : block + 1);
            next = prefetcher(right(next_p, next_k), columns_of(next_p, std::min(split.count, next_p + Abreast)), next_count);
          }
          const int64_t lines = ceil_div(next.lines() * Arithmetic::Rows, rows * (p1 - p0));
          for (int64_t first = 0; first < rows; first += RowsAbreast)
            for (int64_t p = p0; p < p1; ++p) {
              const int64_t from = split.begin(p), vecs_wide = split.begin(p + 1) - from, width = vecs_wide * L, column = (first_vec + from) * L,
                            columns = columns_of(p, p + 1);
              const float* panel = packed_b + (p - p0) * PackedPanel;
              float* c = sums + (at_once ? 0 : padded * (from - (together < depth_blocks ? 0 : split.begin(p0))) * L);
              for (int64_t r = first; r < std::min(rows, first + RowsAbreast); r += Arithmetic::Rows) {
                next.fetch(lines);
                const TA* source = a.data + (first_row + r) * a.stride + k_first * a.k_stride;
                float *packed = packed_a + ((block - group) * padded + r) * row_size, *tile = at_once ? c : c + r * width;
                const bool direct = as_is && in_rows && r + Arithmetic::Rows <= rows, row_by_row = in_rows && along_k;
                if (p == 0 && !direct && (row_by_row || r % (PackedTogether * PanelRows) == 0)) {
                  const int64_t some = std::min(row_by_row ? Arithmetic::Rows : PackedTogether * PanelRows, rows - r);
                  pack_left<Arithmetic>(operand<TA>{source, a.stride, a.k_stride}, some, k_count, in_rows, packed);
                  if (Arithmetic::RowsOnly && a_sums && col_block == 0) add_row_sums<Arithmetic>(packed, count, row_size, some, a_sums + first_row + r);
                  for (int64_t i = 0; !Arithmetic::RowsOnly && a_sums && col_block == 0 && i < some; i += PanelRows)
                    add_panel_sums<Arithmetic>(packed + i * row_size, count, PanelRows, std::min(PanelRows, some - i), a_sums + first_row + r + i);
                }
                if constexpr (SmallTiles && requires { epilogue.prefetch(r, column); })
                  if (block + 1 == depth_blocks)
#pragma GCC unroll 4
                    for (int64_t i = 0; i < TileRows; ++i) epilogue.prefetch(first_row + r + i, column);
                if (direct)
                  multiply_tile<Arithmetic, true>(vecs_wide, count, reinterpret_cast<const float*>(source), a.stride / Arithmetic::PerLane, panel, width, tile,
                                                  width, block > 0);
                else if (in_rows) multiply_tile<Arithmetic, true>(vecs_wide, count, packed, RowStride<Arithmetic>, panel, width, tile, width, block > 0);
                else if constexpr (!Arithmetic::RowsOnly)
                  multiply_tile<Arithmetic>(vecs_wide, count,
                                            packed_a + (block - group) * padded * row_size + r / PanelRows * PanelRows * Arithmetic::BlockDepth + r % PanelRows,
                                            PanelRows, panel, width, tile, width, block > 0);
                if (block + 1 < depth_blocks) continue;
                const int64_t tile_rows = std::min(Arithmetic::Rows, rows - r);
                auto finish = [&](int64_t i, int64_t j, int64_t stride, auto span) {
                  epilogue(first_row + r + i, column + j, vec::load(tile + i * stride + j, full{}), span);
                };
                for (int64_t i = 0; i < tile_rows; ++i)
                  if (columns == TileVecs * L) {
#pragma GCC unroll 3
                    for (int64_t j = 0; j < TileVecs * L; j += L) finish(i, j, TileVecs * L, full{});
                  } else sweep(columns, [&](int64_t j, auto span) { finish(i, j, width, span); });
              }
            }
        }
      }
  });
}

}  // namespace fastlm
