// Operands of a product: packed into the panels that the register tile reads, from either orientation, 16-bit types
// being widened (or paired, for the bf16 dot product and for AMX) on the way. That costs 0.1–0.4 cycle an element and
// serves hundreds of rows or columns.
#pragma once
#include "gemm_tile.h"

namespace fastlm {

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
      const T* row = source.at(0, d * Per);
      const T* next = d * Per + 1 < k ? source.at(0, d * Per + 1) : nullptr;
      for (int64_t ahead = 0; ahead < Per;
           ++ahead)  // rows lie pages apart: no hardware follows them. Past the end a prefetch is harmless
        for (int64_t i = 0; i < width; i += 512 / storage<T>::Bits)
          __builtin_prefetch(source.at(i, (d + 8) * Per + ahead));
      if (count == TileVecs * L && width == count && (Per == 1 || next)) {  // most panels of B
#pragma GCC unroll 3
        for (int64_t i = 0; i < TileVecs * L; i += L)
          Arithmetic::along_i(storage<T>::at(row, i), Per == 1 ? nullptr : storage<T>::at(next, i), full{})
              .store(out + d * width + i, full{});
        continue;
      }
      for (int64_t i = 0; i < width; i += L) {
        const T *first = storage<T>::at(row, i), *after = next ? storage<T>::at(next, i) : nullptr;
        vec v = i >= count || d * Per >= k ? vec::zero()
                : i + L <= count           ? Arithmetic::along_i(first, after, full{})
                                           : Arithmetic::along_i(first, after, tail{size_t(count - i)});
        put(v, out + d * width + i, width - i);
      }
    }
    return;
  }
  for (int64_t i = 0; i < width; i += L) {
    for (int64_t d = 0; d < depth; d += L) {
      vec block[L];
      if (i + L <= count && (d + L) * Per <= k && i + L <= width) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < L; ++r) block[r] = Arithmetic::along_k(source.at(i + r, d * Per), L * Per);
        transpose(block);
#pragma GCC unroll 16
        for (int64_t r = 0; r < L; ++r) block[r].store(out + (d + r) * width + i, full{});
      } else {
        for (int64_t r = 0; r < L; ++r)
          block[r] = i + r < count ? Arithmetic::along_k(source.at(i + r, d * Per), k - d * Per) : vec::zero();
        transpose(block);
        for (int64_t r = 0; r < L && d + r < depth; ++r) put(block[r], out + (d + r) * width + i, width - i);
      }
    }
  }
}

// sums[i] += Σ_k of a packed panel. In runs of 32, so that the error grows with the square root of neither many
// additions nor large partial sums.
template <class Arithmetic> void add_panel_sums(const float* panel, int64_t depth, int64_t width, int64_t count,
                                                float* sums) {
  sweep(count, [=](int64_t i, auto span) {
    vec all = vec::zero();
    for (int64_t d = 0; d < depth; d += 32) {
      vec run = vec::zero();
      for (int64_t e = d; e < depth && e < d + 32; ++e)
        run = run + Arithmetic::total(vec::load(panel + e * width + i, span));
      all = all + run;
    }
    (vec::load(sums + i, span) + all).store(sums + i, span);
  });
}

// The same of `count` rows that lie row_stride apart.
template <class Arithmetic> void add_row_sums(const float* rows, int64_t depth, int64_t row_stride, int64_t count,
                                              float* sums) {
  for (int64_t r = 0; r < count; ++r)
    sums[r] += sum_over(
        depth, [=](int64_t d, auto span) { return Arithmetic::total(vec::load(rows + r * row_stride + d, span)); });
}

// Between rows of A that are packed as they lie: no power of two, which would crowd a few sets of the cache.
template <class Arithmetic> inline constexpr int64_t RowStride = Arithmetic::BlockDepth + 16;

