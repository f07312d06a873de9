// Logits z = x·Wᵀ + b (rows, vocab), of which one chunk of rows exists at a time, and the products with their gradient.
//
// A product of 2·rows·width·vocab FLOP for the logits and one for each gradient of x and W. While a chunk exists (≤ 64
// MB), a function of the caller reads its rows and replaces them by the gradient of the product x·Wᵀ + b. dW is
// accumulated over the chunks in fp32.
#pragma once
#include "linear.h"
#include "vmath.h"

namespace fastlm {

struct logit_chunks {
  float* logits;  // (rows, vocab): memory of one chunk
  int64_t rows;
  float scale, softcap;  // of the logits: softcap·tanh(scale·z / softcap), or scale·z where softcap is 0
};

template <class T, class G> struct logit_gradients {
  T* dx = nullptr;               // (rows, width), or null where not wanted
  G* dweight = nullptr;          // (vocab, width), or null
  float* dweight_sum = nullptr;  // fp32 accumulator of dweight, where G is 16-bit and there are several chunks
  G* dbias = nullptr;            // (vocab), or null
  bool wanted() const { return dx || dweight || dbias; }
};

// −1, or the first row whose target is neither a class nor ignore_index.
inline int64_t first_wrong_target(const int64_t* target, int64_t stride, int64_t ignore_index, int64_t rows,
                                  int64_t vocab) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = target[row * stride];
    if (t != ignore_index && (t < 0 || t >= vocab)) return row;
  }
  return -1;
}

// Calls of_row(z, row) for each row of logits; where gradients are wanted, z is then the gradient of the product.
template <class T, class G, class OfRow>
void for_chunks_of_logits(const T* x, int64_t x_stride, weight_operand<const T> weight, const T* bias,
                          logit_chunks chunks, logit_gradients<T, G> out, int64_t rows, int64_t width, int64_t vocab,
                          int threads, OfRow of_row) {
  using arithmetic = arithmetic_for<T>;
  float* const logits = chunks.logits;
  buffer dbias_sum;
  if (out.dbias) {
    dbias_sum = make_buffer(vocab);
    std::fill_n(dbias_sum.get(), vocab, 0.0f);
  }
  float* dw_sum = out.dweight_sum;
  if constexpr (std::is_same_v<G, float>) dw_sum = out.dweight;  // an fp32 result is its own accumulator

  for (int64_t first = 0; first < rows; first += chunks.rows) {
    const int64_t count = std::min(chunks.rows, rows - first);
    const T* xs = x + first * x_stride;
    auto write = [=, scale = chunks.scale, softcap = chunks.softcap](int64_t i, int64_t j, vec value, auto span) {
      if (scale != 1) value = value * vec::all(scale);
      if (softcap > 0) value = vec::all(softcap) * tanh(value / vec::all(softcap));
      value.store(logits + i * vocab + j, span);
    };
    project(xs, x_stride, weight, bias, count, width, vocab, threads, storing_to(logits, vocab, write));
    parallel_parts(count, threads, [=](int64_t row) { of_row(logits + row * vocab, first + row); });
    if (out.dx) {
      T* dx = out.dx + first * width;
      multiply<arithmetic>(count, width, vocab, operand<float>{logits, vocab, 1}, weight.summed_over_outputs(), threads,
                           store_to(dx, width));
    }
    if (out.dweight) {
      const bool first_chunk = first == 0, last_chunk = first + count == rows;
      G* dw = out.dweight;
      auto add = [=](int64_t i, int64_t j, vec value, auto span) {
        const int64_t at = i * width + j;
        if (!first_chunk) value = value + vec::load(dw_sum + at, span);
        if (last_chunk) value.store(dw + at, span);
        else value.store(dw_sum + at, span);
      };
      multiply_transposed<arithmetic>(
          vocab, width, count, operand<float>{logits, 1, vocab}, operand<T>{xs, 1, x_stride}, threads,
          updating_from(first_chunk ? nullptr : static_cast<const float*>(dw_sum), dw, width, add), dbias_sum.get(),
          nullptr);
    } else if (out.dbias) {
      buffer chunk = make_buffer(vocab);
      column_sums(static_cast<const float*>(logits), vocab, chunk.get(), count, vocab, threads);
      for (int64_t i = 0; i < vocab; ++i) dbias_sum[i] += chunk[i];
    }
  }
  if (out.dbias) convert(dbias_sum.get(), out.dbias, vocab);
}

// The largest logit of a row, and in `nans` a NaN if the row holds one: max() may drop it, a sum keeps it.
inline float largest_logit(const float* z, int64_t vocab, float& nans) {
  vec row_max = vec::all(-INFINITY), found = vec::zero();
  sweep(vocab, [&](int64_t i, auto span) {
    vec v = vec::load(z + i, span);
    found = found + zero_where(v == v, v);
    if constexpr (std::is_same_v<decltype(span), full>) row_max = max(row_max, v);
    else row_max = max(row_max, select(vec::iota() < vec::all(float(span.count)), v, vec::all(-INFINITY)));
  });
  nans = found.sum();
  return row_max.max_lane();
}

// Σ over a row in runs, which bounds the rounding error: term(i, span) gives the terms from i on, 0 where span ends.
template <class Term> float sum_in_runs(int64_t vocab, Term term) {
  constexpr int64_t Run = 4096;
  float sum = 0;
  for (int64_t first = 0; first < vocab; first += Run)
    sum += sum_over(std::min(Run, vocab - first), [=](int64_t i, auto span) { return term(first + i, span); });
  return sum;
}

}  // namespace fastlm
