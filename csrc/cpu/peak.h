// What the arithmetic can do at most: multiply-adds of what lies in registers already (of AMX, tiles from L1), as many
// chains of sums as the product's tile has.
#pragma once
#include "gemm.h"

namespace fastlm {

// Returns the FLOP done: `rounds` multiply-adds to each sum, on every thread.
template <class Arithmetic> double multiply_adds(int64_t rounds, int threads) {
  constexpr int64_t L = vec::Lanes, Sums = TileRows * TileVecs,
                    Shares = 8;  // a thread that is late does not hold up the rest
  int64_t count = rounds / Shares;
  double flops = 2.0 * double(Arithmetic::PerLane * L * Sums) * double(count);
  if constexpr (Arithmetic::RowsOnly) {
    count = ceil_div(count, Arithmetic::BlockDepth);
    flops =
        2.0 * double(Arithmetic::PerLane * Arithmetic::Rows * TileVecs * L * Arithmetic::BlockDepth) * double(count);
  }
  parallel_parts(threads * Shares, threads, [=](int64_t) {
    [[maybe_unused]] const typename Arithmetic::session multiplying;
    constexpr int64_t Width = TileVecs * L;
    float* ones = scratch(Arithmetic::BlockDepth * (Width + Arithmetic::Rows) + Arithmetic::Rows * Width);
    std::fill_n(ones, Arithmetic::BlockDepth * (Width + Arithmetic::Rows) + Arithmetic::Rows * Width, 1.0f);
    __asm__ volatile("" : "+r"(ones)::"memory");  // the compiler shall not know what they are
    if constexpr (Arithmetic::RowsOnly) {
      float *rows = ones + Arithmetic::BlockDepth * Width, *sums = rows + Arithmetic::BlockDepth * Arithmetic::Rows;
      for (int64_t i = 0; i < count; ++i)
        multiply_tile<Arithmetic, true>(TileVecs, Arithmetic::BlockDepth, rows, Arithmetic::BlockDepth, ones, Width,
                                        sums, Width, false);
    } else {
      vec sum[Sums];
#pragma GCC unroll 24
      for (int64_t s = 0; s < Sums; ++s) sum[s] = vec::load(ones + s * L, full{});
      const vec a = vec::load(ones, full{}), b = vec::load(ones + L, full{});
      for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 24
        for (int64_t s = 0; s < Sums; ++s) sum[s] = Arithmetic::multiply_add(sum[s], a, b);
#pragma GCC unroll 24
      for (int64_t s = 0; s < Sums; ++s) sum[s].store(ones + s * L, full{});
    }
    __asm__ volatile("" ::"r"(ones) : "memory");
  });
  return flops * double(threads * Shares);
}

}  // namespace fastlm
