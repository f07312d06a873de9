// Attention:  O = softmax(scale·Q Kᵀ + mask) V,  lse = log Σ exp of the masked scores            (FlashAttention-2:
// Dao, 2023, arXiv:2307.08691)
//
// Forward 4·Tq·Tk·D FLOP a head, backward 10·Tq·Tk·D (five products, the scores made again from lse); half where
// causal. Compute bound: scores exist for one tile of up to 256 keys × 48 queries, in L1 and L2; keys that no query of
// the tile may see are left out. Everything is computed transposed, scores [key][query] and output [dim][query]: then
// each product's second operand is the tile as it lies, the softmax runs down the registers without sums across lanes,
// and rescaling is one multiplication per vector. Q, K, V and the results are strided views: they are copied or packed
// as they are read (gemm.h), a key block once for up to 512 queries.
#pragma once
#include "attention_mask.h"
#include "sequences.h"
#include "vmath.h"

namespace fastlm {

template <class T> struct heads_view {  // (batch, head, token, dim), dim contiguous
  T* data;
  std::array<int64_t, 3> strides;
  T* at(int64_t batch, int64_t head, int64_t token = 0) const {
    return data + batch * strides[0] + head * strides[1] + token * strides[2];
  }
  int64_t row() const { return strides[2]; }
  heads_view from(int64_t token) const { return {at(0, 0, token), strides}; }
};

// Between rows of queries or keys that are copied as the first operand of a product over head_dim.
template <class Arithmetic> int64_t copied_stride(int64_t dim) {
  return ceil_div(packed_depth<Arithmetic>(dim), vec::Lanes) * vec::Lanes;
}

// c[row][query] = Σ_d a(row, d)·b[d][query], the rows copied as they lie.
template <class Arithmetic> void multiply_rows(int64_t rows, int64_t dim, const float* a, const float* b, float* c,
                                               int64_t width, int64_t chain = Chain) {
  const int64_t stride = copied_stride<Arithmetic>(dim);
  for (int64_t r = 0; r < rows; r += Arithmetic::Rows)
    multiply_tile<Arithmetic, true>(width / vec::Lanes, packed_depth<Arithmetic>(dim), a + r * stride, stride, b, width,
                                    c + r * width, width, false, chain);
}

// c[row][query] += Σ_d a(row, d)·b[d][query] over d < depth, of the `packed` that pack_transposed made of each row of
// a.
template <class Arithmetic> void add_transposed(int64_t rows, int64_t depth, int64_t packed, const float* a,
                                                const float* b, float* c, int64_t width) {
  constexpr bool AsRows = Arithmetic::RowsOnly;
  for (int64_t r = 0; r < rows; r += Arithmetic::Rows)
    multiply_tile<Arithmetic, AsRows>(width / vec::Lanes, depth, a + r / PanelRows * PanelRows * packed + r % PanelRows,
                                      AsRows ? packed : PanelRows, b, width, c + r * width, width, true);
}

// Two tile rows (keys) per lane pair, for the product that sums over keys; in place. Without a product of pairs a tile
// is what it is.
template <class Arithmetic> void pair_rows(float* tile, int64_t rows, int64_t width) {
  if constexpr (Arithmetic::PerLane == 2) {
    for (int64_t j = 0; j < 2 * packed_depth<Arithmetic>(rows); j += 2)
      for (int64_t i = 0; i < width; i += vec::Lanes) {
        vec low = j < rows ? vec::load(tile + j * width + i, full{}) : vec::zero(),
            high = j + 1 < rows ? vec::load(tile + (j + 1) * width + i, full{}) : vec::zero();
        Arithmetic::join(low, high).store(tile + j / 2 * width + i, full{});
      }
  }
}

// Keys whose rows hold an Inf or NaN. A weight of 0 does not keep those out of a product: they are left out of it, and
// added where the weight is not 0.
template <class T> int64_t find_nonfinite(const T* rows, int64_t stride, int64_t count, int64_t dim, uint8_t* found) {
  vec any[4] = {vec::zero(), vec::zero(), vec::zero(), vec::zero()};  // rows need not wait for each other
  for (int64_t j = 0; j < count; j += 4)
    sweep(dim, [&](int64_t i, auto span) {
#pragma GCC unroll 4
      for (int64_t r = 0; r < 4; ++r)
        any[r] = fma(vec::load(rows + std::min(j + r, count - 1) * stride + i, span), vec::zero(), any[r]);
    });
  if (((any[0] + any[1]) + (any[2] + any[3])).sum() == 0) return 0;
  int64_t total = 0;
  for (int64_t j = 0; j < count; ++j) {
    const T* row = rows + j * stride;
    found[j] = sum_over(dim, [=](int64_t i, auto span) { return vec::load(row + i, span) * vec::zero(); }) != 0;
    total += found[j];
  }
  return total;
}

// The transposed rows [dim][key] as the first operand of a product that sums over keys, with the found rows as zeros:
// panels, where those may be.
template <class Arithmetic, class T> void pack_transposed(const T* rows, int64_t stride, int64_t count, int64_t dim,
                                                          int64_t nonfinite, const uint8_t* found, float* out) {
  auto pack_panels = [=](operand<T> source) {
    for (int64_t d = 0; d < dim; d += PanelRows) {
      const operand<T> panel{source.data + d, 1, source.k_stride};
      float* to = out + d * packed_depth<Arithmetic>(count);
      if constexpr (Arithmetic::RowsOnly)
        pack_as_rows<Arithmetic>(panel, std::min(PanelRows, dim - d), count, packed_depth<Arithmetic>(count), to);
      else pack<Arithmetic>(panel, std::min(PanelRows, dim - d), count, PanelRows, to);
    }
  };
  if (nonfinite == 0) return pack_panels({rows, 1, stride});
  buffer copy = make_buffer(count * dim);
  T* clean = reinterpret_cast<T*>(copy.get());
  for (int64_t j = 0; j < count; ++j)
    sweep(dim, [=](int64_t i, auto span) {
      (found[j] ? vec::zero() : vec::load(rows + j * stride + i, span)).store(clean + j * dim + i, span);
    });
  pack_panels({clean, 1, dim});
}

// What pack_transposed left out: o[dim][query] += weight·row, except where the weight is 0.
template <class T> void add_nonfinite(const T* rows, int64_t stride, int64_t keys, int64_t dim, const uint8_t* found,
                                      const float* weights, int64_t width, float* o) {
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t d = 0; found[j] && d < dim; ++d) {
      alignas(64) float element[vec::Lanes];
      vec::load(rows + j * stride + d, tail{1}).store(element, full{});
      for (int64_t i = 0; i < width; i += vec::Lanes) {
        const vec weight = vec::load(weights + j * width + i, full{});
        (vec::load(o + d * width + i, full{}) + zero_where(weight == vec::zero(), weight * vec::all(element[0])))
            .store(o + d * width + i, full{});
      }
    }
}

