// RMSNorm after the residual sum:  s = residual + dropout(x),  n = s·rstd,  rstd = 1/√(mean(s²) + eps),
// y = T(n)·w as Llama rounds it (T is x's dtype), or n·(1 + w) as Gemma does.
//
// Memory bound. Forward reads x and residual and writes y and s: 4·rows·width elements. Backward reads dy, ds and s
// and writes dresidual, and dx where dropout or the dtype makes it another tensor: 4 to 5. About 8 FLOP an element.
// A row is read into the L1 cache once, and both passes over it run there. Backward sums over several rows at a time:
// each vector of w and of dw is then loaded, and each of dw stored, once for all of them. Results larger than the
// caches are written by streaming stores (streaming.h). s is normalized as stored, rounded to residual's dtype.
#pragma once
#include <cmath>
#include "../row_layout.h"
#include "residual_norm.h"
#include "streaming.h"
#include "threads.h"

namespace fastlm {

// w, or 1 + w where the weight is stored as its difference from one.
struct norm_weight {
  const float* data;
  bool unit_offset;

  template <class Span> FASTLM_INLINE vec load(int64_t i, Span span) const {
    const vec w = vec::load(data + i, span);
    return unit_offset ? vec::all(1.0f) + w : w;
  }
};

// x and y are of type T, residual and summed of type R. residual and summed may be null; summed is null only where it
// equals x.
template <class T, class R>
void rms_norm_residual_forward(strided_rows<const T> x, strided_rows<const R> residual, norm_weight weight, T* y,
                               R* summed, float* rstd, norm_size size, float eps, dropout drop, int threads) {
  const int64_t width = size.width, padded = padded_width(width),
                bytes_per_row = width * int64_t(2 * sizeof(T) + 2 * sizeof(R));
  const bool stream = exceeds_cache(size.rows * bytes_per_row);
  parallel_for(size.rows, parts_for(size.rows, bytes_per_row), threads, [=](int64_t begin, int64_t end, int64_t) {
    float* s = scratch((stream ? 4 : 2) * padded);
    float* factors = s + padded;
    T* streamed_y = reinterpret_cast<T*>(factors + padded);
    R* streamed_sum = reinterpret_cast<R*>(factors + 2 * padded);
    for (int64_t row = begin; row < end; ++row) {
      const sum_row<T, R> sum{x[row], residual[row], summed ? stream ? streamed_sum : summed + row * width : nullptr,
                              drop.active() ? factors : nullptr};
      if (drop.active()) dropout_row(drop, row, width, factors);
      const float squares = sum_over(width, [=](int64_t i, auto span) {
        const vec v = sum(i, span);
        v.store(s + i, span);
        return v * v;
      });
      // Where the sum of squares overflows, a factor of 0 would hide it: the result would be 0.
      rstd[row] = squares < INFINITY ? 1.0f / std::sqrt(squares / float(width) + eps) : NAN;
      const vec scale = vec::all(rstd[row]);
      T* yr = stream ? streamed_y : y + row * width;
      sweep(width, [=](int64_t i, auto span) {
        vec normalized = vec::load(s + i, span) * scale;
        if (!std::is_same_v<T, float> && !weight.unit_offset) {
          normalized.store(yr + i, span);
          normalized = vec::load(yr + i, span);
        }
        (normalized * weight.load(i, span)).store(yr + i, span);
      });
      if (stream) stream_row(yr, width, y + row * width);
      if (stream && summed) stream_row(streamed_sum, width, summed + row * width);
    }
    if (stream) end_streaming();
  });
}

template <class T, class R> struct rms_norm_gradients {  // null where not wanted
  T* dx;
  R* dresidual;
  float* dweight;
};

// correlation[r] = mean(g·n) of `Rows` rows,  g = dy·w,  n = s·rstd;  dw += dy·n. dw may be null.
template <int Rows, class T, class R>
void rms_norm_correlations(const T* const* dy, const R* const* s, const float* rstd, norm_weight weight, float* dw,
                           int64_t width, float* correlation) {
  const T* upstream[Rows];
  const R* row[Rows];
  vec scale[Rows], sum[Rows];
  for (int r = 0; r < Rows; ++r) upstream[r] = dy[r], row[r] = s[r], scale[r] = vec::all(rstd[r]), sum[r] = vec::zero();
  sweep(width, [&](int64_t i, auto span) {
    const vec w = weight.load(i, span);
    vec acc = dw ? vec::load(dw + i, span) : vec::zero();
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const vec product = vec::load(upstream[r] + i, span) * (vec::load(row[r] + i, span) * scale[r]);
      sum[r] = fma(product, w, sum[r]);
      acc = acc + product;
    }
    if (dw) acc.store(dw + i, span);
  });
  for (int r = 0; r < Rows; ++r) correlation[r] = sum[r].sum() / float(width);
}

