// Attention:  O = softmax(S + mask) V,  S = scale·Q Kᵀ or, capped, c·tanh(scale·Q Kᵀ / c),  lse = log Σ exp of the
// masked scores (FlashAttention-2: Dao, 2023, arXiv:2307.08691).
//
// Forward 4·Tq·Tk·D FLOP per head, backward 10·Tq·Tk·D (five products, with the scores recomputed from lse); half of
// that where causal. Reads Q, K, V once per chunk of up to 512 queries and writes O and lse: compute bound. Scores
// exist for one tile of up to 256 keys × 48 queries at a time, in L1 and L2. Keys at the ends of a block that no query
// of a tile attends are skipped.
// All products are computed transposed, scores as [key][query] and the output as [dim][query]: the tile is then the
// second operand of each product as it is, the softmax needs no sums across lanes, and rescaling is one multiplication
// per vector. Q, K, V and the results are strided views, which are packed as they are read (gemm.h), a key block once
// for up to 512 queries.
#pragma once
#include "attention_mask.h"
#include "sequences.h"

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

// The stride of rows of queries or keys that are packed row-major, as the lhs of a product over head_dim.
template <class Arithmetic> int64_t row_major_stride(int64_t dim) {
  return ceil_div(packed_depth<Arithmetic>(dim), vec::Lanes) * vec::Lanes;
}

// c[row][query] = Σ_d a(row, d)·b[d][query], for row-major a.
template <class Arithmetic> void multiply_rows(int64_t rows, int64_t dim, const float* a, const float* b, float* c,
                                               int64_t width, int64_t chain = Chain) {
  const int64_t stride = row_major_stride<Arithmetic>(dim);
  for (int64_t r = 0; r < rows; r += Arithmetic::MR)
    multiply_tile<Arithmetic, true>(width / vec::Lanes, packed_depth<Arithmetic>(dim), a + r * stride, stride, b, width,
                                    c + r * width, width, false, chain);
}

// c[row][query] += Σ_d a(row, first + d)·b[d][query] over d < depth, for an a of pack_transposed, whose rows have
// `packed` lanes.
template <class Arithmetic> void add_transposed(int64_t rows, int64_t first, int64_t depth, int64_t packed,
                                                const float* a, const float* b, float* c, int64_t width) {
  constexpr bool AsRows = Arithmetic::RowMajorOnly;
  a += first * (AsRows ? 1 : PanelRows);
  for (int64_t r = 0; r < rows; r += Arithmetic::MR)
    multiply_tile<Arithmetic, AsRows>(width / vec::Lanes, depth, a + r / PanelRows * PanelRows * packed + r % PanelRows,
                                      AsRows ? packed : PanelRows, b, width, c + r * width, width, true);
}

// In place: packs two tile rows (keys) into each lane, for the product that sums over keys. A tile is left as it is
// where a lane is one element.
template <class Arithmetic> void pair_rows(float* tile, int64_t rows, int64_t width) {
  if constexpr (Arithmetic::PerLane == 2) {
    for (int64_t j = 0; j < 2 * packed_depth<Arithmetic>(rows); j += 2)
      for (int64_t i = 0; i < width; i += vec::Lanes) {
        vec low = j < rows ? vec::load(tile + j * width + i, full{}) : vec::zero(),
            high = j + 1 < rows ? vec::load(tile + (j + 1) * width + i, full{}) : vec::zero();
        Arithmetic::pair(low, high).store(tile + j / 2 * width + i, full{});
      }
  }
}

