// Products of bf16 by AMX. A tile is 16 rows of 64 bytes; one instruction adds the product of two tiles to a third, 16
// × 16 sums over 32 bf16, in 16 cycles. Both operands have the lanes of the bf16 dot product, pairs of bf16: the first
// is [row][pair of k], the second [pair of k][column]. Included by gemm_tile.h.
#pragma once
#include <immintrin.h>

namespace fastlm {

// Configures the calling thread's tiles as amx_multiply_tile needs them, all of full size, and restores the previous
// configuration at its end.
class amx_tile_config {
  struct alignas(64) configuration {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } before;
  static_assert(sizeof(configuration) == 64);

 public:
  amx_tile_config() {
    _tile_storeconfig(&before);
    configuration whole;
    whole.palette = 1;
    for (int t = 0; t < 8; ++t) whole.row_bytes[t] = 64, whole.rows[t] = 16;
    _tile_loadconfig(&whole);
  }
  ~amx_tile_config() { _tile_loadconfig(&before); }
  amx_tile_config(const amx_tile_config&) = delete;
  amx_tile_config& operator=(const amx_tile_config&) = delete;
};

struct amx_arithmetic : dot_arithmetic {
  // 24 kB of B and 8 kB of A in a block: more of both would not stay in L1.
  static constexpr int64_t KC = 128, MR = 16, KStep = 16;
  static constexpr bool RowMajorOnly = true, CheapProducts = true;
  using session = amx_tile_config;
};

// c (16 × 16·Vecs) = a·b, or += where `accumulate`, with one tile of a, up to three of b and up to three of
// accumulators. Each step of k loads 4 tiles (8 cycles each from L1) for 3 products.
template <int Vecs> void amx_multiply_tile(int64_t depth, const float* a, int64_t a_stride, const float* b,
                                           int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  const int64_t row = 4 * c_stride;   // bytes
  __asm__ volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
  if (accumulate) {
    _tile_loadd(0, c, row);
    if constexpr (Vecs > 1) _tile_loadd(1, c + 16, row);
    if constexpr (Vecs > 2) _tile_loadd(2, c + 32, row);
  } else {
    _tile_zero(0);
    if constexpr (Vecs > 1) _tile_zero(1);
    if constexpr (Vecs > 2) _tile_zero(2);
  }
  for (int64_t d = 0; d < depth;
       d += amx_arithmetic::KStep, a += amx_arithmetic::KStep, b += amx_arithmetic::KStep * b_stride) {
    _tile_loadd(3, a, 4 * a_stride);
    _tile_loadd(4, b, 4 * b_stride);
    _tile_dpbf16ps(0, 3, 4);
    if constexpr (Vecs > 1) {
      _tile_loadd(5, b + 16, 4 * b_stride);
      _tile_dpbf16ps(1, 3, 5);
    }
    if constexpr (Vecs > 2) {
      _tile_loadd(6, b + 32, 4 * b_stride);
      _tile_dpbf16ps(2, 3, 6);
    }
  }
  _tile_stored(0, c, row);
  if constexpr (Vecs > 1) _tile_stored(1, c + 16, row);
  if constexpr (Vecs > 2) _tile_stored(2, c + 32, row);
}

// Sums in the order of the instruction: 16 even elements, 16 odd ones, then both sums to the accumulator.
inline vec amx_column_products(int64_t depth, const float* a, const float* b, int64_t stride) {
  vec sum = vec::zero();
  for (int64_t first = 0; first < depth; first += amx_arithmetic::KStep) {
    vec even = vec::zero(), odd = vec::zero();
    for (int64_t d = first; d < first + amx_arithmetic::KStep; ++d) {
      const uvec x = bits_of(vec::load(a + d * stride, full{})), y = bits_of(vec::load(b + d * stride, full{})),
                 high = uvec::all(0xffff0000u);
      even = fma(from_bits(x << 16), from_bits(y << 16), even);
      odd = fma(from_bits(x & high), from_bits(y & high), odd);
    }
    sum = sum + (even + odd);
  }
  return sum;
}

}  // namespace fastlm
