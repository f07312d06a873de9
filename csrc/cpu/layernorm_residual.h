// LayerNorm after the residual sum:  s = residual + dropout(x),  y = (s − mean)·rstd·w + b,  rstd = 1/√(var + eps)
//
// Memory bound. Forward reads x and residual and writes y and s: 4·rows·width elements. Backward reads dy, ds and s
// and writes dresidual, and dx where dropout or the dtype makes it another tensor: 4 to 5. About 15 FLOP an element.
// A row is read into the L1 cache once, and all passes over it (sum, squares, result) run there; the variance is
// two-pass. Backward sums over two rows at a time: each vector of w, dw and db is then loaded, and each of dw and db
// stored, once for both. Results larger than the caches are written by streaming stores (streaming.h). s is normalised
// as stored, rounded to residual's dtype.
#pragma once
#include <cmath>
#include "residual_norm.h"
#include "streaming.h"
#include "threads.h"

namespace fastlm {

// x and y are of type T, residual and summed of type R, weight and bias fp32. residual, bias and summed may be null;
// summed is null only where it equals x.
template <class T, class R>
void layernorm_residual_forward(const T* x, int64_t x_stride, const R* residual, int64_t residual_stride,
                                const float* weight, const float* bias, T* y, R* summed, float* mean, float* rstd,
                                norm_size size, float eps, dropout drop, int threads) {
  const int64_t width = size.width, padded = padded_width(width),
                bytes_per_row = width * int64_t(2 * sizeof(T) + 2 * sizeof(R));
  const bool stream = exceeds_cache(size.rows * bytes_per_row);
  parallel_for(size.rows, parts_for(size.rows, bytes_per_row), threads, [=](int64_t begin, int64_t end, int64_t) {
    float* s = scratch((stream ? 4 : 2) * padded);
    float* factors = s + padded;
    T* streamed_y = reinterpret_cast<T*>(factors + padded);
    R* streamed_sum = reinterpret_cast<R*>(factors + 2 * padded);
    for (int64_t row = begin; row < end; ++row) {
      const sum_row<T, R> sum{x + row * x_stride, residual ? residual + row * residual_stride : nullptr,
                              summed ? stream ? streamed_sum : summed + row * width : nullptr,
                              drop.active() ? factors : nullptr};
      if (drop.active()) dropout_row(drop, row, width, factors);
      // Relative to an element: where all are large and nearly equal, the rounding error of their own sum would be
      // large beside the deviations.
      const float first = sum(0, tail{1}).sum();
      const float differences = sum_over(width, [=](int64_t i, auto span) {
        const vec v = sum(i, span);
        v.store(s + i, span);
        return inside(span, v - vec::all(first));
      });
      mean[row] = first + differences / float(width);
      const vec row_mean = vec::all(mean[row]);
      const float squares = sum_over(width, [=](int64_t i, auto span) {
        const vec d = inside(span, vec::load(s + i, span) - row_mean);
        return d * d;
      });
      // Where the sum of squares overflows, a factor of 0 would hide it: the result would be the bias.
      rstd[row] = squares < INFINITY ? 1.0f / std::sqrt(squares / float(width) + eps) : NAN;
      const vec scale = vec::all(rstd[row]);
      T* yr = stream ? streamed_y : y + row * width;
      sweep(width, [=](int64_t i, auto span) {
        vec normalized = (vec::load(s + i, span) - row_mean) * scale * vec::load(weight + i, span);
        (bias ? normalized + vec::load(bias + i, span) : normalized).store(yr + i, span);
      });
      if (stream) stream_row(yr, width, y + row * width);
      if (stream && summed) stream_row(streamed_sum, width, summed + row * width);
    }
    if (stream) end_streaming();
  });
}

template <class T, class R> struct layernorm_gradients {  // null where not wanted
  T* dx;
  R* dresidual;
  float *dweight, *dbias;
};

// average[r] = mean(g), correlation[r] = mean(g·n) of `Rows` rows,  g = dy·w,  n = (s − mean)·rstd;  dw += dy·n,  db +=
// dy. dw and db may be null together.
template <int Rows, class T, class R>
void layernorm_averages(const T* const* dy, const R* const* s, const float* mean, const float* rstd,
                        const float* weight, float* dw, float* db, int64_t width, float* average, float* correlation) {
  const T* upstream[Rows];
  const R* row[Rows];
  vec row_mean[Rows], scale[Rows], g_sum[Rows], gn_sum[Rows];
  for (int r = 0; r < Rows; ++r) {
    upstream[r] = dy[r], row[r] = s[r], row_mean[r] = vec::all(mean[r]), scale[r] = vec::all(rstd[r]);
    g_sum[r] = gn_sum[r] = vec::zero();
  }
  sweep(width, [&](int64_t i, auto span) {
    const vec w = vec::load(weight + i, span);
    vec dw_sum = dw ? vec::load(dw + i, span) : vec::zero(), db_sum = dw ? vec::load(db + i, span) : vec::zero();
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const vec d = vec::load(upstream[r] + i, span), n = (vec::load(row[r] + i, span) - row_mean[r]) * scale[r],
                g = d * w;
      g_sum[r] = g_sum[r] + g;
      gn_sum[r] = fma(g, n, gn_sum[r]);
      dw_sum = fma(d, n, dw_sum);
      db_sum = db_sum + d;
    }
    if (dw) {
      dw_sum.store(dw + i, span);
      db_sum.store(db + i, span);
    }
  });
  for (int r = 0; r < Rows; ++r)
    average[r] = g_sum[r].sum() / float(width), correlation[r] = gn_sum[r].sum() / float(width);
}

