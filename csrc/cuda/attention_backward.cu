// The gradients of attention: a pass by queries, a pass by keys, and for an additive mask's gradient the pass by
// queries once more. No atomics: every sum has one owner and one order.
//
// The pass by queries owns dq of a tile and walks over the keys. The pass by keys owns dk and dv of a tile and walks
// over the queries of all heads that share it, with scores transposed, so that both products that follow take them from
// registers. Weights come from the log-sum-exp of the forward, and δ = Σ out · dout − dlse from a kernel that goes
// before. 14 · query_len · key_len · head_dim FLOPs a head, half of it with a causal mask: seven products where five
// would do, as the scores and dout vᵀ are computed in both passes. The price of a gradient without atomics.
//
// exact: who asks for the gradient of a mask gets it, and all others, as exact as from PyTorch, whose operator there
// multiplies 16-bit numbers in float32. Over a row dscores sum to 0, so that the rounding of out in δ shows in full,
// and what is left is that of the weights and dscores. So δ is Σ weights · dweights, of float32, in a loop over the
// keys ahead of dq's, and those factors are multiplied in two parts: five products more.
//
// The gradient of a mask takes dq's place in the registers: a block owns a tile of it and walks over whatever the mask
// was broadcast over.
//
// History. Times are predicted, none has been measured.
//   1. 4 warps of 16 rows; 64 rows across (32 from head_dim 65 on and in float32) in two stages of cp.async where 99
//   KiB hold them. At head_dim 64 in 16 bits a
//      tile costs a warp of the pass by keys 128 mma (1024 cycles of its quarter of an A100's multiprocessor) and 32
//      KiB of shared memory for the right operands and 4 for the left (1150 cycles for the four warps): as in the
//      forward the two are balanced. 240 and 250 registers and 48 and 50 KiB: 2 blocks a multiprocessor, in both passes
//      and at head_dim 128 too. Expected: as in the forward half of the peak of mma, so 3.5 × the forward's time
//      for 3.5 × its products. From head_dim 129 on (65 in float32) dk and dv do not fit into registers together: a
//      block computes one of them, and the scores a third time.
//   2. 16 queries across in the pass by keys at head_dim 128, and what only serves addresses is computed in each round:
//   from 255 registers, with spills on
//      sm_120, to 239…248 without. A barrier comes every 64 mma of a warp instead of 128: as often as in the forward at
//      head_dim 64.
//   Next: 32 keys a warp at head_dim 64, with dk and dv in halves of the head: the right operands would be read half as
//   often.
#include "attention_tile.cuh"

