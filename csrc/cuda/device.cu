// Answers from the CUDA runtime.
#include "cuda/device.h"
#include <cuda_runtime_api.h>
#include <stdexcept>

namespace fastlm::cuda {

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : CUDART_VERSION;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

void use_device(int device) {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current == device) return;
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess)
    throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace fastlm::cuda
