// AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101): one step over many tensors, in one pass over memory.
//   g = factor · gradient                         factor: clipping, loss scale and the sign of a maximum, at once
//   m = m + (1 − β1)(g − m)
//   v = β2 v + (1 − β2) g²
//   p = p (1 − lr λ) − lr / (1 − β1ᵗ) · m / (√v / √(1 − β2ᵗ) + ε)
// Memory per fp32 parameter: 16 bytes read, 12 written (every line that is written was read: nothing to gain from
// stores past the cache). Some 15 operations with a root and a division among them, 36 cycles per 16 lanes on Intel's
// cores and fewer on AMD's: below what memory takes, on two cores and more. A 16-bit parameter with a master copy: 2 +
// 12 + 2 bytes read, 12 + 2 written; casting the master in a pass of its own would read 4 and write 2 more.
//
// The tensors of a call are treated as one after the other and cut into parts of equal length, so that a model of many
// small tensors and one of few large ones cost the same; a part looks up where it begins. Sums of squares are cut the
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

// Of one tensor; T: the parameter and its gradient, S: its moments. master: fp32, null where the parameter is its own.
template <class T, class S> struct adamw_tensor {
  T *parameter, *gradient;
  S *exp_avg, *exp_avg_sq;
  float* master;
  float* step;  // updates so far
};

// Where the elements of a list of tensors lie when they are counted through.
struct element_ranges {
  static constexpr int64_t Part = 16384;  // elements: half a megabyte of an fp32 update's traffic
  std::vector<int64_t> ends;

  explicit element_ranges(const std::vector<int64_t>& sizes) {
    int64_t end = 0;
    for (int64_t size : sizes) ends.push_back(end += size);
  }
  int64_t parts() const { return ends.empty() ? 0 : (ends.back() + Part - 1) / Part; }

  // body(tensor, begin, end) for every run of elements of a part.
  template <class Body> void visit(int64_t part, const Body& body) const {
    int64_t begin = part * Part, end = std::min(begin + Part, ends.back());
    for (size_t i = size_t(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin()); begin < end; ++i) {
      int64_t first = i ? ends[i - 1] : 0, stop = std::min(ends[i], end);
      if (begin < stop) body(i, begin - first, stop - first);
      begin = std::max(begin, stop);
    }
  }
};

// As it reads after it was stored as T.
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
  std::vector<scalars> of_tensor;
  for (const auto& tensor : tensors) {
    double t = double(*tensor.step += 1);  // float32, as PyTorch keeps it
    of_tensor.push_back({float(-h.lr / (1 - std::pow(h.beta1, t))), float(1 / std::sqrt(1 - std::pow(h.beta2, t)))});
  }
  const vec factor = vec::all(float(h.factor)), decay = vec::all(float(1 - h.lr * h.weight_decay)),
            eps = vec::all(float(h.eps));
  const vec beta2 = vec::all(float(h.beta2)), rest2 = vec::all(float(1 - h.beta2));
  // From the nearer end: with β1 = 0 the mean is the gradient itself, unrounded.
  const bool from_gradient = h.beta1 < 0.5;
  const vec towards = vec::all(float(from_gradient ? -h.beta1 : 1 - h.beta1));
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
          if (wp) {  // a parameter that someone else has changed since is the truth, not the master that it once came
                     // from
            vec kept = vec::load(wp + j, span);
            w = select(rounded_to<T>(kept) == w, kept, w);
          }
        }
        m = fma(towards, g - m, from_gradient ? g : m);
        vec v = fma(g * rest2, g, beta2 * vec::load(vp + j, span));
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

// Σ x² of all elements of all tensors: the square of their norm.
template <class T> double sum_of_squares(const std::vector<const T*>& tensors, const std::vector<int64_t>& sizes,
                                         int threads) {
  constexpr int64_t Block =
      2048;  // elements whose squares are added in float32: rounding that does not grow with the size of a model
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
