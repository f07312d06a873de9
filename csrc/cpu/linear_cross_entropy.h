// Linear cross-entropy:  loss = lse(z) − (1 − ε)·z[target] − ε·mean(z),  z = x·Wᵀ + b (rows, vocab),  ε
// the label smoothing. Logits may be scaled, z = s·(x·Wᵀ + b), and capped, c·tanh(z / c), which the epilogue of the
// product does.
//
// Three products of 2·rows·width·vocab FLOP where gradients are wanted, one where not. Logits exist for one chunk of
// rows at a time (≤ 64 MB): product, softmax and its gradient in place, then both gradient products. Computing the
// gradients in the forward saves the fourth product that recomputing the logits in the backward would take. dW is
// accumulated over the chunks in fp32.
#pragma once
#include "logits.h"

namespace fastlm {

struct cross_entropy {
  const int64_t* target;
  int64_t target_stride, ignore_index;
  float label_smoothing, logit_scale, softcap;  // the last two as in logit_chunks
  const float* row_scale;                       // upstream gradient of each row's loss
  float *loss, *lse;                            // (rows)
  bool gradients;
};

// One row of logits z, scaled and capped: computes its loss, and where gradients are wanted replaces z by the gradient
// of the product x·Wᵀ + b. Three passes over a row that stays in the L2 cache.
inline void cross_entropy_row(const cross_entropy& ce, float* z, int64_t row, int64_t vocab) {
  float nans;
  const float shift = largest_logit(z, vocab, nans);
  float linear_sum = 0;
  // The derivative of the cap needs z itself, so that its exponential is then computed twice.
  const bool wants_gradient = ce.gradients, capped = ce.softcap > 0, stores_exp = wants_gradient && !capped;
  if (ce.label_smoothing > 0)
    linear_sum = sum_in_runs(
        vocab, [=](int64_t i, auto span) { return inside(span, vec::load(z + i, span) - vec::all(shift)); });
  const int64_t target = ce.target[row * ce.target_stride];
  const bool ignored = target == ce.ignore_index;
  const float target_logit = ignored ? 0.0f : z[target];
  const float sum = nans + sum_in_runs(vocab, [=](int64_t i, auto span) {
                      const vec e = inside(span, exp(vec::load(z + i, span) - vec::all(shift)));
                      if (stores_exp) e.store(z + i, span);
                      return e;
                    });
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
  // The target's share is one number: with few classes, p minus the share may cancel to almost 0.
  const vec factor = vec::all(scale / sum), of_others = vec::all(scale * smoothing / float(vocab)),
            of_target = vec::all(float(scale * (1.0 - smoothing + double(smoothing) / double(vocab))));
  auto replace = [=](auto gradient_of) {
    const vec at_target = vec::all(z[target]);
    sweep(vocab, [=](int64_t i, auto span) { gradient_of(vec::load(z + i, span), of_others).store(z + i, span); });
    gradient_of(at_target, of_target).store(z + target, tail{1});
  };
  if (capped) {
    const vec over_cap = vec::all(1 / ce.softcap);
    replace([=](vec value, vec share) {
      const vec t = value * over_cap, slope = fma(vec::zero() - t, t, vec::all(1));
      return (exp(value - vec::all(shift)) * factor - share) * slope;
    });
  } else {
    replace([=](vec exponential, vec share) { return exponential * factor - share; });
  }
}

// Returns −1, or the first row whose target is neither a class nor ignore_index; then nothing is computed.
template <class T, class G>
int64_t linear_cross_entropy(const T* x, int64_t x_stride, weight_operand<const T> weight, const T* bias,
                             cross_entropy ce, logit_chunks chunks, logit_gradients<T, G> out, int64_t rows,
                             int64_t width, int64_t vocab, int threads) {
  const int64_t wrong = first_wrong_target(ce.target, ce.target_stride, ce.ignore_index, rows, vocab);
  if (wrong >= 0) return wrong;
  ce.gradients = out.wanted();
  for_chunks_of_logits(x, x_stride, weight, bias, chunks, out, rows, width, vocab, threads,
                       [=](float* z, int64_t row) { cross_entropy_row(ce, z, row, vocab); });
  return -1;
}

}  // namespace fastlm
