// What the attention kernels share: tiles of tokens in shared memory, the two matrix products on them, the boundaries
// of sequences, the range of keys that a tile of queries attends to, and the masking of scores.
//
// A warp computes 16 rows. Scores are A Bᵀ of two tiles that hold tokens as memory does; both are read by ldmatrix. The
// next product, A B, takes the scores from the registers they are in and multiplies them by a tile. One layout serves
// both products, and scores never go through shared memory.
//   16 bits: m16n8k16. float32: m16n8k8 in tf32, which also takes 32 bytes of a row per step, so ldmatrix moves its
//   operands too. Full float32 precision takes three products of high and low parts: x y ≈ x_low y_high + x_high y_low
//   + x_high y_high, with an error of 2⁻²² of it.
//
// A kernel iterates over the visible tiles only. Edge tiles compare positions: those cut by the band or by the end of
// the keys, and every tile if there is a mask or key padding. Masking is decided at run time, per tile, so there is one
// kernel per dtype and head-dim bucket.
//
// A matrix product adds 0 · NaN for a value whose weight is 0. Rows of the result that are not finite are therefore
// recomputed by one warp, one key or query at a time, without the masked ones. This is slow, but happens only if there
// is a NaN or an infinity.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>
#include "attention.h"
#include "launch.cuh"
#include "philox.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm::cuda {

// A kernel argument whose address may be taken without a copy in the local memory of each thread.
#define FASTLM_CONSTANT const __grid_constant__

constexpr float Log2e = 1.4426950408889634f;
constexpr float LargestFloat = 3.402823466e38f;
constexpr int WidestHead = 256;

FASTLM_DEVICE int divide_up(int x, int y) { return (x + y - 1) / y; }

template <class T> struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

// Tiles: rows of D channels in chunks of 16 bytes. The swizzle spreads the same chunk of 8 rows over all banks.

template <class T, int D> FASTLM_DEVICE int chunk_at(int row, int chunk) {
  constexpr int Chunks = D * int(sizeof(T)) / 16;
  return (row * Chunks + (chunk ^ (Chunks % 8 == 0 ? row & 7 : row >> 1 & 3))) * 16;
}

// token(row) is the address of a row, or null for a row of zeros. Channels beyond head_dim are zeros.
template <class T, int D, int Rows, int Threads, class Token>
FASTLM_DEVICE void load_rows(unsigned char* tile, const TokensView& view, int head_dim, Token token) {
  constexpr int Chunks = D * int(sizeof(T)) / 16, Each = 16 / int(sizeof(T));
  if (view.aligned) {
#pragma unroll 2
    for (int at = threadIdx.x; at < Rows * Chunks; at += Threads) {
      const int row = at / Chunks, chunk = at % Chunks;
      const T* from = token(row);
      const bool valid = from && chunk * Each < head_dim;
      cp_async_16(tile + chunk_at<T, D>(row, chunk), valid ? from + chunk * Each : static_cast<const T*>(view.data),
                  valid);
    }
  } else {
#pragma unroll 1
    for (int at = threadIdx.x; at < Rows * D; at += Threads) {
      const int row = at / D, channel = at % D;
      const T* from = token(row);
      reinterpret_cast<T*>(tile + chunk_at<T, D>(row, channel / Each))[channel % Each] =
          from && channel < head_dim ? from[channel] : from_float<T>(0.f);
    }
  }
}

