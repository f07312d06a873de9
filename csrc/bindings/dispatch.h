// From a run-time dtype to the kernels' element types.
#pragma once
#include "tensor.h"
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

}  // namespace fastlm
