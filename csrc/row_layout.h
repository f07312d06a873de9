// Where the rows of a tensor begin, in elements. The leading dimensions are at most three after dimensions that one
// stride describes are merged: row = (outer · middle + m) · inner + i. Rows with one stride have inner = their number.
#pragma once
#include <cstdint>

namespace fastlm {

struct row_layout {
  int64_t inner = 1, middle = 1;  // sizes; that of the outer dimension follows from the number of rows
  int64_t outer_stride = 0, middle_stride = 0, inner_stride = 0;

  int64_t offset(int64_t row) const {
    if (row < inner) return row * inner_stride;  // no division for rows with one stride
    const int64_t rest = row / inner;
    return row % inner * inner_stride + rest % middle * middle_stride + rest / middle * outer_stride;
  }
};

// The rows of a tensor; null without data.
template <class T> struct strided_rows {
  T* data;
  row_layout layout;

  explicit operator bool() const { return data != nullptr; }
  T* operator[](int64_t row) const { return data ? data + layout.offset(row) : nullptr; }
};

}  // namespace fastlm
