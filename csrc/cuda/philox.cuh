// Dropout by Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the counters of
// every other backend:
//   key = the 64-bit seed; counter = ((col/64)·16 + col%16, row, third, 0); an element takes word (col/16)%4 and is
//   kept iff word ≥ ⌊p·2³²⌋.
// One call serves columns c, c + 16, c + 32 and c + 48 of a block of 64.
#pragma once
#include <cmath>
#include "launch.cuh"

namespace fastlm::cuda {

struct dropout {
  const int64_t* seed;  // on the device: a captured graph draws a new one each time it runs
  uint32_t threshold;   // 0: nothing is dropped, and seed may be null
  float scale;          // of what is kept, 1/(1 − p)

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

// The words of columns column, column + 16, column + 32 and column + 48, where column % 64 < 16.
FASTLM_DEVICE philox_words dropout_words(uint64_t seed, uint32_t column, uint32_t row, uint32_t third) {
  return philox(seed, column / 64 * 16 + column % 16, row, third);
}

// Whether one element is kept; a thread that holds several columns 16 apart asks dropout_words once.
FASTLM_DEVICE bool kept(uint64_t seed, uint32_t threshold, uint32_t column, uint32_t row, uint32_t third) {
  const philox_words words = dropout_words(seed, column, row, third);
  const uint32_t which = column / 16 % 4;
  const uint32_t word = which == 0   ? words.word[0]
                        : which == 1 ? words.word[1]
                        : which == 2 ? words.word[2]
                                     : words.word[3];
  return word >= threshold;
}

}  // namespace fastlm::cuda
