// Log-probabilities of targets and entropies:  log p(target) and H = −Σ p·log p,  p = softmax(z / T),  z = x·Wᵀ + b
// (rows, vocab), capped c·tanh(z / c) by the epilogue of the product.
//
// Forward one product of 2·rows·width·vocab FLOP, backward three, as it computes the logits again; logits exist for one
// chunk of rows at a time (logits.h). With d = (z − max) / T and s = Σ e^d:  log p = d − log s,  H = log s − Σ p·d,
// which is exact where one logit has all the weight. The gradient of z is (g·(1[target] − p) − h·p·(log p + H)) / T for
// the upstream gradients g and h, times 1 − tanh² where capped.
#pragma once
#include "logits.h"

namespace fastlm {

struct log_prob_rows {
  const int64_t* target;
  int64_t target_stride, ignore_index;
  float temperature, softcap;                     // softcap: as that of logit_chunks
  float *log_prob, *entropy, *row_max, *row_sum;  // (rows): max of z, and s
  const float *dlog_prob, *dentropy;              // (rows): g and h, or null for zeros; of the backward
};

// Results of one row, whose logits are overwritten. The row stays in the L2 cache.
inline void log_prob_row(const log_prob_rows& of, float* z, int64_t row, int64_t vocab) {
  const int64_t target = of.target[row * of.target_stride];
  if (target == of.ignore_index) {
    of.log_prob[row] = of.entropy[row] = of.row_max[row] = 0, of.row_sum[row] = 1;
    return;
  }
  float nans;
  const float row_max = largest_logit(z, vocab, nans), below_max = (z[target] - row_max) / of.temperature;
  const vec shift = vec::all(row_max), inverse = vec::all(1 / of.temperature);
  // z becomes e^d·d: a weight of 0 times a d of −∞ counts as 0.
  const float row_sum = nans + sum_in_runs(vocab, [=](int64_t i, auto span) {
                          const vec d = (vec::load(z + i, span) - shift) * inverse, e = exp(d);
                          zero_where(e == vec::zero(), e * d).store(z + i, span);
                          return inside(span, e);
                        });
  const float weighted = sum_in_runs(vocab, [=](int64_t i, auto span) { return vec::load(z + i, span); });
  const float log_sum = std::log(row_sum);
  of.log_prob[row] = below_max - log_sum;
  of.entropy[row] = log_sum - weighted / row_sum;
  of.row_max[row] = row_max, of.row_sum[row] = row_sum;
}

// Replaces the logits of one row by the gradient of the product.
inline void log_prob_row_gradient(const log_prob_rows& of, float* z, int64_t row, int64_t vocab) {
  const int64_t target = of.target[row * of.target_stride];
  if (target == of.ignore_index) {
    std::fill_n(z, vocab, 0.0f);
    return;
  }
  const float g = of.dlog_prob ? of.dlog_prob[row] : 0, h = of.dentropy ? of.dentropy[row] : 0,
              row_sum = of.row_sum[row];
  const vec shift = vec::all(of.row_max[row]), inverse = vec::all(1 / of.temperature),
            inverse_sum = vec::all(1 / row_sum), of_log_prob = vec::all(g), of_entropy = vec::all(-h),
            constant = vec::all(-h * (of.entropy[row] - std::log(row_sum)));
  // one_hot: 1 at the target, else 0. one_hot - p is computed before the product with g: at the target it may cancel to
  // almost 0, and the rounding errors of g and g·p would exceed the gradient of the entropy.
  auto gradient_of = [=](vec value, vec one_hot) {
    const vec d = (value - shift) * inverse, p = exp(d) * inverse_sum, by_entropy = p * fma(of_entropy, d, constant);
    return fma(one_hot - p, of_log_prob, zero_where(p == vec::zero(), by_entropy)) * inverse;  // where d is −∞ too
  };
  auto replace = [=](auto slope_of) {
    const vec at_target = vec::all(z[target]);
    sweep(vocab, [=](int64_t i, auto span) {
      const vec value = vec::load(z + i, span);
      (gradient_of(value, vec::zero()) * slope_of(value)).store(z + i, span);
    });
    (gradient_of(at_target, vec::all(1)) * slope_of(at_target)).store(z + target, tail{1});
  };
  if (of.softcap > 0) {
    const vec over_cap = vec::all(1 / of.softcap);
    replace([=](vec value) { return fma(vec::zero() - value * over_cap, value * over_cap, vec::all(1)); });
  } else {
    replace([](vec) { return vec::all(1); });
  }
}

// Returns −1, or the first row whose target is neither a class nor ignore_index; then nothing is computed.
template <class T>
int64_t linear_log_prob_forward(const T* x, int64_t x_stride, weight_operand<const T> weight, const T* bias,
                                const log_prob_rows& of, logit_chunks chunks, int64_t rows, int64_t width,
                                int64_t vocab, int threads) {
  const int64_t wrong = first_wrong_target(of.target, of.target_stride, of.ignore_index, rows, vocab);
  if (wrong >= 0) return wrong;
  for_chunks_of_logits(x, x_stride, weight, bias, chunks, logit_gradients<T, T>{}, rows, width, vocab, threads,
                       [=](float* z, int64_t row) { log_prob_row(of, z, row, vocab); });
  return -1;
}

template <class T, class G>
void linear_log_prob_backward(const T* x, int64_t x_stride, weight_operand<const T> weight, const T* bias,
                              const log_prob_rows& of, logit_chunks chunks, logit_gradients<T, G> out, int64_t rows,
                              int64_t width, int64_t vocab, int threads) {
  for_chunks_of_logits(x, x_stride, weight, bias, chunks, out, rows, width, vocab, threads,
                       [=](float* z, int64_t row) { log_prob_row_gradient(of, z, row, vocab); });
}

}  // namespace fastlm
