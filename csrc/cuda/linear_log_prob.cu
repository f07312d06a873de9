// log p(target) and the entropy of p = softmax(z / T), for a chunk of logits z = x·Wᵀ + b (rows, vocab). The products
// are the vendor's. With d = (z − row_max) / T, s = Σ e^d and u = Σ d·e^d:
//
//   log_prob = d[target] − log s,  entropy = log s − u / s,
//   dz = (g·(1[target] − p) − h·p·(log p + entropy)) / T · slope of the cap,
//
// for the upstream gradients g and h.
//
// Forward: one block per row, which is read once; every thread computes its row_max, s and u online. In 16 bits 2 bytes
// and about 12 FLOPs per logit. Backward: the logits are computed again, and one pass by columns reads and writes them
// once; a thread has 8 columns of 64 rows. If the gradient of the bias is wanted, it adds what it writes, before it is
// rounded. The partial sums are added in a fixed order, without atomics.
#include "linear_log_prob.h"
#include "logits.cuh"

namespace fastlm::cuda {

template <class T> logit_chunk<T> chunk_of(const log_prob_chunk& chunk) {
  return {static_cast<T*>(chunk.logits), chunk.logits_stride, int(chunk.rows), int(chunk.vocab)};
}

// Of some logits of a row: the maximum, Σ e^d and Σ d·e^d. NaN propagates to row_sum.
struct entropy_partial {
  float row_max = -INFINITY, row_sum = 0.0f, weighted = 0.0f;
};

// weight·d, where a weight of 0 times −∞ counts as 0.
FASTLM_DEVICE float weighted_distance(float weight, float distance) {
  return weight == 0.0f ? 0.0f : weight * distance;
}

FASTLM_DEVICE entropy_partial relative_to(float row_max, entropy_partial a, float inverse_temperature) {
  const float distance = (a.row_max - shift_of(row_max)) * inverse_temperature, decay = exp2_fast(distance * LOG2E);
  return {row_max, a.row_sum * decay, weighted_distance(decay, a.weighted + distance * a.row_sum)};
}

template <class T> struct forward_args {
  logit_chunk<T> chunk;
  logit_targets targets;
  logit_transform transform;
  float inverse_temperature;
  float *log_prob, *entropy, *row_max, *row_sum;
};

template <class T> __global__ void __launch_bounds__(ROW_THREADS)
    linear_log_prob_row_kernel(const forward_args<T> args) {
  FASTLM_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t row = blockIdx.x;
  const int vocab = args.chunk.vocab, first = int(threadIdx.x) * 8, stride = int(blockDim.x) * 8;
  const T* logits = args.chunk.logits + row * args.chunk.stride;
  const int64_t target = target_of(args.targets, row, vocab);
  if (target < 0) {
    if (threadIdx.x == 0) args.log_prob[row] = args.entropy[row] = args.row_max[row] = 0.0f, args.row_sum[row] = 1.0f;
    return;
  }
  const float at_target = args.transform(to_float(logits[target])), inverse_temperature = args.inverse_temperature;
  entropy_partial own;
  for (int column = first; column < vocab; column += stride) {
    const vec<T, 8> stored = load8(logits + column, vocab - column, column + 8 <= vocab);
    float row_max = own.row_max, z[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      z[e] = args.transform(to_float(stored[e]));
      if (column + e < vocab) row_max = maximum(row_max, z[e]);
    }
    const float shift = shift_of(row_max);
    own = relative_to(row_max, own, inverse_temperature);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (column + e < vocab) {
        const float distance = (z[e] - shift) * inverse_temperature, weight = exp2_fast(distance * LOG2E);
        own.row_sum += weight, own.weighted += weighted_distance(weight, distance);
      }
  }
  const float row_max = block_max(own.row_max, scratch);
  own = relative_to(row_max, own, inverse_temperature);
  const float row_sum = block_sum(own.row_sum, scratch), weighted = block_sum(own.weighted, scratch);
  if (threadIdx.x > 0) return;
  const float log_sum = log_(row_sum);
  args.log_prob[row] = (at_target - row_max) * inverse_temperature - log_sum;
  args.entropy[row] = log_sum - weighted / row_sum;
  args.row_max[row] = row_max, args.row_sum[row] = row_sum;
}

void linear_log_prob_forward(const linear_log_prob_forward_args& args, stream_t stream) {
  const log_prob_chunk& chunk = args.chunk;
  check_sizes("linear_log_prob", chunk.rows, chunk.vocab);
  with_dtype(chunk.dtype, [&]<class T>() {
    const forward_args<T> kernel_args{
        chunk_of<T>(chunk), chunk.targets, {1.0f, chunk.softcap}, 1.0f / chunk.temperature,
        args.log_prob,      args.entropy,  args.row_max,          args.row_sum};
    FASTLM_LAUNCH(linear_log_prob_row_kernel<T>, unsigned(chunk.rows), row_threads(chunk.vocab), 32 * sizeof(float),
                  stream, kernel_args);
  });
}

// The gradient of a row is (g·(1[target] − p) + p·(constant − h·d)) / T, times the slope of the cap. 1[target] − p is
// computed before the product with g: at the target it may cancel to almost 0.
struct log_prob_row {
  float row_max, inverse_sum, constant, of_entropy, of_log_prob, inverse_temperature;
  int target;