// Loads `Rows` tokens of one head from `first` on, and zeros beyond the end of the sequence.
template <class T, int D, int Rows, int Threads>
FASTLM_DEVICE void load_tokens(unsigned char* tile, const TokensView& view, int64_t offset, int first, int length,
                               int head_dim) {
  const T* data = static_cast<const T*>(view.data) + offset;
  constexpr int Chunks = D * int(sizeof(T)) / 16, Each = 16 / int(sizeof(T)), Apart = Threads / Chunks;
  // The chunk of a thread is then the same in all its rows, and one addition makes the address of the next row.
  if constexpr (Apart % 8 == 0 && Rows % Apart == 0) {
    if (view.aligned) {
      const int chunk = int(threadIdx.x) % Chunks, row = int(threadIdx.x) / Chunks;
      const int rows = chunk * Each < head_dim ? length - first - row : 0;
      unsigned char* to = tile + chunk_at<T, D>(row, chunk);
      const T* source = data + int64_t(first + row) * view.token_stride + chunk * Each;
#pragma unroll
      for (int i = 0; i < Rows / Apart; ++i, source += Apart * view.token_stride)
        cp_async_16(to + i * Apart * Chunks * 16, source, i * Apart < rows);
      return;
    }
  }
  load_rows<T, D, Rows, Threads>(tile, view, head_dim, [&](int row) -> const T* {
    return first + row < length ? data + int64_t(first + row) * view.token_stride : nullptr;
  });
}

// Products

// The lhs fragment of one step along K, 16 rows by 32 bytes. In float32 it is split into high and low parts.
template <class T> struct Lhs {
  uint32_t high[4];
  FASTLM_DEVICE Lhs(const uint32_t (&raw)[4], bool) {
#pragma unroll
    for (int i = 0; i < 4; ++i) high[i] = raw[i];
  }
};
template <> struct Lhs<float> {
  uint32_t high[4], low[4];
  FASTLM_DEVICE Lhs(const uint32_t (&raw)[4], bool) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = to_tf32(__uint_as_float(raw[i]));
      low[i] = tf32_residual(__uint_as_float(raw[i]), high[i]);
    }
  }
};

// RhsLowFirst: the order of the products of low parts, on which the last bits of the sum depend. Where rows are keys it
// gives the same bits as A Bᵀ where rows are queries.
template <class T, bool RhsLowFirst = false>
FASTLM_DEVICE void multiply(float (&c)[4], const Lhs<T>& a, uint32_t b0, uint32_t b1, bool tf32) {
  if constexpr (std::is_same_v<T, float>) {
    const uint32_t high[2] = {to_tf32(__uint_as_float(b0)), to_tf32(__uint_as_float(b1))};
    if (tf32) {
      mma_tf32(c, a.high, high);
    } else {  // the products are summed separately, the smallest first, so that c is rounded once per step
      const uint32_t low[2] = {tf32_residual(__uint_as_float(b0), high[0]),
                               tf32_residual(__uint_as_float(b1), high[1])};
      float sum[4] = {};
      if constexpr (RhsLowFirst) {
        mma_tf32(sum, a.high, low);
        mma_tf32(sum, a.low, high);
      } else {
        mma_tf32(sum, a.low, high);
        mma_tf32(sum, a.high, low);
      }
      // Of low parts, either infinity may come out beside that of the high parts, whose sign is right.
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fminf(fmaxf(sum[i], -LargestFloat), LargestFloat);
      mma_tf32(sum, a.high, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] += sum[i];
    }
  } else {
    const uint32_t b[2] = {b0, b1};
    mma<T>(c, a.high, b);
  }
}

// Reads 16 rows of a tile from `row` on, 32 bytes of each, as an lhs fragment, and flips the bits in `sign_flip`.
template <class T, int D> FASTLM_DEVICE void read_lhs(uint32_t (&raw)[4], const unsigned char* tile, int row, int step,
                                                      uint32_t sign_flip) {
  const int lane = opaque(threadIdx.x % 32);
  ldmatrix_x4(raw, tile + chunk_at<T, D>(row + lane % 16, 2 * step + lane / 16));
#pragma unroll
  for (int i = 0; i < 4; ++i) raw[i] ^= sign_flip;
}

template <class T, int D> constexpr int KSteps = D * int(sizeof(T)) / 32;

