// The middle of the feed-forward block, fused into the product that feeds it:
//   forward   hidden = x W1 + b1,  activated = gelu(hidden)
//   backward  dhidden = (dy W2ᵀ)·gelu'(hidden),  activated again where it was not kept
//
// 2·rows·width·hidden_width FLOP each. A pass of its own for the GELU would read hidden and write activated: 4 bytes an
// element in 16 bits, or 25 MB at 2048×3072, 16 µs of sm_80's 1.6 TB/s beside a product of 39 µs at width 768. Here
// hidden leaves the accumulators once and is not read again; where the level of recomputation keeps no hidden it is not
// written at all. The other products are the vendor's. The forward's GELU sees its input before that is rounded to be
// saved; the backward's, after.
//
// 1. The GELU as the epilogue of gemm.cuh. Its arithmetic, about 45 instructions an element for erf and 25 for tanh, is
// 16384·45/32 = 23,000 of a tile's warp
//    instructions, 5,800 cycles of a multiprocessor's four schedulers, against 12,300 cycles of its tensor cores at k =
//    768: partly hidden while another block multiplies, so 80 % of the product alone is predicted with erf, 90 % with
//    tanh. The backward reads hidden too, one run ahead of its use.
#include "gelu_mlp.h"
#include "gemm.cuh"

namespace fastlm::cuda {

struct gelu_result {
  float value, slope;
};

// ½ (1 + tanh(t)) = 1 / (1 + exp(−2t)): no difference of near numbers.
FASTLM_DEVICE gelu_result gelu(float x, bool tanh) {
  if (tanh) {
    const float half = 1.0f / (1.0f + exp_(-1.5957691216057308f * x * (1.0f + 0.044715f * x * x)));
    return {x * half, half + x * half * (1.0f - half) * 1.5957691216057308f * (1.0f + 0.134145f * x * x)};
  }
  const float half = 0.5f * (1.0f + erf_(x * 0.7071067811865476f));
  return {x * half, half + x * exp_(-0.5f * x * x) * 0.3989422804014327f};
}

// Epilogues. whole: runs of 8 are whole and may be moved 16 bytes at a time.
template <class T> struct gelu_epilogue {
  const T* bias;
  T *hidden, *activated;
  int n;
  bool tanh, whole;

  FASTLM_DEVICE vec<T, 8> fetch_columns(int column, bool inside) const {
    return load_run(bias + column, bias && inside ? n - column : 0, whole);
  }
  FASTLM_DEVICE nothing fetch(int, int, bool) const { return {}; }

  template <int> FASTLM_DEVICE void finish(int row, int column, vec<float, 8>& c, const vec<T, 8>& shift, nothing,
                                           bool inside) const {
    if (!inside) return;
    const int64_t at = int64_t(row) * n + column;
#pragma unroll
    for (int e = 0; e < 8; ++e) c[e] += to_float(shift[e]);
    if (hidden) store_run(c, hidden + at, n - column, whole);
    if (!activated) return;
#pragma unroll
    for (int e = 0; e < 8; ++e) c[e] = gelu(c[e], tanh).value;
    store_run(c, activated + at, n - column, whole);
  }
};

template <class T> struct gelu_gradient_epilogue {
  const T* hidden;
  T *dhidden, *activated;
  int n;
  bool tanh, whole;

  FASTLM_DEVICE nothing fetch_columns(int, bool) const { return {}; }
  FASTLM_DEVICE vec<T, 8> fetch(int row, int column, bool inside) const {
    return load_run(hidden + int64_t(row) * n + column, inside ? n - column : 0, whole);
  }

  template <int> FASTLM_DEVICE void finish(int row, int column, vec<float, 8>& c, nothing, const vec<T, 8>& before,
                                           bool inside) const {
    if (!inside) return;
    const int64_t at = int64_t(row) * n + column;
    vec<float, 8> after;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const gelu_result g = gelu(to_float(before[e]), tanh);
      c[e] *= g.slope;
      after[e] = g.value;
    }
    store_run(c, dhidden + at, n - column, whole);
    if (activated) store_run(after, activated + at, n - column, whole);
  }
};

// Tiles of 128 leave no multiprocessor of this GPU idle. The bits do not depend on the choice: the chain along k is the
// same.
static bool fills(int64_t rows, int64_t n) { return (rows + 127) / 128 * ((n + 127) / 128) >= multiprocessors(); }

template <class T, class Epilogue> static void multiply(const gemm_operands& with, const Epilogue& epilogue,
                                                        stream_t stream) {
  if constexpr (sizeof(T) == 2)
    if (fills(with.rows, with.n)) return gemm<T, 64>(with, epilogue, stream);
  gemm<T, 32>(with, epilogue, stream);
}

void gelu_mlp_forward(const gelu_mlp_forward_args& args, stream_t stream) {
  with_dtype(args.dtype, [&]<class T>() {
    const gelu_epilogue<T> epilogue{static_cast<const T*>(args.b1),
                                    static_cast<T*>(args.hidden),
                                    static_cast<T*>(args.activated),
                                    int(args.hidden_width),
                                    args.tanh,
                                    in_whole_runs(args.hidden_width, {args.b1, args.hidden, args.activated})};
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
        in_whole_runs(args.hidden_width, {args.hidden, args.dhidden, args.activated})};
    multiply<T>({args.dy, args.dy_stride, args.w2, args.w2_k_stride, args.w2_n_stride, args.rows, args.out_width,
                 args.hidden_width, args.tf32},
                epilogue, stream);
  });
}

}  // namespace fastlm::cuda
