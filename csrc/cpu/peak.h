// The peak rate of an arithmetic: multiply-adds of operands in registers (for AMX, of tiles in L1), with as many
// independent chains of sums as the register tile has.
#pragma once
#include "gemm.h"

namespace fastlm {

// Returns the number of FLOP: `rounds` multiply-adds to each accumulator, on every thread.
template <class Arithmetic> double multiply_adds(int64_t rounds, int threads) {
  constexpr int64_t L = vec::Lanes, Sums = MR * NRVecs,
                    PartsPerThread = 8;  // for load balance
  int64_t count = rounds / PartsPerThread;
  double flops = 2.0 * double(Arithmetic::PerLane * L * Sums) * double(count);
  if constexpr (Arithmetic::RowMajorOnly) {
    count = ceil_div(count, Arithmetic::KC);
    flops = 2.0 * double(Arithmetic::PerLane * Arithmetic::MR * NRVecs * L * Arithmetic::KC) * double(count);
  }
  parallel_parts(threads * PartsPerThread, threads, [=](int64_t) {
    [[maybe_unused]] const typename Arithmetic::session multiplying;
    constexpr int64_t Width = NRVecs * L;
    float* ones = scratch(Arithmetic::KC * (Width + Arithmetic::MR) + Arithmetic::MR * Width);
    std::fill_n(ones, Arithmetic::KC * (Width + Arithmetic::MR) + Arithmetic::MR * Width, 1.0f);
    __asm__ volatile("" : "+r"(ones)::"memory");  // hides the values from the compiler
    if constexpr (Arithmetic::RowMajorOnly) {
      float *rows = ones + Arithmetic::KC * Width, *sums = rows + Arithmetic::KC * Arithmetic::MR;
      for (int64_t i = 0; i < count; ++i)
        multiply_tile<Arithmetic, true>(NRVecs, Arithmetic::KC, rows, Arithmetic::KC, ones, Width, sums, Width, false);
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
  return flops * double(threads * PartsPerThread);
}

}  // namespace fastlm
