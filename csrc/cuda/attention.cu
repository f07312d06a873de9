// Forward attention by tiles, softmax(q kᵀ · scale + mask) v, with an online softmax (Dao, 2023, arXiv:2307.08691).
//
// q is (batch, num_heads, query_len, head_dim), k and v are (batch, num_kv_heads, key_len, head_dim). One head takes
// 4 · query_len · key_len · head_dim FLOPs, half of it with a causal mask. Each of q, k, v and out is transferred once
// if the keys of a head stay in the L2 cache. From some hundred tokens on the kernel is compute-bound.
//
// A block computes a tile of queries, 16 per warp, and iterates over the keys with a running maximum (row_max) and sum
// (row_sum) in float32. Blocks of one head are adjacent in the grid, so they share its keys in the cache. With a causal
// mask the tile with the most keys is launched first.
//
// Design notes:
//   - A score is scaled and rounded, as row_max is, before row_max is subtracted. The difference is then exact; with
//   the
//     scale folded into a fused multiply-add it would be off by the rounding of row_max. The maximum is that of
//     unscaled scores, which requires a positive scale, so the queries take its sign.
//   - Keys and values are double-buffered by cp.async, with one barrier per tile. Up to head_dim 128 the fragments of
//     the queries stay in registers.
//   - What only edge tiles need (mask rows, dropout counters) is computed where it is used, and visibility is kept as
//     one bit per score from a loop that is not unrolled. This saves registers and compile time.
#include "attention_tile.cuh"

namespace fastlm::cuda {
namespace {

template <class T, int D> struct ForwardTile {
  static constexpr int Warps = 4, Queries = 16 * Warps;
  static constexpr int Keys = sizeof(T) == 2 ? (D <= 128 ? 64 : 32) : D <= 128 ? 32 : 16;
  static constexpr int Stages = sizeof(T) == 4 && D > 128 ? 1 : 2;
  static constexpr int Bytes = (Queries + 2 * Stages * Keys) * D * int(sizeof(T));
  static constexpr bool QueriesInRegisters = sizeof(T) == 2 && D <= 128;
  static constexpr int Unroll = QueriesInRegisters ? KSteps<T, D> : 4;
  // Concurrent blocks per multiprocessor, which limit the registers.
  static constexpr int MinBlocks = D <= 64 ? 3 : sizeof(T) == 2 && D <= 128 ? 2 : 1;
  static_assert(Bytes <= 99 << 10);
};

// The query and the head of a row of a tile. With split-K a tile holds the queries of all heads that share a key head.
struct QueryRow {
  int i, head;
  bool valid;
};

struct ForwardTask {
  Sequence s;
  int first, head, split;  // the first row; its head, or with split-K the first of the heads that share a key head

