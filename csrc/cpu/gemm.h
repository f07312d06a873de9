// C = A·B with an epilogue, the matrix product under every operator. 2·m·n·k FLOP; compute bound from a few dozen rows
// on.
//
// A block of C (up to 512 rows) is one part of the work. Its rows of A are packed once and stay in the L2 cache; then,
// panel after panel of up to three vectors of columns (with 8 lanes, where such a panel ends within a cache line, two
// beside each other), a block of B (≤ 192 deep) is packed into L1 and all the rows pass by it. While one block of B is
// multiplied the next is fetched from memory. Packing (gemm_pack.h) takes 1–3 % of the multiplication (gemm_tile.h).
// The epilogue sees each finished vector of C once, while it is in the cache: a bias, an activation, what the result is
// added to cost no pass over memory.
#pragma once
#include <numeric>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#include "gemm_pack.h"
#include "threads.h"

namespace fastlm {

// `total` vectors in panels of at most TileVecs, as equal as they can be (4 = 2 + 2: a panel of one vector would waste
// two thirds of its loads).
struct panels {
  int64_t total, count;
  explicit panels(int64_t vecs) : total(vecs), count(ceil_div(vecs, TileVecs)) {}
  int64_t begin(int64_t p) const { return total * p / count; }  // in vectors
};

// So many panels beside each other are multiplied by some rows of A before the next rows: together their rows of C are
// whole cache lines. One by one, a line at an edge would have left the cache when the next panel writes its other half.
inline constexpr int64_t PanelBytes = TileVecs * vec::Lanes * 4, Abreast = std::lcm(64, PanelBytes) / PanelBytes;
inline constexpr int64_t PartRows = 512,
                         PartColumns = 768;  // of C, at most: what one packing serves, and sums that stay near
inline constexpr int64_t RowsAbreast = Abreast > 1 ? 64 : PartRows;
inline constexpr int64_t PackedFrom = 8;  // panels of B: with so many columns
inline constexpr int64_t PackedTogether =
    8;  // k-major panels of A: so many read whole cache lines, and each page, once

// Bytes of the L2 cache that rows of A may take: the rest is for what streams by. Where the system does not tell its
// size, that of a small server's.
inline int64_t cache_for_rows() {
  int64_t size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
  size = reported;
#endif
  return (size > 0 ? std::clamp<int64_t>(size, 256 << 10, 4 << 20) : 1 << 20) * 9 / 20;
}

// How C is cut. Only the order of the work follows from it and no result: an element is the same chain of sums however
// C is cut.
struct blocking {
  int64_t row_blocks, col_blocks;
  blocking(int64_t m, int64_t n, int64_t k, int threads)
      : row_blocks(ceil_div(m, PartRows)), col_blocks(ceil_div(n, PartColumns)) {
    for (;;) {
      const int64_t parts = row_blocks * col_blocks, rows = m / row_blocks, cols = n / col_blocks;
      const bool by_cols = cols > 48 && (cols >= rows || rows <= 64);
      if (parts >= 4 * threads || threads == 1 || (!by_cols && rows <= 64)) break;
      const double work = double(m) * double(n) * double(k) / double(parts);
      // A part for each thread, from 50 µs of work on. More of them, so that a late one holds up little, where they are
      // worth half a millisecond and stay large: an element that is read serves rows·cols / (rows + cols)
      // multiply-adds, and memory gives one in the time of a hundred.
      const double served =
          by_cols ? rows * (cols / 2.0) / (rows + cols / 2.0) : (rows / 2.0) * cols / (rows / 2.0 + cols);
      if (work < 4e6 || (parts >= threads && (work < 4e7 || served < 170))) break;
      (by_cols ? col_blocks : row_blocks) *= 2;
    }
    while (row_blocks * col_blocks > threads && row_blocks * col_blocks < 4 * threads &&
           row_blocks * col_blocks % threads && m / row_blocks > 64)
      ++row_blocks;  // few parts are shared out evenly
    row_blocks = std::min(row_blocks, ceil_div(m, PanelRows));
    col_blocks = std::min(col_blocks, ceil_div(n, vec::Lanes));
  }
};

// k cut into blocks, each as deep as a packed panel may be.
struct block_of_k {
  int64_t first, count, lanes;  // of k, and the lanes that they take
};
template <class Arithmetic> struct blocks_of_k {
  int64_t k, steps, count;
  explicit blocks_of_k(int64_t k)
      : k(k),
        steps(packed_depth<Arithmetic>(k) / Arithmetic::DepthStep),
        count(std::max<int64_t>(1, ceil_div(packed_depth<Arithmetic>(k), Arithmetic::BlockDepth))) {}
  block_of_k operator[](int64_t i) const {
    const int64_t from = steps * i / count * Arithmetic::DepthStep,
                  lanes = steps * (i + 1) / count * Arithmetic::DepthStep - from;
    return {from * Arithmetic::PerLane, std::min(k - from * Arithmetic::PerLane, lanes * Arithmetic::PerLane), lanes};
  }
};

// An epilogue that writes C[i, j] to out[i·stride + j], and says so: where that pays, its cache lines are fetched while
// the tile is multiplied.
template <class T, class Write> struct writing : Write {
  T* out;
  int64_t stride;
  FASTLM_INLINE void prefetch(int64_t i, int64_t j) const {
    if constexpr (SmallTiles)
      for (int64_t ahead = 0; ahead < TileVecs * vec::Lanes; ahead += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(out + i * stride + j + ahead, 1, 3);
  }
};
template <class T, class Write> writing<T, Write> writing_to(T* out, int64_t stride, Write write) {
  return {write, out, stride};
}

// One that reads in[i·stride + j] as well, or nothing where that is null. No hardware foresees eight rows of a tile,
// and memory is far.
template <class In, class T, class Write> struct updating : writing<T, Write> {
  const In* in;
  FASTLM_INLINE void prefetch(int64_t i, int64_t j) const {
    if (in)
      for (int64_t ahead = 0; ahead < TileVecs * vec::Lanes; ahead += 64 / int64_t(sizeof(In)))
        __builtin_prefetch(in + i * this->stride + j + ahead, 0, 3);
    writing<T, Write>::prefetch(i, j);
  }
};
template <class In, class T, class Write> updating<In, T, Write> updating_from(const In* in, T* out, int64_t stride,
                                                                               Write write) {
  return {{write, out, stride}, in};
}
template <class T> FASTLM_INLINE auto store_to(T* out, int64_t stride) {
  return writing_to(out, stride,
                    [=](int64_t i, int64_t j, vec value, auto span) { value.store(out + i * stride + j, span); });
}

// Rows of a part are read by the register tile as they lie, from rows RowStride apart, or from k-major panels:
// whichever is fastest for their sizes.
template <class Arithmetic, class T> struct left_side {
  operand<T> a;  // from the part's first row on
  int64_t rows;
  bool in_rows, as_is;
  float *packed = nullptr, *sums = nullptr;  // sums over k, or null

  // Small tiles read k-major panels faster than pieces of long rows, which is worth packing them for so many columns.
  // Rows that hold what the lanes shall hold need no packing, unless they lie whole pages apart and would crowd a few
  // sets of the cache.
  left_side(operand<T> a, int64_t rows, blocks_of_k<Arithmetic> blocks, int64_t b_panels) : a(a), rows(rows) {
    constexpr int64_t Per = Arithmetic::PerLane;
    const bool along_k = a.stride != 1;
    in_rows = Arithmetic::RowsOnly || (along_k && !(SmallTiles && blocks.count > 1 && b_panels >= PackedFrom));
    as_is = in_rows && along_k && storage<T>::Bits * Per == 32 && a.stride % (1024 * Per) != 0 && a.stride % Per == 0 &&
            blocks.k % (Per * Arithmetic::DepthStep) == 0 && reinterpret_cast<uintptr_t>(a.data) % 4 == 0;
  }
  int64_t padded() const { return ceil_div(rows, PanelRows) * PanelRows; }
  int64_t row_size() const { return in_rows ? RowStride<Arithmetic> : Arithmetic::BlockDepth; }
  bool direct(int64_t r) const { return as_is && r + Arithmetic::Rows <= rows; }

  // Called for each tile in turn: packs what it and the next ones read. `held` counts the blocks of k that are packed
  // already.
  FASTLM_INLINE void pack(int64_t r, const block_of_k& block, int64_t held) const {
    const bool row_by_row = in_rows && a.stride != 1;
    if (direct(r) || !(row_by_row || r % (PackedTogether * PanelRows) == 0)) return;
    const int64_t some = std::min(row_by_row ? Arithmetic::Rows : PackedTogether * PanelRows, rows - r);
    float* to = packed + (held * padded() + r) * row_size();
    pack_left<Arithmetic>(a.from(r, block.first), some, block.count, in_rows, to);
    if (!sums) return;
    if constexpr (Arithmetic::RowsOnly) add_row_sums<Arithmetic>(to, block.lanes, row_size(), some, sums + r);
    else
      for (int64_t i = 0; i < some; i += PanelRows)
        add_panel_sums<Arithmetic>(to + i * row_size(), block.lanes, PanelRows, std::min(PanelRows, some - i),
                                   sums + r + i);
  }

  // tile (Rows × vecs·Lanes) = rows from r on times a panel of B, or += where `accumulate`
  FASTLM_INLINE void multiply(int64_t r, const block_of_k& block, int64_t held, int64_t vecs, const float* panel,
                              float* tile, bool accumulate) const {
    const int64_t width = vecs * vec::Lanes;
    const float* block_at = packed + held * padded() * row_size();
    if (direct(r))
      multiply_tile<Arithmetic, true>(vecs, block.lanes, reinterpret_cast<const float*>(a.at(r, block.first)),
                                      a.stride / Arithmetic::PerLane, panel, width, tile, width, accumulate);
    else if (in_rows)
      multiply_tile<Arithmetic, true>(vecs, block.lanes, block_at + r * row_size(), RowStride<Arithmetic>, panel, width,
                                      tile, width, accumulate);
    else if constexpr (!Arithmetic::RowsOnly)
      multiply_tile<Arithmetic>(vecs, block.lanes,
                                block_at + r / PanelRows * PanelRows * Arithmetic::BlockDepth + r % PanelRows,
                                PanelRows, panel, width, tile, width, accumulate);
  }
};

// Columns of a part, in panels of which Abreast are packed at a time.
template <class Arithmetic, class T> struct right_side {
  static constexpr int64_t L = vec::Lanes, PanelSize = Arithmetic::BlockDepth * TileVecs * L;
  operand<T> b;     // from the part's first column on
  int64_t columns;  // that exist
  panels split;
  float *packed = nullptr, *sums = nullptr;  // sums over k, or null

  int64_t first(int64_t p) const { return split.begin(p) * L; }
  int64_t vecs(int64_t p) const { return split.begin(p + 1) - split.begin(p); }
  int64_t columns_of(int64_t p, int64_t end) const { return std::min(first(end), columns) - first(p); }
  operand<T> at(int64_t p, const block_of_k& block) const { return b.from(first(p), block.first); }

  void pack(int64_t p0, int64_t p1, const block_of_k& block) const {
    for (int64_t p = p0; p < p1; ++p) {
      float* to = packed + (p - p0) * PanelSize;
      fastlm::pack<Arithmetic>(at(p, block), columns_of(p, p + 1), block.count, vecs(p) * L, to);
      if (sums) add_panel_sums<Arithmetic>(to, block.lanes, vecs(p) * L, columns_of(p, p + 1), sums + first(p));
    }
  }
  prefetcher fetching(int64_t p0, int64_t p1, const block_of_k& block) const {
    return {at(p0, block), columns_of(p0, p1), block.count};
  }
};

// A tile's rows, `width` apart, to epilogue(i, j, value, span) from (row, column) on.
template <class Arithmetic, class Epilogue>
FASTLM_INLINE void finish(const float* tile, int64_t rows, int64_t columns, int64_t width, int64_t row, int64_t column,
                          Epilogue epilogue) {
  constexpr int64_t L = vec::Lanes, Whole = TileVecs * L;
  using accumulator = typename Arithmetic::accumulator;
  for (int64_t i = 0; i < rows; ++i)
    if (columns == Whole) {
#pragma GCC unroll 3
      for (int64_t j = 0; j < Whole; j += L)
        epilogue(row + i, column + j, Arithmetic::value(accumulator::load(tile + i * Whole + j, full{})), full{});
    } else
      sweep(columns, [&](int64_t j, auto span) {
        epilogue(row + i, column + j, Arithmetic::value(accumulator::load(tile + i * width + j, full{})), span);
      });
}

// epilogue(i, j, value, span): value holds C[i, j…]. a_sums (m; A contiguous along m) and b_sums (n), where given, are
// increased by the sums over k of A and of B.
template <class Arithmetic, class TA, class TB, class Epilogue>
void gemm(int64_t m, int64_t n, int64_t k, operand<TA> a, operand<TB> b, int threads, Epilogue epilogue,
          float* a_sums = nullptr, float* b_sums = nullptr) {
  constexpr int64_t L = vec::Lanes;
  const blocking cut(m, n, k, threads);
  const blocks_of_k<Arithmetic> blocks(k);
  const int64_t row_panels = ceil_div(m, PanelRows), col_vecs = ceil_div(n, L);

  parallel_parts(cut.row_blocks * cut.col_blocks, threads, [=](int64_t part) {
    [[maybe_unused]] const typename Arithmetic::session multiplying;
    const int64_t row_block = part % cut.row_blocks,
                  col_block = part / cut.row_blocks;  // neighbours in time share columns of B
    const int64_t first_row = row_panels * row_block / cut.row_blocks * PanelRows,
                  rows = std::min(m, row_panels * (row_block + 1) / cut.row_blocks * PanelRows) - first_row;
    const int64_t first_vec = col_vecs * col_block / cut.col_blocks,
                  vecs = col_vecs * (col_block + 1) / cut.col_blocks - first_vec, first_column = first_vec * L;
    using right_type = right_side<Arithmetic, TB>;
    right_type right{b.from(first_column, 0), n - first_column, panels(vecs)};
    left_side<Arithmetic, TA> left(a.from(first_row, 0), rows, blocks, right.split.count);

    // As many blocks of k at a time as the cache holds of A. If that is all of them, sums are kept for one panel only.
    const int64_t block_size = left.padded() * left.row_size(),
                  together = std::clamp<int64_t>(cache_for_rows() / (4 * block_size), 1, blocks.count);
    const bool at_once = blocks.count == 1, all_panels = together < blocks.count;
    left.packed = scratch(together * block_size + Abreast * right_type::PanelSize +
                          left.padded() * (all_panels ? vecs : Abreast * TileVecs) * L);
    right.packed = left.packed + together * block_size;
    float* sums = right.packed + Abreast * right_type::PanelSize;  // C so far: panel by panel, each tile's rows one
                                                                   // after another; a tile's alone, if `at_once`
    if (a_sums && col_block == 0) left.sums = a_sums + first_row;
    if (b_sums && row_block == 0) right.sums = b_sums + first_column;

    for (int64_t group = 0; group < blocks.count; group += together)
      for (int64_t p0 = 0; p0 < right.split.count; p0 += Abreast) {
        const int64_t p1 = std::min(right.split.count, p0 + Abreast),
                      group_end = std::min(blocks.count, group + together);
        for (int64_t index = group; index < group_end; ++index) {
          const block_of_k block = blocks[index];
          right.pack(p0, p1, block);
          prefetcher next;
          const int64_t next_index = index + 1 < group_end ? index + 1 : group,
                        next_p = index + 1 < group_end ? p0 : p1;
          if (next_p < right.split.count)
            next = right.fetching(next_p, std::min(right.split.count, next_p + Abreast), blocks[next_index]);
          const int64_t lines = ceil_div(next.lines() * Arithmetic::Rows, rows * (p1 - p0));
          for (int64_t first = 0; first < rows; first += RowsAbreast)
            for (int64_t p = p0; p < p1; ++p) {
              const int64_t panel_vecs = right.vecs(p), width = panel_vecs * L, column = first_column + right.first(p),
                            columns = right.columns_of(p, p + 1);
              float* panel_sums =
                  sums + (at_once ? 0 : left.padded() * (right.first(p) - (all_panels ? 0 : right.first(p0))));
              for (int64_t r = first; r < std::min(rows, first + RowsAbreast); r += Arithmetic::Rows) {
                float* tile = at_once ? panel_sums : panel_sums + r * width;
                next.fetch(lines);
                if (p == 0) left.pack(r, block, index - group);
                if constexpr (requires { epilogue.prefetch(r, column); })
                  if (index + 1 == blocks.count)
#pragma GCC unroll 4
                    for (int64_t i = 0; i < TileRows; ++i) epilogue.prefetch(first_row + r + i, column);
                left.multiply(r, block, index - group, panel_vecs, right.packed + (p - p0) * right_type::PanelSize,
                              tile, index > 0);
                if (index + 1 == blocks.count)
                  finish<Arithmetic>(tile, std::min(Arithmetic::Rows, rows - r), columns, width, first_row + r, column,
                                     epilogue);
              }
            }
        }
      }
  });
}

}  // namespace fastlm