// c = A Bᵀ, 16 rows by N; lhs(step, raw) reads A. All steps are unrolled if A is in registers, otherwise a few, which
// needs less code and fewer registers for addresses.
template <class T, int D, int N, int Unroll = sizeof(T) == 2 ? 4 : 2, bool RhsLowFirst = false, class Read>
FASTLM_DEVICE void multiply_transposed(float (&c)[N / 8][4], Read lhs, const unsigned char* rhs, bool tf32) {
  const int lane = opaque(threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = 0;
#pragma unroll Unroll
  for (int step = 0; step < KSteps<T, D>; ++step) {
    uint32_t raw[4];
    lhs(step, raw);
    const Lhs<T> a(raw, tf32);
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, rhs + chunk_at<T, D>(n * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      multiply<T, RhsLowFirst>(c[2 * n], a, b[0], b[1], tf32);
      multiply<T, RhsLowFirst>(c[2 * n + 1], a, b[2], b[3], tf32);
    }
  }
}

// c += P B, where P is 16 rows by N in registers, as a product leaves it, and B has N rows. With parts = 2 the rounding
// error of P in 16 bits is multiplied too.
template <class T, int D, int N>
FASTLM_DEVICE void multiply_from_registers(float (&c)[D / 8][4], float (&p)[N / 8][4], const unsigned char* rhs,
                                           bool tf32, int parts = 1) {
  const int lane = opaque(threadIdx.x % 32);
  if constexpr (std::is_same_v<T, float>) {
    // The order of the columns in the sum is free: with column 2i as the hardware's column i and 2i + 1 as its i + 4,
    // the accumulators already are the lhs fragment.
#pragma unroll
    for (int step = 0; step < N / 8; ++step) {
      const uint32_t raw[4] = {__float_as_uint(p[step][0]), __float_as_uint(p[step][2]), __float_as_uint(p[step][1]),
                               __float_as_uint(p[step][3])};
      const Lhs<T> a(raw, tf32);
      const int row = step * 8 + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        const int within = lane / 4 % 4 * 4;
        const uint32_t b0 = *reinterpret_cast<const uint32_t*>(rhs + chunk_at<T, D>(row, 2 * d + lane / 16) + within);
        const uint32_t b1 =
            *reinterpret_cast<const uint32_t*>(rhs + chunk_at<T, D>(row + 1, 2 * d + lane / 16) + within);
        multiply<T>(c[d], a, b0, b1, tf32);
      }
    }
  } else {
#pragma unroll 1
    for (int part = 1;; ++part) {
#pragma unroll
      for (int step = 0; step < N / 16; ++step) {
        uint32_t raw[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          raw[i] = pack2<T>(p[2 * step + i / 2][i % 2 * 2], p[2 * step + i / 2][i % 2 * 2 + 1]);
        const Lhs<T> a(raw, tf32);
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, rhs + chunk_at<T, D>(step * 16 + lane % 16, 2 * d + lane / 16));
          multiply<T>(c[2 * d], a, b[0], b[1], tf32);
          multiply<T>(c[2 * d + 1], a, b[2], b[3], tf32);
        }
      }
      if (part == parts) break;
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) p[n][e] -= to_float(from_float<T>(p[n][e]));
    }
  }
}

template <class T> constexpr uint32_t SignBits = sizeof(T) == 2 ? 0x80008000u : 0x80000000u;

// Sequences

struct Sequence {
  int batch, query_len, key_len, lower, upper;
  int64_t query_begin, key_begin;  // the first token
};

FASTLM_DEVICE int64_t start_of(const void* starts, bool wide, int at) {
  return wide ? static_cast<const int64_t*>(starts)[at] : static_cast<const int32_t*>(starts)[at];
}

// cu_seqlens start with 0, never decrease and end with the number of tokens. The first block checks all of them,
// because with wrong values a sequence may have no tile and no block.
FASTLM_DEVICE void check_starts(const AttentionArgs& a) {
  if (blockIdx.x) return;
  for (int i = int(threadIdx.x); i <= a.batch; i += int(blockDim.x)) {
    const int64_t query = start_of(a.query_starts, a.query_starts_int64, i),
                  key = start_of(a.key_starts, a.key_starts_int64, i);
    FASTLM_ASSERT(i > 0 || (query == 0 && key == 0));
    FASTLM_ASSERT(i < a.batch || (query == a.query_len && key == a.key_len));
    FASTLM_ASSERT(i == a.batch || query <= start_of(a.query_starts, a.query_starts_int64, i + 1));
    FASTLM_ASSERT(i == a.batch || key <= start_of(a.key_starts, a.key_starts_int64, i + 1));
  }
}

