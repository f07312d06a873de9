// Kernel launches and warp constants.
#pragma once
#include "intrinsics.cuh"

namespace fastlm::cuda {

constexpr int WarpSize = 32;

// FASTLM_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments…). A kernel whose template arguments contain a
// comma is written in parentheses.
#define FASTLM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::fastlm::cuda::launch(#kernel, (kernel), dim3(grid), dim3(block), size_t(shared_bytes), stream, __VA_ARGS__)

}  // namespace fastlm::cuda
