// The sequences of a batch, and the parts that the work on them is cut into.
//
// A dense batch is so many sequences of one length, a batch stride apart. A packed one has them one after another along
// the tokens: sequence b has the queries from query_starts[b] to query_starts[b + 1] and the keys of key_starts, as
// many as it likes of each, none too; the batch strides are 0.
#pragma once
#include <vector>
#include "gemm.h"

namespace fastlm {

struct sequence {
  int64_t index, queries, keys;    // in the batch; how many
  int64_t first_query, first_key;  // packed: among the tokens of all
  int64_t diagonal;                // packed: from where the band is counted, the last query standing at the last key
  int64_t work() const { return queries * keys; }
};

struct attention_size {
  int64_t batch, heads, kv_heads, query_len, key_len, head_dim;  // packed: the lengths of all sequences together
  const int64_t *query_starts = nullptr, *key_starts = nullptr;  // packed: (batch + 1)
  int64_t padded_dim() const { return ceil_div(head_dim, PanelRows) * PanelRows; }
  int64_t group() const { return heads / kv_heads; }

  sequence at(int64_t index) const {
    if (!query_starts) return {index, query_len, key_len, 0, 0, 0};
    const int64_t q = query_starts[index], k = key_starts[index], queries = query_starts[index + 1] - q,
                  keys = key_starts[index + 1] - k;
    return {index, queries, keys, q, k, keys - queries};
  }
  attention_size of(const sequence& s) const { return {1, heads, kv_heads, s.queries, s.keys, head_dim}; }
  // What there is one of for each query of each head: (batch, head, query), or (head, query) where packed.
  int64_t rows() const { return (query_starts ? 1 : batch) * heads * query_len; }
  int64_t row(const sequence& s, int64_t head) const {
    return ((query_starts ? 0 : s.index * heads) + head) * query_len + s.first_query;
  }
};

// The sequence with most to do first: what a thread is left with at the end is then little. Equals keep their order.
inline std::vector<sequence> longest_first(const attention_size& size) {
  std::vector<sequence> order;
  order.reserve(size.batch);
  for (int64_t i = 0; i < size.batch; ++i) order.push_back(size.at(i));
  std::stable_sort(order.begin(), order.end(),
                   [](const sequence& a, const sequence& b) { return a.work() > b.work(); });
  return order;
}

// Parts of the work, those of one sequence after those of another: count(sequence) of each.
class sequence_parts {
  const std::vector<sequence>& order;
  std::vector<int64_t> first;

 public:
  struct place {
    const sequence& of;
    int64_t part;  // of this sequence's
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
