// Linear cross-entropy:  loss = lse(z) − (1 − ε)·z[target] − ε·mean(z),  z = x·Wᵀ + b (one row per token, vocab
// columns), ε the label smoothing
//
// Without gradients: 2·rows·width·vocab FLOP, and of the logits nothing is stored but a largest one and a sum of
// exponentials for every 64 columns: 12 bytes instead of 128. With gradients the products on all sides are the
// vendor's, on a chunk of rows, and a kernel goes over the chunk twice, the second time in place: 6 bytes and about 10
// FLOP a logit in 16 bits.
//
// 1. The log-sum-exp is an epilogue of gemm.cuh. A pass of its own would write and read 4 bytes a logit: 1.6 GB at
// 8192×50257, 1.0 ms of sm_80's bandwidth
//    beside a product of 2.0 ms at its peak. The epilogue costs 9 exponentials (of 16 a cycle) for 8 logits,
//    16384·9/8/16 = 1,150 cycles a tile against 12,300 of the tensor cores at width 768: 85 % of the product alone is
//    predicted.
// 2. The gradient: a block to a row, which it reads into the L1 cache: a row of 50257 logits in 16 bits is 100 KB, a
// chunk 64 MB. The rows of a chunk begin
//    at multiples of 128 bytes whatever the vocabulary, so that accesses are of 16 bytes and the vendor's products get
//    a leading dimension that they like. Bound by memory: 64 MB read and written, 80 µs on sm_80, of about 600 with the
//    chunk's three products at width 768.
// 3. Where the bias wants a gradient the second pass goes by columns: a thread owns 8 columns of 64 rows and adds up
// what it writes, before it is
//    rounded. No atomics: the shares are added in order. The logits are then read from the L2 cache or from memory
//    again: half as much traffic again.
#include "linear_cross_entropy.h"
#include "gemm.cuh"
#include "reduce.cuh"

namespace fastlm::cuda {

constexpr float LOG2E = 1.4426950408889634f;

// The largest of some logits, and Σ exp(z − largest): relative to it, as the loss of a target that is nearly certain
// would be lost in the difference of two large numbers. A NaN stays one in both.
struct softmax_part {
  float top, norm;
};

FASTLM_DEVICE float shift_of(float top) { return top == -INFINITY ? 0.0f : top; }  // −inf − −inf is not 0
FASTLM_DEVICE float exponential(float z, float shift) { return exp2_fast((z - shift) * LOG2E); }

FASTLM_DEVICE softmax_part joined(softmax_part a, softmax_part b) {
  const float top = maximum(a.top, b.top), shift = shift_of(top);
  return {top, a.norm * exponential(a.top, shift) + b.norm * exponential(b.top, shift)};
}

FASTLM_DEVICE float loss_of(softmax_part row, float at_target, float sum, int vocab, float label_smoothing) {
  const float loss = (row.top - at_target) * (1.0f - label_smoothing) + log_(row.norm);
  return label_smoothing > 0.0f ? loss + label_smoothing * (row.top - sum / float(vocab)) : loss;
}

// The target of a row, −1 for one that is ignored.
FASTLM_DEVICE int64_t target_of(const cross_entropy_targets& targets, int64_t row, int vocab) {
  const int64_t target = targets.target[row * targets.target_stride];
  if (target == targets.ignore_index) return -1;
  FASTLM_ASSERT(target >= 0 && target < vocab);  // expected values in [0, vocabulary) or ignore_index
  return target;
}

// Losses without logits

template <class T> struct log_sum_exp_epilogue {
  const T* bias;
  const int64_t* target;
  int64_t target_stride;
  float *parts, *sums, *at_target;
  int rows, vocab;
  bool whole;

  FASTLM_DEVICE vec<T, 8> fetch_columns(int column, bool inside) const {
    return load_run(bias + column, bias && inside ? vocab - column : 0, whole);
  }
  // The target, from the run's first column.
  FASTLM_DEVICE int64_t fetch(int row, int column, bool inside) const {
    return inside ? target[row * target_stride] - column : -1;
  }

  template <int LANES> FASTLM_DEVICE void finish(int row, int column, vec<float, 8>& z, const vec<T, 8>& shift,
                                                 int64_t place, bool inside) const {
    const int count = inside ? vocab - column : 0;
    float top = -INFINITY, norm = 0.0f, sum = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      z[e] += to_float(shift[e]);
      if (e < count) top = maximum(top, z[e]);
      if (place == e && e < count) at_target[row] = z[e];
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) top = maximum(top, shuffle_xor(top, mask));
    const float from = shift_of(top);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e < count) norm += exponential(z[e], from), sum += z[e];
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) norm += shuffle_xor(norm, mask), sum += shuffle_xor(sum, mask);
    if (!inside || threadIdx.x % LANES != 0) return;
    const int64_t at = int64_t(column / (8 * LANES)) * rows + row;
    vec<float, 2>{{top, norm}}.store(parts + 2 * at);
    if (sums) sums[at] = sum;
  }
};

