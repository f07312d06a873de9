// The gradients of attention: one kernel by tiles of queries, one by tiles of keys, and for the gradient of an additive
// mask the first kernel once more. There are no atomics: every sum has one owner and a fixed order.
//
// The query kernel computes dq of a tile and iterates over the keys. The key kernel computes dk and dv of a tile and
// iterates over the queries of all heads that share it, with transposed scores, so that both products that follow take
// them from registers. Weights are recomputed from the log-sum-exp of the forward pass, and δ = Σ out · dout − dlse is
// computed by a kernel before. One head takes 14 · query_len · key_len · head_dim FLOPs, half of it with a causal mask:
// seven products instead of five, because both kernels compute the scores and dout vᵀ. That is the cost of gradients
// without atomics.
//
// exact: with the gradient of a mask, all gradients are as accurate as PyTorch's, whose operator for it multiplies
// 16-bit numbers in float32. dscores sum to 0 over a row, so the rounding error of `out` in δ would dominate, followed
// by those of the weights and dscores. δ is therefore Σ weights · dweights of float32 weights, from an additional loop
// over the keys, and the factors are multiplied in two parts: five more products.
//
// The gradient of a mask takes the registers of dq: a block computes a tile of it and iterates over the dimensions that
// the mask was broadcast over.
//
// Design notes: tiles are double-buffered by cp.async if 99 KiB of shared memory hold them. From head_dim 129 on (65 in
// float32) dk and dv do not fit into registers together: a block computes one of them, and the scores are computed a
// third time.
#include "attention_tile.cuh"

