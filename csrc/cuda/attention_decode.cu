// Attention for few queries and many keys, as in decoding with a KV cache. It is memory-bound: k and v are read once,
// with 4 FLOPs per element.
//
// Split-K: the forward kernel runs on a tile of all queries of all heads that share a key head, so their keys are read
// once. The keys are cut into splits, by sizes alone, so that one sequence fills the GPU. Each block writes the
// unnormalised output of its split with its row_max and row_sum, and the kernel below combines them in a fixed order.
#include "attention_tile.cuh"

namespace fastlm::cuda {
namespace {

constexpr int CombineThreads = 128;

// One block combines the splits of one query of one head to out and lse.
template <class T> __global__ void __launch_bounds__(CombineThreads)
    attention_decode_combine_kernel(FASTLM_CONSTANT AttentionForwardArgs a) {
  const int64_t row = blockIdx.x, i = row % a.query_len, head = row / a.query_len % a.num_heads,
                batch = row / a.query_len / a.num_heads;
  const float *const row_max = a.partial_max + row * a.num_splits, *const row_sum = a.partial_sum + row * a.num_splits;
  const float* const part = a.partial_out + row * a.num_splits * a.head_dim;
  float max_of_splits = -INFINITY;
  for (int split = 0; split < a.num_splits; ++split) max_of_splits = fmaxf(max_of_splits, row_max[split]);
  const float safe_max = max_of_splits == -INFINITY ? 0.f : max_of_splits;
  float sum_of_splits = 0;
  for (int split = 0; split < a.num_splits; ++split)
    if (row_sum[split] != 0) sum_of_splits += exp2_fast((row_max[split] - safe_max) * Log2e) * row_sum[split];
  const bool fully_masked = sum_of_splits == 0;
  T* const out = token_of<T>(a.out, batch, head, i);
  for (int channel = threadIdx.x; channel < a.head_dim; channel += CombineThreads) {
    float sum = 0;
    for (int split = 0; split < a.num_splits; ++split)  // a split without visible keys holds zeros
      if (row_sum[split] != 0)
        sum += exp2_fast((row_max[split] - safe_max) * Log2e) * part[int64_t(split) * a.head_dim + channel];
    out[channel] = from_float<T>(fully_masked ? 0.f : sum / sum_of_splits);
  }
  if (threadIdx.x == 0)
    a.lse[batch * a.lse_batch_stride + head * a.lse_head_stride + i] =
        fully_masked ? -INFINITY : safe_max + log_(sum_of_splits);
}

}  // namespace

void attention_decode(const AttentionForwardArgs& args, stream_t stream) {
  attention_forward(args, stream);
  with_dtype(args.dtype, [&]<class T>() {
    FASTLM_LAUNCH(attention_decode_combine_kernel<T>, unsigned(int64_t(args.batch) * args.num_heads * args.query_len),
                  CombineThreads, 0, stream, args);
  });
}

}  // namespace fastlm::cuda