// 32 rows to a block, a lane to a row: each warp joins every eighth part, the first the eight results, in order.
constexpr int JOIN_WARPS = 8;

struct join_args {
  cross_entropy_targets targets;
  const float *partials, *logit_sums, *target_logits;
  int rows, vocab, count;
};

template <int WARPS> __global__ void __launch_bounds__(WARPS * 32)
    linear_cross_entropy_join_kernel(const join_args args) {
  FASTLM_SHARED(shared);
  float *tops = reinterpret_cast<float*>(shared), *norms = tops + WARPS * 32, *totals = norms + WARPS * 32;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, row = int(blockIdx.x) * 32 + lane;
  softmax_part own{-INFINITY, 0.0f};
  float sum = 0.0f;
  if (row < args.rows)
    for (int part = warp; part < args.count; part += WARPS) {
      const int64_t at = int64_t(part) * args.rows + row;
      const vec<float, 2> read = vec<float, 2>::load(args.partials + 2 * at);
      own = joined(own, {read[0], read[1]});
      if (args.logit_sums) sum += args.logit_sums[at];
    }
  tops[threadIdx.x] = own.top, norms[threadIdx.x] = own.norm, totals[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || row >= args.rows) return;
  for (int other = 1; other < WARPS; ++other) {
    const int at = other * 32 + lane;
    own = joined(own, {tops[at], norms[at]});
    sum += totals[at];
  }
  const int64_t target = target_of(args.targets, row, args.vocab);
  args.targets.loss[row] =
      target < 0 ? 0.0f : loss_of(own, args.target_logits[row], sum, args.vocab, args.targets.label_smoothing);
}

template <class T> constexpr int PART_WARP = sizeof(T) == 2 ? 64 : 32;  // of gemm.cuh: columns to a part

int64_t linear_cross_entropy_num_splits(DType dtype, int64_t vocab) {
  const int columns = dtype == DType::float32 ? PART_WARP<float> : PART_WARP<bf16>;
  return (vocab + columns - 1) / columns;
}

void linear_cross_entropy_forward(const linear_cross_entropy_forward_args& args, stream_t stream) {
  const cross_entropy_targets& targets = args.targets;
  float* sums = targets.label_smoothing > 0.0f ? args.logit_sums : nullptr;
  with_dtype(args.dtype, [&]<class T>() {
    const log_sum_exp_epilogue<T> epilogue{static_cast<const T*>(args.bias),
                                           targets.target,
                                           targets.target_stride,
                                           args.partials,
                                           sums,
                                           args.target_logits,
                                           int(args.rows),
                                           int(args.vocab),
                                           in_whole_runs(args.vocab, {args.bias})};
    gemm<T, PART_WARP<T>>({args.x, args.x_stride, args.weight, args.weight_k_stride, args.weight_n_stride, args.rows,
                           args.width, args.vocab, args.tf32},
                          epilogue, stream);
  });
  const join_args join{targets,
                       args.partials,
                       sums,
                       args.target_logits,
                       int(args.rows),
                       int(args.vocab),
                       int(linear_cross_entropy_num_splits(args.dtype, args.vocab))};
  FASTLM_LAUNCH(linear_cross_entropy_join_kernel<JOIN_WARPS>, unsigned((args.rows + 31) / 32), JOIN_WARPS * 32,
                3 * JOIN_WARPS * 32 * sizeof(float), stream, join);
}