  FASTLM_DEVICE QueryRow row(const AttentionForwardArgs& a, int at) const {
    const int number = first + at;
    if (a.num_splits == 0) return {number, head, number < s.query_len};
    const bool valid = number < a.num_heads / a.num_kv_heads * s.query_len;
    return {number % s.query_len, valid ? head + number / s.query_len : head, valid};
  }
};

// One row computed by one warp without tensor cores, which adds visible keys only.
template <class T> __device__ __attribute__((noinline)) void recompute_output_row(const AttentionForwardArgs& a,
                                                                                  int batch, int i, int head, int split,
                                                                                  int begin, int end) {
  const Sequence s = sequence_of(a, batch);
  const QueryRow row = {i, head, true};
  const int kv_head = row.head / (a.num_heads / a.num_kv_heads);
  const uint32_t batch_head = s.batch * a.num_heads + row.head;
  const uint64_t seed = a.seed ? *a.seed : 0;
  const Channels query = read_channels<T>(token_of<T>(a.query, s.batch, row.head, s.query_begin + row.i), a.head_dim);
  Channels acc = {};
  float row_max = -INFINITY, row_sum = 0;
  for (int j = begin; j < end; ++j) {
    float score = dot(query, read_channels<T>(token_of<T>(a.key, s.batch, kv_head, s.key_begin + j), a.head_dim));
    if (!is_visible<T>(a, s, row.head, row.i, j, score)) continue;
    const float new_max = fmaxf(row_max, score), safe_max = new_max == -INFINITY ? 0.f : new_max;
    float weight = exp2_fast((score - safe_max) * Log2e);
    const float rescale = exp2_fast((row_max - safe_max) * Log2e);
    row_sum = row_sum * rescale + weight;
    if (a.seed && !kept(seed, a.threshold, j, row.i, batch_head)) weight = 0;
    const Channels value = read_channels<T>(token_of<T>(a.value, s.batch, kv_head, s.key_begin + j), a.head_dim);
    for (int c = 0; c < WidestHead / 32; ++c) acc.at[c] = acc.at[c] * rescale + weight * value.at[c];
    row_max = new_max;
  }
  const bool first_lane = threadIdx.x % 32 == 0;
  if (a.num_splits) {
    const int64_t at = ((int64_t(s.batch) * a.num_heads + row.head) * s.query_len + row.i) * a.num_splits + split;
    write_channels<float>(a.partial_out + at * a.head_dim, acc, a.keep_scale, a.head_dim);
    if (first_lane) a.partial_max[at] = row_max, a.partial_sum[at] = row_sum;
  } else {
    write_channels<T>(token_of<T>(a.out, s.batch, row.head, s.query_begin + row.i), acc,
                      row_sum == 0 ? 0.f : a.keep_scale / row_sum, a.head_dim);
    if (first_lane)
      a.lse[s.batch * a.lse_batch_stride + row.head * a.lse_head_stride + s.query_begin + row.i] =
          row_sum == 0 ? -INFINITY : row_max + log_(row_sum);
  }
}

template <class T, int D> __global__ void __launch_bounds__(ForwardTile<T, D>::Warps * 32, ForwardTile<T, D>::MinBlocks)
    attention_forward_kernel(FASTLM_CONSTANT AttentionForwardArgs a) {
  using Tile = ForwardTile<T, D>;
  constexpr int Queries = Tile::Queries, Keys = Tile::Keys, Threads = Tile::Warps * 32,
                TileBytes = Keys * D * int(sizeof(T));
  FASTLM_SHARED(shared);
  unsigned char *const queries = shared, *const keys = shared + Queries * D * sizeof(T),
                       *const values = keys + Tile::Stages * TileBytes;

  const int heads_per_kv_head = a.num_heads / a.num_kv_heads;
  ForwardTask task;
  if (a.num_splits) {
    const int block = blockIdx.x / a.num_splits;
    task = {sequence_of(a, block / a.num_kv_heads), 0, block % a.num_kv_heads * heads_per_kv_head,
            int(blockIdx.x % a.num_splits)};
  } else if (a.query_starts) {
    check_starts(a);
    const int tiles = gridDim.x / a.num_heads;
    int tile = blockIdx.x % tiles;
    const int batch = find_tile(a.query_starts, a.query_starts_int64, a.batch, Queries, tile);
    if (batch == a.batch) return;
    task = {sequence_of(a, batch), tile * Queries, int(blockIdx.x / tiles), 0};
  } else {
    const int tiles = divide_up(a.query_len, Queries), block = blockIdx.x / tiles;
    task = {sequence_of(a, block / a.num_heads), (tiles - 1 - int(blockIdx.x % tiles)) * Queries, block % a.num_heads,
            0};
  }
  const Sequence& s = task.s;
  const int rows = (a.num_splits ? heads_per_kv_head : 1) * s.query_len - task.first,
            first = a.num_splits ? 0 : task.first;
  const int last = a.num_splits ? s.query_len - 1 : task.first + (rows < Queries ? rows : Queries) - 1;
  TileRange range = tiles_of_keys(s, first, last, Keys);
  if (a.num_splits) {
    const int begin = task.split * (a.split_size / Keys), end = begin + a.split_size / Keys;
    range.begin = range.begin < begin ? begin : range.begin;
    range.end = range.end > end ? end : range.end;
  }
  const bool all_edges = a.mask_type != MaskType::none || a.key_padding;

  const int64_t key_offset = s.batch * a.key.batch_stride + task.head / heads_per_kv_head * a.key.head_stride +
                             s.key_begin * a.key.token_stride;
  const int64_t value_offset = s.batch * a.value.batch_stride + task.head / heads_per_kv_head * a.value.head_stride +
                               s.key_begin * a.value.token_stride;
  const auto fetch = [&](int tile, int stage) {
    if (tile < range.end) {
      load_tokens<T, D, Keys, Threads>(keys + stage * TileBytes, a.key, key_offset, tile * Keys, s.key_len, a.head_dim);
      load_tokens<T, D, Keys, Threads>(values + stage * TileBytes, a.value, value_offset, tile * Keys, s.key_len,
                                       a.head_dim);
    }
    cp_async_commit();
  };
  load_rows<T, D, Queries, Threads>(queries, a.query, a.head_dim, [&](int at) -> const T* {
    const QueryRow row = task.row(a, at);
    return row.valid ? token_of<T>(a.query, s.batch, row.head, s.query_begin + row.i) : nullptr;
  });
  cp_async_commit();
  fetch(range.begin, 0);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool has_rows = warp * 16 < rows;  // a warp without queries only copies
  const uint32_t sign_flip = a.scale < 0 ? SignBits<T> : 0;
  const float abs_scale = fabsf(a.scale), mask_scale = scale_before_masks(a), score_scale = scale_of_score(a);

  cp_async_wait<1>();
  __syncthreads();
  uint32_t query_fragments[Tile::QueriesInRegisters ? KSteps<T, D> : 1][4];
  if constexpr (Tile::QueriesInRegisters)
#pragma unroll
    for (int step = 0; step < KSteps<T, D>; ++step)
      read_lhs<T, D>(query_fragments[step], queries, warp * 16, step, sign_flip);
  const auto lhs = [&](int step, uint32_t (&raw)[4]) {
    if constexpr (Tile::QueriesInRegisters)
      for (int r = 0; r < 4; ++r) raw[r] = query_fragments[step][r];
    else read_lhs<T, D>(raw, queries, warp * 16, step, sign_flip);
  };

  float acc[D / 8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
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

    float weights[Keys / 8][4];
    multiply_transposed<T, D, Keys, Tile::Unroll>(weights, lhs, keys + stage * TileBytes, a.tf32);
    if (a.softcap > 0) cap_scores<Keys>(weights, a, abs_scale);
    if (all_edges || tile < range.inner || tile >= range.outer) {
      const QueryRow row[2] = {task.row(a, warp * 16 + lane / 4), task.row(a, warp * 16 + lane / 4 + 8)};
      const int64_t mask_at[2] = {mask_offset(a, s.batch, row[0].head), mask_offset(a, s.batch, row[1].head)};
      mask_scores<T, false, Keys>(weights, a, s, {row[0].i, row[1].i}, tile * Keys, mask_at, mask_scale);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_max = -INFINITY;
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
        new_max = fmaxf(new_max, fmaxf(weights[n][2 * half], weights[n][2 * half + 1]));
      new_max = fmaxf(new_max, shuffle_xor(new_max, 1));
      new_max = fmaxf(new_max, shuffle_xor(new_max, 2));
      new_max = fmaxf(row_max[half], multiply_rounded(new_max, score_scale));
      const float safe_max = new_max == -INFINITY ? 0.f : new_max;  // no visible key yet
      const float rescale = exp2_fast((row_max[half] - safe_max) * Log2e);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e)
          sum += weights[n][e] = exp2_fast((multiply_rounded(weights[n][e], score_scale) - safe_max) * Log2e);
      row_sum[half] = row_sum[half] * rescale + sum;
      row_max[half] = new_max;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) acc[d][2 * half] *= rescale, acc[d][2 * half + 1] *= rescale;
    }
    if (a.seed) {
      const QueryRow row[2] = {task.row(a, warp * 16 + lane / 4), task.row(a, warp * 16 + lane / 4 + 8)};
      const uint32_t batch_head[2] = {uint32_t(s.batch * a.num_heads + row[0].head),
                                      uint32_t(s.batch * a.num_heads + row[1].head)};
      const uint32_t keep = kept_bits<Keys>(a, *a.seed, {row[0].i, row[1].i}, batch_head, tile * Keys);
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) weights[n][e] = keep >> (n * 4 + e) & 1 ? weights[n][e] : 0.f;
    }
    multiply_from_registers<T, D, Keys>(acc, weights, values + stage * TileBytes, a.tf32);
  }
  cp_async_wait<0>();
  if (!has_rows) return;

  const uint32_t bad_rows = rows_not_finite<D>(acc);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    row_sum[half] += shuffle_xor(row_sum[half], 1);
    row_sum[half] += shuffle_xor(row_sum[half], 2);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const QueryRow r = task.row(a, warp * 16 + lane / 4 + 8 * half);
    if (!r.valid || bad_rows >> (half * 8 + lane / 4) & 1) continue;
    const bool fully_masked = row_sum[half] == 0;
    if (a.num_splits) {
      const int64_t at = ((int64_t(s.batch) * a.num_heads + r.head) * s.query_len + r.i) * a.num_splits + task.split;
      write_row<float, D>(a.partial_out + at * a.head_dim, acc, half, a.keep_scale, a.head_dim, a.head_dim % 2 == 0);
      if (lane % 4 == 0) a.partial_max[at] = row_max[half], a.partial_sum[at] = row_sum[half];
    } else {
      write_row<T, D>(token_of<T>(a.out, s.batch, r.head, s.query_begin + r.i), acc, half,
                      fully_masked ? 0.f : a.keep_scale / row_sum[half], a.head_dim, a.out.paired);
      if (lane % 4 == 0)
        a.lse[s.batch * a.lse_batch_stride + r.head * a.lse_head_stride + s.query_begin + r.i] =
            fully_masked ? -INFINITY : row_max[half] + log_(row_sum[half]);
    }
  }
  if (bad_rows)
    for (int r = 0; r < 16; ++r)
      if (bad_rows >> r & 1) {
        const QueryRow row = task.row(a, warp * 16 + r);
        if (row.valid)
          recompute_output_row<T>(a, s.batch, row.i, row.head, task.split, range.begin * Keys,
                                  range.end * Keys < s.key_len ? range.end * Keys : s.key_len);
      }
}

}  // namespace

void attention_forward(const AttentionForwardArgs& args, stream_t stream) {
  AttentionForwardArgs a = args;
  set_alignment(a, a.out);
  dispatch_type_and_head_dim(a.dtype, a.head_dim, [&]<class T, int D>() {
    using Tile = ForwardTile<T, D>;
    int64_t blocks;
    if (a.num_splits) blocks = int64_t(a.batch) * a.num_kv_heads * a.num_splits;
    else if (a.query_starts) blocks = (int64_t(a.query_len / Tile::Queries) + a.batch) * a.num_heads;
    else blocks = int64_t(divide_up(a.query_len, Tile::Queries)) * a.num_heads * a.batch;
    FASTLM_LAUNCH((attention_forward_kernel<T, D>), unsigned(blocks), Tile::Warps * 32, Tile::Bytes, stream, a);
  });
}

}  // namespace fastlm::cuda