// ds = rstd·(g − mean(g) − n·mean(g·n)) + dsummed,  n = (s − mean)·rstd,  g = dy·w;  dresidual = ds,  dx = dropout(ds);
// dw = Σ_rows dy·n,  db = Σ_rows dy.
// dw and db are reduced in two stages, a row of partials per part and then the parts in order: deterministic, no
// atomics. dy or dsummed may be null, not both.
template <class T, class R>
void layernorm_residual_backward(const T* dy, int64_t dy_stride, const R* dsummed, int64_t dsummed_stride,
                                 const R* summed, int64_t summed_stride, const float* weight, const float* mean,
                                 const float* rstd, layernorm_gradients<T, R> out, norm_size size, dropout drop,
                                 int threads) {
  constexpr int64_t RowsAtOnce = 2;  // as many as the sums and statistics of fit into 16 registers
  const int64_t width = size.width, padded = padded_width(width),
                bytes_per_row = width * int64_t(2 * sizeof(T) + 3 * sizeof(R));
  const int64_t parts = parts_for(size.rows, bytes_per_row);
  const bool sums = out.dweight || out.dbias, stream = exceeds_cache(size.rows * bytes_per_row);
  buffer partials = make_buffer(sums ? parts * 2 * padded : 0);
  float* partial = partials.get();
  parallel_for(size.rows, parts, threads, [=](int64_t begin, int64_t end, int64_t part) {
    float* factors = scratch((stream ? 3 : 1) * padded);
    T* streamed_dx = reinterpret_cast<T*>(factors + padded);
    R* streamed_dresidual = reinterpret_cast<R*>(factors + 2 * padded);
    float *dw = sums ? partial + part * 2 * padded : nullptr, *db = sums ? dw + padded : nullptr;
    if (sums) std::fill_n(dw, 2 * padded, 0.0f);
    for (int64_t first = begin; first < end; first += RowsAtOnce) {
      const int64_t count = std::min(RowsAtOnce, end - first);
      const T* dyr[RowsAtOnce];
      const R* sr[RowsAtOnce];
      float average[RowsAtOnce], correlation[RowsAtOnce];
      if (dy) {
        for (int64_t r = 0; r < count; ++r)
          dyr[r] = dy + (first + r) * dy_stride, sr[r] = summed + (first + r) * summed_stride;
        if (count == RowsAtOnce)
          layernorm_averages<RowsAtOnce>(dyr, sr, mean + first, rstd + first, weight, dw, db, width, average,
                                         correlation);
        else
          for (int64_t r = 0; r < count; ++r)
            layernorm_averages<1>(dyr + r, sr + r, mean + first + r, rstd + first + r, weight, dw, db, width,
                                  average + r, correlation + r);
      }
      for (int64_t r = 0; r < count && (out.dx || out.dresidual); ++r) {
        const int64_t row = first + r;
        const gradient_row<T, R> gradient{
            dsummed ? dsummed + row * dsummed_stride : nullptr,
            out.dresidual ? stream ? streamed_dresidual : out.dresidual + row * width : nullptr,
            out.dx ? stream ? streamed_dx : out.dx + row * width : nullptr, drop.active() ? factors : nullptr};
        if (drop.active() && out.dx) dropout_row(drop, row, width, factors);
        if (dy) {
          const T* const upstream = dyr[r];
          const R* const in = sr[r];
          const vec row_mean = vec::all(mean[row]), scale = vec::all(rstd[row]), mean_g = vec::all(average[r]),
                    mean_gn = vec::all(correlation[r]);
          sweep(width, [=](int64_t i, auto span) {
            const vec g = vec::load(upstream + i, span) * vec::load(weight + i, span),
                      n = (vec::load(in + i, span) - row_mean) * scale;
            gradient.store(scale * (g - mean_g - n * mean_gn), i, span);
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
  if (sums) {
    reduce_partials(partial, parts, 2 * padded, width, out.dweight);
    reduce_partials(partial + padded, parts, 2 * padded, width, out.dbias);
  }
}

// The forward is compiled once, with the operator; layer.h calls it too.
#define FASTLM_LAYERNORM_TYPE(prefix, T)                                                                        \
  prefix template void layernorm_residual_forward<T, T>(const T*, int64_t, const T*, int64_t, const float*,     \
                                                        const float*, T*, T*, float*, float*, norm_size, float, \
                                                        dropout, int);
#define FASTLM_LAYERNORM(prefix) \
  FASTLM_LAYERNORM_TYPE(prefix, float) FASTLM_LAYERNORM_TYPE(prefix, bf16) FASTLM_LAYERNORM_TYPE(prefix, fp16)
FASTLM_LAYERNORM(extern)

}  // namespace fastlm
