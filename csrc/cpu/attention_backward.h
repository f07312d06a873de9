// The gradients of attention, from recomputed scores:  P = exp(S − lse),  dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ∘ (dP − δ),
// dQ = scale·dS K,  dK = scale·dSᵀ Q,  δ = Σ_d dO ∘ O − dlse. Where scores are capped, dQ and dK take dS ∘ (1 − tanh²).
//
// Five products of 2·Tq·Tk·D FLOP per head; reads Q, K, V, O and dO and writes dQ, dK and dV: compute bound. A part of
// the work is the keys, or a range of them, of one kv head of one sequence, with all query heads of its group: dK
// and dV of a key block stay in the cache during the loop over queries and are written once. dQ is accumulated per
// part; the partials of several parts are then added in order: no atomics, the same bits on any number of threads.
#pragma once
#include "attention.h"

namespace fastlm {

template <class T> struct attention_gradients {
  heads_view<T> dquery, dkey, dvalue;
  float* dmask;  // in the mask's shape, zero-initialised; null where not wanted
  std::array<int64_t, 4> dmask_strides;
};

// The chain length of dP and δ. Where one key has nearly all the weight, dP and δ are nearly equal, and their
// difference is dominated by the rounding of their chains.
inline constexpr int64_t DeltaChain = std::min<int64_t>(Chain, 32);

// dmask += dS; dimensions of the mask of size 1 have stride 0.
inline void add_mask_gradient(const float* tile, int64_t width, const tile_position& at, float* dmask,
                              const std::array<int64_t, 4>& strides) {
  dmask += at.batch * strides[0] + at.head * strides[1] + at.query * strides[2] + at.key * strides[3];
  for (int64_t i = 0; i < at.queries; ++i)
    for (int64_t j = 0; j < at.keys; ++j) dmask[i * strides[2] + j * strides[3]] += tile[j * width + i];
}

// A tile's rows (keys) as the lhs of a product that sums over queries, and their stride; `paired` is scratch memory for
// lanes of two elements.
struct key_rows {
  const float* data;
  int64_t stride;
};
template <class Arithmetic> key_rows query_pairs(const float* tile, int64_t keys, int64_t width, float* paired) {
  if constexpr (Arithmetic::PerLane == 2) {
    const int64_t stride = row_major_stride<Arithmetic>(width);
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t i = 0; i < width; i += 2 * vec::Lanes)
        Arithmetic::along_k(tile + j * width + i, width - i).store(paired + j * stride + i / 2, full{});
    return {paired, stride};
  }
  return {tile, width};
}

// sums[key][dim] += Σ_query rows[key][query]·query_major[query][dim]
template <class Arithmetic> void add_over_queries(int64_t keys, int64_t queries, key_rows rows,
                                                  const float* query_major, int64_t padded_width, float* sums) {
  const panel_split panels(padded_width / vec::Lanes);
  const int64_t depth = packed_depth<Arithmetic>(queries);
  for (int64_t r = 0; r < keys; r += Arithmetic::MR)
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t from = panels.begin(p) * vec::Lanes;
      multiply_tile<Arithmetic, true>(panels.begin(p + 1) - panels.begin(p), depth, rows.data + r * rows.stride,
                                      rows.stride, query_major + from, padded_width, sums + r * padded_width + from,
                                      padded_width, true);
    }
}