// From logits to their gradient

template <class T> struct gradient_args {
  T* logits;
  int64_t stride;
  cross_entropy_targets targets;
  const float* row_scale;
  float *row_max, *row_sum, *dbias_partials;
  int rows, vocab;
};

// d(row_scale·loss)/dz of a row is exp(z − top)·factor − uniform, and less at_target at the target.
struct row_gradient {
  float top, factor, uniform, at_target;
  int target;

  FASTLM_DEVICE float operator()(float z, int column) const {
    const float gradient = exponential(z, top) * factor - uniform;
    return column == target ? gradient - at_target : gradient;
  }
};

FASTLM_DEVICE row_gradient gradient_of(softmax_part row, float scale, int64_t target, int vocab,
                                       float label_smoothing) {
  return {row.top, scale / row.norm, scale * label_smoothing / float(vocab), scale * (1.0f - label_smoothing),
          int(target)};
}

constexpr int ROW_THREADS = 512;

// One row to a block. Where shares are wanted it writes the statistics of its row, and the pass by columns the
// gradient.
template <class T> __global__ void __launch_bounds__(ROW_THREADS)
    linear_cross_entropy_row_kernel(const gradient_args<T> args) {
  FASTLM_SHARED(shared);
  float* room = reinterpret_cast<float*>(shared);
  const int64_t row = blockIdx.x;
  const int vocab = args.vocab, first = int(threadIdx.x) * 8, step = int(blockDim.x) * 8;
  T* logits = args.logits + row * args.stride;
  const int64_t target = target_of(args.targets, row, vocab);
  if (target < 0) {
    if (threadIdx.x == 0) args.targets.loss[row] = 0.0f;
    if (!args.dbias_partials)
      for (int column = first; column < vocab; column += step)
        store_run({}, logits + column, vocab - column, column + 8 <= vocab);
    return;
  }
  const float at_target = to_float(logits[target]);
  softmax_part own{-INFINITY, 0.0f};
  float sum = 0.0f;
  for (int column = first; column < vocab; column += step) {
    const vec<T, 8> z = load_run(static_cast<const T*>(logits) + column, vocab - column, column + 8 <= vocab);
    float top = own.top;
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (column + e < vocab) top = maximum(top, to_float(z[e])), sum += to_float(z[e]);
    const float shift = shift_of(top);
    own = {top, own.norm * exponential(own.top, shift)};
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (column + e < vocab) own.norm += exponential(to_float(z[e]), shift);
  }
  const float top = block_max(own.top, room);
  const softmax_part whole{top, block_sum(own.norm * exponential(own.top, shift_of(top)), room)};
  if (args.targets.label_smoothing > 0.0f) sum = block_sum(sum, room);
  if (threadIdx.x == 0) {
    args.targets.loss[row] = loss_of(whole, at_target, sum, vocab, args.targets.label_smoothing);
    if (args.dbias_partials) args.row_max[row] = whole.top, args.row_sum[row] = whole.norm;
  }
  if (args.dbias_partials) return;
  __syncthreads();  // all have read the target's logit: it can be overwritten
  const row_gradient gradient = gradient_of(whole, args.row_scale[row], target, vocab, args.targets.label_smoothing);
  for (int column = first; column < vocab; column += step) {
    const vec<T, 8> z = load_run(static_cast<const T*>(logits) + column, vocab - column, column + 8 <= vocab);
    vec<float, 8> d;
#pragma unroll
    for (int e = 0; e < 8; ++e) d[e] = gradient(to_float(z[e]), column + e);
    store_run(d, logits + column, vocab - column, column + 8 <= vocab);
  }
}

