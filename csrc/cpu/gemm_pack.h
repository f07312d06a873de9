// Packing of operands into the panels that the register tile reads, from either orientation. 16-bit elements are
// widened, or paired for the bf16 dot product and AMX, while they are packed. Packing takes 0.1–0.4 cycles an element,
// and a packed element is used by hundreds of rows or columns.
#pragma once
#include "gemm_tile.h"

namespace fastlm {

// out[d·width + i] = source(i, k) for i < count, 0 beyond; d counts lanes of k.
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
      // Hardware prefetchers do not follow rows that are pages apart. A prefetch past the end is harmless.
      for (int64_t ahead = 0; ahead < Per; ++ahead)
        for (int64_t i = 0; i < width; i += 512 / storage<T>::Bits)
          __builtin_prefetch(source.at(i, (d + 8) * Per + ahead));
      if (count == NRVecs * L && width == count && (Per == 1 || next)) {  // most panels of B
#pragma GCC unroll 3
        for (int64_t i = 0; i < NRVecs * L; i += L)
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

// sums[i] += Σ_k of a packed panel, in runs of 32: shorter chains of smaller partial sums round less.
template <class Arithmetic> void add_panel_sums(const float* panel, int64_t depth, int64_t width, int64_t count,
                                                float* sums) {
  sweep(count, [=](int64_t i, auto span) {
    vec all = vec::zero();
    for (int64_t d = 0; d < depth; d += 32) {
      vec run = vec::zero();
      for (int64_t e = d; e < depth && e < d + 32; ++e)
        run = run + Arithmetic::lane_sum(vec::load(panel + e * width + i, span));
      all = all + run;
    }
    (vec::load(sums + i, span) + all).store(sums + i, span);
  });
}

// The same of `count` rows, row_stride apart.
template <class Arithmetic> void add_row_sums(const float* rows, int64_t depth, int64_t row_stride, int64_t count,
                                              float* sums) {
  for (int64_t r = 0; r < count; ++r)
    sums[r] += sum_over(
        depth, [=](int64_t d, auto span) { return Arithmetic::lane_sum(vec::load(rows + r * row_stride + d, span)); });
}

// The stride of rows of A that are packed row-major. Not a power of two, so that rows do not compete for a few sets of
// the cache.
template <class Arithmetic> inline constexpr int64_t RowStride = Arithmetic::KC + 16;

// Packs rows row-major, row_stride (whole vectors) apart, with zero rows up to a whole tile.
template <class Arithmetic, class T> void copy_rows(operand<T> source, int64_t rows, int64_t k, int64_t row_stride,
                                                    float* out) {
  constexpr int64_t Per = Arithmetic::PerLane;
  const int64_t depth = packed_depth<Arithmetic>(k);
  for (int64_t r = 0; r < ceil_div(rows, Arithmetic::MR) * Arithmetic::MR; ++r) {
    float* to = out + r * row_stride;
    if (r >= rows) std::fill_n(to, depth, 0.0f);
    else
      sweep(depth,
            [=](int64_t d, auto) { Arithmetic::along_k(source.at(r, d * Per), k - d * Per).store(to + d, full{}); });
  }
}

// out[i·row_stride + d] = source(i, k) for i < count, with zeros up to whole vectors; source is contiguous in i.
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

// Packs one k block of `rows` rows of A, into rows RowStride apart or into k-major panels of PanelRows.
template <class Arithmetic, class T> void pack_lhs(operand<T> source, int64_t rows, int64_t k, bool row_major,
                                                   float* out) {
  constexpr int64_t L = vec::Lanes, Per = Arithmetic::PerLane;
  const int64_t depth = packed_depth<Arithmetic>(k);
  const bool along_k = source.stride != 1;
  if (row_major && along_k) return copy_rows<Arithmetic>(source, rows, k, RowStride<Arithmetic>, out);
  if constexpr (Arithmetic::RowMajorOnly) return pack_as_rows<Arithmetic>(source, rows, k, RowStride<Arithmetic>, out);
  if (along_k) {
    for (int64_t i = 0; i < rows; i += PanelRows)
      pack<Arithmetic>(operand<T>{source.at(i, 0), source.stride, 1}, std::min(PanelRows, rows - i), k, PanelRows,
                       out + i * Arithmetic::KC);
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
      v.store(to + i / PanelRows * PanelRows * Arithmetic::KC + i % PanelRows, full{});
    }
  }
}

// Prefetches the cache lines of a block of B, a few at a time while another block is multiplied.
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
      if (at >= row + row_bytes + 63) {  // an unaligned row touches one line more
        row += stride_bytes, at = row;
        --rows;
      }
    }
  }
};

}  // namespace fastlm