// Asserts the boundaries of this sequence itself, because the first block may run later.
FASTLM_DEVICE Sequence sequence_of(const AttentionArgs& a, int batch) {
  if (!a.query_starts) return {batch, a.query_len, a.key_len, a.lower, a.upper, 0, 0};
  const int64_t query = start_of(a.query_starts, a.query_starts_int64, batch),
                query_end = start_of(a.query_starts, a.query_starts_int64, batch + 1);
  const int64_t key = start_of(a.key_starts, a.key_starts_int64, batch),
                key_end = start_of(a.key_starts, a.key_starts_int64, batch + 1);
  FASTLM_ASSERT(query >= 0 && query <= query_end && query_end <= a.query_len);
  FASTLM_ASSERT(key >= 0 && key <= key_end && key_end <= a.key_len);
  constexpr int64_t Far = 1 << 30;
  const int64_t corner = (key_end - key) - (query_end - query), lower = a.lower + corner, upper = a.upper + corner;
  return {batch,
          int(query_end - query),
          int(key_end - key),
          int(lower < -Far ? -Far : lower),
          int(upper > Far ? Far : upper),
          query,
          key};
}

// The sequence of tile number `slot` of a packed batch, and in `slot` the tile within it; `batch` beyond the last tile.
// The host does not know the lengths: without synchronising it launches one block for each possible tile, tokens / Tile
// + batch.
//
// A warp adds the tiles of 32 sequences at a time, so that thousands of short ones do not take thousands of steps.
FASTLM_DEVICE int find_tile(const void* starts, bool wide, int batch, int tile_rows, int& slot) {
  const int lane = int(threadIdx.x) % WarpSize;
  for (int first = 0; first < batch; first += WarpSize) {
    const int sequence = first + lane;
    int end = 0;  // of the tiles up to this sequence, from `first` on
    if (sequence < batch)
      end = divide_up(int(start_of(starts, wide, sequence + 1) - start_of(starts, wide, sequence)), tile_rows);
    const int tiles = end;
#pragma unroll
    for (int distance = 1; distance < WarpSize; distance *= 2) {
      const int before = shuffle(end, lane < distance ? lane : lane - distance);
      if (lane >= distance) end += before;
    }
    if (ballot(end > slot)) {
      const int found = int(warp_sum(end <= slot ? 1.0f : 0.0f));
      slot -= shuffle(end - tiles, found);
      return first + found < batch ? first + found : batch;  // beyond it only with lengths that are asserted later
    }
    slot -= shuffle(end, WarpSize - 1);
  }
  return batch;
}

// Tiles [begin, end) contain visible scores; in tiles [inner, outer) all scores are visible.
struct TileRange {
  int begin, inner, outer, end;
};

FASTLM_DEVICE TileRange ordered(int64_t begin, int64_t inner, int64_t outer, int64_t end) {
  inner = inner < begin ? begin : inner;
  inner = inner > end ? end : inner;
  outer = outer < inner ? inner : outer;
  return {int(begin), int(inner), int(outer > end ? end : outer), int(end)};
}

FASTLM_DEVICE int64_t clamp_to_0(int64_t x) { return x > 0 ? x : 0; }
FASTLM_DEVICE int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// The tiles of keys that queries first … last attend to.
FASTLM_DEVICE TileRange tiles_of_keys(const Sequence& s, int first, int last, int tile) {
  const int64_t lower = s.lower, upper = s.upper, end = clamp_to_0(smaller(last + upper + 1, s.key_len));
  return ordered(clamp_to_0(first + lower) / tile, (clamp_to_0(last + lower) + tile - 1) / tile,
                 clamp_to_0(smaller(first + upper + 1, s.key_len)) / tile, (end + tile - 1) / tile);
}