namespace fastlm::cuda {
namespace {

template <class T, int D> struct QueryTile {
  static constexpr int Warps = sizeof(T) == 4 && D > 128 ? 2 : 4, Queries = 16 * Warps;
  static constexpr int Keys = D > 128 ? 16 : sizeof(T) == 2 && D == 64 ? 64 : 32;
  static constexpr int Stages = D * sizeof(T) > (sizeof(T) == 2 ? 512 : 256) ? 1 : 2;
  static constexpr int Bytes = 2 * (Queries + Stages * Keys) * D * int(sizeof(T));
  static constexpr int Blocks = D * sizeof(T) <= 256 ? 2 : 1;
  static_assert(Bytes <= 99 << 10);
  static_assert(Keys <= D, "the mask's gradient lies where dq would");
};

template <class T, int D> struct KeyTile {
  static constexpr int Warps = sizeof(T) == 4 && D > 128 ? 2 : 4, Keys = 16 * Warps;
  static constexpr int Queries = sizeof(T) == 2 ? (D <= 64 ? 64 : D == 128 ? 16 : 32) : D <= 128 ? 32 : 16;
  static constexpr int Stages = D * sizeof(T) > 256 ? 1 : 2;
  static constexpr bool Both = sizeof(T) == 2 ? D <= 128 : D <= 64;  // dk and dv in one block
  static constexpr int Unrolled = sizeof(T) == 4 ? 2 : D <= 128 ? Steps<T, D> : 4;
  static constexpr int RowBytes = 2 * int(sizeof(float)) * Queries;  // lse and δ of a stage
  static constexpr int Bytes = 2 * (Keys + Stages * Queries) * D * int(sizeof(T)) + Stages * RowBytes + 16 * Queries;
  static constexpr int Blocks = D <= 64 ? 2 : 1;
  static_assert(Bytes <= 99 << 10);
};

FASTLM_DEVICE int64_t row_offset(const AttentionArgs& a, const Sequence& s, int head) {
  return s.batch * a.lse_batch_stride + head * a.lse_head_stride + s.query_begin;
}

// A row that sees nothing has −∞: as +∞ it makes every weight 0.
FASTLM_DEVICE float usable(float lse) { return lse == -INFINITY ? INFINITY : lse; }

// exp(score − log-sum-exp), in place. With an additive mask the difference comes first.
FASTLM_DEVICE float weight_of(float score, float lse, float unit, bool additive) {
  return additive ? exp2_fast((score - lse) * Log2e) : exp2_fast(fmaf(score, unit, -lse * Log2e));
}

// δ of each query: one warp a row.
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

// One row of dq by one warp, without matrix units: only what is seen is ever added.
template <class T>
__device__ __attribute__((noinline)) void query_gradient_key_by_key(const AttentionBackwardArgs& a, int batch, int i,
                                                                    int head, int begin, int end) {
  const Sequence s = sequence_of(a, batch);
  const int key_head = head / (a.num_heads / a.num_kv_heads);
  const uint64_t seed = a.seed ? *a.seed : 0;
  const Channels query = read_channels<T>(token_of<T>(a.query, batch, head, s.query_begin + i), a.head_dim);
  const Channels dout = read_channels<T>(token_of<T>(a.dout, batch, head, s.query_begin + i), a.head_dim);
  const float lse = usable(a.lse[row_offset(a, s, head) + i]), delta = a.delta[row_offset(a, s, head) + i];
  Channels dquery = {};
  for (int j = begin; j < end; ++j) {
    const Channels key = read_channels<T>(token_of<T>(a.key, batch, key_head, s.key_begin + j), a.head_dim);
    float score = dot(query, key);
    if (!sees<T>(a, s, head, i, j, score)) continue;
    float dweight = dot(dout, read_channels<T>(token_of<T>(a.value, batch, key_head, s.key_begin + j), a.head_dim));
    if (a.seed) dweight = kept(seed, a.threshold, j, i, batch * a.num_heads + head) ? dweight * a.keep_scale : 0.f;
    const float dscore = exp2_fast((score - lse) * Log2e) * (dweight - delta);
    for (int c = 0; c < WidestHead / 32; ++c) dquery.at[c] += dscore * key.at[c];
  }
  write_channels<T>(token_of<T>(a.dquery, batch, head, s.query_begin + i), dquery, a.scale, a.head_dim);
}

// dq of a tile of queries, or with of_mask a tile of the mask's gradient: dscores summed over what the mask was
// broadcast over, in the order of batch, head and query.
template <class T, int D>
__global__ void __launch_bounds__(QueryTile<T, D>::Warps * 32, QueryTile<T, D>::Blocks)
    attention_backward_query_kernel(FASTLM_CONSTANT AttentionBackwardArgs a, bool of_mask) {
  using Tile = QueryTile<T, D>;
  constexpr int Queries = Tile::Queries, Keys = Tile::Keys, Threads = Tile::Warps * 32,
                Across = Queries * D * int(sizeof(T)), Down = Keys * D * int(sizeof(T));
  FASTLM_SHARED(shared);
  unsigned char *const queries = shared, *const douts = queries + Across, *const keys = douts + Across,
                       *const values = keys + Tile::Stages * Down;

  const int groups = a.num_heads / a.num_kv_heads, tiles = divide_up(a.query_len, Queries),
            key_tiles = divide_up(a.key_len, Keys);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool additive = is_additive(a), all_edges = a.mask_type != MaskType::none || a.key_padding;
  const uint32_t flip = a.scale < 0 ? SignBits<T> : 0;
  const float size = fabsf(a.scale), unit = fmaxf(size * Log2e, 1e-37f);

  // What the block owns: a tile of queries of one head, or a tile of the mask and the heads (and if it has one row the
  // tiles) that add to it.
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

  float total[D / 8][4] = {};  // dq, or in its first blocks the mask's gradient
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
        batch * a.key.batch_stride + head / groups * a.key.head_stride + s.key_begin * a.key.token_stride;
    const int64_t value_offset =
        batch * a.value.batch_stride + head / groups * a.value.head_stride + s.key_begin * a.value.token_stride;
    const auto fetch = [&](int tile, int stage) {
      if (tile < range.end) {
        load_tokens<T, D, Keys, Threads>(keys + stage * Down, a.key, key_offset, tile * Keys, s.key_len, a.head_dim);
        load_tokens<T, D, Keys, Threads>(values + stage * Down, a.value, value_offset, tile * Keys, s.key_len,
                                         a.head_dim);
      }
      cp_async_commit();
    };
    if (step > 0) __syncthreads();  // no one reads the last tiles any more
    const int64_t query_offset =
        batch * a.query.batch_stride + head * a.query.head_stride + s.query_begin * a.query.token_stride;
    const int64_t dout_offset =
        batch * a.dout.batch_stride + head * a.dout.head_stride + s.query_begin * a.dout.token_stride;
    load_tokens<T, D, Queries, Threads>(queries, a.query, query_offset, first, s.query_len, a.head_dim);
    load_tokens<T, D, Queries, Threads>(douts, a.dout, dout_offset, first, s.query_len, a.head_dim);

    const bool works = first + warp * 16 < s.query_len;
    const int i[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
    float lse[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool real = i[half] < s.query_len;
      const int64_t at = row_offset(a, s, head) + i[half];
      lse[half] = real ? usable(a.lse[at]) : INFINITY;
      delta[half] = real && (of_mask || !a.exact) ? a.delta[at] : 0.f;
    }
    const auto left_query = [&](int k, uint32_t (&raw)[4]) { read_left<T, D>(raw, queries, warp * 16, k, flip); };
    const auto left_dout = [&](int k, uint32_t (&raw)[4]) { read_left<T, D>(raw, douts, warp * 16, k, 0); };

    // The first of two walks sums δ, while it is 0.
#pragma unroll 1
    for (bool summing = a.exact && !of_mask, again = true; again; again = summing, summing = false) {
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
        if (!works) continue;

        float weights[Keys / 8][4], dscores[Keys / 8][4];
        multiply_by_rows<T, D, Keys>(weights, left_query, keys + stage * Down, a.tf32);
        multiply_by_rows<T, D, Keys>(dscores, left_dout, values + stage * Down, a.tf32);
        if (a.seed) {
          const uint32_t third = batch * a.num_heads + head, thirds[2] = {third, third},
                         keep = kept_bits<Keys>(a, *a.seed, i, thirds, tile * Keys);
#pragma unroll
          for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) dscores[n][e] = keep >> (n * 4 + e) & 1 ? dscores[n][e] * a.keep_scale : 0.f;
        }
        uint32_t seen = ~0u;
        if (all_edges || tile < range.inner || tile >= range.outer) {
          const int64_t at = mask_offset(a, batch, head), mask_at[2] = {at, at};
          seen = mask_scores<T, false, Keys>(weights, a, s, i, tile * Keys, mask_at, size);
        }
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            dscores[n][e] = weight_of(weights[n][e], lse[e / 2], unit, additive) * (dscores[n][e] - delta[e / 2]);
        if (seen != ~0u)
#pragma unroll
          for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) dscores[n][e] = seen >> (n * 4 + e) & 1 ? dscores[n][e] : 0.f;
        if (of_mask || summing) {
#pragma unroll
          for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) (summing ? sum[e / 2] : total[n][e]) += dscores[n][e];
        } else {
          multiply_from_registers<T, D, Keys>(total, dscores, keys + stage * Down, a.tf32, a.exact ? 2 : 1);
        }
      }
      if (summing) {
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

    if (!of_mask && works) {
      const uint32_t again = rows_not_finite<D>(total);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (i[half] < s.query_len && !(again >> (half * 8 + lane / 4) & 1))
          write_row<T, D>(token_of<T>(a.dquery, batch, head, s.query_begin + i[half]), total, half, a.scale, a.head_dim,
                          a.dquery.paired);
      if (again) {
        __syncwarp();  // δ that another thread of the warp has written
        for (int r = 0; r < 16; ++r)
          if (again >> r & 1 && first + warp * 16 + r < s.query_len)
            query_gradient_key_by_key<T>(a, batch, first + warp * 16 + r, head, range.begin * Keys, end_seen);
      }
    }
  }
  if (!of_mask) return;

