// What a query attends: a band of diagonals (causal, window), key padding, and a bool or additive mask of four
// dimensions; none of them is ever expanded.
//
// Scores are stored in tiles as [key][query], so that a vector holds one key's scores for Lanes queries: the softmax
// needs no sum across lanes.
#pragma once
#include <array>
#include <cmath>
#include "philox.h"
#include "gemm.h"
#include "vmath.h"

namespace fastlm {

inline constexpr int64_t DropoutGroup = 64;  // keys whose words are computed together, which no two tiles may share
inline constexpr int64_t KeyBlock = 4 * DropoutGroup;       // keys per tile, at most
inline constexpr int64_t QueryPanel = NRVecs * vec::Lanes;  // queries per tile, at most

enum class mask_type { none = 0, boolean = 1, additive = 2, additive_fp32 = 3 };

template <class T> struct masking {
  const void* mask;
  mask_type type;
  std::array<int64_t, 4> mask_strides;  // batch, head, query, key; 0 where the mask has size 1
  const bool* key_padding;              // true: a token, false: padding
  std::array<int64_t, 2> padding_strides;
  int64_t lower, upper;  // position j attends from row i iff lower ≤ j − i ≤ upper
  float scale, softcap;  // softcap: 0 for none
  dropout drop;

  // The band shifted along the keys.
  masking shifted(int64_t diagonals) const {
    masking m = *this;
    m.lower += diagonals, m.upper += diagonals;
    return m;
  }
  // Whether some, and whether all, of the queries [q0, q1) attend some, all, of the keys [k0, k1) by the band.
  bool intersects(int64_t q0, int64_t q1, int64_t k0, int64_t k1) const {
    return k1 - 1 - q0 >= lower && k0 - (q1 - 1) <= upper;
  }
  bool contains(int64_t q0, int64_t q1, int64_t k0, int64_t k1) const {
    return k0 - (q1 - 1) >= lower && k1 - 1 - q0 <= upper;
  }
  // The first key that the band lets a query from q0 on attend, in whole dropout groups, and the end of what those
  // before q1 attend.
  int64_t first_key(int64_t q0) const {
    return std::max<int64_t>(0, q0 + std::max(lower, -q0)) / DropoutGroup * DropoutGroup;
  }
  int64_t end_key(int64_t q1, int64_t key_len) const {
    return upper >= key_len ? key_len : std::min(key_len, q1 + upper);
  }
  // The keys of the block [k0, k0 + keys) that the band lets any of the queries [q0, q1) attend, in whole dropout
  // groups and register tiles: the first, counted from k0, and their number, which is 0 or less if there is none.
  std::array<int64_t, 2> visible_keys(int64_t q0, int64_t q1, int64_t k0, int64_t keys) const {
    const int64_t first = std::clamp<int64_t>(first_key(q0) - k0, 0, keys);
    return {first, visible_keys(q1, k0, keys) - first};
  }
  // The number of keys from k0 on, in whole register tiles, that the band lets any query before q1 attend.
  int64_t visible_keys(int64_t q1, int64_t k0, int64_t keys) const {
    constexpr int64_t tile_rows = arithmetic_for<T>::MR;
    return std::min(keys, ceil_div(std::max<int64_t>(0, end_key(q1, k0 + keys) - k0), tile_rows) * tile_rows);
  }
};

struct tile_position {
  int64_t batch, head, query, queries, key, keys;
};  // head: of the queries; queries, keys: counts

// tile[j·width + i] = mask value of query i and key j; −inf where a bool mask is False.
template <class M> void load_mask(const M* mask, const std::array<int64_t, 4>& strides, const tile_position& at,
                                  float* tile, int64_t width) {
  constexpr int64_t L = vec::Lanes;
  mask += at.batch * strides[0] + at.head * strides[1] + at.query * strides[2] + at.key * strides[3];
  auto scores = [](vec v) {
    if constexpr (std::is_same_v<M, bool>) return select(v == vec::zero(), vec::all(-INFINITY), vec::zero());
    else return v;
  };
  auto element = [&](const M* p) {
    alignas(64) float lane[L];
    scores(vec::load(p, tail{1})).store(lane, full{});
    return lane[0];
  };
  if (strides[2] == 0) {  // broadcast over queries
    for (int64_t j = 0; j < at.keys; ++j) {
      vec v = vec::all(element(mask + j * strides[3]));
      for (int64_t i = 0; i < width; i += L) v.store(tile + j * width + i, full{});
    }
    return;
  }
  for (int64_t j = 0; j < at.keys; j += L) {
    const int64_t keys = std::min(L, at.keys - j);
    for (int64_t i = 0; i < width; i += L) {
      vec block[L];
      for (int64_t r = 0; r < L; ++r) {
        const M* row = mask + (i + r) * strides[2] + j * strides[3];
        if (i + r >= at.queries) {
          block[r] = vec::zero();
        } else if (strides[3] == 1) {
          block[r] = scores(keys == L ? vec::load(row, full{}) : vec::load(row, tail{size_t(keys)}));
        } else {
          alignas(64) float lane[L] = {};
          for (int64_t c = 0; c < keys; ++c) lane[c] = element(row + c * strides[3]);
          block[r] = vec::load(lane, full{});
        }
      }
      transpose(block);
      for (int64_t r = 0; r < keys; ++r) block[r].store(tile + (j + r) * width + i, full{});
    }
  }
}

// In place: s → c·tanh(scale·s / c), for `count` scores; the derivative 1 − tanh² goes to `slopes`, unless null.
inline void cap_scores(float softcap, float scale, int64_t count, float* scores, float* slopes) {
  const vec cap = vec::all(softcap), factor = vec::all(scale);
  for (int64_t i = 0; i < count; i += vec::Lanes) {
    const vec t = tanh(vec::load(scores + i, full{}) * factor / cap);
    (cap * t).store(scores + i, full{});
    if (slopes) fma(vec::zero() - t, t, vec::all(1)).store(slopes + i, full{});
  }
}

// In place: s → scale·s + mask, and −inf wherever attention is masked, whatever the score is. Where only the band
// masks, the other scores are left unscaled; returns the scale that is still to be applied. bias_tile is scratch memory
// of the tile's size. With a cap, scores are scaled and capped first, and the derivative of that goes to `slopes`,
// unless null.
template <class T> float mask_scores(const masking<T>& m, const tile_position& at, float* scores, int64_t width,
                                     float* bias_tile, float* slopes = nullptr) {
  constexpr int64_t L = vec::Lanes;
  const bool capped = m.softcap > 0;
  if (capped) cap_scores(m.softcap, m.scale, at.keys * width, scores, slopes);
  const float remaining = capped ? 1.0f : m.scale;
  const vec scale = vec::all(remaining), minus_infinity = vec::all(-INFINITY);
  const bool biased = m.type != mask_type::none,
             banded = !m.contains(at.query, at.query + at.queries, at.key, at.key + at.keys);
  const bool scale_later = !biased && !m.key_padding && remaining > 0;
  if (scale_later && !banded) return remaining;
  if (m.type == mask_type::boolean) load_mask(static_cast<const bool*>(m.mask), m.mask_strides, at, bias_tile, width);
  if (m.type == mask_type::additive) load_mask(static_cast<const T*>(m.mask), m.mask_strides, at, bias_tile, width);
  if (m.type == mask_type::additive_fp32)
    load_mask(static_cast<const float*>(m.mask), m.mask_strides, at, bias_tile, width);
  const bool* padding =
      m.key_padding ? m.key_padding + at.batch * m.padding_strides[0] + at.key * m.padding_strides[1] : nullptr;

  // Keys from `whole` to `rest` need nothing: all queries of the tile attend them, and only the band masks.
  const int64_t whole = scale_later ? std::clamp<int64_t>(at.query + at.queries - 1 - at.key +
                                                              std::max(m.lower, -at.query - at.queries),
                                                          0, at.keys)
                                    : at.keys,
                rest = std::clamp<int64_t>(at.query - at.key + std::min(m.upper, at.keys + at.key) + 1, whole, at.keys);
  for (int64_t j = whole == 0 ? rest : 0; j < at.keys; j = j + 1 == whole ? rest : j + 1) {
    float* row = scores + j * width;
    if (padding && !padding[j * m.padding_strides[1]]) {
      for (int64_t i = 0; i < width; i += L) minus_infinity.store(row + i, full{});
      continue;
    }
    // Query i of the tile attends key j iff first ≤ i ≤ last; clamped, so that both are exact as floats.
    const int64_t diagonal = at.key + j - at.query;
    const float first = float(std::clamp<int64_t>(diagonal - std::min(m.upper, diagonal + 1), -1, width)),
                last = float(std::clamp<int64_t>(diagonal - std::max(m.lower, diagonal - width), -1, width));
    for (int64_t i = 0; i < width; i += L) {
      vec s = vec::load(row + i, full{});
      if (biased) {
        vec b = vec::load(bias_tile + j * width + i, full{});
        s = select(b == minus_infinity, minus_infinity, fma(s, scale, b));
      } else if (!scale_later) {
        s = s * scale;
      }
      if (banded) {
        vec query = vec::iota() + vec::all(float(i));
        s = select((vec::all(first) <= query) & (query <= vec::all(last)), s, minus_infinity);
      }
      s.store(row + i, full{});
    }
  }
  return scale_later ? remaining : 1;
}

// factors[j·width + i] = 0 where the weight of query i and key j is dropped, otherwise 1/(1 − p).
inline void dropout_tile(const dropout& drop, const tile_position& at, int64_t num_heads, float* factors,
                         int64_t width) {
  const uvec batch_head = uvec::all(uint32_t(at.batch * num_heads + at.head));
  for (int64_t group = 0; group * DropoutGroup < at.keys; ++group)
    for (int64_t column = 0; column < 16; ++column)
      for (int64_t i = 0; i < width; i += vec::Lanes) {
        uvec words[4];
        philox(uvec::all(uint32_t((at.key / DropoutGroup + group) * 16 + column)),
               uvec::all(uint32_t(at.query + i)) + uvec::iota(), batch_head, drop.seed, words);
        for (int64_t word = 0; word < 4; ++word) {
          const int64_t j = group * DropoutGroup + word * 16 + column;
          if (j < at.keys)
            select(words[word] >= uvec::all(drop.threshold), vec::all(drop.scale), vec::zero())
                .store(factors + j * width + i, full{});
        }
      }
}

}  // namespace fastlm