// The tiles of queries that attend to keys first … last. Queries beyond the end have weights of 0 and need no edge
// tile.
FASTLM_DEVICE TileRange tiles_of_queries(const Sequence& s, int first, int last, int tile) {
  const int64_t lower = s.lower, upper = s.upper,
                end = (clamp_to_0(smaller(last - lower + 1, s.query_len)) + tile - 1) / tile,
                first_full = first - lower + 1;
  return ordered(clamp_to_0(first - upper) / tile, (clamp_to_0(last - upper) + tile - 1) / tile,
                 first_full >= s.query_len ? end : clamp_to_0(first_full) / tile, end);
}

// Masks

FASTLM_DEVICE bool is_additive(const AttentionArgs& a) { return int(a.mask_type) >= int(MaskType::additive); }

// The offset of query 0 and key 0 of a head in the mask.
FASTLM_DEVICE int64_t mask_offset(const AttentionArgs& a, int batch, int head) {
  return batch * a.mask_batch_stride + head * a.mask_head_stride;
}

// An element of an additive mask.
template <class T> FASTLM_DEVICE float mask_value(const AttentionArgs& a, int64_t at) {
  return a.mask_type == MaskType::additive ? to_float(static_cast<const T*>(a.mask)[at])
                                           : static_cast<const float*>(a.mask)[at];
}

// The cap of scores: softcap · tanh(scale · score / softcap), and its derivative by scale · score.
struct CappedScore {
  float score, slope;
};
FASTLM_DEVICE CappedScore capped_score(const AttentionArgs& a, float score, float scale) {
  const float t = tanh_(multiply_rounded(score, scale) / a.softcap);
  return {multiply_rounded(t, a.softcap), 1.f - t * t};
}

// Caps scores in place, of which `scale` is still to be applied.
template <int N> FASTLM_DEVICE void cap_scores(float (&scores)[N / 8][4], const AttentionArgs& a, float scale) {
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[n][e] = capped_score(a, scores[n][e], scale).score;
}

// The scale that scores still lack before mask_scores; a capped score is complete.
FASTLM_DEVICE float scale_before_masks(const AttentionArgs& a) { return a.softcap > 0 ? 1.f : fabsf(a.scale); }

// Masks scores in place: −inf where not visible, scale · score + mask with an additive mask. Rows are queries and
// columns are keys from `column` on, or the reverse with KeysAsRows. mask_at is the mask's offset of each of the two
// rows of the thread, without the positions. Returns the visible scores, bit 4n + e for element e of block n. The loop
// is not unrolled to save code and registers.
template <class T, bool KeysAsRows, int N>
FASTLM_DEVICE uint32_t mask_scores(float (&scores)[N / 8][4], const AttentionArgs& a, const Sequence& s,
                                   const int (&row)[2], int column, const int64_t (&mask_at)[2], float scale) {
  column += threadIdx.x % 4 * 2;
  const bool* padding = a.key_padding ? a.key_padding + s.batch * a.key_padding_batch_stride : nullptr;
  const bool* boolean = a.mask_type == MaskType::boolean ? static_cast<const bool*>(a.mask) : nullptr;
  uint32_t bits = 0;
#pragma unroll 1
  for (int at = N / 2 - 1; at >= 0; --at) {  // element e = at % 4 of block at / 4
    const int down = at & 2 ? row[1] : row[0], across = column + at / 4 * 8 + at % 2, i = KeysAsRows ? across : down,
              j = KeysAsRows ? down : across;
    bool visible = i < s.query_len && j < s.key_len && j - i >= s.lower && j - i <= s.upper;
    if (padding && visible) visible = padding[j * a.key_padding_key_stride];
    if (boolean && visible)
      visible = boolean[(at & 2 ? mask_at[1] : mask_at[0]) + i * a.mask_query_stride + j * a.mask_key_stride];
    bits = bits << 1 | visible;
  }
  if (is_additive(a)) {
    const int64_t down_stride = KeysAsRows ? a.mask_key_stride : a.mask_query_stride,
                  across_stride = KeysAsRows ? a.mask_query_stride : a.mask_key_stride;
    int64_t at[2] = {mask_at[0] + row[0] * down_stride + column * across_stride,
                     mask_at[1] + row[1] * down_stride + column * across_stride};
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float bias = -INFINITY;
        if (bits >> (n * 4 + e) & 1) bias = mask_value<T>(a, at[e / 2] + e % 2 * across_stride);
        if (bias == -INFINITY) bits &= ~(1u << (n * 4 + e));
        scores[n][e] = bias == -INFINITY ? bias : fmaf(scores[n][e], scale, bias);
      }
      at[0] += 8 * across_stride, at[1] += 8 * across_stride;
    }
  } else {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[n][e] = bits >> (n * 4 + e) & 1 ? scores[n][e] : -INFINITY;
  }
  return bits;
}