// In place: masked scores, with `scale` still to be applied → weights P (dropped ones zero, kept ones scaled), dP → dS.
// Queries from `count` on get zeros. Works row by row, as the softmax does. With Sums the sum of each row's P, before
// dropout, is added to `sums`.
template <int Vecs, bool Sums = false>
void score_gradients(float* scores, float scale, float* dweights, const float* keep, const float* lse,
                     const float* delta, int64_t keys, int64_t count, float* sums = nullptr) {
  constexpr int64_t L = vec::Lanes, Width = Vecs * L;
  alignas(64) float row_lse[Width], row_delta[Width] = {};
  std::fill_n(row_lse, Width, INFINITY);
  for (int64_t i = 0; i < count; ++i) {
    // A fully masked row: all its scores are −inf, its weights 0.
    row_lse[i] = std::isinf(lse[i]) && lse[i] < 0 ? 0.0f : lse[i];
    row_delta[i] = delta[i];
  }
  // Without a query the score is 0, or NaN beside a key that holds an Inf.
  for (int64_t i = count / L * L; i < Width; i += L)
    for (int64_t j = 0; j < keys; ++j) {
      float* s = scores + j * Width + i;
      select(vec::iota() < vec::all(float(count - i)), vec::load(s, full{}), vec::zero()).store(s, full{});
    }
  const vec factor = vec::all(scale);
  vec shift[Vecs], d[Vecs];
  for (int v = 0; v < Vecs; ++v) {
    shift[v] = vec::load(row_lse + v * L, full{});
    d[v] = vec::load(row_delta + v * L, full{});
  }
  vec total[Vecs];
  for (int v = 0; Sums && v < Vecs; ++v) total[v] = vec::load(sums + v * L, full{});
  auto rows = [&](auto kept) {
    for (int64_t j = 0; j < keys; ++j) {
      float *s = scores + j * Width, *dw = dweights + j * Width;
      vec p[Vecs];
      // Rounded as in online_softmax: P of the only visible key is exactly 1.
      for (int v = 0; v < Vecs; ++v) p[v] = rounded(vec::load(s + v * L, full{}) * factor) - shift[v];
      exp_nonpositive(p);
      for (int v = 0; v < Vecs; ++v) {
        vec weight = p[v], dp = vec::load(dw + v * L, full{});
        if constexpr (Sums) total[v] = total[v] + weight;
        if constexpr (kept) {
          const vec k = vec::load(keep + j * Width + v * L, full{});
          dp = dp * k;
          weight = weight * k;
        }
        weight.store(s + v * L, full{});
        zero_where(p[v] == vec::zero(), p[v] * (dp - d[v]))
            .store(dw + v * L, full{});  // keeps NaN and Inf out where the weight is 0
      }
    }
  };
  if (keep) rows(std::true_type{});
  else rows(std::false_type{});
  for (int v = 0; Sums && v < Vecs; ++v) total[v].store(sums + v * L, full{});
}

// In place: dS → dS ∘ slopes; a dS of 0 stays 0 where the slope of a masked score is NaN.
inline void multiply_slopes(const float* slopes, int64_t count, float* dscores) {
  for (int64_t i = 0; i < count; i += vec::Lanes) {
    const vec d = vec::load(dscores + i, full{});
    zero_where(d == vec::zero(), d * vec::load(slopes + i, full{})).store(dscores + i, full{});
  }
}

// δ of one panel of queries as Σ_key P·dP / Σ_key P. Twice the work of Σ_d dO·O, but without the rounding of a 16-bit
// O, which would dominate the gradient of a mask: over a row that sums to 0. ΣP is not 1 where large scores round lse.
template <class T>
void exact_deltas(heads_view<const T> dout, heads_view<const T> query, heads_view<const T> key,
                  heads_view<const T> value, const float* lse, const attention_size& size, const masking<T>& mask,
                  int64_t batch, int64_t head, int64_t from, int64_t queries, int64_t width, float* delta) {
  using arithmetic = arithmetic_for<T>;
  constexpr int64_t L = vec::Lanes;
  const int64_t dim = size.head_dim, depth = packed_depth<arithmetic>(dim), copied = row_major_stride<arithmetic>(dim),
                kv_head = head / size.group_size();
  float* k_rows = scratch(KeyBlock * (2 * copied + 3 * QueryPanel) + QueryPanel * (2 * depth + 2));
  float* v_rows = k_rows + KeyBlock * copied;
  float* scores = v_rows + KeyBlock * copied;
  float* dscores = scores + KeyBlock * QueryPanel;
  float* extra = dscores + KeyBlock * QueryPanel;
  float* packed_q = extra + KeyBlock * QueryPanel;
  float* packed_g = packed_q + QueryPanel * depth;
  float *sums = packed_g + QueryPanel * depth, *weight_sums = sums + QueryPanel;
  const float none[QueryPanel] = {};
  std::fill_n(sums, 2 * QueryPanel, 0.0f);
  pack<arithmetic>(operand<T>{query.at(batch, head, from), query.row(), 1}, queries, dim, width, packed_q);
  pack<arithmetic>(operand<T>{dout.at(batch, head, from), dout.row(), 1}, queries, dim, width, packed_g);
  for (int64_t k0 = mask.first_key(from); k0 < mask.end_key(from + queries, size.key_len); k0 += KeyBlock) {
    const auto [first, visible] = mask.visible_keys(from, from + queries, k0, std::min(KeyBlock, size.key_len - k0));
    const tile_position at{batch, head, from, queries, k0 + first, visible};
    copy_rows<arithmetic>(operand<T>{key.at(batch, kv_head, at.key), key.row(), 1}, at.keys, dim, copied, k_rows);
    copy_rows<arithmetic>(operand<T>{value.at(batch, kv_head, at.key), value.row(), 1}, at.keys, dim, copied, v_rows);
    multiply_rows<arithmetic>(at.keys, dim, k_rows, packed_q, scores, width);
    multiply_rows<arithmetic>(at.keys, dim, v_rows, packed_g, dscores, width, DeltaChain);
    const float scale = mask_scores(mask, at, scores, width, extra);
    if (mask.drop.active()) dropout_tile(mask.drop, at, size.num_heads, extra, width);
    const float* keep = mask.drop.active() ? extra : nullptr;
    with_vecs(width / L, [=](auto vecs) {
      score_gradients<vecs, true>(scores, scale, dscores, keep, lse, none, at.keys, queries, weight_sums);
    });
    for (int64_t j = 0; j < at.keys; ++j)
      for (int64_t i = 0; i < width; i += L)
        (vec::load(sums + i, full{}) + vec::load(dscores + j * width + i, full{})).store(sums + i, full{});
  }
  for (int64_t i = 0; i < queries; ++i) delta[i] = weight_sums[i] == 0 ? 0.0f : sums[i] / weight_sums[i];
}

