// A post-norm encoder layer on packed sequences, which follow each other along the rows:
//   q, k, v = x·Wq, x·Wk, x·Wv,  a = attention(q, k, v)·Wo within each sequence,  n = norm(x + a),
//   y = norm(n + gelu(n·W1)·W2)
//
// 2 FLOP per weight and row, and 4·rows·width of each sequence's attention. One short text is bound by reading the
// weights. Reading those of a small model takes no longer than calling the operators one by one from Python, whose data
// the weights evict from the caches between two calls. All layers therefore run in one call. Each step of a layer is
// the kernel of an operator, with the arguments that the operator passes, so the bits are the same. The caller
// allocates the scratch memory, which serves all layers.
#pragma once
#include <vector>
#include "attention.h"
#include "layer.h"

namespace fastlm {

template <class T> struct encoder_layer {
  norm_parameters attention_norm, mlp_norm;
  float eps;
  layer_projection<T> query, key, value;  // or all three in query
  layer_projection<T> output, up, down;
  activation_kind activation;
  int64_t width, num_heads, head_dim;
  float scale;

  int64_t query_width() const { return num_heads * head_dim; }
  // Elements per row of encoder_scratch::values, and of its statistics.
  int64_t scratch_width() const { return std::max({4 * query_width(), up.outputs, width}) + 2 * width; }
  int64_t statistics_width() const { return num_heads + 2; }
};

template <class T> struct encoder_scratch {
  T* values;
  float* statistics;
};

// x and y are (rows, width), contiguous, and may be the same. starts: where the sequences begin, and the end.
template <class T>
void encode(const encoder_layer<T>& layer, const T* x, T* y, int64_t rows, const std::vector<int64_t>& starts,
            encoder_scratch<T> scratch, int threads) {
  const int64_t width = layer.width, dim = layer.head_dim, query_width = layer.query_width();
  T *const projected = scratch.values, *const normalized = projected + rows * width,
           *const shared = normalized + rows * width;
  // Steps that follow each other share the rest: queries, keys, values and context; a residual sum; the hidden layer.
  T *const qkv = shared, *const context = qkv + rows * 3 * query_width, *const summed = shared, *const hidden = shared;
  float *const lse = scratch.statistics, *const statistics = lse + rows * layer.num_heads;

  layer.query.run(x, width, qkv, rows, threads);
  heads_view<const T> query{qkv, {0, dim, layer.query.outputs}}, key = query, value = query;
  key.data += query_width, value.data += 2 * query_width;
  if (layer.key.weight.data) {
    T *const keys = qkv + rows * query_width, *const values = keys + rows * query_width;
    layer.key.run(x, width, keys, rows, threads);
    layer.value.run(x, width, values, rows, threads);
    key.data = keys, value.data = values;
  }
  constexpr int64_t Unlimited = int64_t(1) << 62;
  const masking<T> masks{nullptr, mask_type::none, {}, nullptr, {}, -Unlimited, Unlimited, layer.scale, 0, {0, 0}};
  attention_forward<T>(
      query, key, value, {context, {0, dim, query_width}}, lse,
      {int64_t(starts.size()) - 1, layer.num_heads, layer.num_heads, rows, rows, dim, starts.data(), starts.data()},
      masks, threads);
  layer.output.run(context, query_width, projected, rows, threads);

  auto add_and_normalize = [&](norm_parameters parameters, const T* residual, T* to) {
    normalize({true, false, layer.eps}, parameters,
              strided_rows<const T>{projected, {.inner = rows, .inner_stride = width}}, residual, to, summed,
              statistics, {rows, width}, threads);
  };
  add_and_normalize(layer.attention_norm, x, normalized);
  gelu_mlp<T>(layer.up, layer.down, layer.activation, normalized, hidden, projected, rows, width, threads);
  add_and_normalize(layer.mlp_norm, normalized, y);
}

}  // namespace fastlm
