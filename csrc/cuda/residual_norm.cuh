// What the kernels of normalizations share: the threads that have a row in registers, dropout of its columns, and the
// partial sums of parameter gradients. layernorm_residual.cu explains the layout.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>
#include "launch.cuh"
#include "philox.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm::cuda {

// Columns per vector access, vector accesses per thread.
constexpr int VECTOR = 8, VECTORS = 4, COLUMNS_PER_THREAD = VECTOR * VECTORS;
constexpr int MAX_TEAM = 256, MAX_REGISTER_WIDTH = MAX_TEAM * COLUMNS_PER_THREAD, MIN_THREADS = 128;
constexpr int REDUCE_COLUMNS = WarpSize, REDUCE_WARPS = 32;

// Rows of partial sums of a parameter gradient, so many as blocks of backward run at a time: one wave.
inline int max_partials() { return std::min(2 * multiprocessors(), 1024); }

// The threads that share a row. A block has `teams` of them. Columns are assigned to threads in vectors.
struct row_team {
  int size, teams, index, thread;
  bool spread_columns;  // with dropout

  FASTLM_DEVICE row_team(int size, bool spread_columns)
      : size(size),
        teams(int(blockDim.x) / size),
        index(int(threadIdx.x) / size),
        thread(int(threadIdx.x) % size),
        spread_columns(spread_columns) {}

  FASTLM_DEVICE int column(int chunk) const {
    return spread_columns ? thread / 2 * 64 + chunk * 16 + thread % 2 * VECTOR : (chunk * size + thread) * VECTOR;
  }

  // Sums over the team. All threads of the block take part. `shared` is space for N numbers per warp.
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

template <class T> FASTLM_DEVICE void load_parameters(float (&out)[VECTOR], const void* from, bool is_float,
                                                      int column) {
  if (is_float) {
    const auto chunk = vec<float, VECTOR>::load(static_cast<const float*>(from) + column);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out[i] = chunk[i];
  } else {
    const auto chunk = vec<T, VECTOR>::load(static_cast<const T*>(from) + column);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out[i] = to_float(chunk[i]);
  }
}

// Applies dropout to the columns of a thread; `first` is the first of them. The loop is unrolled by 2 only, because 8
// Philox calls are 480 instructions.
FASTLM_DEVICE void apply_dropout(float (&values)[VECTORS][VECTOR], const dropout& drop, int64_t row, int first) {
  const uint64_t seed = uint64_t(*drop.seed);
  uint32_t keeps = 0;  // bit c·8 + i
#pragma unroll 2
  for (int i = 0; i < VECTOR; ++i) {
    const philox_words words = dropout_words(seed, uint32_t(first + i), uint32_t(row), 0);
#pragma unroll
    for (int c = 0; c < VECTORS; ++c) keeps |= uint32_t(words.word[c] >= drop.threshold) << (c * VECTOR + i);
  }
#pragma unroll
  for (int c = 0; c < VECTORS; ++c)
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) values[c][i] = keeps >> (c * VECTOR + i) & 1 ? values[c][i] * drop.scale : 0.0f;
}

// Bytes of the space of row_team::sum for N numbers, a multiple of 16.
FASTLM_DEVICE int sums_bytes(int numbers) { return int(blockDim.x) / WarpSize * numbers * int(sizeof(float)); }

// The columns of a thread in its next row, copied to shared memory while it computes the present one. A thread reads
// only what it has copied itself. prefetch() is followed by cp_async_wait<0>() and take().
template <class X> struct row_slots {
  static constexpr int PIECES = VECTOR * sizeof(X) / 16, PER_VECTOR = 16 / sizeof(X);
  static constexpr size_t bytes_per_thread = VECTORS * PIECES * 16;

  unsigned char* base;

  FASTLM_DEVICE X* slot(int c, int piece) const {
    return reinterpret_cast<X*>(base + (size_t(c * PIECES + piece) * blockDim.x + threadIdx.x) * 16);
  }
  FASTLM_DEVICE void prefetch(const X* row, const row_team& team, int end) const {
#pragma unroll
    for (int c = 0; c < VECTORS; ++c)
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece)
        cp_async_16(slot(c, piece), row + team.column(c) + piece * PER_VECTOR, team.column(c) < end);
  }
  FASTLM_DEVICE void take(vec<X, VECTOR> (&out)[VECTORS]) const {
#pragma unroll
    for (int c = 0; c < VECTORS; ++c)
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
        const auto part = vec<X, PER_VECTOR>::load(slot(c, piece));
#pragma unroll
        for (int i = 0; i < PER_VECTOR; ++i) out[c][piece * PER_VECTOR + i] = part[i];
      }
  }
};

