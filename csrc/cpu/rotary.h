// Rotary positions: for each pair of channels (j, j + half) of the first 2·half,
//   out[j] = x[j]·cos[j] − x[j + half]·sin[j],  out[j + half] = x[j + half]·cos[j + half] + x[j]·sin[j + half];
// the other channels are copied. The inverse (the gradient) is the transposed matrix.
//
// Memory bound: reads and writes queries and keys once, 2 bytes per element and 3 FLOPs in 16 bits. The work is divided
// by tokens: the cosines and sines of a token are read once and stay in L1 for all of its heads, queries and keys.
#pragma once
#include "simd.h"
#include "threads.h"

namespace fastlm {

// Queries or keys; rows of head_dim contiguous channels. No heads where not given.
template <class T> struct rotary_heads {
  const T* in;
  int64_t batch_stride, head_stride, token_stride;
  T* out;  // contiguous (batch, heads, tokens, head_dim)
  int64_t heads;
};

struct rotary_table {
  const float *cos, *sin;
  int64_t cos_batch_stride, cos_token_stride, sin_batch_stride, sin_token_stride;
  int64_t rotary_dim;
  bool inverse;
};

struct rotary_size {
  int64_t batch, tokens, head_dim;
};

template <class T> void rotate_row(const T* in, const float* cos, const float* sin, T* out, int64_t half,
                                   int64_t head_dim, bool inverse) {
  sweep(half, [=](int64_t j, auto span) {
    const vec first = vec::load(in + j, span), second = vec::load(in + half + j, span);
    const vec sin_first = vec::load(sin + j, span), sin_second = vec::load(sin + half + j, span);
    const vec cross = second * (inverse ? sin_second : sin_first), back = first * (inverse ? sin_first : sin_second);
    const vec straight = first * vec::load(cos + j, span), straight_second = second * vec::load(cos + half + j, span);
    (inverse ? straight + cross : straight - cross).store(out + j, span);
    (inverse ? straight_second - back : straight_second + back).store(out + half + j, span);
  });
  std::copy(in + 2 * half, in + head_dim, out + 2 * half);
}

template <class T> void rotate(rotary_heads<T> query, rotary_heads<T> key, rotary_table table, rotary_size size,
                               int threads) {
  const int64_t rows = size.batch * size.tokens,
                bytes_per_row = 2 * (query.heads + key.heads) * size.head_dim * int64_t(sizeof(T));
  parallel_for(rows, parts_for(rows, bytes_per_row), threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t batch = row / size.tokens, token = row % size.tokens;
      const float* cos = table.cos + batch * table.cos_batch_stride + token * table.cos_token_stride;
      const float* sin = table.sin + batch * table.sin_batch_stride + token * table.sin_token_stride;
      for (const rotary_heads<T>& x : {query, key})
        for (int64_t head = 0; head < x.heads; ++head)
          rotate_row(x.in + batch * x.batch_stride + head * x.head_stride + token * x.token_stride, cos, sin,
                     x.out + ((batch * x.heads + head) * size.tokens + token) * size.head_dim, table.rotary_dim / 2,
                     size.head_dim, table.inverse);
    }
  });
}

// Compiled once, with the operator; decoder_layer.h calls it too.
#define FASTLM_ROTARY_TYPE(prefix, T) \
  prefix template void rotate<T>(rotary_heads<T>, rotary_heads<T>, rotary_table, rotary_size, int);
#define FASTLM_ROTARY(prefix) \
  FASTLM_ROTARY_TYPE(prefix, float) FASTLM_ROTARY_TYPE(prefix, bf16) FASTLM_ROTARY_TYPE(prefix, fp16)
FASTLM_ROTARY(extern)

}  // namespace fastlm
