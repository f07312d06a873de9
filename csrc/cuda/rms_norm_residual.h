// Launchers of RMSNorm after the residual sum. x, y, dy and dx have x_dtype. residual, summed and their gradients have
// residual_dtype, which is x_dtype or float32. weight and its gradient have weight_dtype, which is x_dtype or float32
// too. Results are contiguous.
#pragma once
#include <cstdint>
#include "../row_layout.h"
#include "dtype.h"

namespace fastlm::cuda {

struct rms_norm_residual_forward_args {
  DType x_dtype, residual_dtype, weight_dtype;
  const void* x;
  row_layout x_layout;
  const void* residual;  // or null
  row_layout residual_layout;
  const void* weight;
  bool unit_offset;  // 1 + weight is the factor, as in Gemma
  void *y, *summed;  // summed is null where it would be x itself
  float* rstd;
  const int64_t* seed;  // on the device; null without dropout
  int64_t rows, width;
  float eps;
  double dropout_p;
};
void rms_norm_residual_forward(const rms_norm_residual_forward_args& args, stream_t stream);

struct rms_norm_residual_backward_args {
  DType x_dtype, residual_dtype, weight_dtype;
  const void* dy;  // dy or dsummed may be null
  row_layout dy_layout;
  const void* dsummed;
  row_layout dsummed_layout;
  const void* summed;
  row_layout summed_layout;
  const void* weight;
  bool unit_offset;
  const float* rstd;
  void *dx, *dresidual;  // null where not wanted
  void* dweight;         // null where not wanted, and without dy
  // Workspace for the partial sums of dweight: (rms_norm_residual_max_partials(), width rounded up to a multiple of 8).
  float* partials;
  const int64_t* seed;
  int64_t rows, width;
  double dropout_p;
};
void rms_norm_residual_backward(const rms_norm_residual_backward_args& args, stream_t stream);

// The largest number of partial sums of a weight gradient. The actual number follows from the sizes and the alignment.
int64_t rms_norm_residual_max_partials();

}  // namespace fastlm::cuda
