// Matrices as the operands of a product: how elements are stored and addressed.
#pragma once
#include <algorithm>
#include <type_traits>
#include "simd.h"

namespace fastlm {

struct no_scales {};

// How a matrix of storage type T is addressed, and how its elements are read while a block is packed. The primary
// template is for fp32, bf16 and fp16: consecutive elements of type T, read as fp32 lanes. A type with several elements
// to a byte, or with scales, specialises it.
template <class T> struct storage {
  using scales = no_scales;
  static constexpr int64_t Bits = 8 * sizeof(T);  // of one element
  static FASTLM_INLINE const T* at(const T* data, int64_t index) { return data + index; }
  template <class Span> static FASTLM_INLINE vec load(const T* data, Span span) { return vec::load(data, span); }
};

// Element (i, k) at index i·stride + k·k_stride, k being the dimension that is summed over. One of the strides is 1.
template <class T> struct operand {
  const T* data;
  int64_t stride, k_stride;
  FASTLM_INLINE const T* at(int64_t i, int64_t k) const { return storage<T>::at(data, i * stride + k * k_stride); }
  FASTLM_INLINE operand from(int64_t i, int64_t k) const { return {at(i, k), stride, k_stride}; }
};

}  // namespace fastlm
