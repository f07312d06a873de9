// Launchers of LayerNorm after the residual sum. x, y, dy and dx have x_dtype. residual, summed and their gradients
// have residual_dtype, which is x_dtype or float32. weight, bias and their gradients have weight_dtype, which is
// x_dtype or float32 too. Strides are row strides in elements; results are contiguous.
#pragma once
#include <cstdint>
#include "dtype.h"

namespace fastlm::cuda {

struct layernorm_residual_forward_args {
  DType x_dtype, residual_dtype, weight_dtype;
  const void* x;
  int64_t x_stride;
  const void* residual;  // or null
  int64_t residual_stride;
  const void *weight, *bias;  // bias may be null
  void *y, *summed;           // summed is null where it would be x itself
  float *mean, *rstd;
  const int64_t* seed;  // on the device; null without dropout
  int64_t rows, width;
  float eps;
  double dropout_p;
};
void layernorm_residual_forward(const layernorm_residual_forward_args& args, stream_t stream);

struct layernorm_residual_backward_args {
  DType x_dtype, residual_dtype, weight_dtype;
  const void* dy;  // dy or dsummed may be null
  int64_t dy_stride;
  const void* dsummed;
  int64_t dsummed_stride;
  const void* summed;
  int64_t summed_stride;
  const void* weight;
  const float *mean, *rstd;
  void *dx, *dresidual;   // null where not wanted
  void *dweight, *dbias;  // null where not wanted, and without dy
  // Workspace for the partial sums of dweight and dbias: (gradients that are wanted,
  // layernorm_residual_max_partials(), width rounded up to a multiple of 8).
  float* partials;
  const int64_t* seed;
  int64_t rows, width;
  double dropout_p;
};
void layernorm_residual_backward(const layernorm_residual_backward_args& args, stream_t stream);

// The largest number of partial sums of a weight gradient. The actual number follows from the sizes and the alignment.
int64_t layernorm_residual_max_partials();

}  // namespace fastlm::cuda
