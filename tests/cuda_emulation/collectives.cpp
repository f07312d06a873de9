// The collective operations of a warp: shuffles, votes, ldmatrix and mma, in the layouts of csrc/cuda/intrinsics.cuh.
#include "fibers.h"

namespace fastlm::emulation {

uint64_t exchange(uint64_t value, int lane, int line) {
  Fiber* self = current;
  Warp& warp = *self->warp;
  const int parity = warp.parity;
  warp.values[parity][self->lane] = value;
  meet(self, Meeting::shuffle, line, [](Warp& warp) { warp.parity ^= 1; });
  return warp.values[parity][lane % Lanes];
}

uint32_t ballot(bool predicate, int line) {
  Fiber* self = current;
  Warp& warp = *self->warp;
  const int parity = warp.parity;
  if (warp.arrived == 0) warp.votes[parity] = 0;
  warp.votes[parity] |= uint32_t(predicate) << self->lane;
  meet(self, Meeting::vote, line, [](Warp& warp) { warp.parity ^= 1; });
  return warp.votes[parity];
}

static void read_matrices(Warp& warp, int matrices, bool transposed, void* place) {
  uint16_t rows[8][8];
  for (int matrix = 0; matrix < matrices; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      const int lane = matrix * 8 + row;
      read_row(warp.lanes[lane], warp.addresses[lane], place);
      std::memcpy(rows[row], warp.addresses[lane], 16);
    }
    for (int lane = 0; lane < Lanes; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      const uint16_t low = transposed ? rows[pair][group] : rows[group][pair],
                     high = transposed ? rows[pair + 1][group] : rows[group][pair + 1];
      warp.matrices[lane][matrix] = low | uint32_t(high) << 16;
    }
  }
}

words ldmatrix(const void* shared, int matrices, bool transposed, int line) {
  Fiber* self = current;
  Warp& warp = *self->warp;
  void* const place = __builtin_return_address(0);
  warp.addresses[self->lane] = shared;
  meet(self, Meeting::ldmatrix, line, [=](Warp& warp) { read_matrices(warp, matrices, transposed, place); });
  return warp.matrices[self->lane];
}

typedef float row8 __attribute__((vector_size(32)));
typedef uint32_t words8 __attribute__((vector_size(32)));

// Converts the two 16-bit numbers of each word.
template <products kind, int N> [[gnu::always_inline]] inline void widen(const uint32_t* in, float* low, float* high) {
  for (int i = 0; i < N; ++i) {
    if constexpr (kind == products::bf16) {
      low[i] = std::bit_cast<float>(in[i] << 16);
      high[i] = std::bit_cast<float>(in[i] & 0xFFFF0000u);
    } else {
      low[i] = half_to_float(uint16_t(in[i]));
      high[i] = half_to_float(uint16_t(in[i] >> 16));
    }
  }
}

// Products of the operands are exact in float32; the sum runs over k in order.
template <products kind> [[gnu::noinline]] static void multiply16(Warp& warp) {
  alignas(32) float a_low[4][Lanes], a_high[4][Lanes], b_low[2][Lanes], b_high[2][Lanes];
  widen<kind, 4 * Lanes>(warp.a[0], a_low[0], a_high[0]);
  widen<kind, 2 * Lanes>(warp.b[0], b_low[0], b_high[0]);
  for (int upper = 0; upper < 2; ++upper) {
    row8 sums[8];
    for (int group = 0; group < 8; ++group) std::memcpy(&sums[group], warp.c[upper * 8 + group], 32);
    for (int half = 0; half < 2; ++half)
      for (int t = 0; t < 4; ++t) {
        row8 b0, b1;
        std::memcpy(&b0, &b_low[half][t * 8], 32);
        std::memcpy(&b1, &b_high[half][t * 8], 32);
#pragma GCC unroll 8
        for (int group = 0; group < 8; ++group) {
          sums[group] += a_low[half * 2 + upper][group * 4 + t] * b0;
          sums[group] += a_high[half * 2 + upper][group * 4 + t] * b1;
        }
      }
    for (int group = 0; group < 8; ++group) std::memcpy(warp.product[upper * 8 + group], &sums[group], 32);
  }
}

[[gnu::noinline]] static void multiply8(Warp& warp) {
  alignas(32) float a[4][Lanes];
  row8 b[2][4];
  for (int i = 0; i < 4 * Lanes; ++i) a[0][i] = std::bit_cast<float>(warp.a[0][i] & 0xFFFFE000u);
  for (int half = 0; half < 2; ++half)
    for (int t = 0; t < 4; ++t) {
      words8 row;
      std::memcpy(&row, &warp.b[half][t * 8], 32);
      b[half][t] = std::bit_cast<row8>(row & 0xFFFFE000u);
    }
  for (int upper = 0; upper < 2; ++upper) {
    row8 sums[8];
    for (int group = 0; group < 8; ++group) std::memcpy(&sums[group], warp.c[upper * 8 + group], 32);
    for (int half = 0; half < 2; ++half)
      for (int t = 0; t < 4; ++t)
#pragma GCC unroll 8
        for (int group = 0; group < 8; ++group) sums[group] += a[half * 2 + upper][group * 4 + t] * b[half][t];
    for (int group = 0; group < 8; ++group) std::memcpy(warp.product[upper * 8 + group], &sums[group], 32);
  }
}

floats mma(floats c, words a, uint32_t b0, uint32_t b1, products kind, int line) {
  Fiber* self = current;
  Warp& warp = *self->warp;
  const int lane = self->lane, group = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) warp.a[i][lane] = a[i];
  warp.b[0][t * 8 + group] = b0;
  warp.b[1][t * 8 + group] = b1;
  std::memcpy(&warp.c[group][2 * t], &c, 8);
  std::memcpy(&warp.c[group + 8][2 * t], reinterpret_cast<const float*>(&c) + 2, 8);
  meet(self, Meeting::mma, line, [=](Warp& warp) {
    if (kind == products::bf16) multiply16<products::bf16>(warp);
    else if (kind == products::fp16) multiply16<products::fp16>(warp);
    else multiply8(warp);
  });
  return floats{warp.product[group][2 * t], warp.product[group][2 * t + 1], warp.product[group + 8][2 * t],
                warp.product[group + 8][2 * t + 1]};
}

}  // namespace fastlm::emulation
