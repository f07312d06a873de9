// s = residual + dropout(x),  y = (s − mean)·rstd·w + b,  rstd = 1/√(var + eps)
//
// Bound by memory. Forward reads x and residual and writes s and y: 8 bytes an element in 16 bits. Backward reads dy, s
// and ds and writes dresidual, and dx where dropout or its type makes it another tensor: 8 or 10. About 10 and 15 FLOP
// an element; dropout adds 8 calls of Philox to 32 elements, some 25 integer instructions an element, still less than
// the memory takes. s is normalised as stored, rounded to residual's type; the variance is two-pass.
//
// 1. A row is held in registers, 32 columns a thread, by a team of 8 to 256 threads, so that x and residual are read
// once whatever the width up to 8192. Chunks of
//    8 columns: 16 bytes an access in 16 bits. With dropout a thread's four chunks are 16 columns apart, so that each
//    call of Philox gives four of its columns, not one. Predicted: above 90 % of the copy bandwidth forward from 768
//    wide; 512 threads · 32 columns · 4 bytes = 64 KiB are on their way to a multiprocessor where 20 KiB cover the
//    latency.
// 2. Backward: 264 blocks (two a multiprocessor of an H100) walk over many rows each and keep their share of dw and db
// in registers; a second kernel adds the
//    shares in order. No atomics: the same bits on every run. The shares are 264 · width · 8 bytes, written and read:
//    12 % of the traffic at 4096 × 768 in 16 bits, most of it in the L2 cache.
// 3. ds is asked for before the two sums over the row, with dy and s: three loads' latency for one. Predicted: a third
// of backward's time at 8 warps a multiprocessor.
// 4. Rows that are wider, or whose chunks are not whole and aligned, have kernels of their own, which hold nothing: a
// column at a time, read again for each pass,
//    from the caches. Without their branches the kernels above compile in a fraction of the time. Predicted: half the
//    bandwidth, on widths that models do not have.
#include "layernorm_residual.h"
#include <algorithm>
#include <stdexcept>
#include "launch.cuh"
#include "philox.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm::cuda {

constexpr int CHUNK = 8, CHUNKS = 4, HELD = CHUNK * CHUNKS;  // columns of an access; accesses and columns of a thread
constexpr int LARGEST_TEAM = 256, WIDEST_HELD = LARGEST_TEAM * HELD, FEWEST_THREADS = 128;
constexpr int MAX_PARTIALS = 264;
constexpr int FOLD_COLUMNS = WarpSize, FOLD_WARPS = 8;

template <class T, class R> struct forward_args {
  const T* x;
  int64_t x_stride;
  const R* residual;
  int64_t residual_stride;
  const void *weight, *bias;
  bool float_weights;  // they are float, else T
  T* y;
  R* summed;
  float *mean, *rstd;
  int64_t rows;
  int width, team;
  float eps;
  dropout drop;
};

template <class T, class R> struct backward_args {
  const T* dy;
  int64_t dy_stride;
  const R* dsummed;
  int64_t dsummed_stride;
  const R* summed;
  int64_t summed_stride;
  const void* weight;
  bool float_weights;
  const float *mean, *rstd;
  T* dx;
  R* dresidual;
  float *dweight, *dbias;  // shares, a row of `padded` columns for each block
  int64_t rows;
  int width, padded, team, steps;  // steps: rows that each team walks over
  dropout drop;
};

// The threads that share a row, one of `teams` of a block. It hands out columns by chunks, whole and aligned to 16
// bytes.
struct row_team {
  int size, teams, index, thread;
  bool apart;  // with dropout

  FASTLM_DEVICE row_team(int size, bool apart)
      : size(size),
        teams(int(blockDim.x) / size),
        index(int(threadIdx.x) / size),
        thread(int(threadIdx.x) % size),
        apart(apart) {}

  FASTLM_DEVICE int column(int chunk) const {
    return apart ? thread / 2 * 64 + chunk * 16 + thread % 2 * CHUNK : (chunk * size + thread) * CHUNK;
  }