// Bytes of shared memory of dy, s and ds: 16 to 96 KiB.
template <class T, class R> constexpr size_t slot_bytes(int threads) {
  return size_t(threads) * (row_slots<T>::bytes_per_thread + 2 * row_slots<R>::bytes_per_thread);
}

// The teams of a block add their partial sums in shared memory, one after the other; the last writes the result.
FASTLM_DEVICE void combine_partials(const row_team& team, const float (&values)[VECTORS][VECTOR], float* sums,
                                    float* partial, int width) {
  for (int member = 0; member < team.teams; ++member) {
    if (team.index == member)
#pragma unroll
      for (int c = 0; c < VECTORS; ++c) {
        const int column = team.column(c);
        vec<float, VECTOR> acc{};
        if (member > 0) acc = vec<float, VECTOR>::load(sums + column);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) acc[i] += values[c][i];
        if (member + 1 < team.teams) acc.store(sums + column);
        else if (column < width) acc.store(partial + column);
      }
    __syncthreads();
  }
}

// Reduces the partial sums of dweight (blockIdx.y = 0) or dbias: each of 32 warps adds every 32nd one for 32 columns,
// with all loads under way at once, and the first warp adds the results of all warps.
template <class W> __global__ void residual_norm_reduce_kernel(const float* partials, W* dweight, W* dbias, int count,
                                                               int width, int padded_width) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const int lane = int(threadIdx.x) % WarpSize, warp = int(threadIdx.x) / WarpSize,
            column = int(blockIdx.x) * REDUCE_COLUMNS + lane;
  const float* from = partials + int64_t(blockIdx.y) * count * padded_width;
  float acc = 0.0f;
  if (column < width)
#pragma unroll 8
    for (int partial = warp; partial < count; partial += REDUCE_WARPS)
      acc += from[int64_t(partial) * padded_width + column];
  sums[threadIdx.x] = acc;
  __syncthreads();
  if (warp > 0 || column >= width) return;
#pragma unroll
  for (int other = 1; other < REDUCE_WARPS; ++other) acc += sums[other * WarpSize + lane];
  W* to = dweight && blockIdx.y == 0 ? dweight : dbias;  // without dweight the partial sums of dbias come first
  to[column] = from_float<W>(acc);
}

// How rows are assigned to blocks and teams, from the sizes and whether vectors are read.
struct row_partition {
  int team, threads, partials, rows_per_team, padded_width;
  int64_t blocks;  // of forward, with one row per team

  row_partition(const char* operation, int64_t rows, int64_t width, bool in_registers) {
    if (width > 1 << 30 || rows > int64_t(1) << 31)
      throw std::runtime_error(std::string(operation) + ": sizes beyond the range of 32 bits");
    for (team = in_registers ? 8 : WarpSize;
         team < MAX_TEAM && team * (in_registers ? COLUMNS_PER_THREAD : VECTORS) < width; team *= 2) {}
    threads = in_registers ? std::max(team, MIN_THREADS) : team;
    blocks = (rows + threads / team - 1) / (threads / team);
    const int most = max_partials();
    rows_per_team = int((blocks + most - 1) / most);
    partials = int((blocks + rows_per_team - 1) / rows_per_team);
    padded_width = int((width + VECTOR - 1) / VECTOR * VECTOR);
  }

  // Bytes of shared memory for so many numbers per warp.
  size_t shared_bytes(int numbers) const { return size_t(threads / WarpSize) * numbers * sizeof(float); }
};

inline bool aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % VECTOR == 0;
}
inline bool fits_in_registers(int64_t width) { return width % VECTOR == 0 && width <= MAX_REGISTER_WIDTH; }

// Calls run.template operator()<T, R>().
template <class F> void dispatch_types(DType x, DType residual, F run) {
  with_dtype(x, [&]<class T>() {
    if (residual == DType::float32) run.template operator()<T, float>();
    else run.template operator()<T, T>();
  });
}

// Reduces the partial sums of a backward pass; dweight or dbias may be null.
inline void reduce_partials(const float* partials, DType dtype, void* dweight, void* dbias,
                            const row_partition& partition, int64_t width, stream_t stream) {
  const unsigned gradients = (dweight != nullptr) + (dbias != nullptr);
  if (gradients == 0) return;
  const dim3 grid(unsigned((width + REDUCE_COLUMNS - 1) / REDUCE_COLUMNS), gradients);
  constexpr int threads = REDUCE_WARPS * WarpSize;
  with_dtype(dtype, [&]<class W>() {
    FASTLM_LAUNCH(residual_norm_reduce_kernel<W>, grid, threads, threads * sizeof(float), stream, partials,
                  static_cast<W*>(dweight), static_cast<W*>(dbias), partition.partials, int(width),
                  partition.padded_width);
  });
}

}  // namespace fastlm::cuda
