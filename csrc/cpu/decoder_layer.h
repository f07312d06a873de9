// A decoder layer for the next token of every sequence, a decode step:
//   s = residual + x,  n = norm(s),  q, k, v = n·Wq, n·Wk, n·Wv, the heads of q and k normalized and rotated where the
//   model has that;  k and v appended to the cache;  a = attention(q, cache)·Wo;  s' = s + a,  y = mlp(norm(s'))
// and a, y normalized before they are added where the model has norms of outputs. Returns y and s'.
//
// 2 FLOP per weight and sequence: bound by reading the weights and the cached keys and values. Python takes about as
// long to call the operators one by one as a small model's weights take to be read, all the more as these evict its own
// data from the caches between two calls. All layers therefore run in one call. They compute nothing themselves: each
// step is the kernel of an operator, with the arguments that the modules of fastlm.models pass, so the bits are the
// same. The cache (fastlm/models/cache.py) decides which slot of each layer is next; every call reads the tensors
// again, so nothing here can be outdated.
#pragma once
#include "attention.h"
#include "glu_mlp.h"
#include "layer.h"
#include "rotary.h"

namespace fastlm {

template <class T> struct decoder_layer {
  norm_kind norms;
  norm_parameters attention_norm, query_norm, key_norm, attention_output_norm, mlp_norm, mlp_output_norm;
  layer_projection<T> query, key, value;  // or all three in query
  layer_projection<T> output, gate, up, down;
  activation_kind activation;
};

struct decoder_layer_size {
  int64_t batch, width, num_heads, num_kv_heads, head_dim;
};

// The cached keys and values, (batch, head, slot, dim). The new token is written to `slot` and attends to slots up to
// it as `masks` allows.
template <class T> struct kv_slots {
  heads_view<T> keys, values;
  int64_t slot;
};

// An uninitialized part of a block of memory, aligned to cache lines.
template <class T> T* take(float*& memory, int64_t count) {
  T* const taken = reinterpret_cast<T*>(memory);
  memory += (count + 15) / 16 * 16;
  return taken;
}

// Copies one token of each sequence and head into its slot of the cache.
template <class T>
void append_heads(heads_view<const T> from, heads_view<T> cache, int64_t slot, decoder_layer_size size) {
  for (int64_t batch = 0; batch < size.batch; ++batch)
    for (int64_t head = 0; head < size.num_kv_heads; ++head)
      std::copy_n(from.at(batch, head), size.head_dim, cache.at(batch, head, slot));
}

// x, residual, y and summed are (batch, width), contiguous; residual is null in the first layer. y may be x, and summed
// may be residual. masks: the band and padding of one query over the keys up to the slot.
template <class T>
void decode(const decoder_layer<T>& layer, const T* x, const T* residual, T* y, T* summed, const kv_slots<T>& cache,
            const rotary_table* rotation, const masking<T>& masks, decoder_layer_size size, int threads) {
  const int64_t rows = size.batch, width = size.width, dim = size.head_dim, query_width = size.num_heads * dim,
                key_width = size.num_kv_heads * dim, qkv_width = query_width + 2 * key_width,
                hidden_width = layer.up.outputs, all_heads = rows * size.num_heads;
  buffer memory =
      make_buffer(rows * (4 * width + 3 * qkv_width + query_width + hidden_width) + 3 * all_heads + 16 * 16);
  float* free = memory.get();
  T *normalized = take<T>(free, rows * width), *projected = take<T>(free, rows * width),
    *output = take<T>(free, rows * width), *first_sum = take<T>(free, rows * width),
    *qkv = take<T>(free, rows * qkv_width), *context = take<T>(free, rows * query_width),
    *hidden = take<T>(free, rows * hidden_width);
  float *lse = take<float>(free, all_heads), *statistics = take<float>(free, 2 * all_heads);

  const norm_size tokens{rows, width};
  auto rows_of = [=](const T* data) { return strided_rows<const T>{data, {.inner = rows, .inner_stride = width}}; };
  auto linear = [=](const layer_projection<T>& with, const T* from, int64_t inputs, T* to) {
    with.run(from, inputs, to, rows, threads);
  };

  normalize(layer.norms, layer.attention_norm, rows_of(x), residual, normalized, residual ? first_sum : nullptr,
            statistics, tokens, threads);
  const T* const sum = residual ? first_sum : x;

  // The heads of a token follow each other, and the tokens of separate projections too.
  linear(layer.query, normalized, width, qkv);
  heads_view<const T> query{qkv, {qkv_width, dim, dim}}, key = query, value = query;
  key.data += query_width, value.data += query_width + key_width;
  if (layer.key.weight.data) {
    T *const keys = qkv + rows * query_width, *const values = keys + rows * key_width;
    linear(layer.key, normalized, width, keys);
    linear(layer.value, normalized, width, values);
    query = {qkv, {query_width, dim, dim}}, key = {keys, {key_width, dim, dim}},
    value = {values, {key_width, dim, dim}};
  }
  auto normalize_heads = [&](norm_parameters parameters, heads_view<const T>& x, int64_t heads) {
    if (!parameters.weight) return;
    T* const to = take<T>(free, rows * heads * dim);
    const row_layout layout{.inner = heads, .middle = rows, .middle_stride = x.strides[0], .inner_stride = dim};
    normalize(layer.norms, parameters, {x.data, layout}, static_cast<const T*>(nullptr), to, static_cast<T*>(nullptr),
              statistics, {rows * heads, dim}, threads);
    x = {to, {heads * dim, dim, dim}};
  };
  normalize_heads(layer.query_norm, query, size.num_heads);
  normalize_heads(layer.key_norm, key, size.num_kv_heads);
  if (rotation) {
    T *const queries = take<T>(free, rows * query_width), *const keys = take<T>(free, rows * key_width);
    auto heads = [=](heads_view<const T> x, T* out, int64_t count) {
      return rotary_heads<T>{x.data, x.strides[0], x.strides[1], x.strides[2], out, count};
    };
    rotate(heads(query, queries, size.num_heads), heads(key, keys, size.num_kv_heads), *rotation, {rows, 1, dim},
           threads);
    query = {queries, {query_width, dim, dim}}, key = {keys, {key_width, dim, dim}};
  }
  append_heads(key, cache.keys, cache.slot, size);
  append_heads(value, cache.values, cache.slot, size);

  const heads_view<const T> keys{cache.keys.data, cache.keys.strides}, values{cache.values.data, cache.values.strides};
  attention_forward<T>(query, keys, values, {context, {query_width, dim, query_width}}, lse,
                       {rows, size.num_heads, size.num_kv_heads, 1, cache.slot + 1, dim}, masks, threads);
  linear(layer.output, context, query_width, projected);
  // A norm of its own before the output is added to the sum.
  auto normalize_output = [&](norm_parameters parameters, T*& from, T* to) {
    if (!parameters.weight) return;
    normalize(layer.norms, parameters, rows_of(from), static_cast<const T*>(nullptr), to, static_cast<T*>(nullptr),
              statistics, tokens, threads);
    from = to;
  };
  normalize_output(layer.attention_output_norm, projected, output);
  normalize(layer.norms, layer.mlp_norm, rows_of(projected), sum, normalized, summed, statistics, tokens, threads);

  T* const result = layer.mlp_output_norm.weight ? projected : y;
  if (layer.gate.weight.data) {
    const glu_mlp_weights<T> weights{layer.gate.weight, layer.up.weight, layer.down.weight, layer.gate.bias,
                                     layer.up.bias};
    glu_mlp_forward(static_cast<const T*>(normalized), width, weights, layer.down.bias, static_cast<T*>(nullptr),
                    static_cast<T*>(nullptr), hidden, result, {rows, width, hidden_width, width}, layer.activation,
                    threads);
  } else {
    gelu_mlp<T>(layer.up, layer.down, layer.activation, normalized, hidden, result, rows, width, threads);
  }
  T* normed = result;
  normalize_output(layer.mlp_output_norm, normed, y);
}

}  // namespace fastlm
