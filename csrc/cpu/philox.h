// Dropout by Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). The mask is a pure
// function of seed and position: it is the same on every backend and number of threads, and is recomputed in the
// backward instead of being stored.
//   key = the 64-bit seed; counter = ((col/64)·16 + col%16, row, batch_head, 0); an element uses word (col/16)%4 and is
//   kept iff word ≥ ⌊p·2³²⌋.
#pragma once
#include <cmath>
#include "simd.h"

namespace fastlm {

struct dropout {
  uint64_t seed;
  uint32_t threshold;  // 0: nothing is dropped
  float scale;         // of kept elements, 1/(1 − p)

  dropout(double p, int64_t seed)
      : seed(uint64_t(seed)), threshold(uint32_t(std::floor(p * 4294967296.0))), scale(float(1.0 / (1.0 - p))) {}
  bool active() const { return threshold != 0; }
};

FASTLM_INLINE void philox(uvec c0, uvec c1, uvec c2, uint64_t seed, uvec (&words)[4]) {
  uvec c3 = uvec::all(0);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    uvec high0, low0, high1, low1;
    multiply_wide(c0, uvec::all(0xD2511F53u), high0, low0);
    multiply_wide(c2, uvec::all(0xCD9E8D57u), high1, low1);
    c0 = high1 ^ c1 ^ uvec::all(k0);
    c1 = low1;
    c2 = high0 ^ c3 ^ uvec::all(k1);
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Factors for 64 columns of one row, from column 64·group on: 0 where dropped, d.scale where kept.
inline void dropout_factors(const dropout& d, int64_t group, int64_t row, int64_t batch_head, float* factors) {
  for (int64_t lane = 0; lane < 16; lane += vec::Lanes) {
    uvec words[4];
    philox(uvec::all(uint32_t(group * 16 + lane)) + uvec::iota(), uvec::all(uint32_t(row)),
           uvec::all(uint32_t(batch_head)), d.seed, words);
#pragma GCC unroll 4
    for (int word = 0; word < 4; ++word)
      select(words[word] >= uvec::all(d.threshold), vec::all(d.scale), vec::zero())
          .store(factors + word * 16 + lane, full{});
  }
}

}  // namespace fastlm
