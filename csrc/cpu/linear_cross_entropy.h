// Linear cross-entropy:  loss = lse(z) − (1 − ε)·z[target] − ε·mean(z),  z = x·Wᵀ + b (rows, vocab),  ε
// the label smoothing. Logits may be scaled, z = s·(x·Wᵀ + b), and capped, c·tanh(z / c), which the epilogue of the
// product does.
//
// Three products of 2·rows·width·vocab FLOP where gradients are wanted, one where not. Logits exist for one chunk of
// rows at a time (≤ 64 MB): product, softmax and its gradient in place, then both gradient products. Computing the
// gradients in the forward saves the fourth product that recomputing the logits in the backward would take. dW is
// accumulated over the chunks in fp32.
#pragma once
#include "linear.h"
#include "vmath.h"

namespace fastlm {

struct cross_entropy {
  const int64_t* target;
  int64_t target_stride, ignore_index;
  float label_smoothing, logit_scale, softcap;  // softcap: 0 for none
  const float* row_scale;                       // upstream gradient of each row's loss
  float *loss, *lse;                            // (rows)
  bool gradients;
};

// One row of logits z, scaled and capped: computes its loss, and where gradients are wanted replaces z by the gradient
// of the product x·Wᵀ + b. Three passes over a row that stays in the L2 cache.
inline void cross_entropy_row(const cross_entropy& ce, float* z, int64_t row, int64_t vocab) {
  constexpr int64_t Run = 4096;  // elements per partial sum, which bounds the rounding error
  vec row_max = vec::all(-INFINITY), nans = vec::zero();
  sweep(vocab, [&](int64_t i, auto span) {
    vec v = vec::load(z + i, span);
    nans = nans + zero_where(v == v, v);  // max() may drop a NaN, a sum keeps it
    if constexpr (std::is_same_v<decltype(span), full>) row_max = max(row_max, v);
    else row_max = max(row_max, select(vec::iota() < vec::all(float(span.count)), v, vec::all(-INFINITY)));
  });
  const float shift = row_max.max_lane();
  float sum = 0, linear_sum = 0;
  // The derivative of the cap needs z itself, so that its exponential is then computed twice.
  const bool wants_gradient = ce.gradients, capped = ce.softcap > 0, stores_exp = wants_gradient && !capped;
  if (ce.label_smoothing > 0)
    for (int64_t first = 0; first < vocab; first += Run) {
      const float* at = z + first;
      linear_sum += sum_over(std::min(Run, vocab - first), [=](int64_t i, auto span) {
        return inside(span, vec::load(at + i, span) - vec::all(shift));
      });
    }
  const int64_t target = ce.target[row * ce.target_stride];
  const bool ignored = target == ce.ignore_index;
  const float target_logit = ignored ? 0.0f : z[target];
  for (int64_t first = 0; first < vocab; first += Run) {
    float* at = z + first;
    sum += sum_over(std::min(Run, vocab - first), [=](int64_t i, auto span) {
      const vec e = inside(span, exp(vec::load(at + i, span) - vec::all(shift)));
      if (stores_exp) e.store(at + i, span);
      return e;
    });
  }
  sum += nans.sum();
  const float log_sum = std::log(sum), smoothing = ce.label_smoothing;
  ce.lse[row] = shift + log_sum;
  // Differences from the largest logit come first: they are exact where the loss is small, and a sum with the shift
  // would round them away.
  ce.loss[row] = ignored ? 0.0f
                         : log_sum + (1 - smoothing) * (shift - target_logit) +
                               (smoothing > 0 ? smoothing * -linear_sum / float(vocab) : 0.0f);
  if (!wants_gradient) return;
  if (ignored) {
    std::fill_n(z, vocab, 0.0f);
    return;
  }
  const float scale = ce.row_scale[row] * ce.logit_scale;
  const vec factor = vec::all(scale / sum), uniform = vec::all(scale * smoothing / float(vocab));
  if (capped) {
    const vec over_cap = vec::all(1 / ce.softcap);
    sweep(vocab, [=](int64_t i, auto span) {
      const vec value = vec::load(z + i, span), t = value * over_cap, slope = fma(vec::zero() - t, t, vec::all(1));
      ((exp(value - vec::all(shift)) * factor - uniform) * slope).store(z + i, span);
    });
    const float t = target_logit / ce.softcap;
    z[target] -= scale * (1 - smoothing) * (1 - t * t);
    return;
  }
  sweep(vocab, [=](int64_t i, auto span) { (vec::load(z + i, span) * factor - uniform).store(z + i, span); });
  z[target] -= scale * (1 - smoothing);
}

template <class T, class G> struct cross_entropy_gradients {
  T* dx;               // (rows, width), or null where not wanted
  G* dweight;          // (vocab, width), or null
  float* dweight_sum;  // fp32 accumulator of dweight, where G is 16-bit and there are several chunks
  G* dbias;            // (vocab), or null
};

// Returns −1, or the first row whose target is neither a class nor ignore_index; then nothing is computed.
template <class T, class G>
int64_t linear_cross_entropy(const T* x, int64_t x_stride, weight_operand<const T> weight, const T* bias,
                             cross_entropy ce, float* logits, int64_t chunk_rows, cross_entropy_gradients<T, G> out,
                             int64_t rows, int64_t width, int64_t vocab, int threads) {
  for (int64_t row = 0; row < rows; ++row) {
    int64_t target = ce.target[row * ce.target_stride];
    if (target != ce.ignore_index && (target < 0 || target >= vocab)) return row;
  }
  using arithmetic = arithmetic_for<T>;
  ce.gradients = out.dx || out.dweight || out.dbias;
  buffer dbias_sum;
  if (out.dbias) {
    dbias_sum = make_buffer(vocab);
    std::fill_n(dbias_sum.get(), vocab, 0.0f);
  }
  float* dw_sum = out.dweight_sum;
  if constexpr (std::is_same_v<G, float>) dw_sum = out.dweight;  // an fp32 result is its own accumulator

  for (int64_t first = 0; first < rows; first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, rows - first);
    const T* xs = x + first * x_stride;
    auto write = [=, logit_scale = ce.logit_scale, softcap = ce.softcap](int64_t i, int64_t j, vec value, auto span) {
      if (logit_scale != 1) value = value * vec::all(logit_scale);
      if (softcap > 0) value = vec::all(softcap) * tanh(value / vec::all(softcap));
      value.store(logits + i * vocab + j, span);
    };
    project(xs, x_stride, weight, bias, count, width, vocab, threads, storing_to(logits, vocab, write));
    parallel_parts(count, threads, [=](int64_t row) {
      cross_entropy part = ce;
      part.target += first * ce.target_stride, part.loss += first, part.lse += first;
      if (part.row_scale) part.row_scale += first;
      cross_entropy_row(part, logits + row * vocab, row, vocab);
    });
    if (out.dx) {
      T* dx = out.dx + first * width;
      multiply<arithmetic>(count, width, vocab, operand<float>{logits, vocab, 1}, weight.summed_over_outputs(), threads,
                           store_to(dx, width));
    }
    if (out.dweight) {
      const bool first_chunk = first == 0, last_chunk = first + count == rows;
      G* dw = out.dweight;
      auto write = [=](int64_t i, int64_t j, vec value, auto span) {
        const int64_t at = i * width + j;
        if (!first_chunk) value = value + vec::load(dw_sum + at, span);
        if (last_chunk) value.store(dw + at, span);
        else value.store(dw_sum + at, span);
      };
      multiply_transposed<arithmetic>(
          vocab, width, count, operand<float>{logits, 1, vocab}, operand<T>{xs, 1, x_stride}, threads,
          updating_from(first_chunk ? nullptr : static_cast<const float*>(dw_sum), dw, width, write), dbias_sum.get(),
          nullptr);
    } else if (out.dbias) {
      buffer chunk = make_buffer(vocab);
      column_sums(static_cast<const float*>(logits), vocab, chunk.get(), count, vocab, threads);
      for (int64_t i = 0; i < vocab; ++i) dbias_sum[i] += chunk[i];
    }
  }
  if (out.dbias) convert(dbias_sum.get(), out.dbias, vocab);
  return -1;
}

}  // namespace fastlm
