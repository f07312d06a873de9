// What the normalizations of a residual sum share: a row of the sum with its dropout, a row of its gradient, and the
// partial sums of parameter gradients.
#pragma once
#include <type_traits>
#include "philox.h"
#include "simd.h"

namespace fastlm {

struct norm_size {
  int64_t rows, width;
};

inline int64_t padded_width(int64_t width) { return (width + 63) / 64 * 64; }

inline void dropout_row(const dropout& drop, int64_t row, int64_t width, float* factors) {
  for (int64_t group = 0; group * 64 < width; ++group) dropout_factors(drop, group, row, 0, factors + group * 64);
}

// A row of s = residual + factors · x, stored to `summed` and returned as stored. x is of type T, the sum of type R.
// residual, summed and factors may be null; summed is null only where s is x.
template <class T, class R> struct sum_row {
  const T* x;
  const R* residual;
  R* summed;
  const float* factors;

  template <class Span> FASTLM_INLINE vec operator()(int64_t i, Span span) const {
    vec v = vec::load(x + i, span);
    if (factors) v = v * vec::load(factors + i, span);
    if (residual) v = vec::load(residual + i, span) + v;
    if (summed) {
      v.store(summed + i, span);
      if constexpr (!std::is_same_v<R, float>) v = vec::load(summed + i, span);
    }
    return v;
  }
};

// A row of the gradients, from that through the norm: ds = dnorm + dsummed, dresidual = ds, dx = factors · ds.
// Null where not given or not wanted.
template <class T, class R> struct gradient_row {
  const R* dsummed;
  R* dresidual;
  T* dx;
  const float* factors;

  template <class Span> FASTLM_INLINE void store(vec ds, int64_t i, Span span) const {
    if (dsummed) ds = ds + vec::load(dsummed + i, span);
    if (dresidual) ds.store(dresidual + i, span);
    if (dx) (factors ? ds * vec::load(factors + i, span) : ds).store(dx + i, span);
  }
};

// The sum of `parts` partial sums, `stride` apart, in order: deterministic, no atomics. `to` may be null.
inline void reduce_partials(const float* from, int64_t parts, int64_t stride, int64_t width, float* to) {
  if (!to) return;
  sweep(width, [=](int64_t i, auto span) {
    vec column_sum = vec::zero();
    for (int64_t part = 0; part < parts; ++part) column_sum = column_sum + vec::load(from + part * stride + i, span);
    column_sum.store(to + i, span);
  });
}

}  // namespace fastlm
