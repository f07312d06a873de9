// Attention's gradients, from the scores made again:  P = exp(S − lse),  dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ∘ (dP − δ),
// dQ = scale·dS K,  dK = scale·dSᵀ Q, δ = Σ_d dO ∘ O − dlse. Five products of 2·Tq·Tk·D FLOP a head.
//
// One part of the work is the keys (or a share of them) of one key head of one sequence, with every query head of its
// group: dK and dV of a key block stay in the cache while the queries pass by and are written once; dQ is summed in the
// part, and over the parts in their order: no atomics, the same bits on any number of threads.
#pragma once
#include "attention.h"

namespace fastlm {

template <class T> struct attention_gradients {
  heads_view<T> dquery, dkey, dvalue;
  float* dmask;  // the mask's own shape, zeros; null where not wanted
  std::array<int64_t, 4> dmask_strides;
};

// Of dP and of δ. Where one key has nearly all the weight they are nearly equal, and what is left of dP − δ is the
// rounding of their chains.
inline constexpr int64_t DeltaChain = std::min<int64_t>(Chain, 32);

// dmask += dS, the mask's dimensions of size 1 having stride 0.
inline void add_mask_gradient(const float* tile, int64_t width, const tile_place& at, float* dmask,
                              const std::array<int64_t, 4>& strides) {
  dmask += at.batch * strides[0] + at.head * strides[1] + at.query * strides[2] + at.key * strides[3];
  for (int64_t i = 0; i < at.queries; ++i)
    for (int64_t j = 0; j < at.keys; ++j) dmask[i * strides[2] + j * strides[3]] += tile[j * width + i];
}

// A tile's rows (keys) as the first operand of a product that sums over queries, and how far apart they are; `paired`
// is working memory for pairs.
struct key_rows {
  const float* data;
  int64_t stride;
};
template <class Arithmetic> key_rows query_pairs(const float* tile, int64_t keys, int64_t width, float* paired) {
  if constexpr (Arithmetic::PerLane == 2) {
    const int64_t stride = copied_stride<Arithmetic>(width);
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t i = 0; i < width; i += 2 * vec::Lanes)
        Arithmetic::along_k(tile + j * width + i, width - i).store(paired + j * stride + i / 2, full{});
    return {paired, stride};
  }
  return {tile, width};
}

// sums[key][dim] += Σ_query rows[key][query]·natural[query][dim]
template <class Arithmetic> void add_over_queries(int64_t keys, int64_t queries, key_rows rows, const float* natural,
                                                  int64_t wide, float* sums) {
  const panels split(wide / vec::Lanes);
  const int64_t depth = packed_depth<Arithmetic>(queries);
  for (int64_t r = 0; r < keys; r += Arithmetic::Rows)
    for (int64_t p = 0; p < split.count; ++p) {
      const int64_t from = split.begin(p) * vec::Lanes;
      multiply_tile<Arithmetic, true>(split.begin(p + 1) - split.begin(p), depth, rows.data + r * rows.stride,
                                      rows.stride, natural + from, wide, sums + r * wide + from, wide, true);
    }
}

// In place: masked scores, still to be scaled → weights P (dropped ones zero, kept ones scaled), dP → dS. Queries from
// `count` on get zeros. By rows, as the softmax.
template <int Vecs>
void score_gradients(float* scores, float scale, float* dweights, const float* keep, const float* lse,
                     const float* delta, int64_t keys, int64_t count) {
  constexpr int64_t L = vec::Lanes, Width = Vecs * L;
  alignas(64) float row_lse[Width], row_delta[Width] = {};
  std::fill_n(row_lse, Width, INFINITY);
  for (int64_t i = 0; i < count; ++i) {
    row_lse[i] =
        std::isinf(lse[i]) && lse[i] < 0 ? 0.0f : lse[i];  // a fully masked row: all its scores are −inf, its weights 0
    row_delta[i] = delta[i];
  }
  for (int64_t i = count / L * L; i < Width;
       i += L)  // where there is no query the score is 0, but NaN beside a key that holds an Inf
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
  auto rows = [&](auto kept) {
    for (int64_t j = 0; j < keys; ++j) {
      float *s = scores + j * Width, *dw = dweights + j * Width;
      vec p[Vecs];
      for (int v = 0; v < Vecs; ++v) p[v] = vec::load(s + v * L, full{}) * factor - shift[v];
      exp_below(p);
      for (int v = 0; v < Vecs; ++v) {
        vec weight = p[v], dp = vec::load(dw + v * L, full{});
        if constexpr (kept) {
          const vec k = vec::load(keep + j * Width + v * L, full{});
          dp = dp * k;
          weight = weight * k;
        }
        weight.store(s + v * L, full{});
        zero_where(p[v] == vec::zero(), p[v] * (dp - d[v]))
            .store(dw + v * L, full{});  // where nothing was attended, NaN and Inf stay out
      }
    }
  };
  if (keep) rows(std::true_type{});
  else rows(std::false_type{});
}

