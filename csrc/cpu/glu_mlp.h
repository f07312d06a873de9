// Gated MLP:  g = x·Wg + bg,  u = x·Wu + bu,  a = act(g)·u,  y = a·Wd + bd
//
// Forward 2·rows·(2·width + out)·hidden FLOP (three products), backward twice that; compute bound. Of rows × hidden,
// forward writes a and, where they are saved, g and u; backward reads g and u and writes their gradients. The first two
// products are computed together, group of panels by group of panels (see gemm.h): the activation is their epilogue,
// which receives g and u from the accumulators and reads neither from memory. Two products and a pass of their own for
// the activation would read g and u once more. In the backward, dy·Wdᵀ is never stored: its epilogue reads g and u and
// writes both gradients, and a where it was not saved. These gradients may replace g and u, element by element.
#pragma once
#include "linear.h"
#include "vmath.h"

namespace fastlm {

template <class T> struct glu_mlp_weights {
  weight_operand<const T> gate, up, down;
  const T *gate_bias, *up_bias;  // or null
};

struct glu_mlp_sizes {
  int64_t rows, width, hidden, out;
};

// gate, up and activated are (rows, hidden); gate and up may be null where they are not saved.
template <class T>
void glu_mlp_hidden(const T* x, int64_t x_stride, const glu_mlp_weights<T>& weights, T* gate, T* up, T* activated,
                    const glu_mlp_sizes& sizes, activation_kind activation, int threads) {
  auto write = [=, gate_bias = weights.gate_bias, up_bias = weights.up_bias, hidden = sizes.hidden](
                   int64_t i, int64_t j, vec g, vec u, auto span) {
    const int64_t at = i * hidden + j;
    if (gate_bias) g = g + vec::load(gate_bias + j, span);
    if (up_bias) u = u + vec::load(up_bias + j, span);
    if (gate) g.store(gate + at, span), u.store(up + at, span);
    (activate(activation, g).value * u).store(activated + at, span);
  };
  multiply<arithmetic_for<T>>(sizes.rows, sizes.hidden, sizes.width, operand<T>{x, x_stride, 1},
                              operands<T, 2>{weights.gate.summed_over_inputs(), weights.up.summed_over_inputs()},
                              threads, storing_to(activated, sizes.hidden, write));
}

template <class T>
void glu_mlp_forward(const T* x, int64_t x_stride, const glu_mlp_weights<T>& weights, const T* down_bias, T* gate,
                     T* up, T* activated, T* y, const glu_mlp_sizes& sizes, activation_kind activation, int threads) {
  glu_mlp_hidden(x, x_stride, weights, gate, up, activated, sizes, activation, threads);
  linear_forward(activated, sizes.hidden, weights.down, down_bias, y, sizes.rows, sizes.hidden, sizes.out, threads);
}

// (rows, hidden) each. dgate and dup are scratch memory, and gate and up themselves where these are not known.
template <class T> struct glu_mlp_saved {
  T *gate, *up, *activated, *dgate, *dup;
  bool hidden_known, activated_known;
};

template <class T, class G> struct glu_mlp_gradients {  // null where not wanted
  T* dx;
  weight_operand<G> dw_gate, dw_up, dw_down;
  G *db_gate, *db_up, *db_down;
};

// Computes what the gradients need of the hidden layer and is not known: gate, up, activated, and where wanted dgate =
// dy·Wdᵀ · up · act'(gate) and dup = dy·Wdᵀ · act(gate).
template <class T>
void glu_mlp_hidden_gradient(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride,
                             const glu_mlp_weights<T>& weights, const glu_mlp_saved<T>& saved, bool wants_hidden,
                             const glu_mlp_sizes& sizes, activation_kind activation, int threads) {
  const auto [gate, up, activated, dgate, dup, hidden_known, activated_known] = saved;
  const int64_t hidden = sizes.hidden;
  bool compute_activated = !activated_known;
  if (!hidden_known) {
    glu_mlp_hidden(x, x_stride, weights, gate, up, activated, sizes, activation, threads);
    compute_activated = false;
  }
  if (wants_hidden) {
    auto write = [=, gate = gate, up = up, activated = activated, dgate = dgate, dup = dup](int64_t i, int64_t j,
                                                                                            vec value, auto span) {
      const int64_t at = i * hidden + j;
      const activation_value g = activate(activation, vec::load(gate + at, span));
      const vec u = vec::load(up + at, span);
      if (compute_activated) (g.value * u).store(activated + at, span);
      // ReLU drops what is not finite where its slope is 0, as PyTorch does.
      zero_where(g.slope == vec::zero(), value * u * g.slope).store(dgate + at, span);
      (value * g.value).store(dup + at, span);
    };
    project_transposed(dy, dy_stride, weights.down, sizes.rows, hidden, sizes.out, threads,
                       storing_to(dgate, hidden, write));
  } else if (compute_activated) {
    parallel_for(sizes.rows, parts_for(sizes.rows, 3 * hidden * sizeof(T)), threads,
                 [=, gate = gate, up = up, activated = activated](int64_t begin, int64_t end, int64_t) {
                   const int64_t first = begin * hidden;
                   sweep((end - begin) * hidden, [=](int64_t i, auto span) {
                     const vec g = vec::load(gate + first + i, span), u = vec::load(up + first + i, span);
                     (activate(activation, g).value * u).store(activated + first + i, span);
                   });
                 });
  }
}

template <class T, class G>
void glu_mlp_backward(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const glu_mlp_weights<T>& weights,
                      const glu_mlp_saved<T>& saved, const glu_mlp_gradients<T, G>& out, const glu_mlp_sizes& sizes,
                      activation_kind activation, int threads) {
  const auto [rows, width, hidden, out_width] = sizes;
  const bool wants_gate = out.dw_gate.data || out.db_gate, wants_up = out.dw_up.data || out.db_up;
  glu_mlp_hidden_gradient(dy, dy_stride, x, x_stride, weights, saved, out.dx || wants_gate || wants_up, sizes,
                          activation, threads);
  weight_gradient(dy, dy_stride, static_cast<const T*>(saved.activated), hidden, out.dw_down, out.db_down, rows, hidden,
                  out_width, threads);
  const T *dgate = saved.dgate, *dup = saved.dup;
  linear_backward(dgate, hidden, x, x_stride, weights.gate, out.dx, out.dw_gate, out.db_gate, rows, width, hidden,
                  threads);
  if (T* dx = out.dx) {
    auto add = [=, width = width](int64_t i, int64_t j, vec value, auto span) {
      T* at = dx + i * width + j;
      (vec::load(at, span) + value).store(at, span);
    };
    project_transposed(dup, hidden, weights.up, rows, width, hidden, threads, updating_from(dx, dx, width, add));
  }
  weight_gradient(dup, hidden, x, x_stride, out.dw_up, out.db_up, rows, width, hidden, threads);
}

// The forward is compiled once, with the operator; decoder_layer.h calls it too.
#define FASTLM_GLU_MLP_TYPE(prefix, T)                                                                            \
  prefix template void glu_mlp_forward<T>(const T*, int64_t, const glu_mlp_weights<T>&, const T*, T*, T*, T*, T*, \
                                          const glu_mlp_sizes&, activation_kind, int);
#define FASTLM_GLU_MLP(prefix) \
  FASTLM_GLU_MLP_TYPE(prefix, float) FASTLM_GLU_MLP_TYPE(prefix, bf16) FASTLM_GLU_MLP_TYPE(prefix, fp16)
FASTLM_GLU_MLP(extern)

}  // namespace fastlm