  // Every thread of the block takes part. shared: room for N numbers of each warp.
  template <int N> FASTLM_DEVICE void sum(float (&values)[N], float* shared) const {
    for (int mask = (size < WarpSize ? size : WarpSize) / 2; mask > 0; mask /= 2)
#pragma unroll
      for (int n = 0; n < N; ++n) values[n] += shuffle_xor(values[n], mask);
    if (size <= WarpSize) return;
    const int warp = int(threadIdx.x) / WarpSize, first = index * (size / WarpSize);
    if (threadIdx.x % WarpSize == 0)
#pragma unroll
      for (int n = 0; n < N; ++n) shared[warp * N + n] = values[n];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = shared[first * N + n];
#pragma unroll 1
    for (int other = 1; other < size / WarpSize; ++other)
#pragma unroll
      for (int n = 0; n < N; ++n) values[n] += shared[(first + other) * N + n];
    __syncthreads();
  }
};

template <class T> FASTLM_DEVICE float parameter(const void* from, bool is_float, int column) {
  return is_float ? static_cast<const float*>(from)[column] : to_float(static_cast<const T*>(from)[column]);
}

template <class T> FASTLM_DEVICE void load_parameters(float (&out)[CHUNK], const void* from, bool is_float,
                                                      int column) {
  if (is_float) {
    const auto chunk = vec<float, CHUNK>::load(static_cast<const float*>(from) + column);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) out[i] = chunk[i];
  } else {
    const auto chunk = vec<T, CHUNK>::load(static_cast<const T*>(from) + column);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) out[i] = to_float(chunk[i]);
  }
}

// A thread's columns after dropout, given the first of them. The words are asked for in a loop that stays one: they are
// 8 · 60 instructions.
FASTLM_DEVICE void drop_out(float (&values)[CHUNKS][CHUNK], const dropout& drop, int64_t row, int first) {
  const uint64_t seed = uint64_t(*drop.seed);
  uint32_t keeps = 0;  // bit c·8 + i
#pragma unroll 2
  for (int i = 0; i < CHUNK; ++i) {
    const philox_words words = dropout_words(seed, uint32_t(first + i), uint32_t(row), 0);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) keeps |= uint32_t(words.word[c] >= drop.threshold) << (c * CHUNK + i);
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) values[c][i] = keeps >> (c * CHUNK + i) & 1 ? values[c][i] * drop.scale : 0.0f;
}

template <class T, class R> __global__ void __launch_bounds__(LARGEST_TEAM, 2)
    layernorm_residual_forward_kernel(const forward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(args.team, args.drop.active());
  const int64_t row = int64_t(blockIdx.x) * team.teams + team.index;
  const int width = args.width, end = row < args.rows ? width : 0;

  vec<T, CHUNK> x[CHUNKS];
  vec<R, CHUNK> residual[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = team.column(c);
    x[c] = {}, residual[c] = {};
    if (column < end) x[c] = vec<T, CHUNK>::load(args.x + row * args.x_stride + column);
    if (column < end && args.residual)
      residual[c] = vec<R, CHUNK>::load(args.residual + row * args.residual_stride + column);
  }
  float s[CHUNKS][CHUNK];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) s[c][i] = to_float(x[c][i]);
  if (args.drop.active()) drop_out(s, args.drop, row, team.column(0));
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    vec<R, CHUNK> stored;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      stored[i] = from_float<R>(s[c][i] + to_float(residual[c][i]));
      s[c][i] = to_float(stored[i]);
    }
    if (args.summed && team.column(c) < end) stored.store(args.summed + row * width + team.column(c));
  }

  float total[1] = {}, squares[1] = {};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) total[0] += s[c][i];
  team.sum(total, sums);
  const float mean = total[0] / float(width);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      s[c][i] -= mean;
      if (team.column(c) < end) squares[0] += s[c][i] * s[c][i];
    }
  team.sum(squares, sums);
  const float rstd = 1.0f / sqrtf(squares[0] / float(width) + args.eps);
  if (row < args.rows && team.thread == 0) args.mean[row] = mean, args.rstd[row] = rstd;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = team.column(c);
    if (column >= end) continue;
    float weight[CHUNK], bias[CHUNK] = {};
    load_parameters<T>(weight, args.weight, args.float_weights, column);
    if (args.bias) load_parameters<T>(bias, args.bias, args.float_weights, column);
    vec<T, CHUNK> y;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) y[i] = from_float<T>(s[c][i] * rstd * weight[i] + bias[i]);
    y.store(args.y + row * width + column);
  }
}

