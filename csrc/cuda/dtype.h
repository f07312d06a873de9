// What a launcher's arguments are made of besides pointers and sizes. No CUDA header: the bindings, which the host's
// compiler sees, include it.
#pragma once

struct CUstream_st;

namespace fastlm::cuda {

enum class DType { float32, bfloat16, float16 };

using stream_t = CUstream_st*;  // cudaStream_t by its own name

}  // namespace fastlm::cuda