// The factor that a score of mask_scores still lacks. It is never 0, because −∞ · 0 is NaN.
FASTLM_DEVICE float scale_of_score(const AttentionArgs& a) {
  return is_additive(a) ? 1.f : fmaxf(scale_before_masks(a), 1e-37f);
}

// The same for one query and one key; `score` becomes the scaled, capped and masked score.
template <class T> FASTLM_DEVICE bool is_visible(const AttentionArgs& a, const Sequence& s, int head, int i, int j,
                                                 float& score) {
  if (j - i < s.lower || j - i > s.upper) return false;
  const bool capped = a.softcap > 0;
  const float scale = capped ? 1.f : a.scale, unscaled = capped ? capped_score(a, score, a.scale).score : score;
  score = multiply_rounded(unscaled, scale);
  if (a.mask_type != MaskType::none) {
    const int64_t at = mask_offset(a, s.batch, head) + i * a.mask_query_stride + j * a.mask_key_stride;
    const float bias = is_additive(a) ? mask_value<T>(a, at) : static_cast<const bool*>(a.mask)[at] ? 0.f : -INFINITY;
    if (bias == -INFINITY) return false;
    if (is_additive(a)) score = fmaf(unscaled, scale, bias);
  }
  return !a.key_padding || a.key_padding[s.batch * a.key_padding_batch_stride + j * a.key_padding_key_stride];
}

// Dropout: bit 4n + e is set if element e of block n is kept. Rows are queries and columns are keys from `column` on, a
// multiple of 16. One counter gives the words of columns c, c + 16, c + 32 and c + 48 of a block of 64.
template <int N> FASTLM_DEVICE uint32_t kept_bits(const AttentionArgs& a, uint64_t seed, const int (&row)[2],
                                                  const uint32_t (&batch_head)[2], int column) {
  uint32_t bits = 0;
  const int first_word = column % 64 / 16;
#pragma unroll 1
  for (int at = 0; at < 8; ++at) {
    const int e = at % 4, odd = at / 4;
    const philox_words words = philox(seed, uint32_t(column / 64 * 16 + odd * 8 + threadIdx.x % 4 * 2 + e % 2),
                                      uint32_t(e & 2 ? row[1] : row[0]), e & 2 ? batch_head[1] : batch_head[0]);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int n = (word - first_word) * 2 + odd;
      if (n >= 0 && n < N / 8 && words.word[word] >= a.threshold) bits |= 1u << (n * 4 + e);
    }
  }
  return bits;
}

// The channels of one token in the registers of a warp: lane l holds channels l, l + 32, …
struct Channels {
  float at[WidestHead / 32];
};

template <class T> FASTLM_DEVICE Channels read_channels(const T* token, int head_dim) {
  Channels x;
#pragma unroll
  for (int c = 0; c < WidestHead / 32; ++c) {
    const int channel = c * 32 + threadIdx.x % 32;
    x.at[c] = channel < head_dim ? to_float(token[channel]) : 0.f;
  }
  return x;
}

FASTLM_DEVICE float dot(const Channels& x, const Channels& y) {
  float sum = 0;
#pragma unroll
  for (int c = 0; c < WidestHead / 32; ++c) sum += x.at[c] * y.at[c];
  return warp_sum(sum);
}

