// Products of bf16 by AMX: a tile is 16 rows of 64 bytes, and one instruction adds the product of two of them to a
// third, 16 × 16 sums over 32 bf16, in 16 cycles. Both operands are what the bf16 dot product takes, pairs of bf16 in
// 32-bit lanes: the first [row][pair of k], the second [pair of k][column]. Included by gemm_tile.h.
#pragma once
#include <immintrin.h>

namespace fastlm {

// While one lives its thread's tiles have the shape that multiply_tiles wants: all of them whole. Afterwards they have
// again that of whoever used them before.
class tile_shapes {
  struct alignas(64) configuration {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } before;
  static_assert(sizeof(configuration) == 64);

 public:
  tile_shapes() {
    _tile_storeconfig(&before);
    configuration whole;
    whole.palette = 1;
    for (int t = 0; t < 8; ++t) whole.row_bytes[t] = 64, whole.rows[t] = 16;
    _tile_loadconfig(&whole);
  }
  ~tile_shapes() { _tile_loadconfig(&before); }
  tile_shapes(const tile_shapes&) = delete;
  tile_shapes& operator=(const tile_shapes&) = delete;
};

struct by_tiles : by_dot {
  static constexpr int64_t BlockDepth = 128, Rows = 16,
                           DepthStep =
                               16;  // 24 kB of B, and 8 of the rows that pass by: of both more does not stay in L1
  static constexpr bool RowsOnly = true, Cheap = true;
  using session = tile_shapes;
};

// c (16 × 16·Vecs) = a·b, or += where `accumulate`: a tile of a, up to three of b, up to three of sums. Per step of
// depth 4 tiles are loaded (8 cycles each from L1) for 3 products.
template <int Vecs> void multiply_tiles(int64_t depth, const float* a, int64_t a_stride, const float* b,
                                        int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  const int64_t row = 4 * c_stride;   // bytes
  __asm__ volatile("" ::: "memory");  // GCC does not know that loading a tile reads what was written before
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
       d += by_tiles::DepthStep, a += by_tiles::DepthStep, b += by_tiles::DepthStep * b_stride) {
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

// As an instruction adds up: 16 even elements, 16 odd ones, both sums to what was there.
inline vec tile_column_products(int64_t depth, const float* a, const float* b, int64_t stride) {
  vec sum = vec::zero();
  for (int64_t first = 0; first < depth; first += by_tiles::DepthStep) {
    vec even = vec::zero(), odd = vec::zero();
    for (int64_t d = first; d < first + by_tiles::DepthStep; ++d) {
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
