// A chunk of logits (rows, vocab) under the loss and linear_log_prob: how they are read, and their gradient in place.
// Logits are scaled and capped, s·z and c·tanh(z / c), where they are read. Rows of a chunk start at multiples of 16
// bytes whatever the vocabulary.
#pragma once
#include <stdexcept>
#include <string>
#include "logits.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm::cuda {

constexpr float LOG2E = 1.4426950408889634f;

FASTLM_DEVICE float shift_of(float row_max) { return row_max == -INFINITY ? 0.0f : row_max; }  // −inf − −inf is not 0
FASTLM_DEVICE float exponential(float z, float shift) { return exp2_fast((z - shift) * LOG2E); }

// The target of a row, −1 for an ignored row.
FASTLM_DEVICE int64_t target_of(const logit_targets& targets, int64_t row, int vocab) {
  const int64_t target = targets.target[row * targets.target_stride];
  if (target == targets.ignore_index) return -1;
  FASTLM_ASSERT(target >= 0 && target < vocab);  // expected values in [0, vocabulary) or ignore_index
  return target;
}

// A logit of the product, scaled and capped.
struct logit_transform {
  float scale, softcap;

  FASTLM_DEVICE float operator()(float z) const {
    z *= scale;
    return softcap > 0.0f ? softcap * tanh_(z / softcap) : z;
  }
  // The derivative of the cap, by its result.
  FASTLM_DEVICE float slope(float capped) const {
    const float t = capped / softcap;
    return softcap > 0.0f ? 1.0f - t * t : 1.0f;
  }
};

template <class T> struct logit_chunk {
  T* logits;
  int64_t stride;
  int rows, vocab;
};

inline void check_sizes(const char* name, int64_t rows, int64_t vocab) {
  if (rows > 1 << 30 || vocab > 1 << 30)
    throw std::runtime_error(std::string(name) + ": sizes beyond the range of 32 bits");
}

// By rows: one block per row, whose threads have 8 columns at a time

constexpr int ROW_THREADS = 512;

inline int row_threads(int64_t vocab) {
  const int64_t groups = (vocab + 7) / 8, padded = (groups + 31) / 32 * 32;  // whole warps
  return padded < ROW_THREADS ? int(padded) : ROW_THREADS;
}

// By columns

constexpr int COLUMN_THREADS = 128, COLUMNS_PER_BLOCK = COLUMN_THREADS * 8;

inline dim3 column_grid(int64_t rows, int64_t vocab) {
  return dim3(unsigned((vocab + COLUMNS_PER_BLOCK - 1) / COLUMNS_PER_BLOCK), unsigned(logit_partials(rows)));
}

// The gradient in place of the logits: 8 columns per thread and LOGIT_ROWS_PER_PARTIAL rows per block. Row is what the
// gradient of a row needs, row_of(row) returns it, and Row::target is −1 for an ignored row; the shared memory of the
// block holds LOGIT_ROWS_PER_PARTIAL of them. With dbias_partials the sum over these rows is stored, of numbers that
// are not rounded yet.
template <class Row, class T, class RowOf>
FASTLM_DEVICE void gradient_by_columns(const logit_chunk<T>& chunk, const logit_transform& transform,
                                       float* dbias_partials, unsigned char* shared, RowOf row_of) {
  Row* rows = reinterpret_cast<Row*>(shared);
  const int vocab = chunk.vocab, first = int(blockIdx.y) * LOGIT_ROWS_PER_PARTIAL, remaining = chunk.rows - first,
            count = remaining < LOGIT_ROWS_PER_PARTIAL ? remaining : LOGIT_ROWS_PER_PARTIAL;
  for (int i = int(threadIdx.x); i < count; i += COLUMN_THREADS) rows[i] = row_of(first + i);
  __syncthreads();
  const int column = (int(blockIdx.x) * COLUMN_THREADS + int(threadIdx.x)) * 8;
  if (column >= vocab) return;
  const bool vectorized = column + 8 <= vocab;
  vec<float, 8> acc{};
  for (int i = 0; i < count; ++i) {
    T* logits = chunk.logits + (first + i) * chunk.stride + column;
    vec<float, 8> d{};
    if (rows[i].target >= 0) {
      const Row row = rows[i];
      const vec<T, 8> z = load8(static_cast<const T*>(logits), vocab - column, vectorized);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        d[e] = row(to_float(z[e]), column + e, transform);
        acc[e] += d[e];
      }
    }
    store8(d, logits, vocab - column, vectorized);
  }
  if (dbias_partials)
    store8(acc, dbias_partials + int64_t(blockIdx.y) * vocab + column, vocab - column, vectorized && vocab % 4 == 0);
}

}  // namespace fastlm::cuda