template <class T> FASTLM_DEVICE const T* token_of(const TokensView& x, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const T*>(x.data) + batch * x.batch_stride + head * x.head_stride + token * x.token_stride;
}

template <class T> FASTLM_DEVICE T* token_of(const TokensResult& x, int64_t batch, int64_t head, int64_t token) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride + token * x.token_stride;
}

template <class T> FASTLM_DEVICE void write_channels(T* token, const Channels& x, float scale, int head_dim) {
#pragma unroll
  for (int c = 0; c < WidestHead / 32; ++c) {
    const int channel = c * 32 + threadIdx.x % 32;
    if (channel < head_dim) token[channel] = from_float<T>(x.at[c] * scale);
  }
}

// Writes the thread's elements of one of its two rows (`half` 0 or 1) of a result in registers.
template <class T, int D>
FASTLM_DEVICE void write_row(T* token, const float (&c)[D / 8][4], int half, float scale, int head_dim, bool paired) {
#pragma unroll
  for (int d = 0; d < D / 8; ++d) {
    const int channel = d * 8 + threadIdx.x % 4 * 2;
    const T x = from_float<T>(c[d][2 * half] * scale), y = from_float<T>(c[d][2 * half + 1] * scale);
    if (paired && channel + 1 < head_dim) {
      *reinterpret_cast<Pair<T>*>(token + channel) = {x, y};
    } else {
      if (channel < head_dim) token[channel] = x;
      if (channel + 1 < head_dim) token[channel + 1] = y;
    }
  }
}

// Bit r is set if row r of the warp's 16 rows holds a value that is not finite.
template <int D> FASTLM_DEVICE uint32_t rows_not_finite(const float (&c)[D / 8][4]) {
  uint32_t rows = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    bool bad = false;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) bad = bad || !is_finite(c[d][2 * half]) || !is_finite(c[d][2 * half + 1]);
    const uint32_t lanes = ballot(bad);
    if (lanes)
      for (int r = 0; r < 8; ++r)
        if (lanes >> 4 * r & 15) rows |= 1u << (8 * half + r);
  }
  return rows;
}

// Launchers

template <class View> inline bool is_aligned(const View& x, int bytes, size_t element_size) {
  const auto multiple = [&](int64_t stride) { return stride * int64_t(element_size) % bytes == 0; };
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && multiple(x.batch_stride) && multiple(x.head_stride) &&
         multiple(x.token_stride);
}

inline size_t size_of(DType type) { return type == DType::float32 ? 4 : 2; }

// Sets the alignment of the views. Packed sequences are one batch in memory, so all batch strides are 0.
template <class... Views> void set_alignment(AttentionArgs& a, Views&... others) {
  const auto set_one = [&](auto& x) {
    if (a.query_starts) x.batch_stride = 0;
    if constexpr (std::is_same_v<std::remove_reference_t<decltype(x)>, TokensView>)
      x.aligned = a.head_dim * size_of(a.dtype) % 16 == 0 && is_aligned(x, 16, size_of(a.dtype));
    else x.paired = is_aligned(x, 2 * int(size_of(a.dtype)), size_of(a.dtype));
  };
  (set_one(others), ...);
  set_one(a.query), set_one(a.key), set_one(a.value);
  if (a.query_starts) a.lse_batch_stride = 0;
}

// Calls launch.operator()<T, D>() with the smallest bucket D that holds head_dim. In float32 there is no bucket of 96.
template <class Launch> void dispatch_type_and_head_dim(DType type, int head_dim, Launch launch) {
  with_dtype(type, [&]<class T>() {
    if (head_dim <= 32) return launch.template operator()<T, 32>();
    if (head_dim <= 64) return launch.template operator()<T, 64>();
    if constexpr (sizeof(T) == 2)
      if (head_dim <= 96) return launch.template operator()<T, 96>();
    if (head_dim <= 128) return launch.template operator()<T, 128>();
    return launch.template operator()<T, 256>();
  });
}

}  // namespace fastlm::cuda