constexpr int SHARE_ROWS = 64, COLUMN_THREADS = 128;

int64_t linear_cross_entropy_num_partials(int64_t rows) { return (rows + SHARE_ROWS - 1) / SHARE_ROWS; }

// 8 columns to a thread, SHARE_ROWS rows to a block: the gradient, and its sum over these rows.
template <class T> __global__ void __launch_bounds__(COLUMN_THREADS)
    linear_cross_entropy_column_kernel(const gradient_args<T> args) {
  FASTLM_SHARED(shared);
  row_gradient* gradients = reinterpret_cast<row_gradient*>(shared);
  const int vocab = args.vocab, first = int(blockIdx.y) * SHARE_ROWS, left = args.rows - first,
            count = left < SHARE_ROWS ? left : SHARE_ROWS;
  for (int i = int(threadIdx.x); i < count; i += COLUMN_THREADS) {
    const int64_t row = first + i, target = target_of(args.targets, row, vocab);
    gradients[i].target = -1;
    if (target >= 0)
      gradients[i] = gradient_of({args.row_max[row], args.row_sum[row]}, args.row_scale[row], target, vocab,
                                 args.targets.label_smoothing);
  }
  __syncthreads();
  const int column = (int(blockIdx.x) * COLUMN_THREADS + int(threadIdx.x)) * 8;
  if (column >= vocab) return;
  const bool whole = column + 8 <= vocab;
  vec<float, 8> total{};
  for (int i = 0; i < count; ++i) {
    T* logits = args.logits + (first + i) * args.stride + column;
    vec<float, 8> d{};
    if (gradients[i].target >= 0) {
      const row_gradient gradient = gradients[i];
      const vec<T, 8> z = load_run(static_cast<const T*>(logits), vocab - column, whole);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        d[e] = gradient(to_float(z[e]), column + e);
        total[e] += d[e];
      }
    }
    store_run(d, logits, vocab - column, whole);
  }
  store_run(total, args.dbias_partials + int64_t(blockIdx.y) * vocab + column, vocab - column, whole && vocab % 4 == 0);
}

void linear_cross_entropy_gradient(const linear_cross_entropy_gradient_args& args, stream_t stream) {
  if (args.rows > 1 << 30 || args.vocab > 1 << 30)
    throw std::runtime_error("linear_cross_entropy: sizes beyond the range of 32 bits");
  with_dtype(args.dtype, [&]<class T>() {
    const gradient_args<T> with{static_cast<T*>(args.logits),
                                args.logits_stride,
                                args.targets,
                                args.row_scale,
                                args.statistics,
                                args.dbias_partials ? args.statistics + args.rows : nullptr,
                                args.dbias_partials,
                                int(args.rows),
                                int(args.vocab)};
    const int64_t runs = (args.vocab + 7) / 8, wanted = (runs + 31) / 32 * 32;
    const int threads = wanted < ROW_THREADS ? int(wanted) : ROW_THREADS;  // whole warps
    FASTLM_LAUNCH(linear_cross_entropy_row_kernel<T>, unsigned(args.rows), threads, 32 * sizeof(float), stream, with);
    if (!args.dbias_partials) return;
    const dim3 grid(unsigned((runs + COLUMN_THREADS - 1) / COLUMN_THREADS),
                    unsigned(linear_cross_entropy_num_partials(args.rows)));
    FASTLM_LAUNCH(linear_cross_entropy_column_kernel<T>, grid, COLUMN_THREADS, SHARE_ROWS * sizeof(row_gradient),
                  stream, with);
  });
}

}  // namespace fastlm::cuda
