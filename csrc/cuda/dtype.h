// Types that launchers and kernels share. No CUDA header is included, because the bindings, which the host compiler
// builds, use this file too.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace fastlm::cuda {

enum class DType { float32, bfloat16, float16 };

// 16-bit floating-point numbers as they are stored. Arithmetic is in float32.
struct alignas(2) bf16 {
  uint16_t bits;
};
struct alignas(2) fp16 {
  uint16_t bits;
};

template <class T> inline constexpr DType dtype_of = DType::float32;
template <> inline constexpr DType dtype_of<bf16> = DType::bfloat16;
template <> inline constexpr DType dtype_of<fp16> = DType::float16;

using stream_t = CUstream_st*;  // the same type as cudaStream_t

}  // namespace fastlm::cuda
