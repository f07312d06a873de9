// Launchers of linear_cross_entropy: the losses as the epilogue of the product, and the gradient of a chunk of logits
// in place.
#pragma once
#include <cstdint>
#include "dtype.h"
#include "logits.h"

namespace fastlm::cuda {

struct cross_entropy_targets : logit_targets {
  float label_smoothing, logit_scale, softcap;  // softcap: 0 for none
  float* loss;                                  // (rows)
};

// The losses of the logits x·Wᵀ + bias, scaled and capped, which are never stored.
struct linear_cross_entropy_forward_args {
  DType dtype;
  const void* x;  // (rows, width), contiguous along width
  int64_t x_stride;
  const void* weight;
  int64_t weight_k_stride, weight_n_stride;  // along width and along vocab; one of them is 1
  const void* bias;                          // (vocab), contiguous, or null
  cross_entropy_targets targets;
  // Workspace, where num_splits = linear_cross_entropy_num_splits(dtype, vocab).
  float* partials;       // (num_splits, rows, 2): row_max and row_sum of each split of the vocabulary
  float* shifted_sums;   // (num_splits, rows): Σ (z − row_max) of each split; null without label smoothing
  float* target_logits;  // (rows)
  int64_t rows, width, vocab;
  bool tf32;
};
void linear_cross_entropy_forward(const linear_cross_entropy_forward_args& args, stream_t stream);

// The number of splits of the vocabulary whose partial results are combined to a row's log-sum-exp.
int64_t linear_cross_entropy_num_splits(DType dtype, int64_t vocab);

// The losses of a chunk of logits, which are neither scaled nor capped yet, and become d(Σ row_scale·loss)/d(logits) in
// place.
struct linear_cross_entropy_gradient_args {
  DType dtype;
  void* logits;  // (rows, vocab): contiguous along vocab, rows start at multiples of 16 bytes
  int64_t logits_stride;
  cross_entropy_targets targets;
  const float* row_scale;  // (rows)
  float* statistics;       // (2, rows or more): workspace where dbias_partials are wanted
  float* dbias_partials;   // (logit_partials(rows), vocab): partial sums of the gradient over the rows, before it is
                           // rounded; or null
  int64_t rows, vocab;
};
void linear_cross_entropy_gradient(const linear_cross_entropy_gradient_args& args, stream_t stream);

}  // namespace fastlm::cuda