  if (a.mask_has_one_row) {  // the sum over all queries: of a thread's, of a warp's, and of the warps in their order
    float* const sums = reinterpret_cast<float*>(shared);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = total[n][e] + total[n][e + 2];
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
        if (i < a.query_len && j < a.key_len) a.dmask[(dmask_row + i) * a.key_len + j] = total[n][e];
      }
  }
}

// One row of dk and dv by one warp, without matrix units.
template <class T>
__device__ __attribute__((noinline)) void key_gradient_query_by_query(const AttentionBackwardArgs& a, int batch, int j,
                                                                      int key_head, int begin, int end, bool wants_key,
                                                                      bool wants_value) {
  const Sequence s = sequence_of(a, batch);
  const int groups = a.num_heads / a.num_kv_heads;
  const uint64_t seed = a.seed ? *a.seed : 0;
  const Channels key = read_channels<T>(token_of<T>(a.key, batch, key_head, s.key_begin + j), a.head_dim);
  const Channels value = read_channels<T>(token_of<T>(a.value, batch, key_head, s.key_begin + j), a.head_dim);
  Channels dkey = {}, dvalue = {};
  for (int head = key_head * groups; head < (key_head + 1) * groups; ++head)
    for (int i = begin; i < end; ++i) {
      const Channels query = read_channels<T>(token_of<T>(a.query, batch, head, s.query_begin + i), a.head_dim);
      float score = dot(query, key);
      if (!sees<T>(a, s, head, i, j, score)) continue;
      const Channels dout = read_channels<T>(token_of<T>(a.dout, batch, head, s.query_begin + i), a.head_dim);
      const int64_t at = row_offset(a, s, head) + i;
      const float weight = exp2_fast((score - usable(a.lse[at])) * Log2e);
      const float keep = !a.seed ? 1.f : kept(seed, a.threshold, j, i, batch * a.num_heads + head) ? a.keep_scale : 0.f;
      float dweight = dot(dout, value);
      dweight = keep == 0 ? 0.f : dweight * keep;
      const float dscore = weight * (dweight - a.delta[at]), sent = keep == 0 ? 0.f : weight * keep;
      for (int c = 0; c < WidestHead / 32; ++c) dkey.at[c] += dscore * query.at[c], dvalue.at[c] += sent * dout.at[c];
    }
  if (wants_key) write_channels<T>(token_of<T>(a.dkey, batch, key_head, s.key_begin + j), dkey, a.scale, a.head_dim);
  if (wants_value) write_channels<T>(token_of<T>(a.dvalue, batch, key_head, s.key_begin + j), dvalue, 1, a.head_dim);
}

