// What the passes of attention share: tiles of tokens in shared memory, the two forms of product on them, where a
// sequence lies, which keys a tile of queries sees, and scores with everything that masks them.
//
// A warp owns 16 rows. Scores are a product of rows by rows, A Bᵀ, both read with ldmatrix from tiles that hold tokens
// as memory does. What follows is a product of those scores, out of the registers they are in, by a tile: A B. So one
// layout serves both products, and nothing goes through shared memory in between.
//   16 bits: m16n8k16. float32: m16n8k8 in tf32, which takes 32 bytes of a row at a time too, so that ldmatrix moves
//   its operands as it stands; exact are three products, of what rounding keeps and of what it takes away: x y ≈ (x −
//   x') y' + x' (y − y') + x' y', all but 2⁻²² of it.
//
// A pass walks over tiles from the first to the last that is seen at all: empty ones are skipped. Only those at the
// edges compare positions: those that the band cuts, or that reach over the end of the keys; with a mask or padding all
// are edges. What masks is decided at run time, tile by tile, so that there is one kernel a dtype and width of head.
//
// A product adds 0 · NaN for a value that a weight of 0 should hide. So a row of the result that is not finite is
// computed again, one key or query at a time by one warp, and what is not seen is not added. That is slow, and happens
// only where there is a NaN or an infinity.
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

#define FASTLM_CONSTANT \
  const __grid_constant__  // an argument whose address a function may take without a copy of it in each thread's memory

constexpr float Log2e = 1.4426950408889634f;
constexpr int WidestHead = 256;

FASTLM_DEVICE int divide_up(int x, int y) { return (x + y - 1) / y; }

template <class T> struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

// Tiles: rows of D channels, in chunks of 16 bytes, swizzled so that the same chunk of 8 rows lies in all banks.

template <class T, int D> FASTLM_DEVICE int chunk_at(int row, int chunk) {
  constexpr int Chunks = D * int(sizeof(T)) / 16;
  return (row * Chunks + (chunk ^ (Chunks % 8 == 0 ? row & 7 : row >> 1 & 3))) * 16;
}

// token(row): the address of a row, or null where zeros stand for it. Channels beyond the head are zeros too.
template <class T, int D, int Rows, int Threads, class Token>
FASTLM_DEVICE void load_rows(unsigned char* tile, const TokensView& view, int head_dim, Token token) {
  constexpr int Chunks = D * int(sizeof(T)) / 16, Each = 16 / int(sizeof(T));
  if (view.aligned) {
#pragma unroll 2
    for (int at = threadIdx.x; at < Rows * Chunks; at += Threads) {
      const int row = at / Chunks, chunk = at % Chunks;
      const T* from = token(row);
      const bool real = from && chunk * Each < head_dim;
      cp_async_16(tile + chunk_at<T, D>(row, chunk), real ? from + chunk * Each : static_cast<const T*>(view.data),
                  real);
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

// `Rows` tokens of one head from `first` on; zeros beyond the end of the sequence.
template <class T, int D, int Rows, int Threads>
FASTLM_DEVICE void load_tokens(unsigned char* tile, const TokensView& view, int64_t offset, int first, int length,
                               int head_dim) {
  const T* data = static_cast<const T*>(view.data) + offset;
  load_rows<T, D, Rows, Threads>(tile, view, head_dim, [&](int row) -> const T* {
    return first + row < length ? data + int64_t(first + row) * view.token_stride : nullptr;
  });
}

// Products

// The left operand of a step, 16 rows by 32 bytes.
template <class T> struct Left {
  uint32_t near[4];
  FASTLM_DEVICE Left(const uint32_t (&raw)[4], bool) {
#pragma unroll
    for (int i = 0; i < 4; ++i) near[i] = raw[i];
  }
};
template <> struct Left<float> {
  uint32_t near[4], rest[4];
  FASTLM_DEVICE Left(const uint32_t (&raw)[4], bool) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      near[i] = to_tf32(__uint_as_float(raw[i]));
      rest[i] = tf32_residual(__uint_as_float(raw[i]), near[i]);
    }
  }
};

template <class T> FASTLM_DEVICE void multiply(float (&c)[4], const Left<T>& a, uint32_t b0, uint32_t b1, bool tf32) {
  if constexpr (std::is_same_v<T, float>) {
    const uint32_t near[2] = {to_tf32(__uint_as_float(b0)), to_tf32(__uint_as_float(b1))};
    if (tf32) {
      mma_tf32(c, a.near, near);
    } else {  // summed by themselves, the smallest first, and added once: c is rounded once for eight terms, not for
              // each of three times eight
      const uint32_t rest[2] = {tf32_residual(__uint_as_float(b0), near[0]),
                                tf32_residual(__uint_as_float(b1), near[1])};
      float sum[4] = {};
      mma_tf32(sum, a.rest, near);
      mma_tf32(sum, a.near, rest);
      mma_tf32(sum, a.near, near);
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] += sum[i];
    }
  } else {
    const uint32_t b[2] = {b0, b1};
    mma<T>(c, a.near, b);
  }
}