// rows[i·row_stride + d] = factor[i]·tile[d·width + i], the transpose of a finished [dim][query] tile.
template <class T> void store_transposed(const float* tile, int64_t width, int64_t dim, const float* factor, T* rows,
                                         int64_t row_stride, int64_t count) {
  constexpr int64_t L = vec::Lanes;
  for (int64_t i = 0; i < count; i += L) {
    const vec f = vec::load(factor + i, full{});
    for (int64_t d = 0; d < dim; d += L) {
      vec block[L];
      for (int64_t r = 0; r < L; ++r)
        block[r] = d + r < dim ? vec::load(tile + (d + r) * width + i, full{}) * f : vec::zero();
      transpose(block);
      for (int64_t r = 0; r < L && i + r < count; ++r) {
        T* to = rows + (i + r) * row_stride + d;
        if (d + L <= dim) block[r].store(to, full{});
        else block[r].store(to, tail{size_t(dim - d)});
      }
    }
  }
}

// Online softmax of one tile of masked scores (in place), still to be scaled, by more than 0: weights exp(scale·s −
// max), the running maximum and sum of each query, and what earlier output must be scaled by. Row after row, as they
// lie: so all vectors of a row are there for exp_below.
template <int Vecs> void online_softmax(float* tile, float scale, int64_t keys, float* highest, float* sum,
                                        float* rescale) {
  constexpr int64_t L = vec::Lanes;
  const vec factor = vec::all(scale);
  vec top[Vecs], shift[Vecs], total[Vecs];
  for (int v = 0; v < Vecs; ++v) top[v] = vec::all(-INFINITY);
  for (int64_t j = 0; j < keys; ++j)
    for (int v = 0; v < Vecs; ++v) top[v] = max(top[v], vec::load(tile + (j * Vecs + v) * L, full{}));
  for (int v = 0; v < Vecs; ++v) {
    top[v] = max(vec::load(highest + v * L, full{}), top[v] * factor);
    shift[v] = zero_where(top[v] == vec::all(-INFINITY), top[v]);  // nothing seen yet: −inf − −inf would be NaN
    total[v] = vec::zero();
  }
  constexpr int64_t Run = 16;  // weights are added up from zero, so that the rounding grows with the root of neither
                               // many additions nor large sums
  for (int64_t first = 0; first < keys; first += Run) {
    vec run[Vecs];
    for (int v = 0; v < Vecs; ++v) run[v] = vec::zero();
    for (int64_t j = first; j < std::min(first + Run, keys); ++j) {
      vec weight[Vecs];
      for (int v = 0; v < Vecs; ++v) weight[v] = vec::load(tile + (j * Vecs + v) * L, full{}) * factor - shift[v];
      exp_below(weight);
      for (int v = 0; v < Vecs; ++v) {
        weight[v].store(tile + (j * Vecs + v) * L, full{});
        run[v] = run[v] + weight[v];
      }
    }
    for (int v = 0; v < Vecs; ++v) total[v] = total[v] + run[v];
  }
  vec kept[Vecs];
  for (int v = 0; v < Vecs; ++v) kept[v] = vec::load(highest + v * L, full{}) - shift[v];
  exp_below(kept);
  for (int v = 0; v < Vecs; ++v) {
    top[v].store(highest + v * L, full{});
    kept[v].store(rescale + v * L, full{});
    fma(vec::load(sum + v * L, full{}), kept[v], total[v]).store(sum + v * L, full{});
  }
}

