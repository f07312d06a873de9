// What the launchers share that read a chunk of logits (rows, vocab).
#pragma once
#include <cstdint>

namespace fastlm::cuda {

struct logit_targets {
  const int64_t* target;  // (rows)
  int64_t target_stride, ignore_index;
};

constexpr int LOGIT_ROWS_PER_PARTIAL = 64;

// The number of partial sums over rows that a kernel by columns writes for the gradient of a bias.
inline int64_t logit_partials(int64_t rows) { return (rows + LOGIT_ROWS_PER_PARTIAL - 1) / LOGIT_ROWS_PER_PARTIAL; }

}  // namespace fastlm::cuda
