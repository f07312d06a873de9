// C = A·B with an epilogue: the matrix product of all operators. 2·m·n·k FLOP, on m·k + k·n elements read and m·n
// written; compute bound from a few dozen rows on.
//
// C is cut into blocks of at most MC × NC, which threads compute independently. The rows of A in a block are packed
// once and stay in the L2 cache. B is packed in panels of KC lanes of k × NRVecs vectors of columns, which fit in L1,
// and all rows of A are multiplied by each panel; meanwhile the next panel of B is prefetched. With 8 lanes a panel may
// end within a cache line of C; then two adjacent panels form a group. gemm_pack.h packs, gemm_tile.h multiplies. The
// epilogue receives each finished vector of C once, while it is in the cache, so that a bias, an activation or an
// accumulation costs no pass over memory.
//
// Several matrices B of the same shape may be multiplied by one A. Their products are computed group of panels by group
// of panels, and the epilogue receives the same vector of all of them at once.
#pragma once
#include <array>
#include <numeric>
#include <utility>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#include "gemm_pack.h"
#include "threads.h"

namespace fastlm {

// `total` vectors cut into panels of at most NRVecs, of nearly equal width: 4 = 2 + 2, as a panel of one vector would
// waste two thirds of its loads.
struct panel_split {
  int64_t total, count;
  explicit panel_split(int64_t vecs) : total(vecs), count(ceil_div(vecs, NRVecs)) {}
  int64_t begin(int64_t p) const { return total * p / count; }  // in vectors
};

// A group of adjacent panels is multiplied by some rows of A before the next rows, so that the rows of C in a group are
// whole cache lines. Otherwise a line at a panel's edge would be evicted before the next panel writes its other half.
inline constexpr int64_t PanelBytes = NRVecs * vec::Lanes * 4, PanelsPerGroup = std::lcm(64, PanelBytes) / PanelBytes;
// The largest block of C: rows that one packed panel of B serves, and columns whose accumulators stay in the cache.
inline constexpr int64_t MC = 512, NC = 768;
inline constexpr int64_t RowsPerGroup = PanelsPerGroup > 1 ? 64 : MC;
inline constexpr int64_t MinPanelsToPack = 8;       // panels of B from which on packing A k-major pays
inline constexpr int64_t PanelsPackedTogether = 8;  // k-major panels of A: their columns are whole cache lines

// Bytes of the L2 cache for packed rows of A; the rest is for B and C. Where the system does not report the size of the
// cache, that of a small server is assumed.
inline int64_t lhs_cache_bytes() {
  int64_t size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
  size = reported;
#endif
  return (size > 0 ? std::clamp<int64_t>(size, 256 << 10, 4 << 20) : 1 << 20) * 9 / 20;
}

// How C is cut into blocks. No result depends on it: an element is the same chain of sums in any block.
struct blocking {
  int64_t row_blocks, col_blocks;
  blocking(int64_t m, int64_t n, int64_t k, int threads) : row_blocks(ceil_div(m, MC)), col_blocks(ceil_div(n, NC)) {
    for (;;) {
      const int64_t parts = row_blocks * col_blocks, rows = m / row_blocks, cols = n / col_blocks;
      const bool by_cols = cols > 48 && (cols >= rows || rows <= 64);
      if (parts >= 4 * threads || threads == 1 || (!by_cols && rows <= 64)) break;
      const double work = double(m) * double(n) * double(k) / double(parts);
      // At least one block per thread, if a block is 50 µs of work. More blocks balance the load better, but only if
      // each is half a millisecond of work and stays large: an element that is read is used in rows·cols / (rows +
      // cols) multiply-adds, and reading one from memory takes the time of a hundred.
      const double reuse =
          by_cols ? rows * (cols / 2.0) / (rows + cols / 2.0) : (rows / 2.0) * cols / (rows / 2.0 + cols);
      if (work < 4e6 || (parts >= threads && (work < 4e7 || reuse < 170))) break;
      (by_cols ? col_blocks : row_blocks) *= 2;
    }
    while (row_blocks * col_blocks > threads && row_blocks * col_blocks < 4 * threads &&
           row_blocks * col_blocks % threads && m / row_blocks > 64)
      ++row_blocks;  // a small number of blocks is made a multiple of the number of threads
    row_blocks = std::min(row_blocks, ceil_div(m, PanelRows));
    col_blocks = std::min(col_blocks, ceil_div(n, vec::Lanes));
  }
};

// k cut into blocks of at most KC lanes, of nearly equal depth.
struct k_block {
  int64_t first, count, lanes;  // the first k, the number of them, and the lanes that they take
};
template <class Arithmetic> struct k_blocks {
  int64_t k, steps, count;
  explicit k_blocks(int64_t k)
      : k(k),
        steps(packed_depth<Arithmetic>(k) / Arithmetic::KStep),
        count(std::max<int64_t>(1, ceil_div(packed_depth<Arithmetic>(k), Arithmetic::KC))) {}
  k_block operator[](int64_t i) const {
    const int64_t from = steps * i / count * Arithmetic::KStep,
                  lanes = steps * (i + 1) / count * Arithmetic::KStep - from;
    return {from * Arithmetic::PerLane, std::min(k - from * Arithmetic::PerLane, lanes * Arithmetic::PerLane), lanes};
  }
};

// An epilogue that writes C[i, j] to out[i·stride + j]. Where that pays, these cache lines are prefetched while the
// tile is multiplied.
template <class T, class Write> struct store_epilogue : Write {
  T* out;
  int64_t stride;
  FASTLM_INLINE void prefetch(int64_t i, int64_t j) const {
    if constexpr (SmallTiles)
      for (int64_t ahead = 0; ahead < NRVecs * vec::Lanes; ahead += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(out + i * stride + j + ahead, 1, 3);
  }
};
template <class T, class Write> store_epilogue<T, Write> storing_to(T* out, int64_t stride, Write write) {
  return {write, out, stride};
}

// The same for an epilogue that also reads in[i·stride + j], if `in` is not null. Hardware prefetchers do not follow
// the rows of a tile.
template <class In, class T, class Write> struct update_epilogue : store_epilogue<T, Write> {
  const In* in;
  FASTLM_INLINE void prefetch(int64_t i, int64_t j) const {
    if (in)
      for (int64_t ahead = 0; ahead < NRVecs * vec::Lanes; ahead += 64 / int64_t(sizeof(In)))
        __builtin_prefetch(in + i * this->stride + j + ahead, 0, 3);
    store_epilogue<T, Write>::prefetch(i, j);
  }
};
template <class In, class T, class Write> update_epilogue<In, T, Write> updating_from(const In* in, T* out,
                                                                                      int64_t stride, Write write) {
  return {{write, out, stride}, in};
}
template <class T> FASTLM_INLINE auto store_to(T* out, int64_t stride) {
  return storing_to(out, stride,
                    [=](int64_t i, int64_t j, vec value, auto span) { value.store(out + i * stride + j, span); });
}

// The rows of A in a block of C. The register tile reads them unpacked, from packed rows RowStride apart, or from
// k-major panels: whichever is fastest for their sizes.
template <class Arithmetic, class T> struct lhs_block {
  operand<T> a;  // from the block's first row on
  int64_t rows;
  bool row_major, unpacked;
  float *packed = nullptr, *sums = nullptr;  // sums over k, or null

  // Small tiles read k-major panels faster than long rows, which pays for packing if there are many columns. Rows whose
  // memory already equals the packed lanes need no packing, unless their stride is a multiple of the page size, where
  // they would compete for a few sets of the cache.
  lhs_block(operand<T> a, int64_t rows, k_blocks<Arithmetic> blocks, int64_t b_panels) : a(a), rows(rows) {
    constexpr int64_t Per = Arithmetic::PerLane;
    const bool along_k = a.stride != 1;
    row_major =
        Arithmetic::RowMajorOnly || (along_k && !(SmallTiles && blocks.count > 1 && b_panels >= MinPanelsToPack));
    unpacked = row_major && along_k && storage<T>::Bits * Per == 32 && a.stride % (1024 * Per) != 0 &&
               a.stride % Per == 0 && blocks.k % (Per * Arithmetic::KStep) == 0 &&
               reinterpret_cast<uintptr_t>(a.data) % 4 == 0;
  }
  int64_t padded() const { return ceil_div(rows, PanelRows) * PanelRows; }
  int64_t row_size() const { return row_major ? RowStride<Arithmetic> : Arithmetic::KC; }
  bool direct(int64_t r) const { return unpacked && r + Arithmetic::MR <= rows; }

  // Called for each tile in order: packs the rows of this tile, or of several, and prefetches those of a tile that is
  // packed next, as hardware prefetchers do not follow rows that are pages apart. `held` is the number of k blocks that
  // are packed already.
  FASTLM_INLINE void pack(int64_t r, const k_block& block, int64_t held) const {
    if (direct(r)) return;
    const int64_t together = row_major && a.stride != 1 ? Arithmetic::MR : PanelsPackedTogether * PanelRows;
    if (r % together == 0) pack(r, std::min(together, rows - r), block, packed + (held * padded() + r) * row_size());
    if (const int64_t ahead = r + together; a.stride != 1 && ahead < rows) {
      prefetcher next(a.from(ahead, block.first), std::min(Arithmetic::MR, rows - ahead), block.count);
      next.fetch(next.lines());
    }
  }
  FASTLM_INLINE void pack(int64_t r, int64_t some, const k_block& block, float* to) const {
    pack_lhs<Arithmetic>(a.from(r, block.first), some, block.count, row_major, to);
    if (!sums) return;
    if constexpr (Arithmetic::RowMajorOnly) add_row_sums<Arithmetic>(to, block.lanes, row_size(), some, sums + r);
    else
      for (int64_t i = 0; i < some; i += PanelRows)
        add_panel_sums<Arithmetic>(to + i * row_size(), block.lanes, PanelRows, std::min(PanelRows, some - i),
                                   sums + r + i);
  }

  // tile (MR × vecs·Lanes) = rows from r on times a panel of B, or += where `accumulate`.
  FASTLM_INLINE void multiply(int64_t r, const k_block& block, int64_t held, int64_t vecs, const float* panel,
                              float* tile, bool accumulate) const {
    const int64_t width = vecs * vec::Lanes;
    const float* block_at = packed + held * padded() * row_size();
    if (direct(r))
      multiply_tile<Arithmetic, true>(vecs, block.lanes, reinterpret_cast<const float*>(a.at(r, block.first)),
                                      a.stride / Arithmetic::PerLane, panel, width, tile, width, accumulate);
    else if (row_major)
      multiply_tile<Arithmetic, true>(vecs, block.lanes, block_at + r * row_size(), RowStride<Arithmetic>, panel, width,
                                      tile, width, accumulate);
    else if constexpr (!Arithmetic::RowMajorOnly)
      multiply_tile<Arithmetic>(vecs, block.lanes,
                                block_at + r / PanelRows * PanelRows * Arithmetic::KC + r % PanelRows, PanelRows, panel,
                                width, tile, width, accumulate);
  }
};

// The matrices that are multiplied by the same A, all of one shape.
template <class T, size_t Count> using operands = std::array<operand<T>, Count>;

// The columns of each B in a block of C, in panels. A group of them is packed at a time.
template <class Arithmetic, class T, size_t Count> struct rhs_block {
  static constexpr int64_t L = vec::Lanes, PanelSize = Arithmetic::KC * NRVecs * L;
  operands<T, Count> b;  // from the block's first column on
  int64_t columns;       // that exist
  panel_split split;
  float *packed = nullptr, *sums = nullptr;  // sums over k, or null

  rhs_block(const operands<T, Count>& sources, int64_t first_column, int64_t n, int64_t vecs)
      : columns(n - first_column), split(vecs) {
    for (size_t i = 0; i < Count; ++i) b[i] = sources[i].from(first_column, 0);
  }

  int64_t first(int64_t p) const { return split.begin(p) * L; }
  int64_t vecs(int64_t p) const { return split.begin(p + 1) - split.begin(p); }
  int64_t columns_of(int64_t p, int64_t end) const { return std::min(first(end), columns) - first(p); }
  operand<T> at(size_t source, int64_t p, const k_block& block) const { return b[source].from(first(p), block.first); }

  void pack(size_t source, int64_t p0, int64_t p1, const k_block& block) const {
    for (int64_t p = p0; p < p1; ++p) {
      float* to = packed + (p - p0) * PanelSize;
      fastlm::pack<Arithmetic>(at(source, p, block), columns_of(p, p + 1), block.count, vecs(p) * L, to);
      if (sums) add_panel_sums<Arithmetic>(to, block.lanes, vecs(p) * L, columns_of(p, p + 1), sums + first(p));
    }
  }
  prefetcher fetching(size_t source, int64_t p0, int64_t p1, const k_block& block) const {
    return {at(source, p0, block), columns_of(p0, p1), block.count};
  }
};

// epilogue(i, j, value…, span) for the vectors of sums at `at`, one of each product, `apart` from each other.
template <class Arithmetic, size_t Count, class Epilogue, class Span>
FASTLM_INLINE void finish_vector(const float* at, int64_t apart, int64_t i, int64_t j, Span span, Epilogue& epilogue) {
  using accumulator = typename Arithmetic::accumulator;
  [&]<size_t... Source>(std::index_sequence<Source...>) __attribute__((always_inline)) {
    epilogue(i, j, Arithmetic::value(accumulator::load(at + int64_t(Source) * apart, full{}))..., span);
  }(std::make_index_sequence<Count>{});
}

// The same for all vectors of a finished tile at (row, column), whose rows are `width` apart.
template <class Arithmetic, size_t Count, class Epilogue>
FASTLM_INLINE void apply_epilogue(const float* tile, int64_t apart, int64_t rows, int64_t columns, int64_t width,
                                  int64_t row, int64_t column, Epilogue epilogue) {
  constexpr int64_t L = vec::Lanes, Whole = NRVecs * L;
  for (int64_t i = 0; i < rows; ++i)
    if (columns == Whole) {
#pragma GCC unroll 3
      for (int64_t j = 0; j < Whole; j += L)
        finish_vector<Arithmetic, Count>(tile + i * Whole + j, apart, row + i, column + j, full{}, epilogue);
    } else
      sweep(columns, [&](int64_t j, auto span) {
        finish_vector<Arithmetic, Count>(tile + i * width + j, apart, row + i, column + j, span, epilogue);
      });
}

// epilogue(i, j, value…, span): each value holds C[i, j], C[i, j + 1], … of one product. a_sums (m; A contiguous along
// m) and b_sums (n), where not null, are increased by the sums over k of A and of the only B.
template <class Arithmetic, class TA, class TB, size_t Count, class Epilogue>
void gemm(int64_t m, int64_t n, int64_t k, operand<TA> a, const operands<TB, Count>& b, int threads, Epilogue epilogue,
          float* a_sums = nullptr, float* b_sums = nullptr) {
  constexpr int64_t L = vec::Lanes;
  blocking grid(m, int64_t(Count) * n, k, threads);
  const k_blocks<Arithmetic> blocks(k);
  const int64_t row_panels = ceil_div(m, PanelRows), col_vecs = ceil_div(n, L);
  grid.col_blocks = std::min(grid.col_blocks, col_vecs);

  parallel_parts(grid.row_blocks * grid.col_blocks, threads, [=](int64_t part) {
    [[maybe_unused]] const typename Arithmetic::session multiplying;
    const int64_t row_block = part % grid.row_blocks,
                  col_block = part / grid.row_blocks;  // consecutive parts share columns of B
    const int64_t first_row = row_panels * row_block / grid.row_blocks * PanelRows,
                  rows = std::min(m, row_panels * (row_block + 1) / grid.row_blocks * PanelRows) - first_row;
    const int64_t first_vec = col_vecs * col_block / grid.col_blocks,
                  vecs = col_vecs * (col_block + 1) / grid.col_blocks - first_vec, first_column = first_vec * L;
    using rhs_type = rhs_block<Arithmetic, TB, Count>;
    rhs_type rhs(b, first_column, n, vecs);
    lhs_block<Arithmetic, TA> lhs(a.from(first_row, 0), rows, blocks, int64_t(Count) * rhs.split.count);

    // As many k blocks of A are packed at a time as the cache holds. If these are all, accumulators are kept for one
    // group of panels only.
    const int64_t block_size = lhs.padded() * lhs.row_size(),
                  resident = std::clamp<int64_t>(lhs_cache_bytes() / (4 * block_size), 1, blocks.count);
    const bool single_tile = blocks.count == 1 && Count == 1, keep_all_panels = resident < blocks.count;
    const int64_t sums_size = lhs.padded() * (keep_all_panels ? vecs : PanelsPerGroup * NRVecs) * L;  // of a product
    lhs.packed = scratch(resident * block_size + PanelsPerGroup * rhs_type::PanelSize + int64_t(Count) * sums_size);
    rhs.packed = lhs.packed + resident * block_size;
    // Accumulators: panel by panel, the rows of each tile one after another; of one tile only with a single k block of
    // a single product.
    float* sums = rhs.packed + PanelsPerGroup * rhs_type::PanelSize;
    if (a_sums && col_block == 0) lhs.sums = a_sums + first_row;
    if (b_sums && row_block == 0) rhs.sums = b_sums + first_column;

    for (int64_t group = 0; group < blocks.count; group += resident)
      for (int64_t p0 = 0; p0 < rhs.split.count; p0 += PanelsPerGroup) {
        const int64_t p1 = std::min(rhs.split.count, p0 + PanelsPerGroup),
                      group_end = std::min(blocks.count, group + resident);
        for (size_t source = 0; source < Count; ++source)
          for (int64_t index = group; index < group_end; ++index) {
            const k_block block = blocks[index];
            const bool last_source = source + 1 == Count, finishes = last_source && index + 1 == blocks.count;
            rhs.pack(source, p0, p1, block);
            prefetcher next;
            const bool next_block = index + 1 < group_end;
            const int64_t next_index = next_block ? index + 1 : group, next_p = next_block || !last_source ? p0 : p1;
            const size_t next_source = next_block ? source : (source + 1) % Count;
            if (next_p < rhs.split.count)
              next = rhs.fetching(next_source, next_p, std::min(rhs.split.count, next_p + PanelsPerGroup),
                                  blocks[next_index]);
            const int64_t lines = ceil_div(next.lines() * Arithmetic::MR, rows * (p1 - p0));
            for (int64_t first = 0; first < rows; first += RowsPerGroup)
              for (int64_t p = p0; p < p1; ++p) {
                const int64_t panel_vecs = rhs.vecs(p), width = panel_vecs * L, column = first_column + rhs.first(p),
                              columns = rhs.columns_of(p, p + 1);
                float* panel_sums =
                    sums + (single_tile ? 0 : lhs.padded() * (rhs.first(p) - (keep_all_panels ? 0 : rhs.first(p0))));
                for (int64_t r = first; r < std::min(rows, first + RowsPerGroup); r += Arithmetic::MR) {
                  float* tile = single_tile ? panel_sums : panel_sums + r * width;  // of the first product
                  next.fetch(lines);
                  if (p == 0 && source == 0) lhs.pack(r, block, index - group);
                  if constexpr (requires { epilogue.prefetch(r, column); })
                    if (finishes)
#pragma GCC unroll 4
                      for (int64_t i = 0; i < MR; ++i) epilogue.prefetch(first_row + r + i, column);
                  lhs.multiply(r, block, index - group, panel_vecs, rhs.packed + (p - p0) * rhs_type::PanelSize,
                               tile + int64_t(source) * sums_size, index > 0);
                  if (finishes)
                    apply_epilogue<Arithmetic, Count>(tile, sums_size, std::min(Arithmetic::MR, rows - r), columns,
                                                      width, first_row + r, column, epilogue);
                }
              }
          }
      }
  });
}

}  // namespace fastlm
