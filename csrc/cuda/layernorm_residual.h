// Launchers of LayerNorm after the residual sum. x, y, dy and dx are of x_dtype; residual, summed, their gradients of
// residual_dtype, which is the same or float32; weight, bias and their gradients of weight_dtype, again the same or
// float32. Strides are between rows, in elements; results are contiguous.
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
  const void* dy;  // one of dy and dsummed may be null
  int64_t dy_stride;
  const void* dsummed;
  int64_t dsummed_stride;
  const void* summed;
  int64_t summed_stride;
  const void* weight;
  const float *mean, *rstd;
  void *dx, *dresidual;   // null where not wanted
  void *dweight, *dbias;  // null where not wanted, and without dy
  float*
      shares;  // room for (dweight and dbias that are wanted, layernorm_residual_most_shares(), width rounded up to 8)
  const int64_t* seed;
  int64_t rows, width;
  double dropout_p;
};
void layernorm_residual_backward(const layernorm_residual_backward_args& args, stream_t stream);

// Of how many shares the weights' gradients are the sum at most. How many there are follows from the sizes and from how
// the arguments lie in memory.
int64_t layernorm_residual_most_shares();

}  // namespace fastlm::cuda
