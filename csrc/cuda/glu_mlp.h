// Launchers of glu_mlp: the product with w_up in a gated feed-forward block with act(gate)·up as its epilogue, and its
// gradient.
#pragma once
#include <cstdint>
#include "../activation.h"
#include "dtype.h"

namespace fastlm::cuda {

// up = x Wu + bu and activated = act(gate)·up: (rows, hidden_width), contiguous, as is gate. up may be null.
struct glu_mlp_forward_args {
  DType dtype;
  const void* x;  // (rows, width), contiguous along width
  int64_t x_stride;
  const void* w_up;
  int64_t w_up_k_stride, w_up_n_stride;  // along width and along hidden_width; one of them is 1
  const void* b_up;                      // (hidden_width), contiguous, or null
  const void* gate;
  void *up, *activated;
  int64_t rows, width, hidden_width;
  activation_kind activation;
  bool tf32;
};
void glu_mlp_forward(const glu_mlp_forward_args& args, stream_t stream);

// With dactivated = dy Wdᵀ: dgate = dactivated·up·act'(gate) and dup = dactivated·act(gate), and activated =
// act(gate)·up unless it is null.
struct glu_mlp_backward_args {
  DType dtype;
  const void* dy;  // (rows, out_width), contiguous along out_width
  int64_t dy_stride;
  const void* w_down;
  int64_t w_down_k_stride, w_down_n_stride;  // along out_width and along hidden_width: w_down is read transposed
  const void *gate, *up;                     // (rows, hidden_width), contiguous, as are the results
  void *dgate, *dup, *activated;
  int64_t rows, out_width, hidden_width;
  activation_kind activation;
  bool tf32;
};
void glu_mlp_backward(const glu_mlp_backward_args& args, stream_t stream);

}  // namespace fastlm::cuda
