// Weight matrices as arguments.
#pragma once
#include "tensor.h"
#include "../cpu/linear.h"

namespace fastlm {

// A weight of nn.Linear, (n, k), or of GPT-2's Conv1D, (k, n): which of its two dimensions is the input, k.
struct weight_layout {
  int input;
  explicit weight_layout(bool conv1d) : input(conv1d ? 0 : 1) {}
  int64_t inputs(const tensor& weight) const { return weight.sizes[input]; }
  int64_t outputs(const tensor& weight) const { return weight.sizes[1 - input]; }

  // k inputs and n outputs; one of the strides is 1. Null where the argument is None.
  template <class T> weight_operand<T> matrix(const tensor& weight, int64_t k, int64_t n) const {
    T* const data = weight.as<T>(2);
    if (!weight.given()) return {nullptr, 0, 0};
    if (inputs(weight) != k || outputs(weight) != n)
      throw_argument_error(weight.name, std::to_string(k) + " inputs and " + std::to_string(n) + " outputs",
                           weight.layout());
    if (weight.strides[0] != 1 && weight.strides[1] != 1 && !weight.contiguous)
      throw_argument_error(weight.name, "a stride of 1 in one of the dimensions", weight.layout());
    return {data, weight.strides[input], weight.strides[1 - input]};
  }
};

// The dtype of a call's weight gradients: that of the first one that is wanted.
inline dtype gradient_type(std::initializer_list<const tensor*> gradients, dtype otherwise) {
  for (const tensor* gradient : gradients)
    if (gradient->given()) return gradient->type;
  return otherwise;
}

}  // namespace fastlm