// The teams of a block add up their shares in shared memory, one after the other; the last writes the sum.
FASTLM_DEVICE void combine_partials(const row_team& team, const float (&values)[CHUNKS][CHUNK], float* sums,
                                    float* share, int width) {
  for (int turn = 0; turn < team.teams; ++turn) {
    if (team.index == turn)
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int column = team.column(c);
        vec<float, CHUNK> total{};
        if (turn > 0) total = vec<float, CHUNK>::load(sums + column);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) total[i] += values[c][i];
        if (turn + 1 < team.teams) total.store(sums + column);
        else if (column < width) total.store(share + column);
      }
    __syncthreads();
  }
}

// ds = rstd·(g − mean(g) − n·mean(g·n)) + dsummed,  n = (s − mean)·rstd,  g = dy·w;  dresidual = ds,  dx = dropout(ds);
// dw = Σ_rows dy·n,  db = Σ_rows dy
template <class T, class R> __global__ void __launch_bounds__(LARGEST_TEAM)
    layernorm_residual_backward_kernel(const backward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(args.team, args.drop.active());
  const int width = args.width;
  float dweight[CHUNKS][CHUNK] = {}, dbias[CHUNKS][CHUNK] = {};
#pragma unroll 1
  for (int step = 0; step < args.steps; ++step) {
    const int64_t row = (int64_t(blockIdx.x) * args.steps + step) * team.teams + team.index;
    const int end = row < args.rows ? width : 0;
    vec<T, CHUNK> dy[CHUNKS];
    vec<R, CHUNK> s[CHUNKS], dsummed[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = team.column(c);
      dy[c] = {}, s[c] = {}, dsummed[c] = {};
      if (column < end && args.dy) {
        dy[c] = vec<T, CHUNK>::load(args.dy + row * args.dy_stride + column);
        s[c] = vec<R, CHUNK>::load(args.summed + row * args.summed_stride + column);
      }
      if (column < end && args.dsummed)
        dsummed[c] = vec<R, CHUNK>::load(args.dsummed + row * args.dsummed_stride + column);
    }
    float ds[CHUNKS][CHUNK] = {};
    if (args.dy) {
      const float mean = row < args.rows ? args.mean[row] : 0.0f, rstd = row < args.rows ? args.rstd[row] : 0.0f;
      float n[CHUNKS][CHUNK], totals[2] = {};
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int column = team.column(c);
        float weight[CHUNK] = {};
        if (column < end) load_parameters<T>(weight, args.weight, args.float_weights, column);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
          n[c][i] = column < end ? (to_float(s[c][i]) - mean) * rstd : 0.0f;
          ds[c][i] = to_float(dy[c][i]) * weight[i];
          totals[0] += ds[c][i];
          totals[1] += ds[c][i] * n[c][i];
          dweight[c][i] += to_float(dy[c][i]) * n[c][i];
          dbias[c][i] += to_float(dy[c][i]);
        }
      }
      team.sum(totals, sums);
      const float average = totals[0] / float(width), correlation = totals[1] / float(width);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) ds[c][i] = rstd * (ds[c][i] - average - n[c][i] * correlation);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      vec<R, CHUNK> out;
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        ds[c][i] += to_float(dsummed[c][i]);
        out[i] = from_float<R>(ds[c][i]);
      }
      if (args.dresidual && team.column(c) < end) out.store(args.dresidual + row * width + team.column(c));
    }
    if (!args.dx) continue;
    if (args.drop.active()) drop_out(ds, args.drop, row, team.column(0));
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      vec<T, CHUNK> out;
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) out[i] = from_float<T>(ds[c][i]);
      if (team.column(c) < end) out.store(args.dx + row * width + team.column(c));
    }
  }
  if (args.dweight) combine_partials(team, dweight, sums, args.dweight + int64_t(blockIdx.x) * args.padded, width);
  if (args.dbias) combine_partials(team, dbias, sums, args.dbias + int64_t(blockIdx.x) * args.padded, width);
}

