// Linear cross-entropy:  loss = lse(z) − (1 − ε)·z[target] − ε·mean(z),  z = x·Wᵀ + b, one row per token and vocab
// columns, with label smoothing ε. Logits are scaled and capped, s·z and c·tanh(z / c), where they are read.
//
// Without gradients: 2·rows·width·vocab FLOPs, and of every 64 logits only their maximum and sum of exponentials are
// stored: 12 bytes instead of 128. With gradients the products are the vendor's, on a chunk of rows, and a kernel reads
// the chunk twice and writes the gradient in place: 6 bytes and about 10 FLOPs per logit in 16 bits.
//
// Layout:
//   - The log-sum-exp is an epilogue of gemm.cuh. A separate kernel would write and read 4 bytes per logit.
//   - The gradient kernel has one block per row, which stays in the L1 cache between the two passes: a row of 50257
//     logits in 16 bits is 100 KB. Rows of a chunk start at multiples of 128 bytes whatever the vocabulary, so accesses
//     are vectors and the leading dimension suits the vendor's products.
//   - If the gradient of the bias is wanted, the second pass goes by columns: a thread has 8 columns of 64 rows and
//   adds
//     what it writes, before it is rounded. The partial sums are added in a fixed order, without atomics. The logits
//     are then read from the L2 cache or from memory once more.
#include "linear_cross_entropy.h"
#include "gemm.cuh"
#include "logits.cuh"

namespace fastlm::cuda {

// Of `count` logits of a row: the maximum, Σ exp(z − row_max) and, for label smoothing, Σ (z − row_max). The sums are
// relative to the maximum, because otherwise the loss of an almost certain target, or of large and nearly equal logits,
// would be the difference of two large numbers. NaN propagates to all three.
struct softmax_partial {
  float row_max = -INFINITY, row_sum = 0.0f, shifted_sum = 0.0f;
  int count = 0;
};

FASTLM_DEVICE softmax_partial relative_to(float row_max, softmax_partial a) {
  const float shift = shift_of(row_max), moved = a.row_max == -INFINITY ? 0.0f : a.row_max - shift;
  return {row_max, a.row_sum * exponential(a.row_max, shift), a.shifted_sum + float(a.count) * moved, a.count};
}

FASTLM_DEVICE softmax_partial combined(softmax_partial a, softmax_partial b) {
  const float row_max = maximum(a.row_max, b.row_max);
  a = relative_to(row_max, a), b = relative_to(row_max, b);
  return {row_max, a.row_sum + b.row_sum, a.shifted_sum + b.shifted_sum, a.count + b.count};
}

FASTLM_DEVICE float loss_of(softmax_partial row, float at_target, float label_smoothing) {
  const float loss = (row.row_max - at_target) * (1.0f - label_smoothing) + log_(row.row_sum);
  return label_smoothing > 0.0f ? loss - label_smoothing * (row.shifted_sum / float(row.count)) : loss;
}

FASTLM_DEVICE logit_transform transform_of(const cross_entropy_targets& targets) {
  return {targets.logit_scale, targets.softcap};
}

// Losses without stored logits

template <class T> struct log_sum_exp_epilogue {
  const T* bias;
  const int64_t* target;
  int64_t target_stride;
  float *partials, *shifted_sums, *target_logits;
  cross_entropy_targets targets;
  int rows, vocab;
  bool vectorized;

  FASTLM_DEVICE vec<T, 8> prefetch_columns(int column, bool inside) const {
    return load8(bias + column, bias && inside ? vocab - column : 0, vectorized);
  }
  // The target relative to the first column of the group.
  FASTLM_DEVICE int64_t prefetch(int row, int column, bool inside) const {
    return inside ? target[row * target_stride] - column : -1;
  }

  template <int LANES> FASTLM_DEVICE void finish(int row, int column, vec<float, 8>& z, const vec<T, 8>& shift,
                                                 int64_t target_offset, bool inside) const {
    const int count = inside ? vocab - column : 0;
    const logit_transform transform = transform_of(targets);
    float row_max = -INFINITY, row_sum = 0.0f, sum = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      z[e] = transform(z[e] + to_float(shift[e]));
      if (e < count) row_max = maximum(row_max, z[e]);
      if (target_offset == e && e < count) target_logits[row] = z[e];
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) row_max = maximum(row_max, shuffle_xor(row_max, mask));
    const float from = shift_of(row_max);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e < count) row_sum += exponential(z[e], from), sum += z[e] - from;
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2)
      row_sum += shuffle_xor(row_sum, mask), sum += shuffle_xor(sum, mask);
    if (!inside || threadIdx.x % LANES != 0) return;
    const int64_t at = int64_t(column / (8 * LANES)) * rows + row;
    vec<float, 2>{{row_max, row_sum}}.store(partials + 2 * at);
    if (shifted_sums) shifted_sums[at] = sum;
  }
};