// δ of one panel of queries as Σ_d dO·O, in the order of the product that computes dP: where a row attends one key, dP
// − δ is exactly 0.
template <class T> void output_deltas(heads_view<const T> dout, heads_view<const T> out, int64_t dim, int64_t batch,
                                      int64_t head, int64_t from, int64_t queries, int64_t width, float* delta) {
  using arithmetic = arithmetic_for<T>;
  const int64_t depth = packed_depth<arithmetic>(dim);
  float* packed_g = scratch(2 * depth * width);
  float* packed_o = packed_g + depth * width;
  pack<arithmetic>(operand<T>{dout.at(batch, head, from), dout.row(), 1}, queries, dim, width, packed_g);
  pack<arithmetic>(operand<T>{out.at(batch, head, from), out.row(), 1}, queries, dim, width, packed_o);
  sweep(queries, [=](int64_t i, auto span) {
    column_products<arithmetic>(depth, packed_o + i, packed_g + i, width, DeltaChain).store(delta + i, span);
  });
}

template <class T>
void attention_backward(heads_view<const T> all_dout, heads_view<const T> all_query, heads_view<const T> all_key,
                        heads_view<const T> all_value, heads_view<const T> all_out, const float* lse, const float* dlse,
                        attention_gradients<T> all_grad, attention_size sizes, const masking<T>& masks, int threads) {
  using arithmetic = arithmetic_for<T>;
  constexpr int64_t L = vec::Lanes;
  const int64_t dim = sizes.head_dim, padded = sizes.padded_dim(), depth = packed_depth<arithmetic>(dim),
                copied = row_major_stride<arithmetic>(dim), padded_width = ceil_div(dim, L) * L;
  const int64_t group_size = sizes.group_size();
  const std::vector<sequence> order = longest_first(sizes);
  auto panels_of = [](const sequence& s) { return panel_split(ceil_div(s.queries, L)); };
  auto dquery_size_of = [=](const sequence& s) {
    return panels_of(s).total * L * padded;
  };  // of one head: [panel][dim][query]

  buffer deltas = make_buffer(sizes.rows());
  float* delta = deltas.get();
  // Dropout scales the kept weights, and the rounding of a 16-bit O with them, beyond the error of PyTorch, which
  // computes O in fp32. Where products are cheap δ is always exact: without that a query's gradient can be twice as far
  // from the truth as PyTorch's.
  const bool exact = all_grad.dmask || ((masks.drop.active() || arithmetic::CheapProducts) && sizeof(T) == 2);
  const sequence_parts rows(order, [=](const sequence& s) { return sizes.num_heads * panels_of(s).count; });
  parallel_parts(rows.total(), threads, [=, &rows, &masks](int64_t number) {
    [[maybe_unused]] const typename arithmetic::session multiplying;
    const auto place = rows.find(number);
    const sequence& of = place.of;
    const heads_view<const T> dout = all_dout.from(of.first_query);
    const panel_split panels = panels_of(of);
    const int64_t head = place.part / panels.count, p = place.part % panels.count, from = panels.begin(p) * L,
                  width = panels.begin(p + 1) * L - from;
    const int64_t queries = std::min(width, of.queries - from), row = sizes.row(of, head) + from;
    if (exact) {
      exact_deltas(dout, all_query.from(of.first_query), all_key.from(of.first_key), all_value.from(of.first_key),
                   lse + row, sizes.of(of), masks.shifted(of.diagonal), of.index, head, from, queries, width,
                   delta + row);
    } else {
      output_deltas(dout, all_out.from(of.first_query), dim, of.index, head, from, queries, width, delta + row);
    }
    for (int64_t i = 0; dlse && i < queries; ++i) delta[row + i] -= dlse[row + i];
  });

  // Where several (batch, head) add to one element of dmask they run one after another; where keys share an element,
  // all keys of a head are one part.
  const bool shared = all_grad.dmask && ((all_grad.dmask_strides[0] == 0 && sizes.batch > 1) ||
                                         (all_grad.dmask_strides[1] == 0 && sizes.num_heads > 1));
  const bool one_part = all_grad.dmask && all_grad.dmask_strides[3] == 0;
  int64_t total_work = 0;
  for (const sequence& s : order) total_work += s.work();
  // A part of a sequence's keys is at most a 16th of all the work, or one block.
  auto key_parts_of = [=](const sequence& s) {
    if (one_part || s.work() == 0) return int64_t(1);
    return std::min(ceil_div(s.keys, KeyBlock), shared ? 16 : ceil_div(16 * s.work(), total_work * sizes.num_kv_heads));
  };
  std::vector<int64_t> partials_before(sizes.batch);
  int64_t partials_size = 0;
  for (const sequence& s : order) {
    partials_before[s.index] = partials_size;
    if (key_parts_of(s) > 1) partials_size += sizes.num_heads * key_parts_of(s) * dquery_size_of(s);
  }
  buffer partials = make_buffer(partials_size);

  auto store_dquery = [=, &masks](const sequence& of, const float* sums, int64_t head, int64_t p) {
    const panel_split panels = panels_of(of);
    const int64_t from = panels.begin(p) * L, width = panels.begin(p + 1) * L - from;
    float factor[QueryPanel];
    std::fill_n(factor, width, masks.scale);
    store_transposed(sums, width, dim, factor, all_grad.dquery.at(of.index, head, of.first_query + from),
                     all_grad.dquery.row(), std::min(width, of.queries - from));
  };

  const sequence_parts parts(order, [=](const sequence& s) { return sizes.num_kv_heads * key_parts_of(s); });
  auto work = [=, &parts, &partials, &partials_before, &masks](int64_t number) {
    [[maybe_unused]] const typename arithmetic::session multiplying;
    const auto place = parts.find(number);
    const sequence& of = place.of;
    const attention_size size = sizes.of(of);
    const masking<T> mask = masks.shifted(of.diagonal);
    const heads_view<const T> dout = all_dout.from(of.first_query), query = all_query.from(of.first_query),
                              key = all_key.from(of.first_key), value = all_value.from(of.first_key);
    const attention_gradients<T> grad{all_grad.dquery, all_grad.dkey.from(of.first_key),
                                      all_grad.dvalue.from(of.first_key), all_grad.dmask, all_grad.dmask_strides};
    const panel_split panels = panels_of(of);
    const int64_t query_len = of.queries, key_blocks = ceil_div(of.keys, KeyBlock), key_parts = key_parts_of(of),
                  dquery_size = dquery_size_of(of);
    const int64_t batch = of.index, kv_head = place.part / key_parts, key_part = place.part % key_parts;
    float* partial = partials.get() + partials_before[batch];
    const int64_t first_block = key_blocks * key_part / key_parts, end_block = key_blocks * (key_part + 1) / key_parts;
    // Panels of queries are packed once, in both layouts, if they are not too many; otherwise for each block of keys.
    const int64_t panel_size = 2 * QueryPanel * (depth + padded_width);
    const bool capped = mask.softcap > 0, keep_panels = group_size * panels.count * panel_size <= (16 << 20) / 4;
    const int64_t slots = keep_panels ? group_size * panels.count : 1;
    float* k_rows =
        scratch(KeyBlock * (2 * copied + padded + 2 * padded_width + 4 * QueryPanel) + slots * (panel_size + 1) +
                (key_parts == 1 ? group_size * dquery_size : 0) + (capped ? KeyBlock * QueryPanel : 0));
    float* v_rows = k_rows + KeyBlock * copied;
    float* transposed_k = v_rows + KeyBlock * copied;
    float* dk = transposed_k + KeyBlock * padded;
    float* dv = dk + KeyBlock * padded_width;
    float* scores = dv + KeyBlock * padded_width;
    float* dscores = scores + KeyBlock * QueryPanel;
    float* extra = dscores + KeyBlock * QueryPanel;
    float* paired = extra + KeyBlock * QueryPanel;
    float* packed = paired + KeyBlock * QueryPanel;
    float* own = packed + slots * panel_size;
    float* tile_of_slopes = own + (key_parts == 1 ? group_size * dquery_size : 0);
    float* ready = tile_of_slopes + (capped ? KeyBlock * QueryPanel : 0);
    float* slopes = capped ? tile_of_slopes : nullptr;
    std::fill_n(ready, slots, 0.0f);
    auto dquery = [=](int64_t group_head) {
      return key_parts == 1 ? own + group_head * dquery_size
                            : partial + ((kv_head * group_size + group_head) * key_parts + key_part) * dquery_size;
    };
    uint8_t nonfinite[KeyBlock];
    for (int64_t group_head = 0; group_head < group_size; ++group_head)
      std::fill_n(dquery(group_head), dquery_size, 0.0f);

    for (int64_t block = first_block; block < end_block; ++block) {
      const int64_t k0 = block * KeyBlock, keys = std::min(KeyBlock, size.key_len - k0);
      const T* k = key.at(batch, kv_head, k0);
      const int64_t num_nonfinite = find_nonfinite_rows(k, key.row(), keys, dim, nonfinite);
      copy_rows<arithmetic>(operand<T>{k, key.row(), 1}, keys, dim, copied, k_rows);
      copy_rows<arithmetic>(operand<T>{value.at(batch, kv_head, k0), value.row(), 1}, keys, dim, copied, v_rows);
      pack_transposed<arithmetic>(k, key.row(), keys, dim, num_nonfinite, nonfinite, transposed_k);
      std::fill_n(dk, KeyBlock * padded_width, 0.0f);
      std::fill_n(dv, KeyBlock * padded_width, 0.0f);

      for (int64_t group_head = 0; group_head < group_size; ++group_head) {
        const int64_t head = kv_head * group_size + group_head, first_row = sizes.row(of, head);
        for (int64_t p = 0; p < panels.count; ++p) {
          const int64_t from = panels.begin(p) * L, width = panels.begin(p + 1) * L - from,
                        queries = std::min(width, query_len - from);
          const auto [first, visible] = mask.visible_keys(from, from + queries, k0, keys);
          const tile_position at{batch, head, from, queries, k0 + first, visible};
          if (!mask.intersects(from, from + queries, at.key, at.key + at.keys)) continue;
          const T *q = query.at(batch, head, from), *g = dout.at(batch, head, from);
          const int64_t slot = keep_panels ? group_head * panels.count + p : 0;
          float* packed_q = packed + slot * panel_size;
          float* packed_g = packed_q + QueryPanel * depth;
          float* query_major_q = packed_g + QueryPanel * depth;
          float* query_major_g = query_major_q + QueryPanel * padded_width;
          if (!keep_panels || ready[slot] == 0) {
            pack<arithmetic>(operand<T>{q, query.row(), 1}, queries, dim, width, packed_q);
            pack<arithmetic>(operand<T>{g, dout.row(), 1}, queries, dim, width, packed_g);
            pack<arithmetic>(operand<T>{q, 1, query.row()}, dim, queries, padded_width, query_major_q);
            pack<arithmetic>(operand<T>{g, 1, dout.row()}, dim, queries, padded_width, query_major_g);
            ready[slot] = 1;
          }

          multiply_rows<arithmetic>(at.keys, dim, k_rows + first * copied, packed_q, scores, width);
          multiply_rows<arithmetic>(at.keys, dim, v_rows + first * copied, packed_g, dscores, width, DeltaChain);
          const float scale = mask_scores(mask, at, scores, width, extra, slopes);
          if (mask.drop.active()) dropout_tile(mask.drop, at, size.num_heads, extra, width);
          const float *keep = mask.drop.active() ? extra : nullptr, *row_lse = lse + first_row + from,
                      *row_delta = delta + first_row + from;
          with_vecs(width / L, [=](auto vecs) {
            score_gradients<vecs>(scores, scale, dscores, keep, row_lse, row_delta, at.keys, queries);
          });
          if (grad.dmask) add_mask_gradient(dscores, width, at, grad.dmask, grad.dmask_strides);
          if (slopes) multiply_slopes(slopes, at.keys * width, dscores);
          add_over_queries<arithmetic>(at.keys, queries, query_pairs<arithmetic>(scores, at.keys, width, paired),
                                       query_major_g, padded_width, dv + first * padded_width);
          add_over_queries<arithmetic>(at.keys, queries, query_pairs<arithmetic>(dscores, at.keys, width, paired),
                                       query_major_q, padded_width, dk + first * padded_width);
          pair_rows<arithmetic>(dscores, at.keys, width);
          add_transposed<arithmetic>(dim, first / arithmetic::PerLane, packed_depth<arithmetic>(at.keys),
                                     packed_depth<arithmetic>(keys), transposed_k, dscores,
                                     dquery(group_head) + from * padded, width);
        }
      }
      for (int64_t j = 0; j < keys; ++j) {
        T *dkey = grad.dkey.at(batch, kv_head, k0 + j), *dvalue = grad.dvalue.at(batch, kv_head, k0 + j);
        sweep(dim, [=, &mask](int64_t i, auto span) {
          (vec::load(dk + j * padded_width + i, full{}) * vec::all(mask.scale)).store(dkey + i, span);
          vec::load(dv + j * padded_width + i, full{}).store(dvalue + i, span);
        });
      }
    }
    if (key_parts == 1)
      for (int64_t group_head = 0; group_head < group_size; ++group_head)
        for (int64_t p = 0; p < panels.count; ++p)
          store_dquery(of, own + group_head * dquery_size + panels.begin(p) * L * padded,
                       kv_head * group_size + group_head, p);
  };
  if (shared) {
    const int64_t pairs = sizes.batch * sizes.num_kv_heads, key_parts = parts.total() / pairs;
    for (int64_t pair = 0; pair < pairs; ++pair)
      parallel_parts(key_parts, threads, [=](int64_t key_part) { work(pair * key_parts + key_part); });
  } else {
    parallel_parts(parts.total(), threads, work);
  }

  const sequence_parts sums_of(
      order, [=](const sequence& s) { return key_parts_of(s) > 1 ? sizes.num_heads * panels_of(s).count : 0; });
  parallel_parts(sums_of.total(), threads, [=, &sums_of, &partials, &partials_before](int64_t number) {
    const auto place = sums_of.find(number);
    const sequence& of = place.of;
    const panel_split panels = panels_of(of);
    const int64_t head = place.part / panels.count, p = place.part % panels.count,
                  offset = panels.begin(p) * L * padded, count = (panels.begin(p + 1) - panels.begin(p)) * L * padded,
                  key_parts = key_parts_of(of), dquery_size = dquery_size_of(of);
    float* sums = partials.get() + partials_before[of.index] + head * key_parts * dquery_size + offset;
    for (int64_t key_part = 1; key_part < key_parts; ++key_part) {
      const float* more = sums + key_part * dquery_size;
      sweep(count, [=](int64_t i, auto) {
        (vec::load(sums + i, full{}) + vec::load(more + i, full{})).store(sums + i, full{});
      });
    }
    store_dquery(of, sums, head, p);
  });
}

}  // namespace fastlm
