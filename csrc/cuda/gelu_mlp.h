// The launchers of gelu_mlp: the middle of the feed-forward block, in the product before it.
#pragma once
#include <cstdint>
#include "dtype.h"

namespace fastlm::cuda {

// hidden = x W1 + b1, activated = gelu(hidden): (rows, hidden_width), contiguous; either may be null.
struct gelu_mlp_forward_args {
  DType dtype;
  const void* x;  // (rows, width), unit stride along width
  int64_t x_stride;
  const void* w1;
  int64_t w1_k_stride, w1_n_stride;  // along width and along hidden_width; one of them is 1
  const void* b1;                    // (hidden_width), contiguous, or null
  void *hidden, *activated;
  int64_t rows, width, hidden_width;
  bool tanh, tf32;
};
void gelu_mlp_forward(const gelu_mlp_forward_args& args, stream_t stream);

// dhidden = (dy W2ᵀ)·gelu'(hidden), and activated = gelu(hidden) again unless it is null.
struct gelu_mlp_backward_args {
  DType dtype;
  const void* dy;  // (rows, out_width), unit stride along out_width
  int64_t dy_stride;
  const void* w2;
  int64_t w2_k_stride, w2_n_stride;  // along out_width and along hidden_width: W2 read backwards
  const void* hidden;                // (rows, hidden_width), contiguous, as dhidden and activated
  void *dhidden, *activated;
  int64_t rows, out_width, hidden_width;
  bool tanh, tf32;
};
void gelu_mlp_backward(const gelu_mlp_backward_args& args, stream_t stream);

}  // namespace fastlm::cuda
