// Launchers of gelu_mlp: the first linear layer of a feed-forward block with GELU as its epilogue, and its gradient.
#pragma once
#include <cstdint>
#include "dtype.h"

namespace fastlm::cuda {

// hidden = x W1 + b1, activated = gelu(hidden): (rows, hidden_width), contiguous; either may be null.
struct gelu_mlp_forward_args {
  DType dtype;
  const void* x;  // (rows, width), contiguous along width
  int64_t x_stride;
  const void* w1;
  int64_t w1_k_stride, w1_n_stride;  // along width and along hidden_width; one of them is 1
  const void* b1;                    // (hidden_width), contiguous, or null
  void *hidden, *activated;
  int64_t rows, width, hidden_width;
  bool tanh, tf32;
};
void gelu_mlp_forward(const gelu_mlp_forward_args& args, stream_t stream);

// dhidden = (dy W2ᵀ)·gelu'(hidden), and activated = gelu(hidden) unless it is null.
struct gelu_mlp_backward_args {
  DType dtype;
  const void* dy;  // (rows, out_width), contiguous along out_width
  int64_t dy_stride;
  const void* w2;
  int64_t w2_k_stride, w2_n_stride;  // along out_width and along hidden_width, because W2 is read transposed
  const void* hidden;                // (rows, hidden_width), contiguous, as are dhidden and activated
  void *dhidden, *activated;
  int64_t rows, out_width, hidden_width;
  bool tanh, tf32;
};
void gelu_mlp_backward(const gelu_mlp_backward_args& args, stream_t stream);

}  // namespace fastlm::cuda