namespace fastlm::cuda {
namespace {

template <class T, int D> struct QueryTile {
  static constexpr int Warps = sizeof(T) == 4 && D > 128 ? 2 : 4, Queries = 16 * Warps;
  static constexpr int Keys = D > 128 ? 16 : sizeof(T) == 2 && D == 64 ? 64 : 32;
  static constexpr int Stages = D * sizeof(T) > (sizeof(T) == 2 ? 512 : 256) ? 1 : 2;
  static constexpr int Bytes = 2 * (Queries + Stages * Keys) * D * int(sizeof(T));
  static constexpr int MinBlocks = D * sizeof(T) <= 256 ? 2 : 1;
  static_assert(Bytes <= 99 << 10);
  static_assert(Keys <= D, "the gradient of the mask takes the registers of dq");
};

template <class T, int D> struct KeyTile {
  static constexpr int Warps = sizeof(T) == 4 && D > 128 ? 2 : 4, Keys = 16 * Warps;
  static constexpr int Queries = sizeof(T) == 2 ? (D <= 64 ? 64 : D == 128 ? 16 : 32) : D <= 128 ? 32 : 16;
  static constexpr int Stages = D * sizeof(T) > 256 ? 1 : 2;
  static constexpr bool Joint = sizeof(T) == 2 ? D <= 128 : D <= 64;  // dk and dv in one block
  static constexpr int Unroll = sizeof(T) == 4 ? 2 : D <= 128 ? KSteps<T, D> : 4;
  static constexpr int RowBytes = 2 * int(sizeof(float)) * Queries;  // lse and δ of a stage
  static constexpr int Bytes = 2 * (Keys + Stages * Queries) * D * int(sizeof(T)) + Stages * RowBytes + 16 * Queries;
  static constexpr int MinBlocks = D <= 64 ? 2 : 1;
  static_assert(Bytes <= 99 << 10);
};

// Before scores are masked: caps them, and multiplies dP − δ by the derivative of the cap, which is not known
// afterwards. delta(n, e) is δ of an element; without_slope: the derivative counts as 1.
template <int N, class Delta> FASTLM_DEVICE void cap_with_gradient(float (&scores)[N / 8][4],
                                                                   float (&dweights)[N / 8][4], const AttentionArgs& a,
                                                                   float scale, bool without_slope, Delta delta) {
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const CappedScore capped = capped_score(a, scores[n][e], scale);
      scores[n][e] = capped.score;
      dweights[n][e] = (dweights[n][e] - delta(n, e)) * (without_slope ? 1.f : capped.slope);
    }
}

// The derivative of the cap, by the unscaled score; 1 without a cap.
FASTLM_DEVICE float slope_of(const AttentionArgs& a, float score) {
  return a.softcap > 0 ? capped_score(a, score, a.scale).slope : 1.f;
}

FASTLM_DEVICE int64_t row_offset(const AttentionArgs& a, const Sequence& s, int head) {
  return s.batch * a.lse_batch_stride + head * a.lse_head_stride + s.query_begin;
}

// A fully masked row has a log-sum-exp of −∞. With +∞ instead all its weights are 0.
FASTLM_DEVICE float weight_lse(float lse) { return lse == -INFINITY ? INFINITY : lse; }

// exp(score · scale − log-sum-exp). The product is rounded as in the forward pass: the weight of the only visible key
// is exactly 1.
FASTLM_DEVICE float weight_of(float score, float lse, float scale) {
  return exp2_fast((multiply_rounded(score, scale) - lse) * Log2e);
}

// δ of each query, one warp per row.
constexpr int DeltaWarps = 4;

template <class T> __global__ void __launch_bounds__(DeltaWarps * 32)
    attention_delta_kernel(FASTLM_CONSTANT AttentionBackwardArgs a, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * DeltaWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t query = row % a.query_len, head = row / a.query_len % a.num_heads,
                batch = row / a.query_len / a.num_heads;
  float delta = dot(read_channels<T>(token_of<T>(a.out, batch, head, query), a.head_dim),
                    read_channels<T>(token_of<T>(a.dout, batch, head, query), a.head_dim));
  const int64_t at = batch * a.lse_batch_stride + head * a.lse_head_stride + query;
  if (a.dlse) delta -= a.dlse[at];
  if (threadIdx.x % 32 == 0) a.delta[at] = delta;
}

// One row of dq computed by one warp without tensor cores, which adds visible keys only.
template <class T>
__device__ __attribute__((noinline)) void recompute_query_gradient_row(const AttentionBackwardArgs& a, int batch, int i,
                                                                       int head, int begin, int end) {
  const Sequence s = sequence_of(a, batch);
  const int kv_head = head / (a.num_heads / a.num_kv_heads);
  const uint64_t seed = a.seed ? *a.seed : 0;
  const Channels query = read_channels<T>(token_of<T>(a.query, batch, head, s.query_begin + i), a.head_dim);
  const Channels dout = read_channels<T>(token_of<T>(a.dout, batch, head, s.query_begin + i), a.head_dim);
  const float lse = weight_lse(a.lse[row_offset(a, s, head) + i]), delta = a.delta[row_offset(a, s, head) + i];
  Channels dquery = {};
  for (int j = begin; j < end; ++j) {
    const Channels key = read_channels<T>(token_of<T>(a.key, batch, kv_head, s.key_begin + j), a.head_dim);
    float score = dot(query, key);
    const float slope = slope_of(a, score);
    if (!is_visible<T>(a, s, head, i, j, score)) continue;
    float dweight = dot(dout, read_channels<T>(token_of<T>(a.value, batch, kv_head, s.key_begin + j), a.head_dim));
    if (a.seed) dweight = kept(seed, a.threshold, j, i, batch * a.num_heads + head) ? dweight * a.keep_scale : 0.f;
    const float dscore = weight_of(score, lse, 1) * (dweight - delta) * slope;
    for (int c = 0; c < WidestHead / 32; ++c) dquery.at[c] += dscore * key.at[c];
  }
  write_channels<T>(token_of<T>(a.dquery, batch, head, s.query_begin + i), dquery, a.scale, a.head_dim);
}

// dq of a tile of queries, or with of_mask a tile of the gradient of the mask: dscores summed over the dimensions that
// the mask was broadcast over, in the order of batch, head and query.
template <class T, int D>
__global__ void __launch_bounds__(QueryTile<T, D>::Warps * 32, QueryTile<T, D>::MinBlocks)
    attention_backward_query_kernel(FASTLM_CONSTANT AttentionBackwardArgs a, bool of_mask) {
  using Tile = QueryTile<T, D>;
  constexpr int Queries = Tile::Queries, Keys = Tile::Keys, Threads = Tile::Warps * 32,
                QueryTileBytes = Queries * D * int(sizeof(T)), KeyTileBytes = Keys * D * int(sizeof(T));
  FASTLM_SHARED(shared);
  unsigned char *const queries = shared, *const douts = queries + QueryTileBytes, *const keys = douts + QueryTileBytes,
                       *const values = keys + Tile::Stages * KeyTileBytes;

  const int heads_per_kv_head = a.num_heads / a.num_kv_heads, tiles = divide_up(a.query_len, Queries),
            key_tiles = divide_up(a.key_len, Keys);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool all_edges = a.mask_type != MaskType::none || a.key_padding;
  const uint32_t sign_flip = a.scale < 0 ? SignBits<T> : 0;
  const float abs_scale = fabsf(a.scale), mask_scale = scale_before_masks(a), score_scale = scale_of_score(a);

  // The block computes a tile of queries of one head, or a tile of the mask, to which several heads contribute (and all
  // tiles of queries if the mask has one row).
  int batch = 0, head = 0, tile_m = 0, steps = 1, heads_each = 1, tiles_each = 1, own_key_tile = 0;
  int64_t dmask_row = 0;
  if (of_mask) {
    const int own_tiles = a.mask_has_one_row ? 1 : tiles;
    int block = blockIdx.x;
    own_key_tile = block % key_tiles, block /= key_tiles;
    tile_m = block % own_tiles, block /= own_tiles;
    head = block % a.mask_heads, batch = block / a.mask_heads;
    dmask_row = int64_t(block) * (a.mask_has_one_row ? 1 : a.query_len);
    heads_each = divide_up(a.num_heads - head, a.mask_heads), tiles_each = a.mask_has_one_row ? tiles : 1;
    steps = divide_up(a.batch - batch, a.mask_batch) * heads_each * tiles_each;
  } else if (a.query_starts) {
    check_starts(a);
    const int slots = gridDim.x / a.num_heads;
    tile_m = blockIdx.x % slots, head = blockIdx.x / slots;
    batch = find_tile(a.query_starts, a.query_starts_int64, a.batch, Queries, tile_m);
    if (batch == a.batch) return;
  } else {
    const int block = blockIdx.x / tiles;
    tile_m = tiles - 1 - int(blockIdx.x % tiles), head = block % a.num_heads, batch = block / a.num_heads;
  }
  const int first_batch = batch, first_head = head, first_tile = tile_m;

  float acc[D / 8][4] = {};  // dq, or in its first blocks the gradient of the mask
  for (int step = 0; step < steps; ++step) {
    if (of_mask) {
      tile_m = first_tile + step % tiles_each;
      head = first_head + step / tiles_each % heads_each * a.mask_heads;
      batch = first_batch + step / tiles_each / heads_each * a.mask_batch;
    }
    const Sequence s = sequence_of(a, batch);
    const int first = tile_m * Queries, last = first + Queries < s.query_len ? first + Queries - 1 : s.query_len - 1;
    TileRange range = tiles_of_keys(s, first, last, Keys);
    const int end_seen = range.end * Keys < s.key_len ? range.end * Keys : s.key_len;
    if (of_mask) {
      if (own_key_tile < range.begin || own_key_tile >= range.end) continue;
      range.begin = own_key_tile, range.end = own_key_tile + 1;
    }
    const int64_t key_offset =
        batch * a.key.batch_stride + head / heads_per_kv_head * a.key.head_stride + s.key_begin * a.key.token_stride;
    const int64_t value_offset = batch * a.value.batch_stride + head / heads_per_kv_head * a.value.head_stride +
                                 s.key_begin * a.value.token_stride;
    const auto fetch = [&](int tile, int stage) {
      if (tile < range.end) {
        load_tokens<T, D, Keys, Threads>(keys + stage * KeyTileBytes, a.key, key_offset, tile * Keys, s.key_len,
                                         a.head_dim);
        load_tokens<T, D, Keys, Threads>(values + stage * KeyTileBytes, a.value, value_offset, tile * Keys, s.key_len,
                                         a.head_dim);
      }
      cp_async_commit();
    };
    if (step > 0) __syncthreads();  // all warps are done with the previous tiles
    const int64_t query_offset =
        batch * a.query.batch_stride + head * a.query.head_stride + s.query_begin * a.query.token_stride;
    const int64_t dout_offset =
        batch * a.dout.batch_stride + head * a.dout.head_stride + s.query_begin * a.dout.token_stride;
    load_tokens<T, D, Queries, Threads>(queries, a.query, query_offset, first, s.query_len, a.head_dim);
    load_tokens<T, D, Queries, Threads>(douts, a.dout, dout_offset, first, s.query_len, a.head_dim);

    const bool has_rows = first + warp * 16 < s.query_len;
    const int i[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
    float lse[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = i[half] < s.query_len;
      const int64_t at = row_offset(a, s, head) + i[half];
      lse[half] = valid ? weight_lse(a.lse[at]) : INFINITY;
      delta[half] = valid && (of_mask || !a.exact) ? a.delta[at] : 0.f;
    }
    const auto lhs_query = [&](int k, uint32_t (&raw)[4]) { read_lhs<T, D>(raw, queries, warp * 16, k, sign_flip); };
    const auto lhs_dout = [&](int k, uint32_t (&raw)[4]) { read_lhs<T, D>(raw, douts, warp * 16, k, 0); };

    // With `exact` a first iteration over the keys computes δ, which is 0 until then.
#pragma unroll 1
    for (bool computes_delta = a.exact && !of_mask, more = true; more; more = computes_delta, computes_delta = false) {
      float sum[2] = {};
      fetch(range.begin, 0);
      for (int tile = range.begin; tile < range.end; ++tile) {
        const int stage = Tile::Stages == 1 ? 0 : (tile - range.begin) % 2;
        if (Tile::Stages == 1 && tile > range.begin) {
          __syncthreads();
          fetch(tile, 0);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (Tile::Stages == 2) fetch(tile + 1, 1 - stage);
        if (!has_rows) continue;

        float weights[Keys / 8][4], dscores[Keys / 8][4];
        multiply_transposed<T, D, Keys>(weights, lhs_query, keys + stage * KeyTileBytes, a.tf32);
        multiply_transposed<T, D, Keys>(dscores, lhs_dout, values + stage * KeyTileBytes, a.tf32);
        if (a.seed) {
          const uint32_t batch_head = batch * a.num_heads + head, batch_heads[2] = {batch_head, batch_head},
                         keep = kept_bits<Keys>(a, *a.seed, i, batch_heads, tile * Keys);
#pragma unroll
          for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) dscores[n][e] = keep >> (n * 4 + e) & 1 ? dscores[n][e] * a.keep_scale : 0.f;
        }
        float subtracted[2] = {delta[0], delta[1]};
        if (a.softcap > 0) {
          cap_with_gradient<Keys>(weights, dscores, a, abs_scale, of_mask || computes_delta,
                                  [&](int, int e) { return delta[e / 2]; });
          subtracted[0] = subtracted[1] = 0;
        }
        uint32_t visible = ~0u;
        if (all_edges || tile < range.inner || tile >= range.outer) {
          const int64_t at = mask_offset(a, batch, head), mask_at[2] = {at, at};
          visible = mask_scores<T, false, Keys>(weights, a, s, i, tile * Keys, mask_at, mask_scale);
        }
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            dscores[n][e] = weight_of(weights[n][e], lse[e / 2], score_scale) * (dscores[n][e] - subtracted[e / 2]);
        if (visible != ~0u)
#pragma unroll
          for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) dscores[n][e] = visible >> (n * 4 + e) & 1 ? dscores[n][e] : 0.f;
        if (of_mask || computes_delta) {
#pragma unroll
          for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) (computes_delta ? sum[e / 2] : acc[n][e]) += dscores[n][e];
        } else {
          multiply_from_registers<T, D, Keys>(acc, dscores, keys + stage * KeyTileBytes, a.tf32, a.exact ? 2 : 1);
        }
      }
      if (computes_delta) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sum[half] += shuffle_xor(sum[half], 1);
          sum[half] += shuffle_xor(sum[half], 2);
          const int64_t at = row_offset(a, s, head) + i[half];
          if (i[half] < s.query_len) {
            delta[half] = sum[half] - (a.dlse ? a.dlse[at] : 0.f);
            if (lane % 4 == 0) a.delta[at] = delta[half];
          }
        }
        __syncthreads();
      }
    }
    cp_async_wait<0>();

    if (!of_mask && has_rows) {
      const uint32_t bad_rows = rows_not_finite<D>(acc);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (i[half] < s.query_len && !(bad_rows >> (half * 8 + lane / 4) & 1))
          write_row<T, D>(token_of<T>(a.dquery, batch, head, s.query_begin + i[half]), acc, half, a.scale, a.head_dim,
                          a.dquery.paired);
      if (bad_rows) {
        __syncwarp();  // makes δ visible, which another thread of the warp has written
        for (int r = 0; r < 16; ++r)
          if (bad_rows >> r & 1 && first + warp * 16 + r < s.query_len)
            recompute_query_gradient_row<T>(a, batch, first + warp * 16 + r, head, range.begin * Keys, end_seen);
      }
    }
  }
  if (!of_mask) return;

  if (a.mask_has_one_row) {  // sum over all queries: within a thread, a warp, and over the warps in order
    float* const sums = reinterpret_cast<float*>(shared);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = acc[n][e] + acc[n][e + 2];
        sum += shuffle_xor(sum, 4);
        sum += shuffle_xor(sum, 8);
        sum += shuffle_xor(sum, 16);
        if (lane < 4) sums[warp * Keys + n * 8 + lane * 2 + e] = sum;
      }
    __syncthreads();
    const int column = threadIdx.x, j = own_key_tile * Keys + column;
    if (column < Keys && j < a.key_len) {
      float sum = 0;
      for (int w = 0; w < Tile::Warps; ++w) sum += sums[w * Keys + column];
      a.dmask[dmask_row * a.key_len + j] = sum;
    }
  } else {
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = first_tile * Queries + warp * 16 + lane / 4 + e / 2 * 8,
                  j = own_key_tile * Keys + n * 8 + lane % 4 * 2 + e % 2;
        if (i < a.query_len && j < a.key_len) a.dmask[(dmask_row + i) * a.key_len + j] = acc[n][e];
      }
  }
}

