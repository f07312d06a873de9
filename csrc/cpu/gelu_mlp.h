// GELU-MLP:  h = x·W1 + b1,  a = gelu(h),  y = a·W2 + b2
//
// Forward 4·rows·width·hidden FLOP (two products), backward twice that; compute bound. The activation is an epilogue of
// the first product: h and a are written once, from registers, and not read again for it. In the backward the
// derivative of GELU is an epilogue of dy·W2ᵀ, which also recomputes a where it was not saved.
#pragma once
#include "linear.h"
#include "vmath.h"

namespace fastlm {

template <bool Tanh> FASTLM_INLINE activation_value gelu(vec x) {
  if constexpr (Tanh) return gelu_tanh(x);
  else return gelu_erf(x);
}

// hidden and activated are (rows, hidden_width); hidden may be null where it is not saved.
template <bool Tanh, class T>
void gelu_mlp_hidden(const T* x, int64_t x_stride, weight_operand<const T> w1, const T* b1, T* hidden, T* activated,
                     int64_t rows, int64_t width, int64_t hidden_width, int threads) {
  auto write = [=](int64_t i, int64_t j, vec value, auto span) {
    if (hidden) value.store(hidden + i * hidden_width + j, span);
    gelu<Tanh>(value).value.store(activated + i * hidden_width + j, span);
  };
  project(x, x_stride, w1, b1, rows, width, hidden_width, threads, storing_to(activated, hidden_width, write));
}

template <bool Tanh, class T>
void gelu_mlp_forward(const T* x, int64_t x_stride, weight_operand<const T> w1, const T* b1, weight_operand<const T> w2,
                      const T* b2, T* hidden, T* activated, T* y, int64_t rows, int64_t width, int64_t hidden_width,
                      int64_t out_width, int threads) {
  gelu_mlp_hidden<Tanh>(x, x_stride, w1, b1, hidden, activated, rows, width, hidden_width, threads);
  linear_forward(activated, hidden_width, w2, b2, y, rows, hidden_width, out_width, threads);
}

template <class T> struct gelu_mlp_saved {
  T *hidden, *activated, *dhidden;  // (rows, hidden_width) each; dhidden is scratch memory
  bool hidden_known, activated_known;
};

template <class T, class G> struct gelu_mlp_gradients {  // null where not wanted
  T* dx;
  weight_operand<G> dw1, dw2;
  G *db1, *db2;
};

// Computes what the gradients need of the hidden layer and is not known: hidden, activated, and where wanted dhidden =
// dy·W2ᵀ · gelu'(hidden).
template <bool Tanh, class T>
void gelu_mlp_hidden_gradient(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, weight_operand<const T> w1,
                              const T* b1, weight_operand<const T> w2, gelu_mlp_saved<T> saved, bool wants_dhidden,
                              int64_t rows, int64_t width, int64_t hidden_width, int64_t out_width, int threads) {
  T *hidden = saved.hidden, *activated = saved.activated, *dhidden = saved.dhidden;
  bool compute_activated = !saved.activated_known;
  if (!saved.hidden_known) {
    gelu_mlp_hidden<Tanh>(x, x_stride, w1, b1, hidden, activated, rows, width, hidden_width, threads);
    compute_activated = false;
  }
  if (wants_dhidden) {
    auto write = [=](int64_t i, int64_t j, vec value, auto span) {
      const int64_t at = i * hidden_width + j;
      activation_value g = gelu<Tanh>(vec::load(hidden + at, span));
      (value * g.slope).store(dhidden + at, span);
      if (compute_activated) g.value.store(activated + at, span);
    };
    project_transposed(dy, dy_stride, w2, rows, hidden_width, out_width, threads,
                       storing_to(dhidden, hidden_width, write));
  } else if (compute_activated) {
    parallel_for(rows, parts_for(rows, 2 * hidden_width * sizeof(T)), threads,
                 [=](int64_t begin, int64_t end, int64_t) {
                   const int64_t first = begin * hidden_width;
                   sweep((end - begin) * hidden_width, [=](int64_t i, auto span) {
                     gelu<Tanh>(vec::load(hidden + first + i, span)).value.store(activated + first + i, span);
                   });
                 });
  }
}

template <bool Tanh, class T, class G>
void gelu_mlp_backward(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, weight_operand<const T> w1,
                       const T* b1, weight_operand<const T> w2, gelu_mlp_saved<T> saved, gelu_mlp_gradients<T, G> out,
                       int64_t rows, int64_t width, int64_t hidden_width, int64_t out_width, int threads) {
  const bool wants_dhidden = out.dx || out.dw1.data || out.db1;
  gelu_mlp_hidden_gradient<Tanh>(dy, dy_stride, x, x_stride, w1, b1, w2, saved, wants_dhidden, rows, width,
                                 hidden_width, out_width, threads);
  weight_gradient(dy, dy_stride, static_cast<const T*>(saved.activated), hidden_width, out.dw2, out.db2, rows,
                  hidden_width, out_width, threads);
  linear_backward(static_cast<const T*>(saved.dhidden), hidden_width, x, x_stride, w1, out.dx, out.dw1, out.db1, rows,
                  width, hidden_width, threads);
}

// The forward is compiled once, with the operator; layer.h calls it too.
#define FASTLM_GELU_MLP_TYPE(prefix, Tanh, T)                                                                     \
  prefix template void gelu_mlp_forward<Tanh, T>(const T*, int64_t, weight_operand<const T>, const T*,            \
                                                 weight_operand<const T>, const T*, T*, T*, T*, int64_t, int64_t, \
                                                 int64_t, int64_t, int);
#define FASTLM_GELU_MLP_KIND(prefix, Tanh)  \
  FASTLM_GELU_MLP_TYPE(prefix, Tanh, float) \
  FASTLM_GELU_MLP_TYPE(prefix, Tanh, bf16) FASTLM_GELU_MLP_TYPE(prefix, Tanh, fp16)
#define FASTLM_GELU_MLP(prefix) FASTLM_GELU_MLP_KIND(prefix, false) FASTLM_GELU_MLP_KIND(prefix, true)
FASTLM_GELU_MLP(extern)

}  // namespace fastlm
