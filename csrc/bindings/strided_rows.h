// The rows of a tensor for kernels that take a row_layout (csrc/row_layout.h).
#pragma once
#include "tensor.h"
#include "../row_layout.h"

namespace fastlm {

// The rows of a tensor's last dimension, which is contiguous. Leading dimensions that one stride describes are merged;
// at most three may be left.
inline row_layout layout_of_rows(const tensor& x) {
  if (!x.given()) return {};
  if (x.contiguous && x.rank > 0) return {.inner = x.width ? x.count / x.width : 1, .inner_stride = x.width};
  int64_t sizes[3] = {1, 1, 1}, strides[3] = {};  // from the innermost
  int last = -1;
  if (x.rank < 1 || x.rank > tensor::MaxRank || (x.strides[x.rank - 1] != 1 && x.width != 1)) last = 3;
  for (int i = x.rank - 2; i >= 0 && last < 3; --i) {
    if (x.sizes[i] == 1) continue;
    if (last >= 0 && x.strides[i] == sizes[last] * strides[last]) {
      sizes[last] *= x.sizes[i];
    } else if (++last < 3) {
      sizes[last] = x.sizes[i], strides[last] = x.strides[i];
    }
  }
  if (last == 3)
    throw_argument_error(x.name, "a contiguous last dimension and at most three strides of rows", x.layout());
  return {sizes[0], sizes[1], strides[2], strides[1], strides[0]};
}

// The same, checked to be so many rows of this width.
template <class T> strided_rows<T> strided_rows_of(const tensor& x, int64_t count, int64_t width) {
  T* const address = x.as<T>();
  if (x.given() && (x.count != count * width || x.width != width))
    throw_argument_error(x.name, std::to_string(count) + " rows of " + std::to_string(width), x.layout());
  return {address, layout_of_rows(x)};
}

}  // namespace fastlm
