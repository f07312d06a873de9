// AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101): one step for many tensors, in one pass over memory.
//   g = factor · gradient             factor combines clipping, the loss scale and the sign of a maximisation
//   m = m + (1 − β1)(g − m)
//   v = β2 v + (1 − β2) g²
//   p = p (1 − lr λ) − lr / (1 − β1ᵗ) · m / (√v / √(1 − β2ᵗ) + ε)
// Memory bound: about 15 operations an element, with a square root and a division. An fp32 parameter reads 16 bytes and
// writes 12. Streaming stores gain nothing, as every line that is written was read. A 16-bit parameter with a master
// copy reads 2 + 12 + 2 bytes and writes 12 + 2; casting the master in a separate pass would read 4 and write 2 more.
//
// The tensors of a call are treated as one sequence of elements and cut into parts of equal length, so that many small
// tensors cost as much as a few large ones. A part finds its first tensor by binary search. Sums of squares are cut the
// same way, in blocks whose float32 sums are added in double precision.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>
#include "simd.h"
#include "threads.h"

namespace fastlm {

struct adamw_hyper {
  double lr, beta1, beta2, eps, weight_decay, factor;
  bool zero_gradients;
};

// The state of one tensor. T is the type of the parameter and its gradient, S of its moments. master is null where the
// parameter has no master copy.
template <class T, class S> struct adamw_tensor {
  T *parameter, *gradient;
  S *exp_avg, *exp_avg_sq;
  float* master;
  float* step;  // number of updates
};

// The elements of a list of tensors, numbered consecutively.
struct element_ranges {
  static constexpr int64_t Part = 16384;  // elements: half a megabyte of traffic for an fp32 parameter
  std::vector<int64_t> ends;

  explicit element_ranges(const std::vector<int64_t>& sizes) {
    int64_t end = 0;
    for (int64_t size : sizes) ends.push_back(end += size);
  }
  int64_t parts() const { return ends.empty() ? 0 : (ends.back() + Part - 1) / Part; }

  // Calls body(tensor, begin, end) for each range of a part's elements within one tensor.
  template <class Body> void visit(int64_t part, const Body& body) const {
    int64_t begin = part * Part, end = std::min(begin + Part, ends.back());
    for (size_t i = size_t(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin()); begin < end; ++i) {
      int64_t first = i ? ends[i - 1] : 0, stop = std::min(ends[i], end);
      if (begin < stop) body(i, begin - first, stop - first);
      begin = std::max(begin, stop);
    }
  }
};

// The value of x after a store as T.
template <class T> FASTLM_INLINE vec rounded_to(vec x) {
  T stored[vec::Lanes];
  x.store(stored, full{});
  return vec::load(stored, full{});
}

template <class T, class S> void adamw(const std::vector<adamw_tensor<T, S>>& tensors,
                                       const std::vector<int64_t>& sizes, const adamw_hyper& h, int threads) {
  struct scalars {
    float step_size, root_correction;
  };
  // 1 − βᵗ without cancellation. pow would require glibc 2.29, and wheels serve 2.28.
  const double log_beta1 = std::log1p(h.beta1 - 1), log_beta2 = std::log1p(h.beta2 - 1);
  std::vector<scalars> of_tensor;
  for (const auto& tensor : tensors) {
    double t = double(*tensor.step += 1);  // float32, as in PyTorch
    const double correction1 = -std::expm1(t * log_beta1), correction2 = -std::expm1(t * log_beta2);
    of_tensor.push_back({float(-h.lr / correction1), float(1 / std::sqrt(correction2))});
  }
  const vec factor = vec::all(float(h.factor)), decay = vec::all(float(1 - h.lr * h.weight_decay)),
            eps = vec::all(float(h.eps));
  const vec beta2 = vec::all(float(h.beta2)), one_minus_beta2 = vec::all(float(1 - h.beta2));
  // Interpolate from the nearer end: with β1 = 0 the mean is exactly the gradient.
  const bool from_gradient = h.beta1 < 0.5;
  const vec mean_rate = vec::all(float(from_gradient ? -h.beta1 : 1 - h.beta1));
  const bool zero = h.zero_gradients;

  const element_ranges ranges(sizes);
  parallel_parts(ranges.parts(), threads, [&](int64_t part) {
    ranges.visit(part, [&](size_t i, int64_t begin, int64_t end) {
      const auto [p, gradient, exp_avg, exp_avg_sq, master, step] = tensors[i];
      const vec step_size = vec::all(of_tensor[i].step_size), root_correction = vec::all(of_tensor[i].root_correction);
      T* pp = p + begin;
      T* gp = gradient + begin;
      S *mp = exp_avg + begin, *vp = exp_avg_sq + begin;
      float* wp = master ? master + begin : nullptr;
      sweep(end - begin, [=](int64_t j, auto span) {
        vec g = vec::load(gp + j, span) * factor, m = vec::load(mp + j, span), w = vec::load(pp + j, span);
        if constexpr (!std::is_same_v<T, float>) {
          if (wp) {  // a parameter that was changed since the last step wins over its master copy
            vec kept = vec::load(wp + j, span);
            w = select(rounded_to<T>(kept) == w, kept, w);
          }
        }
        m = fma(mean_rate, g - m, from_gradient ? g : m);
        vec v = fma(g * one_minus_beta2, g, beta2 * vec::load(vp + j, span));
        w = fma(step_size, m / fma(sqrt(v), root_correction, eps), w * decay);
        m.store(mp + j, span);
        v.store(vp + j, span);
        w.store(pp + j, span);
        if constexpr (!std::is_same_v<T, float>) {
          if (wp) w.store(wp + j, span);
        }
        if (zero) vec::zero().store(gp + j, span);
      });
    });
  });
}

// Σ x² over all elements of all tensors.
template <class T> double sum_of_squares(const std::vector<const T*>& tensors, const std::vector<int64_t>& sizes,
                                         int threads) {
  constexpr int64_t Block = 2048;  // elements whose squares are added in float32, which bounds the rounding error
  const element_ranges ranges(sizes);
  std::vector<double> sums(size_t(ranges.parts()), 0.0);
  parallel_parts(ranges.parts(), threads, [&](int64_t part) {
    double sum = 0;
    ranges.visit(part, [&](size_t i, int64_t begin, int64_t end) {
      for (; begin < end; begin += Block) {
        const T* x = tensors[i] + begin;
        sum += sum_over(std::min(Block, end - begin), [=](int64_t j, auto span) {
          vec value = vec::load(x + j, span);
          return value * value;
        });
      }
    });
    sums[size_t(part)] = sum;
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace fastlm
