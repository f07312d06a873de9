// Launchers of attention: softmax(q kᵀ · scale + mask) v, its gradients, and the split over keys for a few queries.
#pragma once
#include <cstdint>
#include "dtype.h"

namespace fastlm::cuda {

enum class MaskType { none = 0, boolean = 1, additive = 2, additive_fp32 = 3 };

// Tokens of several heads, in place: strides count elements, and the channels of a token lie side by side.
struct TokensView {
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
  bool chunked = false;  // every token begins at a multiple of 16 bytes and fills them: launchers find out
};
struct TokensResult {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
  bool paired = false;  // two channels at a time may be written: launchers find out
};

struct AttentionArgs {
  DType dtype;
  TokensView query, key, value;
  float* lse;  // log-sum-exp of the scaled and masked scores
  int64_t lse_batch_stride, lse_head_stride;

  MaskType mask_type;
  const void* mask;
  int64_t mask_batch_stride, mask_head_stride, mask_query_stride, mask_key_stride;  // 0 where the mask has size 1
  const bool* padding;                                                              // true = a real token
  int64_t padding_batch_stride, padding_key_stride;

  // Of packed sequences where each begins, `batch` + 1 numbers of 32 or 64 bits; query_len and key_len are those of all
  // together then, and the band is relative to each sequence's own last key.
  const void *query_starts, *key_starts;
  bool wide_query_starts, wide_key_starts;

  int batch, heads, key_heads, query_len, key_len, head_dim;
  int lower, upper;  // query i sees key j iff lower ≤ j − i ≤ upper
  float scale;
  const int64_t* seed;  // of dropout, or null
  uint32_t threshold;
  float keep_scale;
  bool tf32;  // products of float32 may be rounded
};

struct AttentionForwardArgs : AttentionArgs {
  TokensResult out;
  // Split over the keys: each block sees `stretch` keys and leaves Σ weights · v, the maximum and Σ weights here, in
  // float32, by (batch, head, query, stretch). All queries of all heads that share a key head are one tile then, 64 at
  // most. 0 stretches: no split.
  float *part, *top, *norm;
  int stretch, stretches;
};

struct AttentionBackwardArgs : AttentionArgs {
  TokensView out, dout;
  const float* dlse;           // laid out as lse, or null
  float* delta;                // laid out as lse: working memory
  TokensResult dquery;         // always wanted: its pass computes what others need
  TokensResult dkey, dvalue;   // both or none
  float* dmask;                // contiguous, or null
  int mask_batch, mask_heads;  // sizes of the mask
  bool mask_row;               // it has one row for all queries
  bool exact;  // factors that are rounded to 16 bits are multiplied in two parts, and δ is summed from float32 weights
};

void attention_forward(const AttentionForwardArgs& args, stream_t stream);
void attention_decode(const AttentionForwardArgs& args, stream_t stream);  // the split, and its sum
void attention_backward(const AttentionBackwardArgs& args, stream_t stream);

}  // namespace fastlm::cuda
