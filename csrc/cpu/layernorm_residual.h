// LayerNorm after the residual sum:  s = residual + dropout(x),  y = (s − mean)·rstd·w + b,  rstd = 1/√(var + eps)
//
// Memory bound. Forward reads x and residual and writes y and s: 4·rows·width elements. Backward reads dy, ds and s
// and writes dresidual, and dx where dropout or the dtype makes it another tensor: 4 to 5. About 15 FLOP an element.
// A row is read into the L1 cache once, and all passes over it (sum, squares, result) run there; the variance is
// two-pass. Results larger than the caches are written by streaming stores (streaming.h). s is normalised as stored,
// rounded to residual's dtype.
#pragma once
#include <cmath>
#include "philox.h"
#include "simd.h"
#include "streaming.h"
#include "threads.h"

namespace fastlm {

struct layernorm_size {
  int64_t rows, width;
};

inline int64_t padded_width(int64_t width) { return (width + 63) / 64 * 64; }

inline void dropout_row(const dropout& drop, int64_t row, int64_t width, float* factors) {
  for (int64_t group = 0; group * 64 < width; ++group) dropout_factors(drop, group, row, 0, factors + group * 64);
}

// x and y are of type T, residual and summed of type R, weight and bias fp32. residual, bias and summed may be null;
// summed is null only where it equals x.
template <class T, class R>
void layernorm_residual_forward(const T* x, int64_t x_stride, const R* residual, int64_t residual_stride,
                                const float* weight, const float* bias, T* y, R* summed, float* mean, float* rstd,
                                layernorm_size size, float eps, dropout drop, int threads) {
  const int64_t width = size.width, padded = padded_width(width),
                bytes_per_row = width * int64_t(2 * sizeof(T) + 2 * sizeof(R));
  const bool stream = exceeds_cache(size.rows * bytes_per_row);
  parallel_for(size.rows, parts_for(size.rows, bytes_per_row), threads, [=](int64_t begin, int64_t end, int64_t) {
    float* s = scratch((stream ? 4 : 2) * padded);
    float* factors = s + padded;
    T* streamed_y = reinterpret_cast<T*>(factors + padded);
    R* streamed_sum = reinterpret_cast<R*>(factors + 2 * padded);
    for (int64_t row = begin; row < end; ++row) {
      const T* xr = x + row * x_stride;
      const R* rr = residual ? residual + row * residual_stride : nullptr;
      R* sr = summed ? stream ? streamed_sum : summed + row * width : nullptr;
      if (drop.active()) dropout_row(drop, row, width, factors);
      const float row_sum = sum_over(width, [=](int64_t i, auto span) {
        vec v = vec::load(xr + i, span);
        if (drop.active()) v = v * vec::load(factors + i, span);
        if (rr) v = vec::load(rr + i, span) + v;
        if (sr) {
          v.store(sr + i, span);
          if constexpr (!std::is_same_v<R, float>) v = vec::load(sr + i, span);
        }
        v.store(s + i, span);
        return v;
      });
      const vec row_mean = vec::all(row_sum / float(width));
      const float squares = sum_over(width, [=](int64_t i, auto span) {
        vec d = vec::load(s + i, span) - row_mean;
        if constexpr (!std::is_same_v<decltype(span), full>)
          d = select(vec::iota() < vec::all(float(span.count)), d, vec::zero());
        return d * d;
      });
      mean[row] = row_sum / float(width);
      // Where the sum of squares overflows, a factor of 0 would hide it: the result would be the bias.
      rstd[row] = squares < INFINITY ? 1.0f / std::sqrt(squares / float(width) + eps) : NAN;
      const vec scale = vec::all(rstd[row]);
      T* yr = stream ? streamed_y : y + row * width;
      sweep(width, [=](int64_t i, auto span) {
        vec normalized = (vec::load(s + i, span) - row_mean) * scale * vec::load(weight + i, span);
        (bias ? normalized + vec::load(bias + i, span) : normalized).store(yr + i, span);
      });
      if (stream) stream_row(yr, width, y + row * width);
      if (stream && sr) stream_row(sr, width, summed + row * width);
    }
    if (stream) end_streaming();
  });
}

template <class T, class R> struct layernorm_gradients {  // null where not wanted
  T* dx;
  R* dresidual;
  float *dweight, *dbias;
};

// ds = rstd·(g − mean(g) − n·mean(g·n)) + dsummed,  n = (s − mean)·rstd,  g = dy·w;  dresidual = ds,  dx = dropout(ds);
// dw = Σ_rows dy·n,  db = Σ_rows dy.
// dw and db are reduced in two stages, a row of partials per part and then the parts in order: deterministic, no
// atomics. dy or dsummed may be null, not both.
template <class T, class R>
void layernorm_residual_backward(const T* dy, int64_t dy_stride, const R* dsummed, int64_t dsummed_stride,
                                 const R* summed, int64_t summed_stride, const float* weight, const float* mean,
                                 const float* rstd, layernorm_gradients<T, R> out, layernorm_size size, dropout drop,
                                 int threads) {
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
    for (int64_t row = begin; row < end; ++row) {
      const R* sr = summed + row * summed_stride;
      const R* dsr = dsummed ? dsummed + row * dsummed_stride : nullptr;
      const T* dyr = dy ? dy + row * dy_stride : nullptr;
      T* dxr = out.dx ? stream ? streamed_dx : out.dx + row * width : nullptr;
      R* drr = out.dresidual ? stream ? streamed_dresidual : out.dresidual + row * width : nullptr;
      const vec row_mean = vec::all(mean[row]), scale = vec::all(rstd[row]);
      float average = 0, correlation = 0;
      if (dyr) {
        const two_floats totals = two_sums_over(width, [=](int64_t i, auto span) {
          vec d = vec::load(dyr + i, span), n = (vec::load(sr + i, span) - row_mean) * scale,
              g = d * vec::load(weight + i, span);
          if (sums) {
            fma(d, n, vec::load(dw + i, span)).store(dw + i, span);
            (vec::load(db + i, span) + d).store(db + i, span);
          }
          return two_vecs{g, g * n};
        });
        average = totals.first / float(width), correlation = totals.second / float(width);
      }
      if (!dxr && !drr) continue;
      if (drop.active() && dxr) dropout_row(drop, row, width, factors);
      sweep(width, [=](int64_t i, auto span) {
        vec ds = vec::zero();
        if (dyr) {
          vec n = (vec::load(sr + i, span) - row_mean) * scale;
          ds = scale *
               (vec::load(dyr + i, span) * vec::load(weight + i, span) - vec::all(average) - n * vec::all(correlation));
        }
        if (dsr) ds = ds + vec::load(dsr + i, span);
        if (drr) ds.store(drr + i, span);
        if (dxr) (drop.active() ? ds * vec::load(factors + i, span) : ds).store(dxr + i, span);
      });
      if (stream && dxr) stream_row(dxr, width, out.dx + row * width);
      if (stream && drr) stream_row(drr, width, out.dresidual + row * width);
    }
    if (stream) end_streaming();
  });
  auto reduce = [=](const float* from, float* to) {
    if (!to) return;
    sweep(width, [=](int64_t i, auto span) {
      vec column_sum = vec::zero();
      for (int64_t part = 0; part < parts; ++part)
        column_sum = column_sum + vec::load(from + part * 2 * padded + i, span);
      column_sum.store(to + i, span);
    });
  };
  if (sums) {
    reduce(partial, out.dweight);
    reduce(partial + padded, out.dbias);
  }
}

}  // namespace fastlm