template <class T>
void attention_forward(heads_view<const T> all_query, heads_view<const T> all_key, heads_view<const T> all_value,
                       heads_view<T> all_out, float* lse, attention_size sizes, const masking<T>& masks, int threads) {
  using arithmetic = arithmetic_for<T>;
  constexpr int64_t L = vec::Lanes;
  const int64_t dim = sizes.head_dim, padded = sizes.padded_dim(), depth = packed_depth<arithmetic>(dim),
                copied = copied_stride<arithmetic>(dim);
  const int64_t chunk =
      ceil_div(std::min<int64_t>(32768 / padded, 512), QueryPanel) * QueryPanel;  // outputs of a chunk: some 128 kB
  const std::vector<sequence> order = longest_first(sizes);
  const sequence_parts parts(order, [=](const sequence& s) { return sizes.heads * ceil_div(s.queries, chunk); });

  parallel_parts(parts.total(), threads, [=, &parts, &masks](int64_t number) {
    [[maybe_unused]] const typename arithmetic::session multiplying;
    const auto place = parts.find(number);
    const sequence& of = place.of;
    const attention_size size = sizes.of(of);
    const masking<T> mask = masks.moved(of.diagonal);
    const heads_view<const T> query = all_query.from(of.first_query), key = all_key.from(of.first_key),
                              value = all_value.from(of.first_key);
    const heads_view<T> out = all_out.from(of.first_query);
    const int64_t chunks = ceil_div(size.query_len, chunk), part = place.part, batch = of.index, head = part / chunks,
                  kv_head = head / size.group();
    const int64_t q0 = size.query_len * (part % chunks) / chunks, q1 = size.query_len * (part % chunks + 1) / chunks,
                  queries = q1 - q0;
    const panels split(ceil_div(queries, L));
    const int64_t lanes = split.total * L;

    float* packed_q = scratch(lanes * (depth + padded + 3) + KeyBlock * (copied + padded + 2 * QueryPanel));
    float* output = packed_q + lanes * depth;  // [panel][dim][query], not yet divided by the sum
    float* highest = output + lanes * padded;
    float* sum = highest + lanes;
    float* rescale = sum + lanes;
    float* copied_k = rescale + lanes;
    float* packed_v = copied_k + KeyBlock * copied;
    float* tile = packed_v + KeyBlock * padded;
    float* extra = tile + KeyBlock * QueryPanel;
    uint8_t nonfinite[KeyBlock];

    std::fill_n(output, lanes * padded, 0.0f);
    std::fill_n(highest, lanes, -INFINITY);
    std::fill_n(sum, lanes, 0.0f);
    for (int64_t p = 0; p < split.count; ++p) {
      const int64_t from = split.begin(p) * L, width = split.begin(p + 1) * L - from;
      pack<arithmetic>(operand<T>{query.at(batch, head, q0 + from), query.row(), 1}, std::min(width, queries - from),
                       dim, width, packed_q + from * depth);
    }

    for (int64_t k0 = mask.first_key(q0); k0 < mask.end_key(q1, size.key_len); k0 += KeyBlock) {
      const int64_t keys = std::min(KeyBlock, size.key_len - k0);
      const T* v = value.at(batch, kv_head, k0);
      const int64_t bad = find_nonfinite(v, value.row(), keys, dim, nonfinite);
      copy_rows<arithmetic>(operand<T>{key.at(batch, kv_head, k0), key.row(), 1}, keys, dim, copied, copied_k);
      pack_transposed<arithmetic>(v, value.row(), keys, dim, bad, nonfinite, packed_v);
      for (int64_t p = 0; p < split.count; ++p) {
        const int64_t from = split.begin(p) * L, width = split.begin(p + 1) * L - from;
        const int64_t count = std::min(width, queries - from);
        const tile_place at{batch, head, q0 + from, count, k0, mask.seen(q0 + from + count, k0, keys)};
        if (!mask.touches(at.query, at.query + at.queries, k0, k0 + at.keys)) continue;
        float* o = output + from * padded;
        multiply_rows<arithmetic>(at.keys, dim, copied_k, packed_q + from * depth, tile, width);
        const float scale = mask_scores(mask, at, tile, width, extra);
        with_vecs(width / L, [=](auto vecs) {
          online_softmax<vecs>(tile, scale, at.keys, highest + from, sum + from, rescale + from);
        });
        for (int64_t i = 0; i < width; i += L) {
          const vec factor = vec::load(rescale + from + i, full{});
          for (int64_t d = 0; d < dim; ++d)
            (vec::load(o + d * width + i, full{}) * factor).store(o + d * width + i, full{});
        }
        if (mask.drop.active()) {
          keep_tile(mask.drop, at, size.heads, extra, width);
          sweep(at.keys * width, [=](int64_t i, auto) {
            (vec::load(tile + i, full{}) * vec::load(extra + i, full{})).store(tile + i, full{});
          });
        }
        if (bad) add_nonfinite(v, value.row(), at.keys, dim, nonfinite, tile, width, o);
        pair_rows<arithmetic>(tile, at.keys, width);
        add_transposed<arithmetic>(dim, packed_depth<arithmetic>(at.keys), packed_depth<arithmetic>(keys), packed_v,
                                   tile, o, width);
      }
    }

    for (int64_t p = 0; p < split.count; ++p) {
      const int64_t from = split.begin(p) * L, width = split.begin(p + 1) * L - from,
                    count = std::min(width, queries - from);
      float* row_lse = lse + sizes.row(of, head) + q0 + from;
      for (int64_t i = 0; i < count; ++i)
        row_lse[i] = sum[from + i] == 0 ? -INFINITY : highest[from + i] + std::log(sum[from + i]);
      for (int64_t i = 0; i < width; ++i) rescale[from + i] = sum[from + i] == 0 ? 0.0f : 1.0f / sum[from + i];
      store_transposed(output + from * padded, width, dim, rescale + from, out.at(batch, head, q0 + from), out.row(),
                       count);
    }
  });
}

}  // namespace fastlm
