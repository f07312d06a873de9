// The sequences of a batch, and how the work on them is cut into parts.
//
// A dense batch consists of sequences of one length, a batch stride apart. In a packed batch they follow each other
// along the tokens, and the batch stride is 0: sequence b has the queries from query_starts[b] to query_starts[b + 1]
// and the keys from key_starts[b] to key_starts[b + 1], any number of each, including none.
#pragma once
#include <vector>
#include "gemm.h"

namespace fastlm {

struct sequence {
  int64_t index, queries, keys;    // position in the batch; numbers of queries and keys
  int64_t first_query, first_key;  // packed: among all tokens
  int64_t diagonal;                // packed: offset of the band, as the last query is aligned with the last key
  int64_t work() const { return queries * keys; }
};

struct attention_size {
  int64_t batch, num_heads, num_kv_heads, query_len, key_len, head_dim;  // lengths; packed: of all sequences together
  const int64_t *query_starts = nullptr, *key_starts = nullptr;          // packed: (batch + 1)
  int64_t padded_dim() const { return ceil_div(head_dim, PanelRows) * PanelRows; }
  int64_t group_size() const { return num_heads / num_kv_heads; }

  sequence at(int64_t index) const {
    if (!query_starts) return {index, query_len, key_len, 0, 0, 0};
    const int64_t q = query_starts[index], k = key_starts[index], queries = query_starts[index + 1] - q,
                  keys = key_starts[index + 1] - k;
    return {index, queries, keys, q, k, keys - queries};
  }
  attention_size of(const sequence& s) const { return {1, num_heads, num_kv_heads, s.queries, s.keys, head_dim}; }
  // The number of rows of lse: (batch, head, query), or (head, query) where packed.
  int64_t rows() const { return (query_starts ? 1 : batch) * num_heads * query_len; }
  int64_t row(const sequence& s, int64_t head) const {
    return ((query_starts ? 0 : s.index * num_heads) + head) * query_len + s.first_query;
  }
};

// Longest sequences first, for load balance at the end. Sequences of equal work keep their order.
inline std::vector<sequence> longest_first(const attention_size& size) {
  std::vector<sequence> order;
  order.reserve(size.batch);
  for (int64_t i = 0; i < size.batch; ++i) order.push_back(size.at(i));
  std::stable_sort(order.begin(), order.end(),
                   [](const sequence& a, const sequence& b) { return a.work() > b.work(); });
  return order;
}

// The parts of all sequences, count(sequence) of each, one sequence after another.
class sequence_parts {
  const std::vector<sequence>& order;
  std::vector<int64_t> first;

 public:
  struct place {
    const sequence& of;
    int64_t part;  // within this sequence
  };
  template <class Count> sequence_parts(const std::vector<sequence>& order, Count count) : order(order) {
    first.reserve(order.size() + 1);
    first.push_back(0);
    for (const sequence& s : order) first.push_back(first.back() + count(s));
  }
  int64_t total() const { return first.back(); }
  place find(int64_t part) const {
    const int64_t i = std::upper_bound(first.begin(), first.end(), part) - first.begin() - 1;
    return {order[i], part - first[i]};
  }
};

}  // namespace fastlm
