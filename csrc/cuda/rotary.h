// Launcher of rotary positions, of queries or of keys.
#pragma once
#include <cstdint>
#include "dtype.h"

namespace fastlm::cuda {

struct rotary_args {
  DType dtype;
  const void* x;  // (batch, heads, tokens, head_dim)
  int64_t batch_stride, head_stride, token_stride;
  const float* cos;  // (batch, tokens, rotary_dim); a stride of 0 where all sequences share it
  int64_t cos_batch_stride, cos_token_stride;
  const float* sin;
  int64_t sin_batch_stride, sin_token_stride;
  void* out;  // contiguous
  int64_t batch, heads, tokens, head_dim, rotary_dim;
  bool inverse;  // the transposed matrix
};
void rotary(const rotary_args& args, stream_t stream);

}  // namespace fastlm::cuda