// ds = rstd·(g − n·mean(g·n)) + dsummed,  n = s·rstd,  g = dy·w;  dresidual = ds,  dx = dropout(ds);  dw = Σ_rows dy·n.
// dw is reduced in two stages, a row of partials per part and then the parts in order. dy or dsummed may be null, not
// both.
template <class T, class R>
void rms_norm_residual_backward(strided_rows<const T> dy, strided_rows<const R> dsummed, strided_rows<const R> summed,
                                norm_weight weight, const float* rstd, rms_norm_gradients<T, R> out, norm_size size,
                                dropout drop, int threads) {
  constexpr int64_t RowsAtOnce = 4;
  const int64_t width = size.width, padded = padded_width(width),
                bytes_per_row = width * int64_t(2 * sizeof(T) + 3 * sizeof(R));
  const int64_t parts = parts_for(size.rows, bytes_per_row);
  const bool stream = exceeds_cache(size.rows * bytes_per_row);
  buffer partials = make_buffer(out.dweight ? parts * padded : 0);
  float* partial = out.dweight ? partials.get() : nullptr;
  parallel_for(size.rows, parts, threads, [=](int64_t begin, int64_t end, int64_t part) {
    float* factors = scratch((stream ? 3 : 1) * padded);
    T* streamed_dx = reinterpret_cast<T*>(factors + padded);
    R* streamed_dresidual = reinterpret_cast<R*>(factors + 2 * padded);
    float* dw = partial ? partial + part * padded : nullptr;
    if (dw) std::fill_n(dw, padded, 0.0f);
    for (int64_t first = begin; first < end; first += RowsAtOnce) {
      const int64_t count = std::min(RowsAtOnce, end - first);
      const T* dyr[RowsAtOnce];
      const R* sr[RowsAtOnce];
      float correlation[RowsAtOnce];
      if (dy) {
        for (int64_t r = 0; r < count; ++r) dyr[r] = dy[first + r], sr[r] = summed[first + r];
        if (count == RowsAtOnce)
          rms_norm_correlations<RowsAtOnce>(dyr, sr, rstd + first, weight, dw, width, correlation);
        else
          for (int64_t r = 0; r < count; ++r)
            rms_norm_correlations<1>(dyr + r, sr + r, rstd + first + r, weight, dw, width, correlation + r);
      }
      for (int64_t r = 0; r < count && (out.dx || out.dresidual); ++r) {
        const int64_t row = first + r;
        const gradient_row<T, R> gradient{
            dsummed[row], out.dresidual ? stream ? streamed_dresidual : out.dresidual + row * width : nullptr,
            out.dx ? stream ? streamed_dx : out.dx + row * width : nullptr, drop.active() ? factors : nullptr};
        if (drop.active() && out.dx) dropout_row(drop, row, width, factors);
        if (dy) {
          const T* const upstream = dyr[r];
          const R* const in = sr[r];
          const vec scale = vec::all(rstd[row]), share = vec::all(correlation[r]);
          sweep(width, [=](int64_t i, auto span) {
            const vec g = vec::load(upstream + i, span) * weight.load(i, span), n = vec::load(in + i, span) * scale;
            gradient.store(scale * (g - n * share), i, span);
          });
        } else {
          sweep(width, [=](int64_t i, auto span) { gradient.store(vec::zero(), i, span); });
        }
        if (stream && out.dx) stream_row(streamed_dx, width, out.dx + row * width);
        if (stream && out.dresidual) stream_row(streamed_dresidual, width, out.dresidual + row * width);
      }
    }
    if (stream) end_streaming();
  });
  if (partial) reduce_partials(partial, parts, padded, width, out.dweight);
}

// The forward is compiled once, with the operator; layer.h calls it too.
#define FASTLM_RMS_NORM_TYPE(prefix, T)                                                                               \
  prefix template void rms_norm_residual_forward<T, T>(strided_rows<const T>, strided_rows<const T>, norm_weight, T*, \
                                                       T*, float*, norm_size, float, dropout, int);
#define FASTLM_RMS_NORM(prefix) \
  FASTLM_RMS_NORM_TYPE(prefix, float) FASTLM_RMS_NORM_TYPE(prefix, bf16) FASTLM_RMS_NORM_TYPE(prefix, fp16)
FASTLM_RMS_NORM(extern)

}  // namespace fastlm