// The same of any width and alignment, a column at a time: thread t has columns t, t + threads, …; a block is one team.
template <class T, class R> __global__ void __launch_bounds__(LARGEST_TEAM)
    layernorm_residual_forward_any_kernel(const forward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(int(blockDim.x), false);
  const int64_t row = blockIdx.x;
  const int width = args.width, first = int(threadIdx.x);
  const T* x = args.x + row * args.x_stride;
  R* summed = args.summed + row * width;
  const auto s = [&](int column) { return args.summed ? to_float(summed[column]) : to_float(x[column]); };  // as stored
  float total[1] = {}, squares[1] = {};
#pragma unroll 1
  for (int column = first; column < width; column += team.size) {
    float sum = to_float(x[column]);
    if (args.drop.active())
      sum = kept(uint64_t(*args.drop.seed), args.drop.threshold, uint32_t(column), uint32_t(row), 0)
                ? sum * args.drop.scale
                : 0.0f;
    if (args.residual) sum += to_float(args.residual[row * args.residual_stride + column]);
    if (args.summed) {
      summed[column] = from_float<R>(sum);
      sum = to_float(summed[column]);
    }
    total[0] += sum;
  }
  team.sum(total, sums);
  const float mean = total[0] / float(width);
#pragma unroll 1
  for (int column = first; column < width; column += team.size) squares[0] += (s(column) - mean) * (s(column) - mean);
  team.sum(squares, sums);
  const float rstd = 1.0f / sqrtf(squares[0] / float(width) + args.eps);
  if (first == 0) args.mean[row] = mean, args.rstd[row] = rstd;
#pragma unroll 1
  for (int column = first; column < width; column += team.size) {
    const float normal = (s(column) - mean) * rstd * parameter<T>(args.weight, args.float_weights, column);
    args.y[row * width + column] =
        from_float<T>(args.bias ? normal + parameter<T>(args.bias, args.float_weights, column) : normal);
  }
}

// The shares are kept in memory: each thread adds to its own columns of the block's.
template <class T, class R> __global__ void __launch_bounds__(LARGEST_TEAM)
    layernorm_residual_backward_any_kernel(const backward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(int(blockDim.x), false);
  const int width = args.width, first = int(threadIdx.x);
  float *dweight = args.dweight + int64_t(blockIdx.x) * args.padded,
        *dbias = args.dbias + int64_t(blockIdx.x) * args.padded;
#pragma unroll 1
  for (int step = 0; step < args.steps; ++step) {
    const int64_t row = int64_t(blockIdx.x) * args.steps + step;
    if (row >= args.rows) return;  // the whole block; its first row exists
    const T* upstream = args.dy + row * args.dy_stride;
    const R* s = args.summed + row * args.summed_stride;
    const float mean = args.mean[row], rstd = args.rstd[row];
    float totals[2] = {};
    if (args.dy) {
#pragma unroll 1
      for (int column = first; column < width; column += team.size) {
        const float dy = to_float(upstream[column]), n = (to_float(s[column]) - mean) * rstd;
        const float g = dy * parameter<T>(args.weight, args.float_weights, column);
        totals[0] += g;
        totals[1] += g * n;
        if (args.dweight) dweight[column] = (step ? dweight[column] : 0.0f) + dy * n;
        if (args.dbias) dbias[column] = (step ? dbias[column] : 0.0f) + dy;
      }
      team.sum(totals, sums);
    }
    const float average = totals[0] / float(width), correlation = totals[1] / float(width);
#pragma unroll 1
    for (int column = first; column < width; column += team.size) {
      float ds = 0.0f;
      if (args.dy) {
        const float n = (to_float(s[column]) - mean) * rstd;
        ds = rstd * (to_float(upstream[column]) * parameter<T>(args.weight, args.float_weights, column) - average -
                     n * correlation);
      }
      if (args.dsummed) ds += to_float(args.dsummed[row * args.dsummed_stride + column]);
      if (args.dresidual) args.dresidual[row * width + column] = from_float<R>(ds);
      if (!args.dx) continue;
      if (args.drop.active())
        ds = kept(uint64_t(*args.drop.seed), args.drop.threshold, uint32_t(column), uint32_t(row), 0)
                 ? ds * args.drop.scale
                 : 0.0f;
      args.dx[row * width + column] = from_float<T>(ds);
    }
  }
}