  FASTLM_DEVICE float operator()(float stored, int column, const logit_transform& transform) const {
    const float z = transform(stored), distance = (z - row_max) * inverse_temperature,
                p = exp2_fast(distance * LOG2E) * inverse_sum;
    const float gradient =
        (float(column == target) - p) * of_log_prob + weighted_distance(p, constant - of_entropy * distance);
    return gradient * inverse_temperature * transform.slope(z);
  }
};

template <class T> struct backward_args {
  logit_chunk<T> chunk;
  logit_targets targets;
  logit_transform transform;
  float inverse_temperature;
  const float *dlog_prob, *dentropy, *entropy, *row_max, *row_sum;
  float* dbias_partials;
};

template <class T> __global__ void __launch_bounds__(COLUMN_THREADS)
    linear_log_prob_column_kernel(const backward_args<T> args) {
  FASTLM_SHARED(shared);
  gradient_by_columns<log_prob_row>(args.chunk, args.transform, args.dbias_partials, shared, [&](int row) {
    log_prob_row result{};
    result.target = int(target_of(args.targets, row, args.chunk.vocab));
    if (result.target < 0) return result;
    const float row_sum = args.row_sum[row];
    result.row_max = args.row_max[row], result.inverse_sum = 1.0f / row_sum;
    result.of_log_prob = args.dlog_prob ? args.dlog_prob[row] : 0.0f;
    result.of_entropy = args.dentropy ? args.dentropy[row] : 0.0f;
    result.constant = -result.of_entropy * (args.entropy[row] - log_(row_sum));
    result.inverse_temperature = args.inverse_temperature;
    return result;
  });
}

void linear_log_prob_backward(const linear_log_prob_backward_args& args, stream_t stream) {
  const log_prob_chunk& chunk = args.chunk;
  check_sizes("linear_log_prob", chunk.rows, chunk.vocab);
  with_dtype(chunk.dtype, [&]<class T>() {
    const backward_args<T> kernel_args{
        chunk_of<T>(chunk), chunk.targets,      {1.0f, chunk.softcap}, 1.0f / chunk.temperature,
        args.dlog_prob,     args.dentropy,      args.entropy,          args.row_max,
        args.row_sum,       args.dbias_partials};
    FASTLM_LAUNCH(linear_log_prob_column_kernel<T>, column_grid(chunk.rows, chunk.vocab), COLUMN_THREADS,
                  LOGIT_ROWS_PER_PARTIAL * sizeof(log_prob_row), stream, kernel_args);
  });
}

}  // namespace fastlm::cuda
