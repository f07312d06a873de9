// What a kernel file needs of the machine: launches, shared memory, barriers and the collectives of a warp. The same
// sources are compiled by nvcc and, with FASTLM_CUDA_EMULATION, by a C++ compiler against tests/cuda_emulation, which
// is why nothing else names a CUDA function of the host.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include "dtype.h"

#ifdef FASTLM_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#undef NDEBUG  // a wrong value must stop the kernel in a release too
#include <cassert>
#include <cuda_runtime.h>
#endif

#define FASTLM_DEVICE __device__ __forceinline__

namespace fastlm::cuda {

constexpr int WarpSize = 32;
constexpr uint32_t FullWarp = 0xFFFFFFFFu;

#ifdef FASTLM_CUDA_EMULATION

using emulation::launch;
using emulation::multiprocessors;

#define FASTLM_SHARED(name) unsigned char* const name = ::fastlm::emulation::shared_memory()
#define FASTLM_ASSERT(condition) \
  ((condition) ? void() : ::fastlm::emulation::assertion_failed(#condition, __FILE__, __LINE__))

// Barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads of the block, a multiple of 32.
FASTLM_DEVICE void named_barrier(int id, int threads, int line = __builtin_LINE()) {
  emulation::barrier(id, threads, line);
}

template <class V> FASTLM_DEVICE V shuffle(V value, int lane, int line = __builtin_LINE()) {
  return emulation::shuffle(value, lane, line);
}
template <class V> FASTLM_DEVICE V shuffle_xor(V value, int mask, int line = __builtin_LINE()) {
  return emulation::shuffle(value, int(threadIdx.x % WarpSize) ^ mask, line);
}
template <class V> FASTLM_DEVICE V shuffle_down(V value, int count, int line = __builtin_LINE()) {
  const int lane = int(threadIdx.x % WarpSize);
  return emulation::shuffle(value, lane + count < WarpSize ? lane + count : lane, line);
}
FASTLM_DEVICE uint32_t ballot(bool predicate, int line = __builtin_LINE()) {
  return emulation::ballot(predicate, line);
}
FASTLM_DEVICE bool any(bool predicate, int line = __builtin_LINE()) { return emulation::ballot(predicate, line) != 0; }
FASTLM_DEVICE bool all(bool predicate, int line = __builtin_LINE()) {
  return emulation::ballot(predicate, line) == FullWarp;
}

#else

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "an attribute of the device");
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            stream_t stream, std::type_identity_t<Parameters>... parameters) {
  constexpr size_t free_for_all = 48 << 10;  // more has to be asked for, kernel by kernel
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > free_for_all)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  void* addresses[] = {&parameters...};
  check(cudaLaunchKernel(function, grid, block, addresses, shared_bytes, stream), name);
}

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];

#define FASTLM_SHARED(name) unsigned char* const name = ::fastlm::cuda::dynamic_shared_memory
#define FASTLM_ASSERT(condition) assert(condition)

// Barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads of the block, a multiple of 32.
FASTLM_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The collectives of a warp: all 32 threads take part, always. shuffle_down leaves the last `count` lanes their own
// value.
template <class V> FASTLM_DEVICE V shuffle(V value, int lane) { return __shfl_sync(FullWarp, value, lane); }
template <class V> FASTLM_DEVICE V shuffle_xor(V value, int mask) { return __shfl_xor_sync(FullWarp, value, mask); }
template <class V> FASTLM_DEVICE V shuffle_down(V value, int count) { return __shfl_down_sync(FullWarp, value, count); }
FASTLM_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(FullWarp, predicate); }
FASTLM_DEVICE bool any(bool predicate) { return __any_sync(FullWarp, predicate); }
FASTLM_DEVICE bool all(bool predicate) { return __all_sync(FullWarp, predicate); }

#endif

// FASTLM_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments…); a kernel whose template arguments hold a comma
// stands in parentheses. Throws std::runtime_error with the kernel's name and what was wrong with the launch.
#define FASTLM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::fastlm::cuda::launch(#kernel, (kernel), dim3(grid), dim3(block), size_t(shared_bytes), stream, __VA_ARGS__)

}  // namespace fastlm::cuda