// The 16 rows of a tile from `row` on, 32 bytes a step, as a left operand; `flip` is xored to what is read.
template <class T, int D> FASTLM_DEVICE void read_left(uint32_t (&raw)[4], const unsigned char* tile, int row, int step,
                                                       uint32_t flip) {
  const int lane = opaque(threadIdx.x % 32);
  ldmatrix_x4(raw, tile + chunk_at<T, D>(row + lane % 16, 2 * step + lane / 16));
#pragma unroll
  for (int i = 0; i < 4; ++i) raw[i] ^= flip;
}

template <class T, int D> constexpr int Steps = D * int(sizeof(T)) / 32;

// c = A Bᵀ of 16 rows by N. left(step, raw) gives A. So many steps are unrolled: all, where A is in registers, else a
// few: less code, and fewer addresses in registers.
template <class T, int D, int N, int Unrolled = sizeof(T) == 2 ? 4 : 2, class Read>
FASTLM_DEVICE void multiply_by_rows(float (&c)[N / 8][4], Read left, const unsigned char* right, bool tf32) {
  const int lane = opaque(threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = 0;
#pragma unroll Unrolled
  for (int step = 0; step < Steps<T, D>; ++step) {
    uint32_t raw[4];
    left(step, raw);
    const Left<T> a(raw, tf32);
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, right + chunk_at<T, D>(n * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      multiply<T>(c[2 * n], a, b[0], b[1], tf32);
      multiply<T>(c[2 * n + 1], a, b[2], b[3], tf32);
    }
  }
}

// c += P B: P is 16 rows by N in registers, as a product leaves it, and B has N rows. parts 2: what rounding P to 16
// bits took away is multiplied too.
template <class T, int D, int N>
FASTLM_DEVICE void multiply_from_registers(float (&c)[D / 8][4], float (&p)[N / 8][4], const unsigned char* right,
                                           bool tf32, int parts = 1) {
  const int lane = opaque(threadIdx.x % 32);
  if constexpr (std::is_same_v<T, float>) {
    // A product sums over its columns in any order: let column 2i be the hardware's i, and 2i + 1 its i + 4, and the
    // registers are those it wants.
#pragma unroll
    for (int step = 0; step < N / 8; ++step) {
      const uint32_t raw[4] = {__float_as_uint(p[step][0]), __float_as_uint(p[step][2]), __float_as_uint(p[step][1]),
                               __float_as_uint(p[step][3])};
      const Left<T> a(raw, tf32);
      const int row = step * 8 + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        const int within = lane / 4 % 4 * 4;
        const uint32_t b0 = *reinterpret_cast<const uint32_t*>(right + chunk_at<T, D>(row, 2 * d + lane / 16) + within);
        const uint32_t b1 =
            *reinterpret_cast<const uint32_t*>(right + chunk_at<T, D>(row + 1, 2 * d + lane / 16) + within);
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
        const Left<T> a(raw, tf32);
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, right + chunk_at<T, D>(step * 16 + lane % 16, 2 * d + lane / 16));
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

// cu_seqlens begin with 0, never decrease and end with the number of tokens. The first block checks all of them: what
// is wrong may leave a sequence without a tile, and so without a block.
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

FASTLM_DEVICE Sequence sequence_of(const AttentionArgs& a, int batch) {
  if (!a.query_starts) return {batch, a.query_len, a.key_len, a.lower, a.upper, 0, 0};
  const int64_t query = start_of(a.query_starts, a.query_starts_int64, batch),
                query_end = start_of(a.query_starts, a.query_starts_int64, batch + 1);
  const int64_t key = start_of(a.key_starts, a.key_starts_int64, batch),
                key_end = start_of(a.key_starts, a.key_starts_int64, batch + 1);
  FASTLM_ASSERT(query >= 0 && query <= query_end &&
                query_end <= a.query_len);                            // nothing leads out of the tensors, even before
  FASTLM_ASSERT(key >= 0 && key <= key_end && key_end <= a.key_len);  // the block that checks all has come to it
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

// (sequence, tile) number `slot` of all tiles of a packed batch; `batch` sequences beyond the last. So the host need
// not know the lengths: it launches as many blocks as there can be tiles, tokens / Tile + batch, and waits for nothing.
FASTLM_DEVICE int find_tile(const void* starts, bool wide, int batch, int tile_rows, int& slot) {
  for (int sequence = 0; sequence < batch; ++sequence) {
    const int tiles =
        divide_up(int(start_of(starts, wide, sequence + 1) - start_of(starts, wide, sequence)), tile_rows);
    if (slot < tiles) return sequence;
    slot -= tiles;
  }
  return batch;
}

// Tiles [begin, end) are seen at all, [inner, outer) wholly.
struct TileRange {
  int begin, inner, outer, end;
};

FASTLM_DEVICE TileRange ordered(int64_t begin, int64_t inner, int64_t outer, int64_t end) {
  inner = inner < begin ? begin : inner;
  inner = inner > end ? end : inner;
  outer = outer < inner ? inner : outer;
  return {int(begin), int(inner), int(outer > end ? end : outer), int(end)};
}

FASTLM_DEVICE int64_t at_least_0(int64_t x) { return x > 0 ? x : 0; }
FASTLM_DEVICE int64_t lesser(int64_t x, int64_t y) { return x < y ? x : y; }

// What queries first … last see, in tiles of keys.
FASTLM_DEVICE TileRange tiles_of_keys(const Sequence& s, int first, int last, int tile) {
  const int64_t lower = s.lower, upper = s.upper, end = at_least_0(lesser(last + upper + 1, s.key_len));
  return ordered(at_least_0(first + lower) / tile, (at_least_0(last + lower) + tile - 1) / tile,
                 at_least_0(lesser(first + upper + 1, s.key_len)) / tile, (end + tile - 1) / tile);
}

// The queries that see keys first … last. Those beyond the end need no edge: they weigh nothing.
FASTLM_DEVICE TileRange tiles_of_queries(const Sequence& s, int first, int last, int tile) {
  const int64_t lower = s.lower, upper = s.upper,
                end = (at_least_0(lesser(last - lower + 1, s.query_len)) + tile - 1) / tile, whole = first - lower + 1;
  return ordered(at_least_0(first - upper) / tile, (at_least_0(last - upper) + tile - 1) / tile,
                 whole >= s.query_len ? end : at_least_0(whole) / tile, end);
}

// Masks

FASTLM_DEVICE bool is_additive(const AttentionArgs& a) { return int(a.mask_type) >= int(MaskType::additive); }

// The mask's offset of a head's query 0 and key 0.
FASTLM_DEVICE int64_t mask_offset(const AttentionArgs& a, int batch, int head) {
  return batch * a.mask_batch_stride + head * a.mask_head_stride;
}

// Of an additive mask.
template <class T> FASTLM_DEVICE float mask_value(const AttentionArgs& a, int64_t at) {
  return a.mask_type == MaskType::additive ? to_float(static_cast<const T*>(a.mask)[at])
                                           : static_cast<const float*>(a.mask)[at];
}

// Scores in place, −inf where not seen; with an additive mask they become scale · scores + mask. Rows are queries,
// columns keys from `column` on, or with KeysDown the other way round; mask_at: the mask's offset for each of the
// thread's two rows, without what the positions add. Returns what is seen, bit 4n + e for element e of block n, found
// in a loop that is not unrolled: little code, and few registers.
template <class T, bool KeysDown, int N>
FASTLM_DEVICE uint32_t mask_scores(float (&scores)[N / 8][4], const AttentionArgs& a, const Sequence& s,
                                   const int (&row)[2], int column, const int64_t (&mask_at)[2], float scale) {
  column += threadIdx.x % 4 * 2;
  const bool* padding = a.key_padding ? a.key_padding + s.batch * a.key_padding_batch_stride : nullptr;
  const bool* boolean = a.mask_type == MaskType::boolean ? static_cast<const bool*>(a.mask) : nullptr;
  uint32_t bits = 0;
#pragma unroll 1
  for (int at = N / 2 - 1; at >= 0; --at) {  // element e = at % 4 of block at / 4
    const int down = at & 2 ? row[1] : row[0], across = column + at / 4 * 8 + at % 2, i = KeysDown ? across : down,
              j = KeysDown ? down : across;
    bool seen = i < s.query_len && j < s.key_len && j - i >= s.lower && j - i <= s.upper;
    if (padding && seen) seen = padding[j * a.key_padding_key_stride];
    if (boolean && seen)
      seen = boolean[(at & 2 ? mask_at[1] : mask_at[0]) + i * a.mask_query_stride + j * a.mask_key_stride];
    bits = bits << 1 | seen;
  }
  if (is_additive(a)) {
    const int64_t down_stride = KeysDown ? a.mask_key_stride : a.mask_query_stride,
                  across_stride = KeysDown ? a.mask_query_stride : a.mask_key_stride;
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

// The same for one pair, with the scaled score.
template <class T> FASTLM_DEVICE bool sees(const AttentionArgs& a, const Sequence& s, int head, int i, int j,
                                           float& score) {
  if (j - i < s.lower || j - i > s.upper) return false;
  score *= a.scale;
  if (a.mask_type != MaskType::none) {
    const int64_t at = mask_offset(a, s.batch, head) + i * a.mask_query_stride + j * a.mask_key_stride;
    const float bias = is_additive(a) ? mask_value<T>(a, at) : static_cast<const bool*>(a.mask)[at] ? 0.f : -INFINITY;
    if (bias == -INFINITY) return false;
    score += bias;
  }
  return !a.key_padding || a.key_padding[s.batch * a.key_padding_batch_stride + j * a.key_padding_key_stride];
}

// Dropout: bit 4n + e says whether element e of block n is kept; rows are queries, columns keys from `column` on, a
// multiple of 16. A counter gives the words of columns c, c + 16, c + 32 and c + 48 of a block of 64.
template <int N> FASTLM_DEVICE uint32_t kept_bits(const AttentionArgs& a, uint64_t seed, const int (&row)[2],
                                                  const uint32_t (&third)[2], int column) {
  uint32_t bits = 0;
  const int first_word = column % 64 / 16;
#pragma unroll 1
  for (int at = 0; at < 8; ++at) {
    const int e = at % 4, odd = at / 4;
    const philox_words words = philox(seed, uint32_t(column / 64 * 16 + odd * 8 + threadIdx.x % 4 * 2 + e % 2),
                                      uint32_t(e & 2 ? row[1] : row[0]), e & 2 ? third[1] : third[0]);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int n = (word - first_word) * 2 + odd;
      if (n >= 0 && n < N / 8 && words.word[word] >= a.threshold) bits |= 1u << (n * 4 + e);
    }
  }
  return bits;
}

// A row of tokens as one warp reads it: lane l has channels l, l + 32, …
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

// The thread's part of one of its rows (`half` 0 or 1) of a result in registers.
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

// Which of the warp's 16 rows hold a value that is not finite: bit r.
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

template <class View> inline bool divides(const View& x, int bytes, size_t size) {
  const auto whole = [&](int64_t stride) { return stride * int64_t(size) % bytes == 0; };
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && whole(x.batch_stride) && whole(x.head_stride) &&
         whole(x.token_stride);
}

inline size_t size_of(DType type) { return type == DType::float32 ? 4 : 2; }

// Of packed sequences there is one batch in memory, so that its strides are 0 whichever sequence a block computes.
template <class... Views> void complete(AttentionArgs& a, Views&... others) {
  const auto complete_one = [&](auto& x) {
    if (a.query_starts) x.batch_stride = 0;
    if constexpr (std::is_same_v<std::remove_reference_t<decltype(x)>, TokensView>)
      x.aligned = a.head_dim * size_of(a.dtype) % 16 == 0 && divides(x, 16, size_of(a.dtype));
    else x.paired = divides(x, 2 * int(size_of(a.dtype)), size_of(a.dtype));
  };
  (complete_one(others), ...);
  complete_one(a.query), complete_one(a.key), complete_one(a.value);
  if (a.query_starts) a.lse_batch_stride = 0;
}

// launch.operator()<T, D>() with the narrowest bucket that holds the head. In float32, whose products no one tunes for,
// 96 shares the bucket of 128.
template <class Launch> void by_type_and_width(DType type, int head_dim, Launch launch) {
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