// δ of one panel of queries as Σ_key P·dP. Twice the work of Σ_d dO·O, but free of the rounding of a 16-bit O, which a
// mask's gradient would show in full: over a row it sums to 0.
template <class T>
void exact_deltas(heads_view<const T> dout, heads_view<const T> query, heads_view<const T> key,
                  heads_view<const T> value, const float* lse, const attention_size& size, const masking<T>& mask,
                  int64_t batch, int64_t head, int64_t from, int64_t queries, int64_t width, float* delta) {
  using arithmetic = arithmetic_for<T>;
  constexpr int64_t L = vec::Lanes;
  const int64_t dim = size.head_dim, depth = packed_depth<arithmetic>(dim), copied = copied_stride<arithmetic>(dim),
                kv_head = head / size.group();
  float* copied_k = scratch(KeyBlock * (2 * copied + 3 * QueryPanel) + QueryPanel * (2 * depth + 1));
  float* copied_v = copied_k + KeyBlock * copied;
  float* scores = copied_v + KeyBlock * copied;
  float* dscores = scores + KeyBlock * QueryPanel;
  float* extra = dscores + KeyBlock * QueryPanel;
  float* packed_q = extra + KeyBlock * QueryPanel;
  float* packed_g = packed_q + QueryPanel * depth;
  float* sums = packed_g + QueryPanel * depth;
  const float none[QueryPanel] = {};
  std::fill_n(sums, QueryPanel, 0.0f);
  pack<arithmetic>(operand<T>{query.at(batch, head, from), query.row(), 1}, queries, dim, width, packed_q);
  pack<arithmetic>(operand<T>{dout.at(batch, head, from), dout.row(), 1}, queries, dim, width, packed_g);
  for (int64_t k0 = mask.first_key(from); k0 < mask.end_key(from + queries, size.key_len); k0 += KeyBlock) {
    const tile_place at{batch,   head, from,
                        queries, k0,   mask.seen(from + queries, k0, std::min(KeyBlock, size.key_len - k0))};
    copy_rows<arithmetic>(operand<T>{key.at(batch, kv_head, k0), key.row(), 1}, at.keys, dim, copied, copied_k);
    copy_rows<arithmetic>(operand<T>{value.at(batch, kv_head, k0), value.row(), 1}, at.keys, dim, copied, copied_v);
    multiply_rows<arithmetic>(at.keys, dim, copied_k, packed_q, scores, width);
    multiply_rows<arithmetic>(at.keys, dim, copied_v, packed_g, dscores, width, DeltaChain);
    const float scale = mask_scores(mask, at, scores, width, extra);
    if (mask.drop.active()) keep_tile(mask.drop, at, size.heads, extra, width);
    const float* keep = mask.drop.active() ? extra : nullptr;
    with_vecs(width / L,
              [=](auto vecs) { score_gradients<vecs>(scores, scale, dscores, keep, lse, none, at.keys, queries); });
    for (int64_t j = 0; j < at.keys; ++j)
      for (int64_t i = 0; i < width; i += L)
        (vec::load(sums + i, full{}) + vec::load(dscores + j * width + i, full{})).store(sums + i, full{});
  }
  std::copy_n(sums, queries, delta);
}

