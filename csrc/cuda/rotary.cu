// For each pair of channels (j, j + half) of the first 2·half, by the tables of the token:
//   out[j] = x[j]·cos[j] − x[j + half]·sin[j],  out[j + half] = x[j + half]·cos[j + half] + x[j]·sin[j + half];
// the other channels are copied. The inverse (the gradient) is the transposed matrix.
//
// Memory-bound: reads and writes each channel once, 4 bytes per element in 16 bits, and the tables, which the heads of
// a token share in the caches. 3 FLOPs per element.
//
// Layout: a thread has one pair of channels, or one channel that is copied, of one row; neighbours have neighbouring
// channels. A thread reads its tables and one pair only, so no row needs to be aligned.
#include "rotary.h"
#include <stdexcept>
#include "launch.cuh"
#include "vec.cuh"

namespace fastlm::cuda {

constexpr int ROTARY_THREADS = 256;

template <class T> struct rotary_kernel_args {
  const T* x;
  int64_t batch_stride, head_stride, token_stride;
  const float* cos;
  int64_t cos_batch_stride, cos_token_stride;
  const float* sin;
  int64_t sin_batch_stride, sin_token_stride;
  T* out;
  uint32_t rows, heads, tokens;
  int head_dim, half, columns;  // columns: threads of a row
  bool inverse;
};

template <class T> __global__ void __launch_bounds__(ROTARY_THREADS) rotary_kernel(const rotary_kernel_args<T> args) {
  const int64_t index = int64_t(blockIdx.x) * ROTARY_THREADS + threadIdx.x;
  if (index >= int64_t(args.rows) * args.columns) return;
  const uint32_t row = uint32_t(index / args.columns);
  const int j = int(index - int64_t(row) * args.columns);
  const int64_t token = row % args.tokens, head = row / args.tokens % args.heads,
                batch = row / args.tokens / args.heads;
  const T* x = args.x + batch * args.batch_stride + head * args.head_stride + token * args.token_stride;
  T* out = args.out + int64_t(row) * args.head_dim;
  const int half = args.half;
  if (j >= half) {
    out[j + half] = x[j + half];
    return;
  }
  const float* cos = args.cos + batch * args.cos_batch_stride + token * args.cos_token_stride;
  const float* sin = args.sin + batch * args.sin_batch_stride + token * args.sin_token_stride;
  const float first = to_float(x[j]), second = to_float(x[j + half]);
  const float sin_first = args.inverse ? -sin[j + half] : sin[j], sin_second = args.inverse ? -sin[j] : sin[j + half];
  out[j] = from_float<T>(first * cos[j] - second * sin_first);
  out[j + half] = from_float<T>(second * cos[j + half] + first * sin_second);
}

void rotary(const rotary_args& args, stream_t stream) {
  const int64_t rows = args.batch * args.heads * args.tokens, half = args.rotary_dim / 2,
                columns = args.head_dim - half;
  if (rows == 0) return;
  if (rows > int64_t(1) << 31 || args.head_dim > 1 << 30 || rows * columns / ROTARY_THREADS >= int64_t(1) << 31)
    throw std::runtime_error("rotary: sizes beyond the range of 32 bits");
  with_dtype(args.dtype, [&]<class T>() {
    const rotary_kernel_args<T> kernel_args{.x = static_cast<const T*>(args.x),
                                            .batch_stride = args.batch_stride,
                                            .head_stride = args.head_stride,
                                            .token_stride = args.token_stride,
                                            .cos = args.cos,
                                            .cos_batch_stride = args.cos_batch_stride,
                                            .cos_token_stride = args.cos_token_stride,
                                            .sin = args.sin,
                                            .sin_batch_stride = args.sin_batch_stride,
                                            .sin_token_stride = args.sin_token_stride,
                                            .out = static_cast<T*>(args.out),
                                            .rows = uint32_t(rows),
                                            .heads = uint32_t(args.heads),
                                            .tokens = uint32_t(args.tokens),
                                            .head_dim = int(args.head_dim),
                                            .half = int(half),
                                            .columns = int(columns),
                                            .inverse = args.inverse};
    FASTLM_LAUNCH(rotary_kernel<T>, unsigned((rows * columns + ROTARY_THREADS - 1) / ROTARY_THREADS), ROTARY_THREADS, 0,
                  stream, kernel_args);
  });
}

}  // namespace fastlm::cuda
