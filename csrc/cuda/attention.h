// Launchers of attention, softmax(s + mask) v with s = q kᵀ · scale or softcap · tanh(q kᵀ · scale / softcap): forward,
// backward, and forward with split-K for few queries.
#pragma once
#include <cstdint>
#include "dtype.h"

namespace fastlm::cuda {

enum class MaskType { none = 0, boolean = 1, additive = 2, additive_fp32 = 3 };

// (batch, head, token, head_dim) with strides in elements; the last dimension is contiguous.
struct TokensView {
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
  bool aligned = false;  // every token starts at, and its size is, a multiple of 16 bytes; set by the launchers
};
struct TokensResult {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
  bool paired = false;  // aligned for stores of two elements; set by the launchers
};

struct AttentionArgs {
  DType dtype;
  TokensView query, key, value;
  float* lse;  // log-sum-exp of the scaled and masked scores
  int64_t lse_batch_stride, lse_head_stride;

  MaskType mask_type;
  const void* mask;
  int64_t mask_batch_stride, mask_head_stride, mask_query_stride, mask_key_stride;  // 0 where the mask has size 1
  const bool* key_padding;                                                          // true for a real token, or null
  int64_t key_padding_batch_stride, key_padding_key_stride;

  // Packed sequences: `batch` + 1 offsets of 32 or 64 bits. query_len and key_len are then the total numbers of tokens,
  // and the band is aligned to the last key of each sequence.
  const void *query_starts, *key_starts;
  bool query_starts_int64, key_starts_int64;

  int batch, num_heads, num_kv_heads, query_len, key_len, head_dim;
  int lower, upper;      // query i attends to key j if lower ≤ j − i ≤ upper
  float scale, softcap;  // softcap: 0 for none
  const int64_t* seed;   // of dropout, on the device, or null
  uint32_t threshold;    // a weight is kept if its random word is at least this
  float keep_scale;      // 1/(1 − p)
  bool tf32;             // float32 operands of products may be rounded to tf32
};

struct AttentionForwardArgs : AttentionArgs {
  TokensResult out;
  // Split-K: each block computes the attention over `split_size` keys and writes the unnormalised output, the maximum
  // and the sum of its weights here, in float32, indexed by (batch, head, query, split). One tile then holds all
  // queries of all heads that share a key head, 64 at most. num_splits is 0 without split-K.
  float *partial_out, *partial_max, *partial_sum;
  int split_size, num_splits;
};

struct AttentionBackwardArgs : AttentionArgs {
  TokensView out, dout;
  const float* dlse;           // in the layout of lse, or null
  float* delta;                // in the layout of lse: workspace
  TokensResult dquery;         // always computed, because its pass computes what the others need
  TokensResult dkey, dvalue;   // both or none
  float* dmask;                // contiguous, or null
  int mask_batch, mask_heads;  // sizes of the mask
  bool mask_has_one_row;       // the mask is broadcast over the queries
  bool exact;                  // split 16-bit factors into two parts, and sum δ from float32 weights
};

void attention_forward(const AttentionForwardArgs& args, stream_t stream);
void attention_decode(const AttentionForwardArgs& args, stream_t stream);  // split-K and its combine
void attention_backward(const AttentionBackwardArgs& args, stream_t stream);

}  // namespace fastlm::cuda
