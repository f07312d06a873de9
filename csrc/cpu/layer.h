// What the compiled layers of models consist of (decoder_layer.h, encoder_layer.h): parameters, and steps that are the
// kernels of operators with the arguments that the operators pass.
#pragma once
#include "gelu_mlp.h"
#include "layernorm_residual.h"
#include "rms_norm_residual.h"

namespace fastlm {

struct norm_parameters {
  const float *weight, *bias;  // no weight: no such norm
};

struct norm_kind {
  bool centered;  // LayerNorm, else RMSNorm
  bool unit_offset;
  float eps;
};

template <class T> struct layer_projection {
  weight_operand<const T> weight;  // no data: no such projection
  const T* bias;
  int64_t outputs;

  // to = from·W + b, both contiguous.
  void run(const T* from, int64_t inputs, T* to, int64_t rows, int threads) const {
    linear_forward(from, inputs, weight, bias, to, rows, inputs, outputs, threads);
  }
};

// y = norm(residual + x), and summed = residual + x, which must not alias residual. Without a residual it is null.
template <class T>
void normalize(norm_kind kind, norm_parameters parameters, strided_rows<const T> x, const T* residual, T* y, T* summed,
               float* statistics, norm_size size, int threads) {
  const dropout none{0, 0};
  if (kind.centered)
    layernorm_residual_forward(x.data, x.layout.inner_stride, residual, size.width, parameters.weight, parameters.bias,
                               y, summed, statistics, statistics + size.rows, size, kind.eps, none, threads);
  else
    rms_norm_residual_forward(x, strided_rows<const T>{residual, {.inner = size.rows, .inner_stride = size.width}},
                              norm_weight{parameters.weight, kind.unit_offset}, y, summed, statistics, size, kind.eps,
                              none, threads);
}

// y = gelu(x·W1 + b1)·W2 + b2, of contiguous rows. activated is (rows, up.outputs).
template <class T>
void gelu_mlp(const layer_projection<T>& up, const layer_projection<T>& down, activation_kind activation, const T* x,
              T* activated, T* y, int64_t rows, int64_t width, int threads) {
  auto run = activation == activation_kind::gelu_tanh ? gelu_mlp_forward<true, T> : gelu_mlp_forward<false, T>;
  run(x, width, up.weight, up.bias, down.weight, down.bias, nullptr, activated, y, rows, width, up.outputs,
      down.outputs, threads);
}

}  // namespace fastlm
