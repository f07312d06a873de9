// Sums and maxima over a warp and over a block, always along the same tree, so results are deterministic. Every thread
// receives the result.
#pragma once
#include "launch.cuh"

namespace fastlm::cuda {

FASTLM_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = WarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// NaN propagates, as in torch.
FASTLM_DEVICE float maximum(float a, float b) { return a > b || a != a ? a : b; }

FASTLM_DEVICE float warp_max(float value) {
#pragma unroll
  for (int mask = WarpSize / 2; mask > 0; mask /= 2) value = maximum(value, shuffle_xor(value, mask));
  return value;
}

// Blocks are one-dimensional, with a multiple of 32 threads. `shared` is space for 32 numbers, which is free again on
// return.
FASTLM_DEVICE float block_sum(float value, float* shared) {
  const int lane = threadIdx.x % WarpSize, warp = threadIdx.x / WarpSize, warps = blockDim.x / WarpSize;
  value = warp_sum(value);
  if (warps == 1) return value;
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = warp_sum(lane < warps ? shared[lane] : 0.0f);
  __syncthreads();
  return value;
}

FASTLM_DEVICE float block_max(float value, float* shared) {
  const int lane = threadIdx.x % WarpSize, warp = threadIdx.x / WarpSize, warps = blockDim.x / WarpSize;
  value = warp_max(value);
  if (warps == 1) return value;
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = warp_max(shared[lane < warps ? lane : 0]);
  __syncthreads();
  return value;
}

}  // namespace fastlm::cuda
