// From a run-time dtype to the kernels' element types.
#pragma once
#include "tensor.h"
#include "../cpu/threads.h"
#include "../cpu/simd.h"

namespace fastlm {

// kernel.operator()<T>(), T being the element type.
template <class Kernel> auto dispatch(dtype type, const char* argument, Kernel kernel) {
  switch (type) {
    case dtype::float32: return kernel.template operator()<float>();
    case dtype::bfloat16: return kernel.template operator()<bf16>();
    case dtype::float16: return kernel.template operator()<fp16>();
    default: throw_argument_error(argument, "torch.float32, torch.bfloat16 or torch.float16", name_of(type));
  }
}
template <class Kernel> auto dispatch(const tensor& x, Kernel kernel) { return dispatch(x.type, x.name, kernel); }

// kernel.operator()<T, U>(), U being fp32 or T.
template <class Kernel> auto dispatch(dtype type, const char* argument, dtype wider, Kernel kernel) {
  return dispatch(type, argument, [&]<class T>() {
    return wider == dtype::float32 ? kernel.template operator()<T, float>() : kernel.template operator()<T, T>();
  });
}

// A vector of parameters as fp32, which the kernels read. One of 16 bits is converted, a few elements for a whole call.
class fp32_parameters {
  buffer converted;
  const float* address;

 public:
  fp32_parameters(const tensor& given, int64_t size) {
    if (!given.given() || given.type == dtype::float32) {
      address = given.contiguous_as<const float>(size);
      return;
    }
    converted = make_buffer(size);
    address = converted.get();
    dispatch(given, [&]<class T>() {
      const T* from = given.contiguous_as<const T>(size);
      sweep(size, [=, to = converted.get()](int64_t i, auto span) { vec::load(from + i, span).store(to + i, span); });
    });
  }
  operator const float*() const { return address; }
};

}  // namespace fastlm