// dweight (blockIdx.y = 0) or dbias from its shares: each warp adds every eighth share of 32 columns, and the first the
// sums of all warps.
template <class W> __global__ void layernorm_residual_fold_kernel(const float* shares, W* dweight, W* dbias, int count,
                                                                  int width, int padded) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const int lane = int(threadIdx.x) % WarpSize, warp = int(threadIdx.x) / WarpSize,
            column = int(blockIdx.x) * FOLD_COLUMNS + lane;
  const float* from = shares + int64_t(blockIdx.y) * count * padded;
  float total = 0.0f;
  if (column < width)
#pragma unroll 8
    for (int share = warp; share < count; share += FOLD_WARPS) total += from[int64_t(share) * padded + column];
  sums[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || column >= width) return;
#pragma unroll
  for (int other = 1; other < FOLD_WARPS; ++other) total += sums[other * WarpSize + lane];
  W* to = dweight && blockIdx.y == 0 ? dweight : dbias;  // where only one of the two is wanted its shares come first
  to[column] = from_float<W>(total);
}

// How the rows are dealt out, by the sizes and whether whole chunks are read.
struct row_cut {
  int team, threads, partials, steps, padded;
  int64_t blocks;  // of forward, a row a team

  row_cut(int64_t rows, int64_t width, bool held) {
    if (width > 1 << 30 || rows > int64_t(1) << 31)
      throw std::runtime_error("layernorm_residual: sizes beyond the range of 32 bits");
    for (team = held ? 8 : WarpSize; team < LARGEST_TEAM && team * (held ? HELD : CHUNKS) < width; team *= 2) {}
    threads = held ? std::max(team, FEWEST_THREADS) : team;
    blocks = (rows + threads / team - 1) / (threads / team);
    steps = int((blocks + MAX_PARTIALS - 1) / MAX_PARTIALS);
    partials = int((blocks + steps - 1) / steps);
    padded = int((width + CHUNK - 1) / CHUNK * CHUNK);
  }

  // Bytes of shared memory: `numbers` of each warp.
  size_t room(int numbers) const { return size_t(threads / WarpSize) * numbers * sizeof(float); }
};

static bool aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % CHUNK == 0;
}
static bool fits(int64_t width) { return width % CHUNK == 0 && width <= WIDEST_HELD; }

// Calls run.template operator()<T, R>().
template <class F> static void with_types(DType x, DType residual, F run) {
  with_dtype(x, [&]<class T>() {
    if (residual == DType::float32) run.template operator()<T, float>();
    else run.template operator()<T, T>();
  });
}

