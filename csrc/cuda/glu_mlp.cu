// The activation of a gated feed-forward block, as the epilogue of the product with w_up and of the one after it:
//   forward   up = x Wu + bu,  activated = act(gate)·up,  gate being x Wg + bg
//   backward  dactivated = dy Wdᵀ,  dgate = dactivated·up·act'(gate),  dup = dactivated·act(gate),  and activated if it
//             was not saved
//
// 2·rows·width·hidden_width FLOPs each; gate and the other products are the vendor's. A kernel of its own would read
// gate and up and write activated, 6 bytes per element in 16 bits. Here up is stored from the accumulators and not read
// again, and where the recompute level does not save it, it is not stored: 4 bytes, gate read and activated written. In
// the backward pass dactivated is never stored, which saves 4 of 12 bytes. The epilogues read gate, and in the backward
// pass up, one group ahead of their use.
#include "glu_mlp.h"
#include "activation.cuh"
#include "gemm.cuh"

namespace fastlm::cuda {

// Epilogues. vectorized: all groups of 8 columns can be loaded and stored as vectors.
template <class T> struct glu_epilogue {
  const T *bias, *gate;
  T *up, *activated;
  int n;
  activation_kind activation;
  bool vectorized;

  FASTLM_DEVICE vec<T, 8> prefetch_columns(int column, bool inside) const {
    return load8(bias + column, bias && inside ? n - column : 0, vectorized);
  }
  FASTLM_DEVICE vec<T, 8> prefetch(int row, int column, bool inside) const {
    return load8(gate + int64_t(row) * n + column, inside ? n - column : 0, vectorized);
  }

  template <int> FASTLM_DEVICE void finish(int row, int column, vec<float, 8>& c, const vec<T, 8>& shift,
                                           const vec<T, 8>& gates, bool inside) const {
    if (!inside) return;
    const int64_t at = int64_t(row) * n + column;
#pragma unroll
    for (int e = 0; e < 8; ++e) c[e] += to_float(shift[e]);
    if (up) store8(c, up + at, n - column, vectorized);
#pragma unroll
    for (int e = 0; e < 8; ++e) c[e] *= activate(to_float(gates[e]), activation).value;
    store8(c, activated + at, n - column, vectorized);
  }
};

template <class T> struct glu_gradient_epilogue {
  struct saved {
    vec<T, 8> gate, up;
  };
  const T *gate, *up;
  T *dgate, *dup, *activated;
  int n;
  activation_kind activation;
  bool vectorized;

  FASTLM_DEVICE no_data prefetch_columns(int, bool) const { return {}; }
  FASTLM_DEVICE saved prefetch(int row, int column, bool inside) const {
    const int64_t at = int64_t(row) * n + column;
    const int count = inside ? n - column : 0;
    return {load8(gate + at, count, vectorized), load8(up + at, count, vectorized)};
  }

  template <int>
  FASTLM_DEVICE void finish(int row, int column, vec<float, 8>& c, no_data, const saved& hidden, bool inside) const {
    if (!inside) return;
    const int64_t at = int64_t(row) * n + column;
    vec<float, 8> gradient, activations;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const activation_result g = activate(to_float(hidden.gate[e]), activation);
      const float u = to_float(hidden.up[e]);
      gradient[e] = g.slope == 0 ? 0.f : c[e] * u * g.slope;  // also where u is not finite
      activations[e] = g.value * u;
      c[e] *= g.value;
    }
    store8(gradient, dgate + at, n - column, vectorized);
    store8(c, dup + at, n - column, vectorized);
    if (activated) store8(activations, activated + at, n - column, vectorized);
  }
};

void glu_mlp_forward(const glu_mlp_forward_args& args, stream_t stream) {
  with_dtype(args.dtype, [&]<class T>() {
    const glu_epilogue<T> epilogue{static_cast<const T*>(args.b_up),
                                   static_cast<const T*>(args.gate),
                                   static_cast<T*>(args.up),
                                   static_cast<T*>(args.activated),
                                   int(args.hidden_width),
                                   args.activation,
                                   can_vectorize(args.hidden_width, {args.b_up, args.gate, args.up, args.activated})};
    multiply<T>({args.x, args.x_stride, args.w_up, args.w_up_k_stride, args.w_up_n_stride, args.rows, args.width,
                 args.hidden_width, args.tf32},
                epilogue, stream);
  });
}

void glu_mlp_backward(const glu_mlp_backward_args& args, stream_t stream) {
  with_dtype(args.dtype, [&]<class T>() {
    const glu_gradient_epilogue<T> epilogue{
        static_cast<const T*>(args.gate),
        static_cast<const T*>(args.up),
        static_cast<T*>(args.dgate),
        static_cast<T*>(args.dup),
        static_cast<T*>(args.activated),
        int(args.hidden_width),
        args.activation,
        can_vectorize(args.hidden_width, {args.gate, args.up, args.dgate, args.dup, args.activated})};
    multiply<T>({args.dy, args.dy_stride, args.w_down, args.w_down_k_stride, args.w_down_n_stride, args.rows,
                 args.out_width, args.hidden_width, args.tf32},
                epilogue, stream);
  });
}

}  // namespace fastlm::cuda