// dk and dv of a tile of keys, from all heads that share it. Scores are transposed here: rows are keys.
template <class T, int D>
__global__ void __launch_bounds__(KeyTile<T, D>::Warps * 32, KeyTile<T, D>::Blocks)
    attention_backward_key_kernel(FASTLM_CONSTANT AttentionBackwardArgs a) {
  using Tile = KeyTile<T, D>;
  constexpr int Queries = Tile::Queries, Keys = Tile::Keys, Threads = Tile::Warps * 32,
                Across = Queries * D * int(sizeof(T)), Down = Keys * D * int(sizeof(T));
  FASTLM_SHARED(shared);
  unsigned char *const keys = shared, *const values = keys + Down, *const queries = values + Down,
                       *const douts = queries + Tile::Stages * Across;
  float* const row_values = reinterpret_cast<float*>(douts + Tile::Stages * Across);  // of each stage lse, then δ
  unsigned char* const kept_words = reinterpret_cast<unsigned char*>(row_values) + Tile::Stages * Tile::RowBytes;

  const int groups = a.num_heads / a.num_kv_heads;
  int block = blockIdx.x, batch, tile_n, key_head;
  bool wants_key = true, wants_value = true;
  if (!Tile::Both) wants_key = block % 2, wants_value = !wants_key, block /= 2;
  if (a.key_starts) {
    const int slots = gridDim.x / (Tile::Both ? 1 : 2) / a.num_kv_heads;
    tile_n = block % slots, key_head = block / slots;
    batch = find_tile(a.key_starts, a.key_starts_int64, a.batch, Keys, tile_n);
    if (batch == a.batch) return;
  } else {
    const int tiles = divide_up(a.key_len, Keys);
    tile_n = block % tiles, key_head = block / tiles % a.num_kv_heads,
    batch = block / tiles / a.num_kv_heads;  // of a causal mask the first tile has the most queries
  }
  const Sequence s = sequence_of(a, batch);
  const int first = tile_n * Keys, last = first + Keys < s.key_len ? first + Keys - 1 : s.key_len - 1;
  const TileRange range = tiles_of_queries(s, first, last, Queries);
  const int each = range.end > range.begin ? range.end - range.begin : 0,
            items = each * groups;  // tiles of queries of all heads, one after another

  const auto fetch = [&](int item, int stage) {
    if (item < items) {
      const int head = key_head * groups + item / each, query = (range.begin + item % each) * Queries;
      const int64_t query_offset =
          batch * a.query.batch_stride + head * a.query.head_stride + s.query_begin * a.query.token_stride;
      const int64_t dout_offset =
          batch * a.dout.batch_stride + head * a.dout.head_stride + s.query_begin * a.dout.token_stride;
      load_tokens<T, D, Queries, Threads>(queries + stage * Across, a.query, query_offset, query, s.query_len,
                                          a.head_dim);
      load_tokens<T, D, Queries, Threads>(douts + stage * Across, a.dout, dout_offset, query, s.query_len, a.head_dim);
      const int row = threadIdx.x % Queries;
      if (threadIdx.x < 2 * Queries) {  // zeros beyond the end: what such queries weigh is multiplied by zeros
        const bool real = query + row < s.query_len;
        const float* from = int(threadIdx.x) < Queries ? a.lse : a.delta;
        cp_async_4(row_values + stage * 2 * Queries + threadIdx.x,
                   real ? from + row_offset(a, s, head) + query + row : from, real);
      }
    }
    cp_async_commit();
  };
  const int64_t key_offset =
      batch * a.key.batch_stride + key_head * a.key.head_stride + s.key_begin * a.key.token_stride;
  const int64_t value_offset =
      batch * a.value.batch_stride + key_head * a.value.head_stride + s.key_begin * a.value.token_stride;
  load_tokens<T, D, Keys, Threads>(keys, a.key, key_offset, first, s.key_len, a.head_dim);
  load_tokens<T, D, Keys, Threads>(values, a.value, value_offset, first, s.key_len, a.head_dim);
  fetch(0, 0);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool works = first + warp * 16 < s.key_len, additive = is_additive(a),
             all_edges = a.mask_type != MaskType::none || a.key_padding;
  const int j[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
  const uint32_t flip = a.scale < 0 ? SignBits<T> : 0;
  const float size = fabsf(a.scale), unit = fmaxf(size * Log2e, 1e-37f);
  const auto left_key = [&](int k, uint32_t (&raw)[4]) { read_left<T, D>(raw, keys, warp * 16, k, flip); };
  const auto left_value = [&](int k, uint32_t (&raw)[4]) { read_left<T, D>(raw, values, warp * 16, k, 0); };

  float dvalue[D / 8][4] = {}, dkey[Tile::Both ? D / 8 : 1][4] = {};  // of one alone, whichever it is, in dvalue
  for (int item = 0; item < items; ++item) {
    const int stage = Tile::Stages == 1 ? 0 : item % 2;
    if (Tile::Stages == 1 && item > 0) {
      __syncthreads();
      fetch(item, 0);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (Tile::Stages == 2) fetch(item + 1, 1 - stage);
    const int head = key_head * groups + item / each, tile = range.begin + item % each, query = tile * Queries;
    if (a.seed) {  // the four words of a counter are those of four warps: each is computed once, for all
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
    if (!works) continue;

    float weights[Queries / 8][4], dscores[Queries / 8][4];
    multiply_by_rows<T, D, Queries, Tile::Unrolled>(weights, left_key, queries + stage * Across, a.tf32);
    if (wants_key) multiply_by_rows<T, D, Queries, Tile::Unrolled>(dscores, left_value, douts + stage * Across, a.tf32);
    uint32_t seen = ~0u;
    if (all_edges || tile < range.inner || tile >= range.outer) {
      const int64_t at = mask_offset(a, batch, head), mask_at[2] = {at, at};
      seen = mask_scores<T, true, Queries>(weights, a, s, j, query, mask_at, size);
    }
    const float* const lse = row_values + stage * 2 * Queries + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[n][e] = weight_of(weights[n][e], usable(lse[n * 8 + e % 2]), unit, additive);
    if (seen != ~0u)
#pragma unroll
      for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) weights[n][e] = seen >> (n * 4 + e) & 1 ? weights[n][e] : 0.f;

    const unsigned char* const kept_at = kept_words + lane % 4 * 32 + lane / 4;
    const int word = (first + warp * 16) % 64 / 16;
    if (wants_key) {
      if (a.seed)
#pragma unroll
        for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            dscores[n][e] = kept_at[(n * 8 + e % 2) * 16 + e / 2 * 8] >> word & 1 ? dscores[n][e] * a.keep_scale : 0.f;
#pragma unroll
      for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dscores[n][e] = weights[n][e] * (dscores[n][e] - lse[Queries + n * 8 + e % 2]);
      if (seen != ~0u)
#pragma unroll
        for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) dscores[n][e] = seen >> (n * 4 + e) & 1 ? dscores[n][e] : 0.f;
    }
    if (wants_value && a.seed)
#pragma unroll
      for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          weights[n][e] = kept_at[(n * 8 + e % 2) * 16 + e / 2 * 8] >> word & 1 ? weights[n][e] * a.keep_scale : 0.f;
    const int parts = a.exact ? 2 : 1;
    if constexpr (Tile::Both) {
      multiply_from_registers<T, D, Queries>(dvalue, weights, douts + stage * Across, a.tf32, parts);
      multiply_from_registers<T, D, Queries>(dkey, dscores, queries + stage * Across, a.tf32, parts);
    } else {
      if (wants_key)
#pragma unroll
        for (int n = 0; n < Queries / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) weights[n][e] = dscores[n][e];
      multiply_from_registers<T, D, Queries>(dvalue, weights, (wants_key ? queries : douts) + stage * Across, a.tf32,
                                             parts);
    }
  }
  cp_async_wait<0>();
  if (!works) return;

  uint32_t again = rows_not_finite<D>(dvalue);
  if constexpr (Tile::Both) again |= rows_not_finite<D>(dkey);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (j[half] >= s.key_len || again >> (half * 8 + lane / 4) & 1) continue;
    T *const to_key = token_of<T>(a.dkey, batch, key_head, s.key_begin + j[half]), *const to_value = token_of<T>(
                                                                                       a.dvalue, batch, key_head,
                                                                                       s.key_begin + j[half]);
    if constexpr (Tile::Both) {
      write_row<T, D>(to_value, dvalue, half, 1, a.head_dim, a.dvalue.paired);
      write_row<T, D>(to_key, dkey, half, a.scale, a.head_dim, a.dkey.paired);
    } else {
      write_row<T, D>(wants_key ? to_key : to_value, dvalue, half, wants_key ? a.scale : 1.f, a.head_dim,
                      wants_key ? a.dkey.paired : a.dvalue.paired);
    }
  }
  if (again)
    for (int r = 0; r < 16; ++r)
      if (again >> r & 1 && first + warp * 16 + r < s.key_len)
        key_gradient_query_by_query<T>(a, batch, first + warp * 16 + r, key_head, range.begin * Queries,
                                       range.end * Queries < s.query_len ? range.end * Queries : s.query_len, wants_key,
                                       wants_value);
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& args, stream_t stream) {
  AttentionBackwardArgs a = args;
  complete(a, a.out, a.dout, a.dquery, a.dkey, a.dvalue);
  const int each = a.query_starts ? 1 : a.batch;
  by_type_and_width(a.dtype, a.head_dim, [&]<class T, int D>() {
    using Rows = QueryTile<T, D>;
    using Columns = KeyTile<T, D>;
    if (!a.exact) {
      const int64_t rows = int64_t(each) * a.num_heads * a.query_len;
      FASTLM_LAUNCH(attention_delta_kernel<T>, unsigned((rows + DeltaWarps - 1) / DeltaWarps), DeltaWarps * 32, 0,
                    stream, a, rows);
    }
    const int64_t query_tiles =
        a.query_starts ? a.query_len / Rows::Queries + a.batch : divide_up(a.query_len, Rows::Queries);
    FASTLM_LAUNCH((attention_backward_query_kernel<T, D>), unsigned(query_tiles * a.num_heads * each), Rows::Warps * 32,
                  Rows::Bytes, stream, a, false);
    if (a.dkey.data) {
      const int64_t key_tiles =
          a.key_starts ? a.key_len / Columns::Keys + a.batch : divide_up(a.key_len, Columns::Keys);
      const int64_t blocks = key_tiles * a.num_kv_heads * each * (Columns::Both ? 1 : 2);
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