void layernorm_residual_forward(const layernorm_residual_forward_args& args, stream_t stream) {
  if (args.rows == 0) return;
  const bool held = fits(args.width) && aligned(args.x, args.x_stride) &&
                    aligned(args.residual, args.residual_stride) && aligned(args.weight, 0) && aligned(args.bias, 0) &&
                    aligned(args.y, 0) && aligned(args.summed, 0);
  const row_cut cut(args.rows, args.width, held);
  with_types(args.x_dtype, args.residual_dtype, [&]<class T, class R>() {
    const forward_args<T, R> with{.x = static_cast<const T*>(args.x),
                                  .x_stride = args.x_stride,
                                  .residual = static_cast<const R*>(args.residual),
                                  .residual_stride = args.residual_stride,
                                  .weight = args.weight,
                                  .bias = args.bias,
                                  .float_weights = args.weight_dtype == DType::float32,
                                  .y = static_cast<T*>(args.y),
                                  .summed = static_cast<R*>(args.summed),
                                  .mean = args.mean,
                                  .rstd = args.rstd,
                                  .rows = args.rows,
                                  .width = int(args.width),
                                  .team = cut.team,
                                  .eps = args.eps,
                                  .drop = make_dropout(args.seed ? args.dropout_p : 0.0, args.seed)};
    if (held)
      FASTLM_LAUNCH((layernorm_residual_forward_kernel<T, R>), unsigned(cut.blocks), cut.threads, cut.room(1), stream,
                    with);
    else
      FASTLM_LAUNCH((layernorm_residual_forward_any_kernel<T, R>), unsigned(cut.blocks), cut.threads, cut.room(1),
                    stream, with);
  });
}

int64_t layernorm_residual_max_partials() { return MAX_PARTIALS; }

void layernorm_residual_backward(const layernorm_residual_backward_args& args, stream_t stream) {
  if (args.rows == 0) return;
  const bool held = fits(args.width) && aligned(args.dy, args.dy_stride) &&
                    aligned(args.dsummed, args.dsummed_stride) && aligned(args.summed, args.summed_stride) &&
                    aligned(args.weight, 0) && aligned(args.dx, 0) && aligned(args.dresidual, 0) &&
                    aligned(args.partials, 0);
  const row_cut cut(args.rows, args.width, held);
  float* dbias_partials = args.dweight ? args.partials + int64_t(cut.partials) * cut.padded : args.partials;
  with_types(args.x_dtype, args.residual_dtype, [&]<class T, class R>() {
    const backward_args<T, R> with{.dy = static_cast<const T*>(args.dy),
                                   .dy_stride = args.dy_stride,
                                   .dsummed = static_cast<const R*>(args.dsummed),
                                   .dsummed_stride = args.dsummed_stride,
                                   .summed = static_cast<const R*>(args.summed),
                                   .summed_stride = args.summed_stride,
                                   .weight = args.weight,
                                   .float_weights = args.weight_dtype == DType::float32,
                                   .mean = args.mean,
                                   .rstd = args.rstd,
                                   .dx = static_cast<T*>(args.dx),
                                   .dresidual = static_cast<R*>(args.dresidual),
                                   .dweight = args.dweight ? args.partials : nullptr,
                                   .dbias = args.dbias ? dbias_partials : nullptr,
                                   .rows = args.rows,
                                   .width = int(args.width),
                                   .padded = cut.padded,
                                   .team = cut.team,
                                   .steps = cut.steps,
                                   .drop = make_dropout(args.seed ? args.dropout_p : 0.0, args.seed)};
    const size_t sums =
        cut.threads > cut.team ? size_t(cut.team) * HELD * sizeof(float) : 0;  // of the teams of a block
    if (held)
      FASTLM_LAUNCH((layernorm_residual_backward_kernel<T, R>), unsigned(cut.partials), cut.threads,
                    std::max(cut.room(2), sums), stream, with);
    else
      FASTLM_LAUNCH((layernorm_residual_backward_any_kernel<T, R>), unsigned(cut.partials), cut.threads, cut.room(2),
                    stream, with);
  });
  const unsigned wanted = (args.dweight != nullptr) + (args.dbias != nullptr);
  if (wanted == 0) return;
  const dim3 grid(unsigned((args.width + FOLD_COLUMNS - 1) / FOLD_COLUMNS), wanted);
  constexpr int threads = FOLD_WARPS * WarpSize;
  with_dtype(args.weight_dtype, [&]<class W>() {
    FASTLM_LAUNCH(layernorm_residual_fold_kernel<W>, grid, threads, threads * sizeof(float), stream, args.partials,
                  static_cast<W*>(args.dweight), static_cast<W*>(args.dbias), cut.partials, int(args.width),
                  cut.padded);
  });
}

}  // namespace fastlm::cuda