// Rows as they lie, row_stride (whole vectors) apart; zeros up to the last tile.
template <class Arithmetic, class T> void copy_rows(operand<T> source, int64_t rows, int64_t k, int64_t row_stride,
                                                    float* out) {
  constexpr int64_t Per = Arithmetic::PerLane;
  const int64_t depth = packed_depth<Arithmetic>(k);
  for (int64_t r = 0; r < ceil_div(rows, Arithmetic::Rows) * Arithmetic::Rows; ++r) {
    float* to = out + r * row_stride;
    if (r >= rows) std::fill_n(to, depth, 0.0f);
    else
      sweep(depth,
            [=](int64_t d, auto) { Arithmetic::along_k(source.at(r, d * Per), k - d * Per).store(to + d, full{}); });
  }
}

// out[i·row_stride + d] = source (i, k) for i < count, zeros up to whole vectors; source is contiguous in i.
template <class Arithmetic, class T> void pack_as_rows(operand<T> source, int64_t count, int64_t k, int64_t row_stride,
                                                       float* out) {
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  for (int64_t first = 0; first < packed_depth<Arithmetic>(k); first += L)
    for (int64_t i = 0; i < count; i += L) {
      vec block[L];
#pragma GCC unroll 16
      for (int64_t r = 0; r < L; ++r) {
        const int64_t at = (first + r) * Per;
        const T *row = source.at(i, at), *next = at + 1 < k ? source.at(i, at + 1) : nullptr;
        block[r] = at >= k          ? vec::zero()
                   : i + L <= count ? Arithmetic::along_i(row, next, full{})
                                    : Arithmetic::along_i(row, next, tail{size_t(count - i)});
      }
      transpose(block);
#pragma GCC unroll 16
      for (int64_t r = 0; r < L; ++r) block[r].store(out + (i + r) * row_stride + first, full{});
    }
}

// `rows` rows of A, one block of k deep, in rows RowStride apart or in k-major panels of PanelRows.
template <class Arithmetic, class T> void pack_left(operand<T> source, int64_t rows, int64_t k, bool in_rows,
                                                    float* out) {
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  const int64_t depth = packed_depth<Arithmetic>(k);
  const bool along_k = source.stride != 1;
  if (in_rows && along_k) return copy_rows<Arithmetic>(source, rows, k, RowStride<Arithmetic>, out);
  if constexpr (Arithmetic::RowsOnly) return pack_as_rows<Arithmetic>(source, rows, k, RowStride<Arithmetic>, out);
  if (along_k) {
    for (int64_t i = 0; i < rows; i += PanelRows)
      pack<Arithmetic>(operand<T>{source.at(i, 0), source.stride, 1}, std::min(PanelRows, rows - i), k, PanelRows,
                       out + i * Arithmetic::BlockDepth);
    return;
  }
  for (int64_t d = 0; d < depth; ++d) {
    const T* row = source.at(0, d * Per);
    const T* next = d * Per + 1 < k ? source.at(0, d * Per + 1) : nullptr;
    float* to = out + d * PanelRows;
    for (int64_t i = 0; i < ceil_div(rows, PanelRows) * PanelRows; i += L) {
      const T *first = storage<T>::at(row, i), *after = next ? storage<T>::at(next, i) : nullptr;
      vec v = i + L <= rows ? Arithmetic::along_i(first, after, full{})
              : i < rows    ? Arithmetic::along_i(first, after, tail{size_t(rows - i)})
                            : vec::zero();
      v.store(to + i / PanelRows * PanelRows * Arithmetic::BlockDepth + i % PanelRows, full{});
    }
  }
}

// The cache lines of a block of B, a few at a time while another block is multiplied: what memory takes then costs
// little.
class prefetcher {
  const char *row = nullptr, *at = nullptr;
  int64_t rows = 0, row_bytes = 0, stride_bytes = 0;

 public:
  prefetcher() = default;
  template <class T> prefetcher(operand<T> source, int64_t count, int64_t k) {
    const bool along_k = source.stride != 1;
    row = at = reinterpret_cast<const char*>(source.data);
    rows = along_k ? count : k;
    row_bytes = (along_k ? k : count) * storage<T>::Bits / 8;
    stride_bytes = (along_k ? source.stride : source.k_stride) * storage<T>::Bits / 8;
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

}  // namespace fastlm
