// The launchers of linear_cross_entropy: losses straight from the product, and what turns a chunk of logits into its
// gradient.
#pragma once
#include <cstdint>
#include "dtype.h"

namespace fastlm::cuda {

struct cross_entropy_targets {
  const int64_t* target;  // (rows)
  int64_t target_stride, ignore_index;
  float label_smoothing;
  float* loss;  // (rows)
};

// The losses of x·Wᵀ + bias, whose logits are never stored.
struct linear_cross_entropy_forward_args {
  DType dtype;
  const void* x;  // (rows, width), unit stride along width
  int64_t x_stride;
  const void* weight;
  int64_t weight_k_stride, weight_n_stride;  // along width and along vocab; one of them is 1
  const void* bias;                          // (vocab), contiguous, or null
  cross_entropy_targets targets;
  float* parts;      // (linear_cross_entropy_parts(dtype, vocab), rows, 2): working memory, as the next two
  float* sums;       // (the same number, rows) with label smoothing
  float* at_target;  // (rows)
  int64_t rows, width, vocab;
  bool tf32;
};
void linear_cross_entropy_forward(const linear_cross_entropy_forward_args& args, stream_t stream);

// Of how many parts of the vocabulary a row's log-sum-exp is made.
int64_t linear_cross_entropy_parts(DType dtype, int64_t vocab);

// The losses of some rows of logits, which become d(Σ row_scale·loss)/d(logits) in place.
struct linear_cross_entropy_gradient_args {
  DType dtype;
  void* logits;  // (rows, vocab): unit stride along vocab, rows that begin at multiples of 16 bytes
  int64_t logits_stride;
  cross_entropy_targets targets;
  const float* row_scale;  // (rows)
  float* statistics;       // (2, rows): working memory where shares are wanted
  float* shares;  // (linear_cross_entropy_shares(rows), vocab): sums of the gradient over some rows each, before it is
                  // rounded; or null
  int64_t rows, vocab;
};
void linear_cross_entropy_gradient(const linear_cross_entropy_gradient_args& args, stream_t stream);

int64_t linear_cross_entropy_shares(int64_t rows);

}  // namespace fastlm::cuda
