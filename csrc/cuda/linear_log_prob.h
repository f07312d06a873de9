// Launchers of linear_log_prob: the results of a chunk of logits, and the gradient in their place.
#pragma once
#include <cstdint>
#include "dtype.h"
#include "logits.h"

namespace fastlm::cuda {

// A chunk of logits x·Wᵀ + bias, which are not capped yet.
struct log_prob_chunk {
  DType dtype;
  void* logits;  // (rows, vocab): contiguous along vocab, rows start at multiples of 16 bytes
  int64_t logits_stride, rows, vocab;
  logit_targets targets;
  float temperature, softcap;  // softcap: 0 for none
};

// log p(target) and the entropy of p = softmax(logits / temperature). The logits are read only.
struct linear_log_prob_forward_args {
  log_prob_chunk chunk;
  float *log_prob, *entropy, *row_max, *row_sum;  // (rows); row_sum: Σ exp((logit − row_max) / temperature)
};
void linear_log_prob_forward(const linear_log_prob_forward_args& args, stream_t stream);

// The logits become d(Σ dlog_prob·log_prob + dentropy·entropy)/d(logits).
struct linear_log_prob_backward_args {
  log_prob_chunk chunk;
  const float *dlog_prob, *dentropy;         // (rows), or null for zeros
  const float *entropy, *row_max, *row_sum;  // (rows)
  float* dbias_partials;  // (logit_partials(rows), vocab): partial sums of the gradient over the rows, before it is
                          // rounded; or null
};
void linear_log_prob_backward(const linear_log_prob_backward_args& args, stream_t stream);

}  // namespace fastlm::cuda
