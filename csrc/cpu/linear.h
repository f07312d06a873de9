// Linear:  y = x·W + b,  dx = dy·Wᵀ,  dW = xᵀ·dy,  db = Σ_rows dy
//
// Three products of 2·rows·k·n FLOP each; compute bound from a few dozen rows on (see gemm.h). W comes in either
// layout, nn.Linear's (n, k) or GPT-2's Conv1D (k, n), told apart by its strides alone: no transposed copy. db falls
// out of packing dy for dW.
#pragma once
#include "gemm_skinny.h"

namespace fastlm {

// W(i, j), i < k, j < n, at data[i·k_stride + j·n_stride]; one of the strides is 1.
template <class T> struct weight_matrix {
  T* data;
  int64_t k_stride, n_stride;
};

template <class T> inline void convert(const float* from, T* to, int64_t count) {
  sweep(count, [=](int64_t i, auto span) { vec::load(from + i, span).store(to + i, span); });
}

template <class T, class Epilogue> struct after_bias : Epilogue {
  const T* bias;  // or null
  template <class Span> FASTLM_INLINE void operator()(int64_t i, int64_t j, vec value, Span span) const {
    Epilogue::operator()(i, j, bias ? value + vec::load(bias + j, span) : value, span);
  }
};

// y = x·W + bias handed to epilogue(row, column, value, span). bias may be null.
template <class T, class Epilogue>
void project(const T* x, int64_t x_stride, weight_matrix<const T> weight, const T* bias, int64_t rows, int64_t k,
             int64_t n, int threads, Epilogue epilogue) {
  multiply<arithmetic_for<T>>(rows, n, k, operand<T>{x, x_stride, 1},
                              operand<T>{weight.data, weight.n_stride, weight.k_stride}, threads,
                              after_bias<T, Epilogue>{epilogue, bias});
}

// dy·Wᵀ handed to epilogue(row, column, value, span)
template <class T, class Epilogue>
void project_back(const T* dy, int64_t dy_stride, weight_matrix<const T> weight, int64_t rows, int64_t k, int64_t n,
                  int threads, Epilogue epilogue) {
  multiply<arithmetic_for<T>>(rows, k, n, operand<T>{dy, dy_stride, 1},
                              operand<T>{weight.data, weight.k_stride, weight.n_stride}, threads, epilogue);
}

// Gradients of weights are of type G: theirs, or fp32 where the weights were rounded to T for this call alone.

// db = Σ_rows dy where dW, which gives it for nothing, is not wanted. Cut by columns: each is summed by one thread, in
// runs of 32 rows.
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
void weight_gradient(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, weight_matrix<G> dweight, G* dbias,
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

template <class T>
void linear_forward(const T* x, int64_t x_stride, weight_matrix<const T> weight, const T* bias, T* y, int64_t rows,
                    int64_t k, int64_t n, int threads) {
  project(x, x_stride, weight, bias, rows, k, n, threads, store_to(y, n));
}

template <class T, class G>
void linear_backward(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, weight_matrix<const T> weight, T* dx,
                     weight_matrix<G> dweight, G* dbias, int64_t rows, int64_t k, int64_t n, int threads) {
  if (dx) project_back(dy, dy_stride, weight, rows, k, n, threads, store_to(dx, k));
  weight_gradient(dy, dy_stride, x, x_stride, dweight, dbias, rows, k, n, threads);
}

}  // namespace fastlm
