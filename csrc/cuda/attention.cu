// softmax(q kᵀ · scale + mask) v by tiles, forward (Dao, 2023, arXiv:2307.08691): q (batch, heads, query_len,
// head_dim), k and v (batch, key_heads, key_len, head_dim). 4 · query_len · key_len · head_dim FLOPs a head, half of it
// with a causal mask; each of q, k, v, out once through memory as long as the keys of a head stay in the L2 cache:
// bound by the matrix units from some hundred tokens on.
//
// A block owns a tile of queries, 16 a warp, and walks over the keys with a running maximum and sum in float32. Blocks
// of one head follow each other, so that they share its keys in the cache, and the tile with the most keys comes first.
// Scores stay raw, and the scale goes into the exponent of 2: one fused multiply-add a score. (For that the scale must
// be positive: the queries take its sign.)
//
// History. Times are predicted, none has been measured.
//   1. 64 queries by 64 keys (32 from head_dim 129 on and in float32), 4 warps, keys and values in two stages of
//   cp.async, one barrier a tile, the queries'
//      fragments in registers up to head_dim 128. At head_dim 64 in 16 bits a tile of keys costs a warp 64 mma (8
//      cycles each of its quarter of an A100's multiprocessor: 512), 16 KiB from shared memory (512 cycles for the four
//      warps together at 128 bytes a cycle), and 32 exponentials a thread (256 cycles at 4 a cycle and quarter):
//      products and shared memory are balanced, and overlap only between blocks. 160 registers and 40 KiB of shared
//      memory: 3 blocks a multiprocessor; at head_dim 128 213 and 80 KiB: 2 on an A100 and an H100, 1 where there are
//      99 KiB. Expected: half of the peak of mma on an A100, about 150 TFLOP/s, and 250 on an H100, whose mma.sync
//      reaches 62 % of what wgmma does.
//   2. What only edges need (rows of the mask, counters of dropout) is computed where it is needed, and what is seen
//   becomes a bit each in a loop that is not
//      unrolled: from 248 registers to 160 at head_dim 64, which is 3 blocks for 2, and from 45 s of compilation to 34.
//   Next: 32 queries a warp where registers allow (head_dim ≤ 64), which halves what is read from shared memory for a
//   product: 1.3 × expected.
#include "attention_tile.cuh"

namespace fastlm::cuda {
namespace {

template <class T, int D> struct ForwardTile {
  static constexpr int Warps = 4, Queries = 16 * Warps;
  static constexpr int Keys = sizeof(T) == 2 ? (D <= 128 ? 64 : 32) : D <= 128 ? 32 : 16;
  static constexpr int Stages = sizeof(T) == 4 && D > 128 ? 1 : 2;
  static constexpr int Bytes = (Queries + 2 * Stages * Keys) * D * int(sizeof(T));
  static constexpr bool Held = sizeof(T) == 2 && D <= 128;  // the queries' fragments, in registers
  static constexpr int Unrolled = Held ? Steps<T, D> : 4;
  static constexpr int Blocks = D <= 64 ? 3
                                : sizeof(T) == 2 && D <= 128
                                    ? 2
                                    : 1;  // at a time on a multiprocessor: what the registers are rationed for
  static_assert(Bytes <= 99 << 10);
};

// What a row of a tile is: a query of a head. Where keys are split, a tile has the queries of all heads that share a
// key head.
struct QueryRow {
  int i, head;
  bool real;
};

struct ForwardPlace {
  Sequence s;
  int first, head, piece;  // the first row; its head, or of a split the first of those that share a key head

