// What the bindings of the CUDA launchers share. Launchers take addresses, strides and the dtype as a run-time value;
// these functions check a tensor and return them.
#pragma once
#include "../arguments.h"
#include "cuda/device.h"
#include "cuda/dtype.h"

namespace fastlm::bindings {

// Where a call launches its kernels: the last two arguments of every function.
struct launch_target {
  int device;
  cuda::stream_t stream;

  launch_target(argument device, argument stream)
      : device(device), stream(reinterpret_cast<cuda::stream_t>(static_cast<int64_t>(stream))) {}

  template <class Launcher, class Args> void launch(Launcher launcher, const Args& args) const {
    cuda::use_device(device);
    launcher(args, stream);
  }
};

inline cuda::DType launch_dtype(dtype type, const char* argument) {
  switch (type) {
    case dtype::float32: return cuda::DType::float32;
    case dtype::bfloat16: return cuda::DType::bfloat16;
    case dtype::float16: return cuda::DType::float16;
    default: throw_argument_error(argument, "torch.float32, torch.bfloat16 or torch.float16", name_of(type));
  }
}
inline cuda::DType launch_dtype(const tensor& x) { return launch_dtype(x.type, x.name); }

// read.operator()<T>() for the element type T that a tensor must have.
template <class Read> auto of_type(const tensor& x, dtype type, Read read) {
  if (x.given() && x.type != type) throw_argument_error(x.name, name_of(type), name_of(x.type));
  switch (launch_dtype(type, x.name)) {
    case cuda::DType::bfloat16: return read.template operator()<bf16>();
    case cuda::DType::float16: return read.template operator()<fp16>();
    default: return read.template operator()<float>();
  }
}

// Rows of a tensor of the given type (see tensor::rows), checked to have the given sizes if there are any.
template <class... Sizes> row_view<void> rows_of(const tensor& x, dtype type, Sizes... sizes) {
  return of_type(x, type, [&]<class T>() -> row_view<void> {
    const row_view<T> rows = x.rows<T>(sizes...);
    return {rows.data, rows.count, rows.width, rows.stride};
  });
}

// The address of a contiguous tensor of the given type and number of elements; null for None.
inline void* contiguous_of(const tensor& x, dtype type, int64_t elements) {
  return of_type(x, type, [&]<class T>() -> void* { return x.contiguous_as<T>(elements); });
}

// A weight matrix of nn.Linear, (outputs, inputs), or of GPT-2's Conv1D, (inputs, outputs). One of the strides is 1.
struct weight_view {
  const void* data;
  int64_t inputs, outputs, input_stride, output_stride;

  weight_view(const tensor& weight, dtype type, bool conv1d) {
    weight.check_rank(2);
    data = of_type(weight, type, [&]<class T>() -> const void* { return weight.as<T>(2); });
    const int input = conv1d ? 0 : 1;
    inputs = weight.sizes[input], outputs = weight.sizes[1 - input];
    input_stride = weight.strides[input], output_stride = weight.strides[1 - input];
    if (input_stride != 1 && output_stride != 1 && !weight.contiguous)
      throw_argument_error(weight.name, "a stride of 1 in one of the dimensions", weight.layout());
  }
};

inline void check_size(const tensor& x, const char* what, int64_t expected, int64_t got) {
  if (expected != got)
    throw_argument_error(x.name, std::string(what) + " " + std::to_string(expected), std::to_string(got));
}

}  // namespace fastlm::bindings
