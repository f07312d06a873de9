// Dropout by Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the same counters
// as all other backends:
//   key = the 64-bit seed, counter = ((col/64)·16 + col%16, row, batch_head, 0). An element takes word (col/16)%4 and
//   is kept if word ≥ ⌊p·2³²⌋.
// One counter gives the words of columns c, c + 16, c + 32 and c + 48 of a block of 64.
#pragma once
#include <cmath>
#include "launch.cuh"

namespace fastlm::cuda {

struct dropout {
  const int64_t* seed;  // on the device, because a captured graph draws a new seed on each replay
  uint32_t threshold;   // 0: no dropout, and seed may be null
  float scale;          // of kept elements, 1/(1 − p)

  FASTLM_DEVICE bool active() const { return threshold != 0; }
};

// p in [0, 1)
inline dropout make_dropout(double p, const int64_t* seed) {
  return {seed, uint32_t(std::floor(p * 4294967296.0)), float(1.0 / (1.0 - p))};
}

struct philox_words {
  uint32_t word[4];
};

FASTLM_DEVICE philox_words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
  uint32_t c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of column, column + 16, column + 32 and column + 48, where column % 64 < 16.
FASTLM_DEVICE philox_words dropout_words(uint64_t seed, uint32_t column, uint32_t row, uint32_t batch_head) {
  return philox(seed, column / 64 * 16 + column % 16, row, batch_head);
}

// Whether one element is kept. A thread with several columns 16 apart calls dropout_words once instead.
FASTLM_DEVICE bool kept(uint64_t seed, uint32_t threshold, uint32_t column, uint32_t row, uint32_t batch_head) {
  const philox_words words = dropout_words(seed, column, row, batch_head);
  const uint32_t which = column / 16 % 4;
  const uint32_t word = which == 0   ? words.word[0]
                        : which == 1 ? words.word[1]
                        : which == 2 ? words.word[2]
                                     : words.word[3];
  return word >= threshold;
}

}  // namespace fastlm::cuda
