// Linear:  y = x·W + b,  dx = dy·Wᵀ,  dW = xᵀ·dy,  db = Σ_rows dy
//
// Three products of 2·rows·k·n FLOP each, on rows·(k + n) + k·n elements; compute bound from a few dozen rows on (see
// gemm.h). W comes in either layout, nn.Linear's (n, k) or GPT-2's Conv1D (k, n), which differ in strides only: no
// transposed copy. Packing dy for dW also gives db.
//
// W is an operand with a storage type of its own. A low-bit type needs three things and no change to the callers:
// 1. storage<W> (operand.h): how elements are addressed and read while a block is packed, and the type of its scales;
// 2. arithmetic_for<T, W> (gemm_tile.h): lanes, multiply-add and accumulator, such as int32 with value() as fp32;
// 3. an overload of dequantized() for its scales, which multiplies each result before bias and activation.
#pragma once
#include "gemm_small.h"

namespace fastlm {

// W(i, j), i < k inputs, j < n outputs, at index i·k_stride + j·n_stride; one of the strides is 1.
template <class T> struct weight_operand {
  T* data;
  int64_t k_stride, n_stride;
  [[no_unique_address]] typename storage<std::remove_const_t<T>>::scales scales = {};

  using element = std::remove_const_t<T>;
  operand<element> summed_over_inputs() const { return {data, n_stride, k_stride}; }
  operand<element> summed_over_outputs() const { return {data, k_stride, n_stride}; }
};

template <class T> inline void convert(const float* from, T* to, int64_t count) {
  sweep(count, [=](int64_t i, auto span) { vec::load(from + i, span).store(to + i, span); });
}

// The epilogue of a product with a weight that has scales. Without scales there is nothing to do.
template <class Epilogue> Epilogue dequantized(no_scales, Epilogue epilogue) { return epilogue; }

template <class T, class Epilogue> struct after_bias : Epilogue {
  const T* bias;  // or null
  template <class Span> FASTLM_INLINE void operator()(int64_t i, int64_t j, vec value, Span span) const {
    Epilogue::operator()(i, j, bias ? value + vec::load(bias + j, span) : value, span);
  }
};
template <class T, class Epilogue> after_bias<T, Epilogue> add_bias(const T* bias, Epilogue epilogue) {
  return {epilogue, bias};
}

// y = x·W + bias handed to epilogue(row, column, value, span). bias may be null.
template <class T, class W, class Epilogue>
void project(const T* x, int64_t x_stride, weight_operand<const W> weight, const T* bias, int64_t rows, int64_t k,
             int64_t n, int threads, Epilogue epilogue) {
  multiply<arithmetic_for<T, W>>(rows, n, k, operand<T>{x, x_stride, 1}, weight.summed_over_inputs(), threads,
                                 dequantized(weight.scales, add_bias(bias, epilogue)));
}

// dy·Wᵀ handed to epilogue(row, column, value, span)
template <class T, class W, class Epilogue>
void project_transposed(const T* dy, int64_t dy_stride, weight_operand<const W> weight, int64_t rows, int64_t k,
                        int64_t n, int threads, Epilogue epilogue) {
  multiply<arithmetic_for<T, W>>(rows, k, n, operand<T>{dy, dy_stride, 1}, weight.summed_over_outputs(), threads,
                                 epilogue);
}

// Gradients of weights are of type G: the weights' own, or fp32 where autocast rounded them to T for this call only.

// db = Σ_rows dy where dW, which gives db as well, is not wanted. Each column is summed by one thread, in runs of 32
// rows.
template <class T, class G> void column_sums(const T* dy, int64_t dy_stride, G* dbias, int64_t rows, int64_t n,
                                             int threads) {
  const int64_t vecs = ceil_div(n, vec::Lanes);
  parallel_for(vecs, parts_for(vecs, rows * vec::Lanes * sizeof(T)), threads, [=](int64_t begin, int64_t end, int64_t) {
    const int64_t first = begin * vec::Lanes;
    sweep(std::min(n, end * vec::Lanes) - first, [=](int64_t j, auto span) {
      vec all = vec::zero();
      for (int64_t r = 0; r < rows; r += 32) {
        vec run = vec::zero();
        for (int64_t e = r; e < rows && e < r + 32; ++e) run = run + vec::load(dy + e * dy_stride + first + j, span);
        all = all + run;
      }
      all.store(dbias + first + j, span);
    });
  });
}

// dweight (in its own layout) and dbias, each where wanted (not null).
template <class T, class G>
void weight_gradient(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, weight_operand<G> dweight, G* dbias,
                     int64_t rows, int64_t k, int64_t n, int threads) {
  if (!dweight.data) {
    if (dbias) column_sums(dy, dy_stride, dbias, rows, n, threads);
    return;
  }
  buffer sums;
  if (dbias) {
    sums = make_buffer(n);
    std::fill_n(sums.get(), n, 0.0f);
  }
  const operand<T> xs{x, 1, x_stride}, dys{dy, 1, dy_stride};
  if (dweight.n_stride == 1)
    multiply_transposed<arithmetic_for<T>>(k, n, rows, xs, dys, threads, store_to(dweight.data, dweight.k_stride),
                                           nullptr, sums.get());
  else
    multiply_transposed<arithmetic_for<T>>(n, k, rows, dys, xs, threads, store_to(dweight.data, dweight.n_stride),
                                           sums.get(), nullptr);
  if (dbias) convert(sums.get(), dbias, n);
}

template <class T, class W>
void linear_forward(const T* x, int64_t x_stride, weight_operand<const W> weight, const T* bias, T* y, int64_t rows,
                    int64_t k, int64_t n, int threads) {
  project(x, x_stride, weight, bias, rows, k, n, threads, store_to(y, n));
}

template <class T, class W, class G>
void linear_backward(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, weight_operand<const W> weight,
                     T* dx, weight_operand<G> dweight, G* dbias, int64_t rows, int64_t k, int64_t n, int threads) {
  if (dx) project_transposed(dy, dy_stride, weight, rows, k, n, threads, store_to(dx, k));
  weight_gradient(dy, dy_stride, x, x_stride, dweight, dbias, rows, k, n, threads);
}

// Operators that end in a linear layer share these; they are compiled once, with the linear operator.
#define FASTLM_LINEAR_TYPES(prefix, T, G)                                                                          \
  prefix template void linear_backward<T, T, G>(const T*, int64_t, const T*, int64_t, weight_operand<const T>, T*, \
                                                weight_operand<G>, G*, int64_t, int64_t, int64_t, int);            \
  prefix template void weight_gradient<T, G>(const T*, int64_t, const T*, int64_t, weight_operand<G>, G*, int64_t, \
                                             int64_t, int64_t, int);
#define FASTLM_LINEAR(prefix)                                                                                         \
  prefix template void linear_forward<float, float>(const float*, int64_t, weight_operand<const float>, const float*, \
                                                    float*, int64_t, int64_t, int64_t, int);                          \
  prefix template void linear_forward<bf16, bf16>(const bf16*, int64_t, weight_operand<const bf16>, const bf16*,      \
                                                  bf16*, int64_t, int64_t, int64_t, int);                             \
  prefix template void linear_forward<fp16, fp16>(const fp16*, int64_t, weight_operand<const fp16>, const fp16*,      \
                                                  fp16*, int64_t, int64_t, int64_t, int);                             \
  FASTLM_LINEAR_TYPES(prefix, float, float)                                                                           \
  FASTLM_LINEAR_TYPES(prefix, bf16, bf16)                                                                             \
  FASTLM_LINEAR_TYPES(prefix, bf16, float)                                                                            \
  FASTLM_LINEAR_TYPES(prefix, fp16, fp16)                                                                             \
  FASTLM_LINEAR_TYPES(prefix, fp16, float)
FASTLM_LINEAR(extern)

}  // namespace fastlm