// δ of one panel of queries as Σ_d dO·O, added up in the order of the product that makes dP: where a row attends one
// key, dP − δ is exactly 0.
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
                copied = copied_stride<arithmetic>(dim), wide = ceil_div(dim, L) * L;
  const int64_t group = sizes.group();
  const std::vector<sequence> order = longest_first(sizes);
  auto panels_of = [](const sequence& s) { return panels(ceil_div(s.queries, L)); };
  auto dquery_size_of = [=](const sequence& s) {
    return panels_of(s).total * L * padded;
  };  // of one head: [panel][dim][query]

  buffer deltas = make_buffer(sizes.rows());
  float* delta = deltas.get();
  // Dropout scales what is kept, and with it the rounding of O, past what PyTorch (which computes it in fp32) lets
  // through. Where products are cheap δ is exact in any case: a query's gradient without that is now and then twice as
  // far from the truth as PyTorch's.
  const bool exact = all_grad.dmask || ((masks.drop.active() || arithmetic::Cheap) && sizeof(T) == 2);
  const sequence_parts rows(order, [=](const sequence& s) { return sizes.heads * panels_of(s).count; });
  parallel_parts(rows.total(), threads, [=, &rows, &masks](int64_t number) {
    [[maybe_unused]] const typename arithmetic::session multiplying;
    const auto place = rows.find(number);
    const sequence& of = place.of;
    const heads_view<const T> dout = all_dout.from(of.first_query);
    const panels split = panels_of(of);
    const int64_t head = place.part / split.count, p = place.part % split.count, from = split.begin(p) * L,
                  width = split.begin(p + 1) * L - from;
    const int64_t queries = std::min(width, of.queries - from), row = sizes.row(of, head) + from;
    if (exact) {
      exact_deltas(dout, all_query.from(of.first_query), all_key.from(of.first_key), all_value.from(of.first_key),
                   lse + row, sizes.of(of), masks.moved(of.diagonal), of.index, head, from, queries, width,
                   delta + row);
    } else {
      output_deltas(dout, all_out.from(of.first_query), dim, of.index, head, from, queries, width, delta + row);
    }
    for (int64_t i = 0; dlse && i < queries; ++i) delta[row + i] -= dlse[row + i];
  });

  // Where several (batch, head) add to one place of dmask they take turns; where keys share a place, a head's keys are
  // one part.
  const bool shared = all_grad.dmask && ((all_grad.dmask_strides[0] == 0 && sizes.batch > 1) ||
                                         (all_grad.dmask_strides[1] == 0 && sizes.heads > 1));
  const bool one_part = all_grad.dmask && all_grad.dmask_strides[3] == 0;
  int64_t total_work = 0;
  for (const sequence& s : order) total_work += s.work();
  // A share of a sequence's keys is at most a 16th of all there is to do, or one block.
  auto key_parts_of = [=](const sequence& s) {
    if (one_part || s.work() == 0) return int64_t(1);
    return std::min(ceil_div(s.keys, KeyBlock), shared ? 16 : ceil_div(16 * s.work(), total_work * sizes.kv_heads));
  };
  std::vector<int64_t> partials_before(sizes.batch);
  int64_t partials_size = 0;
  for (const sequence& s : order) {
    partials_before[s.index] = partials_size;
    if (key_parts_of(s) > 1) partials_size += sizes.heads * key_parts_of(s) * dquery_size_of(s);
  }
  buffer partials = make_buffer(partials_size);

  auto store_dquery = [=, &masks](const sequence& of, const float* sums, int64_t head, int64_t p) {
    const panels split = panels_of(of);
    const int64_t from = split.begin(p) * L, width = split.begin(p + 1) * L - from;
    float factor[QueryPanel];
    std::fill_n(factor, width, masks.scale);
    store_transposed(sums, width, dim, factor, all_grad.dquery.at(of.index, head, of.first_query + from),
                     all_grad.dquery.row(), std::min(width, of.queries - from));
  };

  const sequence_parts parts(order, [=](const sequence& s) { return sizes.kv_heads * key_parts_of(s); });
  auto work = [=, &parts, &partials, &partials_before, &masks](int64_t number) {
    [[maybe_unused]] const typename arithmetic::session multiplying;
    const auto place = parts.find(number);
    const sequence& of = place.of;
    const attention_size size = sizes.of(of);
    const masking<T> mask = masks.moved(of.diagonal);
    const heads_view<const T> dout = all_dout.from(of.first_query), query = all_query.from(of.first_query),
                              key = all_key.from(of.first_key), value = all_value.from(of.first_key);
    const attention_gradients<T> grad{all_grad.dquery, all_grad.dkey.from(of.first_key),
                                      all_grad.dvalue.from(of.first_key), all_grad.dmask, all_grad.dmask_strides};
    const panels split = panels_of(of);
    const int64_t query_len = of.queries, key_blocks = ceil_div(of.keys, KeyBlock), key_parts = key_parts_of(of),
                  dquery_size = dquery_size_of(of);
    const int64_t batch = of.index, kv_head = place.part / key_parts, key_part = place.part % key_parts;
    float* partial = partials.get() + partials_before[batch];
    const int64_t first_block = key_blocks * key_part / key_parts, end_block = key_blocks * (key_part + 1) / key_parts;
    // The panels of queries in both forms are packed once, where they are not too many; else again for each block of
    // keys.
    const int64_t panel_size = 2 * QueryPanel * (depth + wide);
    const bool keep_panels = group * split.count * panel_size <= (16 << 20) / 4;
    const int64_t slots = keep_panels ? group * split.count : 1;
    float* copied_k = scratch(KeyBlock * (2 * copied + padded + 2 * wide + 4 * QueryPanel) + slots * (panel_size + 1) +
                              (key_parts == 1 ? group * dquery_size : 0));
    float* copied_v = copied_k + KeyBlock * copied;
    float* transposed_k = copied_v + KeyBlock * copied;
    float* dk = transposed_k + KeyBlock * padded;
    float* dv = dk + KeyBlock * wide;
    float* scores = dv + KeyBlock * wide;
    float* dscores = scores + KeyBlock * QueryPanel;
    float* extra = dscores + KeyBlock * QueryPanel;
    float* paired = extra + KeyBlock * QueryPanel;
    float* packed = paired + KeyBlock * QueryPanel;
    float* own = packed + slots * panel_size;
    float* ready = own + (key_parts == 1 ? group * dquery_size : 0);
    std::fill_n(ready, slots, 0.0f);
    auto dquery = [=](int64_t member) {
      return key_parts == 1 ? own + member * dquery_size
                            : partial + ((kv_head * group + member) * key_parts + key_part) * dquery_size;
    };
    uint8_t nonfinite[KeyBlock];
    for (int64_t member = 0; member < group; ++member) std::fill_n(dquery(member), dquery_size, 0.0f);

    for (int64_t block = first_block; block < end_block; ++block) {
      const int64_t k0 = block * KeyBlock, keys = std::min(KeyBlock, size.key_len - k0);
      const T* k = key.at(batch, kv_head, k0);
      const int64_t bad = find_nonfinite(k, key.row(), keys, dim, nonfinite);
      copy_rows<arithmetic>(operand<T>{k, key.row(), 1}, keys, dim, copied, copied_k);
      copy_rows<arithmetic>(operand<T>{value.at(batch, kv_head, k0), value.row(), 1}, keys, dim, copied, copied_v);
      pack_transposed<arithmetic>(k, key.row(), keys, dim, bad, nonfinite, transposed_k);
      std::fill_n(dk, KeyBlock * wide, 0.0f);
      std::fill_n(dv, KeyBlock * wide, 0.0f);

      for (int64_t member = 0; member < group; ++member) {
        const int64_t head = kv_head * group + member, first_row = sizes.row(of, head);
        for (int64_t p = 0; p < split.count; ++p) {
          const int64_t from = split.begin(p) * L, width = split.begin(p + 1) * L - from,
                        queries = std::min(width, query_len - from);
          const tile_place at{batch, head, from, queries, k0, mask.seen(from + queries, k0, keys)};
          if (!mask.touches(from, from + queries, k0, k0 + at.keys)) continue;
          const T *q = query.at(batch, head, from), *g = dout.at(batch, head, from);
          const int64_t slot = keep_panels ? member * split.count + p : 0;
          float* packed_q = packed + slot * panel_size;
          float* packed_g = packed_q + QueryPanel * depth;
          float* natural_q = packed_g + QueryPanel * depth;
          float* natural_g = natural_q + QueryPanel * wide;
          if (!keep_panels || ready[slot] == 0) {
            pack<arithmetic>(operand<T>{q, query.row(), 1}, queries, dim, width, packed_q);
            pack<arithmetic>(operand<T>{g, dout.row(), 1}, queries, dim, width, packed_g);
            pack<arithmetic>(operand<T>{q, 1, query.row()}, dim, queries, wide, natural_q);
            pack<arithmetic>(operand<T>{g, 1, dout.row()}, dim, queries, wide, natural_g);
            ready[slot] = 1;
          }

          multiply_rows<arithmetic>(at.keys, dim, copied_k, packed_q, scores, width);
          multiply_rows<arithmetic>(at.keys, dim, copied_v, packed_g, dscores, width, DeltaChain);
          const float scale = mask_scores(mask, at, scores, width, extra);
          if (mask.drop.active()) keep_tile(mask.drop, at, size.heads, extra, width);
          const float *keep = mask.drop.active() ? extra : nullptr, *row_lse = lse + first_row + from,
                      *row_delta = delta + first_row + from;
          with_vecs(width / L, [=](auto vecs) {
            score_gradients<vecs>(scores, scale, dscores, keep, row_lse, row_delta, at.keys, queries);
          });
          if (grad.dmask) add_mask_gradient(dscores, width, at, grad.dmask, grad.dmask_strides);
          add_over_queries<arithmetic>(at.keys, queries, query_pairs<arithmetic>(scores, at.keys, width, paired),
                                       natural_g, wide, dv);
          add_over_queries<arithmetic>(at.keys, queries, query_pairs<arithmetic>(dscores, at.keys, width, paired),
                                       natural_q, wide, dk);
          pair_rows<arithmetic>(dscores, at.keys, width);
          add_transposed<arithmetic>(dim, packed_depth<arithmetic>(at.keys), packed_depth<arithmetic>(keys),
                                     transposed_k, dscores, dquery(member) + from * padded, width);
        }
      }
      for (int64_t j = 0; j < keys; ++j) {
        T *dkey = grad.dkey.at(batch, kv_head, k0 + j), *dvalue = grad.dvalue.at(batch, kv_head, k0 + j);
        sweep(dim, [=, &mask](int64_t i, auto span) {
          (vec::load(dk + j * wide + i, full{}) * vec::all(mask.scale)).store(dkey + i, span);
          vec::load(dv + j * wide + i, full{}).store(dvalue + i, span);
        });
      }
    }
    if (key_parts == 1)
      for (int64_t member = 0; member < group; ++member)
        for (int64_t p = 0; p < split.count; ++p)
          store_dquery(of, own + member * dquery_size + split.begin(p) * L * padded, kv_head * group + member, p);
  };
  if (shared) {
    const int64_t pairs = sizes.batch * sizes.kv_heads, key_parts = parts.total() / pairs;
    for (int64_t pair = 0; pair < pairs; ++pair)
      parallel_parts(key_parts, threads, [=](int64_t key_part) { work(pair * key_parts + key_part); });
  } else {
    parallel_parts(parts.total(), threads, work);
  }

  const sequence_parts sums_of(
      order, [=](const sequence& s) { return key_parts_of(s) > 1 ? sizes.heads * panels_of(s).count : 0; });
  parallel_parts(sums_of.total(), threads, [=, &sums_of, &partials, &partials_before](int64_t number) {
    const auto place = sums_of.find(number);
    const sequence& of = place.of;
    const panels split = panels_of(of);
    const int64_t head = place.part / split.count, p = place.part % split.count, offset = split.begin(p) * L * padded,
                  count = (split.begin(p + 1) - split.begin(p)) * L * padded, key_parts = key_parts_of(of),
                  dquery_size = dquery_size_of(of);
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