// One row of dk and dv computed by one warp without tensor cores.
template <class T>
__device__ __attribute__((noinline)) void recompute_key_gradient_row(const AttentionBackwardArgs& a, int batch, int j,
                                                                     int kv_head, int begin, int end, bool needs_key,
                                                                     bool needs_value) {
  const Sequence s = sequence_of(a, batch);
  const int heads_per_kv_head = a.num_heads / a.num_kv_heads;
  const uint64_t seed = a.seed ? *a.seed : 0;
  const Channels key = read_channels<T>(token_of<T>(a.key, batch, kv_head, s.key_begin + j), a.head_dim);
  const Channels value = read_channels<T>(token_of<T>(a.value, batch, kv_head, s.key_begin + j), a.head_dim);
  Channels dkey = {}, dvalue = {};
  for (int head = kv_head * heads_per_kv_head; head < (kv_head + 1) * heads_per_kv_head; ++head)
    for (int i = begin; i < end; ++i) {
      const Channels query = read_channels<T>(token_of<T>(a.query, batch, head, s.query_begin + i), a.head_dim);
      float score = dot(query, key);
      const float slope = slope_of(a, score);
      if (!is_visible<T>(a, s, head, i, j, score)) continue;
      const Channels dout = read_channels<T>(token_of<T>(a.dout, batch, head, s.query_begin + i), a.head_dim);
      const int64_t at = row_offset(a, s, head) + i;
      const float weight = weight_of(score, weight_lse(a.lse[at]), 1);
      const float keep = !a.seed ? 1.f : kept(seed, a.threshold, j, i, batch * a.num_heads + head) ? a.keep_scale : 0.f;
      float dweight = dot(dout, value);
      dweight = keep == 0 ? 0.f : dweight * keep;
      const float dscore = weight * (dweight - a.delta[at]) * slope, kept_weight = keep == 0 ? 0.f : weight * keep;
      for (int c = 0; c < WidestHead / 32; ++c)
        dkey.at[c] += dscore * query.at[c], dvalue.at[c] += kept_weight * dout.at[c];
    }
  if (needs_key) write_channels<T>(token_of<T>(a.dkey, batch, kv_head, s.key_begin + j), dkey, a.scale, a.head_dim);
  if (needs_value) write_channels<T>(token_of<T>(a.dvalue, batch, kv_head, s.key_begin + j), dvalue, 1, a.head_dim);
}

