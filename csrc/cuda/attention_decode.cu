// Attention for a few queries against many keys, as in decoding with a cache: bound by reading k and v once, 4 FLOPs
// for each element of them.
//
// The kernel of the forward, on a tile of all queries of all heads that share a key head, so that their keys are read
// once. The keys are cut into stretches, by sizes alone, so that one sequence still fills the GPU; each block leaves
// the sum of its stretch with its maximum and norm, and the kernel here puts them together in order.
//
// History. Times are predicted, none has been measured.
//   1. Up to 16 rows keep one of a block's four warps at the products; all four copy. At head_dim 64 a tile of 64 keys
//   costs that warp 64 mma, 512 cycles, in
//      which a multiprocessor of an A100 receives 7 KiB of the tile's 16: with two blocks or more there the memory is
//      the bound, at 80 % of its bandwidth.
//   Next: the four warps take 16 keys each, where a block has its multiprocessor to itself.
#include "attention_tile.cuh"

namespace fastlm::cuda {
namespace {

constexpr int JoinThreads = 128;

// out and lse of one query of one head: a block.
template <class T> __global__ void __launch_bounds__(JoinThreads)
    attention_decode_join_kernel(FASTLM_CONSTANT AttentionForwardArgs a) {
  const int64_t row = blockIdx.x, i = row % a.query_len, head = row / a.query_len % a.num_heads,
                batch = row / a.query_len / a.num_heads;
  const float *const top = a.partial_max + row * a.num_splits, *const norm = a.partial_sum + row * a.num_splits;
  const float* const part = a.partial_out + row * a.num_splits * a.head_dim;
  float highest = -INFINITY;
  for (int piece = 0; piece < a.num_splits; ++piece) highest = fmaxf(highest, top[piece]);
  const float base = highest == -INFINITY ? 0.f : highest;
  float whole = 0;
  for (int piece = 0; piece < a.num_splits; ++piece)
    if (norm[piece] != 0) whole += exp2_fast((top[piece] - base) * Log2e) * norm[piece];
  const bool empty = whole == 0;
  T* const out = token_of<T>(a.out, batch, head, i);
  for (int channel = threadIdx.x; channel < a.head_dim; channel += JoinThreads) {
    float sum = 0;
    for (int piece = 0; piece < a.num_splits;
         ++piece)  // where nothing was seen the part is 0; a NaN in it is one that was seen
      if (norm[piece] != 0) sum += exp2_fast((top[piece] - base) * Log2e) * part[int64_t(piece) * a.head_dim + channel];
    out[channel] = from_float<T>(empty ? 0.f : sum / whole);
  }
  if (threadIdx.x == 0)
    a.lse[batch * a.lse_batch_stride + head * a.lse_head_stride + i] = empty ? -INFINITY : base + log_(whole);
}

}  // namespace

void attention_decode(const AttentionForwardArgs& args, stream_t stream) {
  attention_forward(args, stream);
  with_dtype(args.dtype, [&]<class T>() {
    FASTLM_LAUNCH(attention_decode_join_kernel<T>, unsigned(int64_t(args.batch) * args.num_heads * args.query_len),
                  JoinThreads, 0, stream, args);
  });
}

}  // namespace fastlm::cuda