// Combines the splits: 32 rows per block, one per lane. Each warp combines every eighth split, and the first warp the
// eight results, in order.
constexpr int COMBINE_WARPS = 8;

struct combine_args {
  cross_entropy_targets targets;
  const float *partials, *shifted_sums, *target_logits;
  int rows, vocab, splits, split_columns;
};

template <int WARPS> __global__ void __launch_bounds__(WARPS * 32)
    linear_cross_entropy_combine_kernel(const combine_args args) {
  FASTLM_SHARED(shared);
  softmax_partial* partials = reinterpret_cast<softmax_partial*>(shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, row = int(blockIdx.x) * 32 + lane;
  softmax_partial own;
  if (row < args.rows)
    for (int split = warp; split < args.splits; split += WARPS) {
      const int64_t at = int64_t(split) * args.rows + row;
      const vec<float, 2> read = vec<float, 2>::load(args.partials + 2 * at);
      const int remaining = args.vocab - split * args.split_columns;
      own = combined(own, {read[0], read[1], args.shifted_sums ? args.shifted_sums[at] : 0.0f,
                           remaining < args.split_columns ? remaining : args.split_columns});
    }
  partials[threadIdx.x] = own;
  __syncthreads();
  if (warp > 0 || row >= args.rows) return;
  for (int other = 1; other < WARPS; ++other) own = combined(own, partials[other * 32 + lane]);
  const int64_t target = target_of(args.targets, row, args.vocab);
  args.targets.loss[row] = target < 0 ? 0.0f : loss_of(own, args.target_logits[row], args.targets.label_smoothing);
}

template <class T> constexpr int SPLIT_COLUMNS = sizeof(T) == 2 ? 64 : 32;  // columns of a warp of gemm.cuh

int split_columns(DType dtype) { return dtype == DType::float32 ? SPLIT_COLUMNS<float> : SPLIT_COLUMNS<bf16>; }

int64_t linear_cross_entropy_num_splits(DType dtype, int64_t vocab) {
  const int columns = split_columns(dtype);
  return (vocab + columns - 1) / columns;
}

void linear_cross_entropy_forward(const linear_cross_entropy_forward_args& args, stream_t stream) {
  const cross_entropy_targets& targets = args.targets;
  float* shifted_sums = targets.label_smoothing > 0.0f ? args.shifted_sums : nullptr;
  with_dtype(args.dtype, [&]<class T>() {
    const log_sum_exp_epilogue<T> epilogue{static_cast<const T*>(args.bias),
                                           targets.target,
                                           targets.target_stride,
                                           args.partials,
                                           shifted_sums,
                                           args.target_logits,
                                           targets,
                                           int(args.rows),
                                           int(args.vocab),
                                           can_vectorize(args.vocab, {args.bias})};
    gemm<T, SPLIT_COLUMNS<T>>({args.x, args.x_stride, args.weight, args.weight_k_stride, args.weight_n_stride,
                               args.rows, args.width, args.vocab, args.tf32},
                              epilogue, stream);
  });
  const combine_args combine{targets,
                             args.partials,
                             shifted_sums,
                             args.target_logits,
                             int(args.rows),
                             int(args.vocab),
                             int(linear_cross_entropy_num_splits(args.dtype, args.vocab)),
                             split_columns(args.dtype)};
  FASTLM_LAUNCH(linear_cross_entropy_combine_kernel<COMBINE_WARPS>, unsigned((args.rows + 31) / 32), COMBINE_WARPS * 32,
                COMBINE_WARPS * 32 * sizeof(softmax_partial), stream, combine);
}

// The gradient of logits

template <class T> struct gradient_args {
  logit_chunk<T> chunk;
  cross_entropy_targets targets;
  const float* row_scale;
  float *row_max, *row_sum, *dbias_partials;
};

// d(row_scale·loss)/dz of a row is exp(z − row_max)·factor − uniform, minus at_target at the target, times the slope of
// the cap.
struct row_gradient {
  float row_max, factor, uniform, at_target;
  int target;

  FASTLM_DEVICE float operator()(float stored, int column, const logit_transform& transform) const {
    const float z = transform(stored), gradient = exponential(z, row_max) * factor - uniform;
    return (column == target ? gradient - at_target : gradient) * transform.slope(z);
  }
};

FASTLM_DEVICE row_gradient gradient_of(softmax_partial row, float scale, int64_t target, int vocab,
                                       const cross_entropy_targets& targets) {
  scale *= targets.logit_scale;
  return {row.row_max, scale / row.row_sum, scale * targets.label_smoothing / float(vocab),
          scale * (1.0f - targets.label_smoothing), int(target)};
}

// One row per block. With dbias_partials it writes the statistics of its row, and the kernel by columns the gradient.
template <class T> __global__ void __launch_bounds__(ROW_THREADS)
    linear_cross_entropy_row_kernel(const gradient_args<T> args) {
  FASTLM_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t row = blockIdx.x;
  const int vocab = args.chunk.vocab, first = int(threadIdx.x) * 8, stride = int(blockDim.x) * 8;
  T* logits = args.chunk.logits + row * args.chunk.stride;
  const int64_t target = target_of(args.targets, row, vocab);
  if (target < 0) {
    if (threadIdx.x == 0) args.targets.loss[row] = 0.0f;
    if (!args.dbias_partials)
      for (int column = first; column < vocab; column += stride)
        store8({}, logits + column, vocab - column, column + 8 <= vocab);
    return;
  }
  const logit_transform transform = transform_of(args.targets);
  const float at_target = transform(to_float(logits[target]));
  softmax_partial own;
  for (int column = first; column < vocab; column += stride) {
    const vec<T, 8> stored = load8(static_cast<const T*>(logits) + column, vocab - column, column + 8 <= vocab);
    float row_max = own.row_max, z[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      z[e] = transform(to_float(stored[e]));
      if (column + e < vocab) row_max = maximum(row_max, z[e]);
    }
    const float shift = shift_of(row_max);
    own = relative_to(row_max, own);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (column + e < vocab) own.row_sum += exponential(z[e], shift), own.shifted_sum += z[e] - shift, ++own.count;
  }
  const float row_max = block_max(own.row_max, scratch);
  own = relative_to(row_max, own);
  softmax_partial whole{row_max, block_sum(own.row_sum, scratch), 0.0f, vocab};
  if (args.targets.label_smoothing > 0.0f) whole.shifted_sum = block_sum(own.shifted_sum, scratch);
  if (threadIdx.x == 0) {
    args.targets.loss[row] = loss_of(whole, at_target, args.targets.label_smoothing);
    if (args.dbias_partials) args.row_max[row] = whole.row_max, args.row_sum[row] = whole.row_sum;
  }
  if (args.dbias_partials) return;
  __syncthreads();  // all threads have read the logit of the target, which is overwritten next
  const row_gradient gradient = gradient_of(whole, args.row_scale[row], target, vocab, args.targets);
  for (int column = first; column < vocab; column += stride) {
    const vec<T, 8> z = load8(static_cast<const T*>(logits) + column, vocab - column, column + 8 <= vocab);
    vec<float, 8> d;
#pragma unroll
    for (int e = 0; e < 8; ++e) d[e] = gradient(to_float(z[e]), column + e, transform);
    store8(d, logits + column, vocab - column, column + 8 <= vocab);
  }
}

template <class T> __global__ void __launch_bounds__(COLUMN_THREADS)
    linear_cross_entropy_column_kernel(const gradient_args<T> args) {
  FASTLM_SHARED(shared);
  gradient_by_columns<row_gradient>(args.chunk, transform_of(args.targets), args.dbias_partials, shared, [&](int row) {
    const int vocab = args.chunk.vocab;
    const int64_t target = target_of(args.targets, row, vocab);
    row_gradient gradient{};
    gradient.target = -1;
    if (target >= 0)
      gradient = gradient_of({args.row_max[row], args.row_sum[row]}, args.row_scale[row], target, vocab, args.targets);
    return gradient;
  });
}

void linear_cross_entropy_gradient(const linear_cross_entropy_gradient_args& args, stream_t stream) {
  check_sizes("linear_cross_entropy", args.rows, args.vocab);
  with_dtype(args.dtype, [&]<class T>() {
    const gradient_args<T> kernel_args{
        {static_cast<T*>(args.logits), args.logits_stride, int(args.rows), int(args.vocab)},
        args.targets,
        args.row_scale,
        args.statistics,
        args.dbias_partials ? args.statistics + args.rows : nullptr,
        args.dbias_partials};
    FASTLM_LAUNCH(linear_cross_entropy_row_kernel<T>, unsigned(args.rows), row_threads(args.vocab), 32 * sizeof(float),
                  stream, kernel_args);
    if (!args.dbias_partials) return;
    FASTLM_LAUNCH(linear_cross_entropy_column_kernel<T>, column_grid(args.rows, args.vocab), COLUMN_THREADS,
                  LOGIT_ROWS_PER_PARTIAL * sizeof(row_gradient), stream, kernel_args);
  });
}

}  // namespace fastlm::cuda
