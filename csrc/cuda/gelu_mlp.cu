// The GELU of a feed-forward block, as the epilogue of the product before it:
//   forward   hidden = x W1 + b1,  activated = gelu(hidden)
//   backward  dhidden = (dy W2ᵀ)·gelu'(hidden),  and activated if it was not saved
//
// 2·rows·width·hidden_width FLOPs each. A separate kernel for the GELU would read hidden and write activated, 4 bytes
// per element in 16 bits. Here hidden is stored from the accumulators and not read again, and where the recompute level
// does not save it, it is not stored. The other products are the vendor's. In the forward pass the GELU receives its
// input before it is rounded to be saved; in the backward pass, after.
//
// The arithmetic of the GELU (about 45 instructions per element with erf, 25 with tanh) is partly hidden behind the
// products of another block on the same multiprocessor. The backward pass reads hidden one group ahead of its use.
#include "gelu_mlp.h"
#include "activation.cuh"
#include "gemm.cuh"

namespace fastlm::cuda {

// Epilogues. vectorized: all groups of 8 columns can be loaded and stored as vectors.
template <class T> struct gelu_epilogue {
  const T* bias;
  T *hidden, *activated;
  int n;
  bool tanh, vectorized;

  FASTLM_DEVICE vec<T, 8> prefetch_columns(int column, bool inside) const {
    return load8(bias + column, bias && inside ? n - column : 0, vectorized);
  }
  FASTLM_DEVICE no_data prefetch(int, int, bool) const { return {}; }

  template <int> FASTLM_DEVICE void finish(int row, int column, vec<float, 8>& c, const vec<T, 8>& shift, no_data,
                                           bool inside) const {
    if (!inside) return;
    const int64_t at = int64_t(row) * n + column;
#pragma unroll
    for (int e = 0; e < 8; ++e) c[e] += to_float(shift[e]);
    if (hidden) store8(c, hidden + at, n - column, vectorized);
    if (!activated) return;
#pragma unroll
    for (int e = 0; e < 8; ++e) c[e] = gelu(c[e], tanh).value;
    store8(c, activated + at, n - column, vectorized);
  }
};

template <class T> struct gelu_gradient_epilogue {
  const T* hidden;
  T *dhidden, *activated;
  int n;
  bool tanh, vectorized;

  FASTLM_DEVICE no_data prefetch_columns(int, bool) const { return {}; }
  FASTLM_DEVICE vec<T, 8> prefetch(int row, int column, bool inside) const {
    return load8(hidden + int64_t(row) * n + column, inside ? n - column : 0, vectorized);
  }

  template <int> FASTLM_DEVICE void finish(int row, int column, vec<float, 8>& c, no_data,
                                           const vec<T, 8>& saved_hidden, bool inside) const {
    if (!inside) return;
    const int64_t at = int64_t(row) * n + column;
    vec<float, 8> activations;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const activation_result g = gelu(to_float(saved_hidden[e]), tanh);
      c[e] *= g.slope;
      activations[e] = g.value;
    }
    store8(c, dhidden + at, n - column, vectorized);
    if (activated) store8(activations, activated + at, n - column, vectorized);
  }
};

void gelu_mlp_forward(const gelu_mlp_forward_args& args, stream_t stream) {
  with_dtype(args.dtype, [&]<class T>() {
    const gelu_epilogue<T> epilogue{static_cast<const T*>(args.b1),
                                    static_cast<T*>(args.hidden),
                                    static_cast<T*>(args.activated),
                                    int(args.hidden_width),
                                    args.tanh,
                                    can_vectorize(args.hidden_width, {args.b1, args.hidden, args.activated})};
    multiply<T>({args.x, args.x_stride, args.w1, args.w1_k_stride, args.w1_n_stride, args.rows, args.width,
                 args.hidden_width, args.tf32},
                epilogue, stream);
  });
}

void gelu_mlp_backward(const gelu_mlp_backward_args& args, stream_t stream) {
  with_dtype(args.dtype, [&]<class T>() {
    const gelu_gradient_epilogue<T> epilogue{
        static_cast<const T*>(args.hidden),
        static_cast<T*>(args.dhidden),
        static_cast<T*>(args.activated),
        int(args.hidden_width),
        args.tanh,
        can_vectorize(args.hidden_width, {args.hidden, args.dhidden, args.activated})};
    multiply<T>({args.dy, args.dy_stride, args.w2, args.w2_k_stride, args.w2_n_stride, args.rows, args.out_width,
                 args.hidden_width, args.tf32},
                epilogue, stream);
  });
}

}  // namespace fastlm::cuda