// Finds keys whose rows hold an Inf or NaN. A weight of 0 would not keep these out of a product, so they are left out
// of it and added separately where the weight is not 0.
template <class T> int64_t find_nonfinite_rows(const T* rows, int64_t stride, int64_t count, int64_t dim,
                                               uint8_t* found) {
  vec any[4] = {vec::zero(), vec::zero(), vec::zero(), vec::zero()};  // independent, to hide the latency of fma
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

// Packs the transposed rows [dim][key] as the lhs of a product that sums over keys, with zeros for the rows that were
// found: k-major panels, except where the arithmetic takes row-major operands only.
template <class Arithmetic, class T> void pack_transposed(const T* rows, int64_t stride, int64_t count, int64_t dim,
                                                          int64_t nonfinite, const uint8_t* found, float* out) {
  auto pack_panels = [=](operand<T> source) {
    for (int64_t d = 0; d < dim; d += PanelRows) {
      const operand<T> panel{source.data + d, 1, source.k_stride};
      float* to = out + d * packed_depth<Arithmetic>(count);
      if constexpr (Arithmetic::RowMajorOnly)
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

// Adds the rows that pack_transposed left out: o[dim][query] += weight·row, except where the weight is 0.
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

// rows[i·row_stride + d] = factor[i]·tile[d·width + i]: the transpose of a finished [dim][query] tile.
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

// Online softmax of one tile of masked scores, in place. `scale` > 0 is still to be applied. Gives the weights
// exp(scale·s − max), updates row_max and row_sum of each query, and gives the factor by which earlier output must be
// rescaled. Scaled scores are rounded as the maximum is, which makes their difference exact: that of a fused
// multiply-add would be off by the rounding of the maximum. Works row by row, so that all vectors of a row are there
// for exp_nonpositive.
template <int Vecs> void online_softmax(float* tile, float scale, int64_t keys, float* row_max, float* row_sum,
                                        float* rescale) {
  constexpr int64_t L = vec::Lanes;
  const vec factor = vec::all(scale);
  vec new_max[Vecs], shift[Vecs], new_sum[Vecs];
  for (int v = 0; v < Vecs; ++v) new_max[v] = vec::all(-INFINITY);
  for (int64_t j = 0; j < keys; ++j)
    for (int v = 0; v < Vecs; ++v) new_max[v] = max(new_max[v], vec::load(tile + (j * Vecs + v) * L, full{}));
  for (int v = 0; v < Vecs; ++v) {
    new_max[v] = max(vec::load(row_max + v * L, full{}), new_max[v] * factor);
    shift[v] = zero_where(new_max[v] == vec::all(-INFINITY), new_max[v]);  // no key yet: −inf − −inf would be NaN
    new_sum[v] = vec::zero();
  }
  // Weights are summed in short chains from zero, which bounds the rounding error.
  constexpr int64_t ChainLength = 16;
  for (int64_t first = 0; first < keys; first += ChainLength) {
    vec partial[Vecs];
    for (int v = 0; v < Vecs; ++v) partial[v] = vec::zero();
    for (int64_t j = first; j < std::min(first + ChainLength, keys); ++j) {
      vec weight[Vecs];
      for (int v = 0; v < Vecs; ++v)
        weight[v] = rounded(vec::load(tile + (j * Vecs + v) * L, full{}) * factor) - shift[v];
      exp_nonpositive(weight);
      for (int v = 0; v < Vecs; ++v) {
        weight[v].store(tile + (j * Vecs + v) * L, full{});
        partial[v] = partial[v] + weight[v];
      }
    }
    for (int v = 0; v < Vecs; ++v) new_sum[v] = new_sum[v] + partial[v];
  }
  vec factor_of_old[Vecs];
  for (int v = 0; v < Vecs; ++v) factor_of_old[v] = vec::load(row_max + v * L, full{}) - shift[v];
  exp_nonpositive(factor_of_old);
  for (int v = 0; v < Vecs; ++v) {
    new_max[v].store(row_max + v * L, full{});
    factor_of_old[v].store(rescale + v * L, full{});
    fma(vec::load(row_sum + v * L, full{}), factor_of_old[v], new_sum[v]).store(row_sum + v * L, full{});
  }
}

template <class T>
void attention_forward(heads_view<const T> all_query, heads_view<const T> all_key, heads_view<const T> all_value,
                       heads_view<T> all_out, float* lse, attention_size sizes, const masking<T>& masks, int threads) {
  using arithmetic = arithmetic_for<T>;
  constexpr int64_t L = vec::Lanes;
  const int64_t dim = sizes.head_dim, padded = sizes.padded_dim(), depth = packed_depth<arithmetic>(dim),
                copied = row_major_stride<arithmetic>(dim);
  // Queries in a chunk: its accumulators take about 128 kB.
  const int64_t chunk = ceil_div(std::min<int64_t>(32768 / padded, 512), QueryPanel) * QueryPanel;
  const std::vector<sequence> order = longest_first(sizes);
  const sequence_parts parts(order, [=](const sequence& s) { return sizes.num_heads * ceil_div(s.queries, chunk); });

  parallel_parts(parts.total(), threads, [=, &parts, &masks](int64_t number) {
    [[maybe_unused]] const typename arithmetic::session multiplying;
    const auto place = parts.find(number);
    const sequence& of = place.of;
    const attention_size size = sizes.of(of);
    const masking<T> mask = masks.shifted(of.diagonal);
    const heads_view<const T> query = all_query.from(of.first_query), key = all_key.from(of.first_key),
                              value = all_value.from(of.first_key);
    const heads_view<T> out = all_out.from(of.first_query);
    const int64_t chunks = ceil_div(size.query_len, chunk), part = place.part, batch = of.index, head = part / chunks,
                  kv_head = head / size.group_size();
    const int64_t q0 = size.query_len * (part % chunks) / chunks, q1 = size.query_len * (part % chunks + 1) / chunks,
                  queries = q1 - q0;
    const panel_split panels(ceil_div(queries, L));
    const int64_t lanes = panels.total * L;

    float* packed_q = scratch(lanes * (depth + padded + 3) + KeyBlock * (copied + padded + 2 * QueryPanel));
    float* acc = packed_q + lanes * depth;  // [panel][dim][query], not yet divided by row_sum
    float* row_max = acc + lanes * padded;
    float* row_sum = row_max + lanes;
    float* rescale = row_sum + lanes;
    float* k_rows = rescale + lanes;
    float* packed_v = k_rows + KeyBlock * copied;
    float* tile = packed_v + KeyBlock * padded;
    float* extra = tile + KeyBlock * QueryPanel;
    uint8_t nonfinite[KeyBlock];

    std::fill_n(acc, lanes * padded, 0.0f);
    std::fill_n(row_max, lanes, -INFINITY);
    std::fill_n(row_sum, lanes, 0.0f);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t from = panels.begin(p) * L, width = panels.begin(p + 1) * L - from;
      pack<arithmetic>(operand<T>{query.at(batch, head, q0 + from), query.row(), 1}, std::min(width, queries - from),
                       dim, width, packed_q + from * depth);
    }

    const int64_t end_key = mask.end_key(q1, size.key_len);
    for (int64_t k0 = mask.first_key(q0); k0 < end_key; k0 += KeyBlock) {
      const int64_t keys = std::min(KeyBlock, end_key - k0);
      const T* v = value.at(batch, kv_head, k0);
      const int64_t num_nonfinite = find_nonfinite_rows(v, value.row(), keys, dim, nonfinite);
      copy_rows<arithmetic>(operand<T>{key.at(batch, kv_head, k0), key.row(), 1}, keys, dim, copied, k_rows);
      pack_transposed<arithmetic>(v, value.row(), keys, dim, num_nonfinite, nonfinite, packed_v);
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t from = panels.begin(p) * L, width = panels.begin(p + 1) * L - from;
        const int64_t count = std::min(width, queries - from);
        const auto [first, visible] = mask.visible_keys(q0 + from, q0 + from + count, k0, keys);
        const tile_position at{batch, head, q0 + from, count, k0 + first, visible};
        if (!mask.intersects(at.query, at.query + at.queries, at.key, at.key + at.keys)) continue;
        float* o = acc + from * padded;
        multiply_rows<arithmetic>(at.keys, dim, k_rows + first * copied, packed_q + from * depth, tile, width);
        const float scale = mask_scores(mask, at, tile, width, extra);
        with_vecs(width / L, [=](auto vecs) {
          online_softmax<vecs>(tile, scale, at.keys, row_max + from, row_sum + from, rescale + from);
        });
        for (int64_t i = 0; i < width; i += L) {
          const vec factor = vec::load(rescale + from + i, full{});
          for (int64_t d = 0; d < dim; ++d)
            (vec::load(o + d * width + i, full{}) * factor).store(o + d * width + i, full{});
        }
        if (mask.drop.active()) {
          dropout_tile(mask.drop, at, size.num_heads, extra, width);
          sweep(at.keys * width, [=](int64_t i, auto) {
            (vec::load(tile + i, full{}) * vec::load(extra + i, full{})).store(tile + i, full{});
          });
        }
        if (num_nonfinite)
          add_nonfinite(v + first * value.row(), value.row(), at.keys, dim, nonfinite + first, tile, width, o);
        pair_rows<arithmetic>(tile, at.keys, width);
        add_transposed<arithmetic>(dim, first / arithmetic::PerLane, packed_depth<arithmetic>(at.keys),
                                   packed_depth<arithmetic>(keys), packed_v, tile, o, width);
      }
    }

    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t from = panels.begin(p) * L, width = panels.begin(p + 1) * L - from,
                    count = std::min(width, queries - from);
      float* row_lse = lse + sizes.row(of, head) + q0 + from;
      for (int64_t i = 0; i < count; ++i)
        row_lse[i] = row_sum[from + i] == 0 ? -INFINITY : row_max[from + i] + std::log(row_sum[from + i]);
      for (int64_t i = 0; i < width; ++i) rescale[from + i] = row_sum[from + i] == 0 ? 0.0f : 1.0f / row_sum[from + i];
      store_transposed(acc + from * padded, width, dim, rescale + from, out.at(batch, head, q0 + from), out.row(),
                       count);
    }
  });
}

// The forward is compiled once, with the operator; decoder_layer.h and encoder_layer.h call it too.
#define FASTLM_ATTENTION_TYPE(prefix, T)                                                                   \
  prefix template void attention_forward<T>(heads_view<const T>, heads_view<const T>, heads_view<const T>, \
                                            heads_view<T>, float*, attention_size, const masking<T>&, int);
#define FASTLM_ATTENTION(prefix) \
  FASTLM_ATTENTION_TYPE(prefix, float) FASTLM_ATTENTION_TYPE(prefix, bf16) FASTLM_ATTENTION_TYPE(prefix, fp16)
FASTLM_ATTENTION(extern)

}  // namespace fastlm