// dk and dv of a tile of keys, from all heads that share it. Scores are transposed: rows are keys.
template <class T, int D>
__global__ void __launch_bounds__(KeyTile<T, D>::Warps * 32, KeyTile<T, D>::MinBlocks)
    attention_backward_key_kernel(FASTLM_CONSTANT AttentionBackwardArgs a) {
  using Tile = KeyTile<T, D>;
  constexpr int Queries = Tile::Queries, Keys = Tile::Keys, Threads = Tile::Warps * 32,
                QueryTileBytes = Queries * D * int(sizeof(T)), KeyTileBytes = Keys * D * int(sizeof(T));
  FASTLM_SHARED(shared);
  unsigned char *const keys = shared, *const values = keys + KeyTileBytes, *const queries = values + KeyTileBytes,
                       *const douts = queries + Tile::Stages * QueryTileBytes;
  float* const row_values = reinterpret_cast<float*>(douts + Tile::Stages * QueryTileBytes);  // per stage: lse, then δ
  unsigned char* const kept_words = reinterpret_cast<unsigned char*>(row_values) + Tile::Stages * Tile::RowBytes;

  const int heads_per_kv_head = a.num_heads / a.num_kv_heads;
  int block = blockIdx.x, batch, tile_n, kv_head;
  bool needs_key = true, needs_value = true;
  if (!Tile::Joint) needs_key = block % 2, needs_value = !needs_key, block /= 2;
  if (a.key_starts) {
    const int slots = gridDim.x / (Tile::Joint ? 1 : 2) / a.num_kv_heads;
    tile_n = block % slots, kv_head = block / slots;
    batch = find_tile(a.key_starts, a.key_starts_int64, a.batch, Keys, tile_n);
    if (batch == a.batch) return;
  } else {
    const int tiles = divide_up(a.key_len, Keys);
    tile_n = block % tiles, kv_head = block / tiles % a.num_kv_heads,
    batch = block / tiles / a.num_kv_heads;  // with a causal mask the first tile has the most queries
  }
  const Sequence s = sequence_of(a, batch);
  const int first = tile_n * Keys, last = first + Keys < s.key_len ? first + Keys - 1 : s.key_len - 1;
  const TileRange range = tiles_of_queries(s, first, last, Queries);
  const int query_tiles = range.end > range.begin ? range.end - range.begin : 0,
            items = query_tiles * heads_per_kv_head;  // tiles of queries of all heads in sequence

  const auto fetch = [&](int item, int stage) {
    if (item < items) {
      const int head = kv_head * heads_per_kv_head + item / query_tiles,
                query = (range.begin + item % query_tiles) * Queries;
      const int64_t query_offset =
          batch * a.query.batch_stride + head * a.query.head_stride + s.query_begin * a.query.token_stride;
      const int64_t dout_offset =
          batch * a.dout.batch_stride + head * a.dout.head_stride + s.query_begin * a.dout.token_stride;
      load_tokens<T, D, Queries, Threads>(queries + stage * QueryTileBytes, a.query, query_offset, query, s.query_len,
                                          a.head_dim);
      load_tokens<T, D, Queries, Threads>(douts + stage * QueryTileBytes, a.dout, dout_offset, query, s.query_len,
                                          a.head_dim);
      const int row = threadIdx.x % Queries;
      if (threadIdx.x < 2 * Queries) {  // zeros beyond the end: the weights of such queries are multiplied by zeros
        const bool valid = query + row < s.query_len;
        const float* from = int(threadIdx.x) < Queries ? a.lse : a.delta;
        cp_async_4(row_values + stage * 2 * Queries + threadIdx.x,
                   valid ? from + row_offset(a, s, head) + query + row : from, valid);
      }
    }
    cp_async_commit();
  };
  const int64_t key_offset =
      batch * a.key.batch_stride + kv_head * a.key.head_stride + s.key_begin * a.key.token_stride;
  const int64_t value_offset =
      batch * a.value.batch_stride + kv_head * a.value.head_stride + s.key_begin * a.value.token_stride;
  load_tokens<T, D, Keys, Threads>(keys, a.key, key_offset, first, s.key_len, a.head_dim);
  load_tokens<T, D, Keys, Threads>(values, a.value, value_offset, first, s.key_len, a.head_dim);
  fetch(0, 0);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool has_rows = first + warp * 16 < s.key_len, all_edges = a.mask_type != MaskType::none || a.key_padding;
  const int j[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
  const uint32_t sign_flip = a.scale < 0 ? SignBits<T> : 0;
  const float abs_scale = fabsf(a.scale), mask_scale = scale_before_masks(a), score_scale = scale_of_score(a);
  const auto lhs_key = [&](int k, uint32_t (&raw)[4]) { read_lhs<T, D>(raw, keys, warp * 16, k, sign_flip); };
  const auto lhs_value = [&](int k, uint32_t (&raw)[4]) { read_lhs<T, D>(raw, values, warp * 16, k, 0); };

  float dvalue[D / 8][4] = {}, dkey[Tile::Joint ? D / 8 : 1][4] = {};  // if one is computed alone, it is in dvalue
  for (int item = 0; item < items; ++item) {
    const int stage = Tile::Stages == 1 ? 0 : item % 2;
    if (Tile::Stages == 1 && item > 0) {
      __syncthreads();
      fetch(item, 0);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (Tile::Stages == 2) fetch(item + 1, 1 - stage);
    const int head = kv_head * heads_per_kv_head + item / query_tiles, tile = range.begin + item % query_tiles,
              query = tile * Queries;
    if (a.seed) {  // the four words of a counter belong to four warps: compute each once
#pragma unroll 1
      for (int at = threadIdx.x; at < 16 * Queries; at += Threads) {
        const philox_words words = philox(*a.seed, uint32_t(first / 64 * 16 + at % 16), uint32_t(query + at / 16),
                                          uint32_t(batch * a.num_heads + head));
        uint32_t bits = 0;
#pragma unroll
        for (int word = 0; word < 4; ++word) bits |= uint32_t(words.word[word] >= a.threshold) << word;
        kept_words[at] = static_cast<unsigned char>(bits);
      }
      __syncthreads();
    }
    if (!has_rows) continue;

    float weights[Queries / 8][4], dscores[Queries / 8][4];
    multiply_transposed<T, D, Queries, Tile::Unroll, true>(weights, lhs_key, queries + stage * QueryTileBytes, a.tf32);
    if (needs_key)
      multiply_transposed<T, D, Queries, Tile::Unroll>(dscores, lhs_value, douts + stage * QueryTileBytes, a.tf32);
    const float* const lse = row_values + stage * 2 * Queries + lane % 4 * 2;
    const unsigned char* const kept_at = kept_words + lane % 4 * 32 + lane / 4;
    const int word = (first + warp * 16) % 64 / 16;
    if (needs_key && a.seed)
#pragma unroll
      for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          dscores[n][e] = kept_at[(n * 8 + e % 2) * 16 + e / 2 * 8] >> word & 1 ? dscores[n][e] * a.keep_scale : 0.f;
    const bool capped = a.softcap > 0;
    if (capped && needs_key)
      cap_with_gradient<Queries>(weights, dscores, a, abs_scale, false,
                                 [&](int n, int e) { return lse[Queries + n * 8 + e % 2]; });
    else if (capped) cap_scores<Queries>(weights, a, abs_scale);
    uint32_t visible = ~0u;
    if (all_edges || tile < range.inner || tile >= range.outer) {
      const int64_t at = mask_offset(a, batch, head), mask_at[2] = {at, at};
      visible = mask_scores<T, true, Queries>(weights, a, s, j, query, mask_at, mask_scale);
    }
#pragma unroll
    for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[n][e] = weight_of(weights[n][e], weight_lse(lse[n * 8 + e % 2]), score_scale);
    if (visible != ~0u)
#pragma unroll
      for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) weights[n][e] = visible >> (n * 4 + e) & 1 ? weights[n][e] : 0.f;

    if (needs_key) {
#pragma unroll
      for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          dscores[n][e] = weights[n][e] * (dscores[n][e] - (capped ? 0.f : lse[Queries + n * 8 + e % 2]));
      if (visible != ~0u)
#pragma unroll
        for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) dscores[n][e] = visible >> (n * 4 + e) & 1 ? dscores[n][e] : 0.f;
    }
    if (needs_value && a.seed)
#pragma unroll
      for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          weights[n][e] = kept_at[(n * 8 + e % 2) * 16 + e / 2 * 8] >> word & 1 ? weights[n][e] * a.keep_scale : 0.f;
    const int parts = a.exact ? 2 : 1;
    if constexpr (Tile::Joint) {
      multiply_from_registers<T, D, Queries>(dvalue, weights, douts + stage * QueryTileBytes, a.tf32, parts);
      multiply_from_registers<T, D, Queries>(dkey, dscores, queries + stage * QueryTileBytes, a.tf32, parts);
    } else {
      if (needs_key)
#pragma unroll
        for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) weights[n][e] = dscores[n][e];
      multiply_from_registers<T, D, Queries>(dvalue, weights, (needs_key ? queries : douts) + stage * QueryTileBytes,
                                             a.tf32, parts);
    }
  }
  cp_async_wait<0>();
  if (!has_rows) return;

  uint32_t bad_rows = rows_not_finite<D>(dvalue);
  if constexpr (Tile::Joint) bad_rows |= rows_not_finite<D>(dkey);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (j[half] >= s.key_len || bad_rows >> (half * 8 + lane / 4) & 1) continue;
    T *const to_key = token_of<T>(a.dkey, batch, kv_head, s.key_begin + j[half]), *const to_value = token_of<T>(
                                                                                      a.dvalue, batch, kv_head,
                                                                                      s.key_begin + j[half]);
    if constexpr (Tile::Joint) {
      write_row<T, D>(to_value, dvalue, half, 1, a.head_dim, a.dvalue.paired);
      write_row<T, D>(to_key, dkey, half, a.scale, a.head_dim, a.dkey.paired);
    } else {
      write_row<T, D>(needs_key ? to_key : to_value, dvalue, half, needs_key ? a.scale : 1.f, a.head_dim,
                      needs_key ? a.dkey.paired : a.dvalue.paired);
    }
  }
  if (bad_rows)
    for (int r = 0; r < 16; ++r)
      if (bad_rows >> r & 1 && first + warp * 16 + r < s.key_len)
        recompute_key_gradient_row<T>(a, batch, first + warp * 16 + r, kv_head, range.begin * Queries,
                                      range.end * Queries < s.query_len ? range.end * Queries : s.query_len, needs_key,
                                      needs_value);
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& args, stream_t stream) {
  AttentionBackwardArgs a = args;
  set_alignment(a, a.out, a.dout, a.dquery, a.dkey, a.dvalue);
  const int batch = a.query_starts ? 1 : a.batch;
  dispatch_type_and_head_dim(a.dtype, a.head_dim, [&]<class T, int D>() {
    using Rows = QueryTile<T, D>;
    using Columns = KeyTile<T, D>;
    if (!a.exact) {
      const int64_t rows = int64_t(batch) * a.num_heads * a.query_len;
      FASTLM_LAUNCH(attention_delta_kernel<T>, unsigned((rows + DeltaWarps - 1) / DeltaWarps), DeltaWarps * 32, 0,
                    stream, a, rows);
    }
    const int64_t query_tiles =
        a.query_starts ? a.query_len / Rows::Queries + a.batch : divide_up(a.query_len, Rows::Queries);
    FASTLM_LAUNCH((attention_backward_query_kernel<T, D>), unsigned(query_tiles * a.num_heads * batch),
                  Rows::Warps * 32, Rows::Bytes, stream, a, false);
    if (a.dkey.data) {
      const int64_t key_tiles =
          a.key_starts ? a.key_len / Columns::Keys + a.batch : divide_up(a.key_len, Columns::Keys);
      const int64_t blocks = key_tiles * a.num_kv_heads * batch * (Columns::Joint ? 1 : 2);
      FASTLM_LAUNCH((attention_backward_key_kernel<T, D>), unsigned(blocks), Columns::Warps * 32, Columns::Bytes,
                    stream, a);
    }
    if (a.dmask) {
      const int64_t tiles = a.mask_has_one_row ? 1 : divide_up(a.query_len, Rows::Queries);
      const int64_t blocks = int64_t(a.mask_batch) * a.mask_heads * tiles * divide_up(a.key_len, Rows::Keys);
      FASTLM_LAUNCH((attention_backward_query_kernel<T, D>), unsigned(blocks), Rows::Warps * 32, Rows::Bytes, stream, a,
                    true);
    }
  });
}

}  // namespace fastlm::cuda