  FASTLM_DEVICE QueryRow row(const AttentionForwardArgs& a, int at) const {
    const int number = first + at;
    if (a.num_splits == 0) return {number, head, number < s.query_len};
    const bool real = number < a.num_heads / a.num_kv_heads * s.query_len;
    return {number % s.query_len, real ? head + number / s.query_len : head, real};
  }
};

// One row by one warp, without matrix units: only what is seen is ever added.
template <class T> __device__ __attribute__((noinline)) void forward_key_by_key(const AttentionForwardArgs& a,
                                                                                int batch, int i, int head, int piece,
                                                                                int begin, int end) {
  const Sequence s = sequence_of(a, batch);
  const QueryRow row = {i, head, true};
  const int key_head = row.head / (a.num_heads / a.num_kv_heads);
  const uint32_t third = s.batch * a.num_heads + row.head;
  const uint64_t seed = a.seed ? *a.seed : 0;
  const Channels query = read_channels<T>(token_of<T>(a.query, s.batch, row.head, s.query_begin + row.i), a.head_dim);
  Channels total = {};
  float top = -INFINITY, norm = 0;
  for (int j = begin; j < end; ++j) {
    float score = dot(query, read_channels<T>(token_of<T>(a.key, s.batch, key_head, s.key_begin + j), a.head_dim));
    if (!sees<T>(a, s, row.head, row.i, j, score)) continue;
    const float new_top = fmaxf(top, score), base = new_top == -INFINITY ? 0.f : new_top;
    float weight = exp2_fast((score - base) * Log2e);
    const float decay = exp2_fast((top - base) * Log2e);
    norm = norm * decay + weight;
    if (a.seed && !kept(seed, a.threshold, j, row.i, third)) weight = 0;
    const Channels value = read_channels<T>(token_of<T>(a.value, s.batch, key_head, s.key_begin + j), a.head_dim);
    for (int c = 0; c < WidestHead / 32; ++c) total.at[c] = total.at[c] * decay + weight * value.at[c];
    top = new_top;
  }
  const bool first_lane = threadIdx.x % 32 == 0;
  if (a.num_splits) {
    const int64_t place = ((int64_t(s.batch) * a.num_heads + row.head) * s.query_len + row.i) * a.num_splits + piece;
    write_channels<float>(a.partial_out + place * a.head_dim, total, a.keep_scale, a.head_dim);
    if (first_lane) a.partial_max[place] = top, a.partial_sum[place] = norm;
  } else {
    write_channels<T>(token_of<T>(a.out, s.batch, row.head, s.query_begin + row.i), total,
                      norm == 0 ? 0.f : a.keep_scale / norm, a.head_dim);
    if (first_lane)
      a.lse[s.batch * a.lse_batch_stride + row.head * a.lse_head_stride + s.query_begin + row.i] =
          norm == 0 ? -INFINITY : top + log_(norm);
  }
}

template <class T, int D> __global__ void __launch_bounds__(ForwardTile<T, D>::Warps * 32, ForwardTile<T, D>::Blocks)
    attention_forward_kernel(FASTLM_CONSTANT AttentionForwardArgs a) {
  using Tile = ForwardTile<T, D>;
  constexpr int Queries = Tile::Queries, Keys = Tile::Keys, Threads = Tile::Warps * 32,
                TileBytes = Keys * D * int(sizeof(T));
  FASTLM_SHARED(shared);
  unsigned char *const queries = shared, *const keys = shared + Queries * D * sizeof(T),
                       *const values = keys + Tile::Stages * TileBytes;

  const int groups = a.num_heads / a.num_kv_heads;
  ForwardPlace place;
  if (a.num_splits) {
    const int block = blockIdx.x / a.num_splits;
    place = {sequence_of(a, block / a.num_kv_heads), 0, block % a.num_kv_heads * groups,
             int(blockIdx.x % a.num_splits)};
  } else if (a.query_starts) {
    check_starts(a);
    const int tiles = gridDim.x / a.num_heads;
    int tile = blockIdx.x % tiles;
    const int batch = find_tile(a.query_starts, a.query_starts_int64, a.batch, Queries, tile);
    if (batch == a.batch) return;
    place = {sequence_of(a, batch), tile * Queries, int(blockIdx.x / tiles), 0};
  } else {
    const int tiles = divide_up(a.query_len, Queries), block = blockIdx.x / tiles;
    place = {sequence_of(a, block / a.num_heads), (tiles - 1 - int(blockIdx.x % tiles)) * Queries, block % a.num_heads,
             0};
  }
  const Sequence& s = place.s;
  const int rows = (a.num_splits ? groups : 1) * s.query_len - place.first, first = a.num_splits ? 0 : place.first;
  const int last = a.num_splits ? s.query_len - 1 : place.first + (rows < Queries ? rows : Queries) - 1;
  TileRange range = tiles_of_keys(s, first, last, Keys);
  if (a.num_splits) {
    const int begin = place.piece * (a.split_size / Keys), end = begin + a.split_size / Keys;
    range.begin = range.begin < begin ? begin : range.begin;
    range.end = range.end > end ? end : range.end;
  }
  const bool all_edges = a.mask_type != MaskType::none || a.key_padding;

  const int64_t key_offset =
      s.batch * a.key.batch_stride + place.head / groups * a.key.head_stride + s.key_begin * a.key.token_stride;
  const int64_t value_offset =
      s.batch * a.value.batch_stride + place.head / groups * a.value.head_stride + s.key_begin * a.value.token_stride;
  const auto fetch = [&](int tile, int stage) {
    if (tile < range.end) {
      load_tokens<T, D, Keys, Threads>(keys + stage * TileBytes, a.key, key_offset, tile * Keys, s.key_len, a.head_dim);
      load_tokens<T, D, Keys, Threads>(values + stage * TileBytes, a.value, value_offset, tile * Keys, s.key_len,
                                       a.head_dim);
    }
    cp_async_commit();
  };
  load_rows<T, D, Queries, Threads>(queries, a.query, a.head_dim, [&](int at) -> const T* {
    const QueryRow row = place.row(a, at);
    return row.real ? token_of<T>(a.query, s.batch, row.head, s.query_begin + row.i) : nullptr;
  });
  cp_async_commit();
  fetch(range.begin, 0);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool works = warp * 16 < rows;  // a warp beyond the queries only copies
  const bool additive = is_additive(a);
  const uint32_t flip = a.scale < 0 ? SignBits<T> : 0;
  const float size = fabsf(a.scale);
  const float unit =
      additive ? Log2e : fmaxf(size * Log2e, 1e-37f);  // of a score in the exponent; never 0, which would make −∞ a NaN

  cp_async_wait<1>();
  __syncthreads();
  uint32_t held[Tile::Held ? Steps<T, D> : 1][4];
  if constexpr (Tile::Held)
#pragma unroll
    for (int step = 0; step < Steps<T, D>; ++step) read_left<T, D>(held[step], queries, warp * 16, step, flip);
  const auto left = [&](int step, uint32_t (&raw)[4]) {
    if constexpr (Tile::Held)
      for (int r = 0; r < 4; ++r) raw[r] = held[step][r];
    else read_left<T, D>(raw, queries, warp * 16, step, flip);
  };

  float total[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, norm[2] = {};
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

    float weights[Keys / 8][4];
    multiply_by_rows<T, D, Keys, Tile::Unrolled>(weights, left, keys + stage * TileBytes, a.tf32);
    if (all_edges || tile < range.inner || tile >= range.outer) {
      const QueryRow row[2] = {place.row(a, warp * 16 + lane / 4), place.row(a, warp * 16 + lane / 4 + 8)};
      const int64_t mask_at[2] = {mask_offset(a, s.batch, row[0].head), mask_offset(a, s.batch, row[1].head)};
      mask_scores<T, false, Keys>(weights, a, s, {row[0].i, row[1].i}, tile * Keys, mask_at, size);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_top = top[half];
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
        new_top = fmaxf(new_top, fmaxf(weights[n][2 * half], weights[n][2 * half + 1]));
      new_top = fmaxf(new_top, shuffle_xor(new_top, 1));
      new_top = fmaxf(new_top, shuffle_xor(new_top, 2));
      const float base = new_top == -INFINITY ? 0.f : new_top;  // a row that has seen nothing yet
      const float decay = exp2_fast((top[half] - base) * unit);
      const float shift = additive ? 0.f : -base * unit;
      if (additive)  // the difference first: finfo.min in a mask is an ordinary number, whose multiple is not
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n) weights[n][2 * half] -= base, weights[n][2 * half + 1] -= base;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e)
          sum += weights[n][e] = exp2_fast(fmaf(weights[n][e], unit, shift));
      norm[half] = norm[half] * decay + sum;
      top[half] = new_top;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) total[d][2 * half] *= decay, total[d][2 * half + 1] *= decay;
    }
    if (a.seed) {
      const QueryRow row[2] = {place.row(a, warp * 16 + lane / 4), place.row(a, warp * 16 + lane / 4 + 8)};
      const uint32_t third[2] = {uint32_t(s.batch * a.num_heads + row[0].head),
                                 uint32_t(s.batch * a.num_heads + row[1].head)};
      const uint32_t keep = kept_bits<Keys>(a, *a.seed, {row[0].i, row[1].i}, third, tile * Keys);
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) weights[n][e] = keep >> (n * 4 + e) & 1 ? weights[n][e] : 0.f;
    }
    multiply_from_registers<T, D, Keys>(total, weights, values + stage * TileBytes, a.tf32);
  }
  cp_async_wait<0>();
  if (!works) return;

  const uint32_t again = rows_not_finite<D>(total);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    norm[half] += shuffle_xor(norm[half], 1);
    norm[half] += shuffle_xor(norm[half], 2);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const QueryRow r = place.row(a, warp * 16 + lane / 4 + 8 * half);
    if (!r.real || again >> (half * 8 + lane / 4) & 1) continue;
    const bool empty = norm[half] == 0;
    const float highest = additive ? top[half] : top[half] * size;
    if (a.num_splits) {
      const int64_t at = ((int64_t(s.batch) * a.num_heads + r.head) * s.query_len + r.i) * a.num_splits + place.piece;
      write_row<float, D>(a.partial_out + at * a.head_dim, total, half, a.keep_scale, a.head_dim, a.head_dim % 2 == 0);
      if (lane % 4 == 0) a.partial_max[at] = empty ? -INFINITY : highest, a.partial_sum[at] = norm[half];
    } else {
      write_row<T, D>(token_of<T>(a.out, s.batch, r.head, s.query_begin + r.i), total, half,
                      empty ? 0.f : a.keep_scale / norm[half], a.head_dim, a.out.paired);
      if (lane % 4 == 0)
        a.lse[s.batch * a.lse_batch_stride + r.head * a.lse_head_stride + s.query_begin + r.i] =
            empty ? -INFINITY : highest + log_(norm[half]);
    }
  }
  if (again)
    for (int r = 0; r < 16; ++r)
      if (again >> r & 1) {
        const QueryRow bad = place.row(a, warp * 16 + r);
        if (bad.real)
          forward_key_by_key<T>(a, s.batch, bad.i, bad.head, place.piece, range.begin * Keys,
                                range.end * Keys < s.key_len ? range.end * Keys : s.key_len);
      }
}

}  // namespace

void attention_forward(const AttentionForwardArgs& args, stream_t stream) {
  AttentionForwardArgs a = args;
  complete(a, a.out);
  by_type_and_width(a.dtype, a.head_dim, [&]<class T, int D>() {
    using Tile = ForwardTile<T, D>;
    int64_t blocks;
    if (a.num_splits) blocks = int64_t(a.batch) * a.num_kv_heads * a.num_splits;
    else if (a.query_starts) blocks = (int64_t(a.query_len / Tile::Queries) + a.batch) * a.num_heads;
    else blocks = int64_t(divide_up(a.query_len, Tile::Queries)) * a.num_heads * a.batch;
    FASTLM_LAUNCH((attention_forward_kernel<T, D>), unsigned(blocks), Tile::Warps * 32, Tile::Bytes, stream, a);
  });
}

}  // namespace fastlm::cuda
