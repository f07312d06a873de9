// C = A·W by tiles on tensor cores, with an epilogue that receives every group of 8 columns of C in float32 before
// anything is stored.
//
// A is (rows, k), contiguous along k. W is (k, n), contiguous along k (the weight of nn.Linear, W1 or W2ᵀ) or along n
// (Conv1D); neither is copied. 2·rows·k·n FLOPs. A block computes a tile of C. Per step along k it copies 64 bytes of
// each of its rows and columns to shared memory by cp.async, in three stages. Chunks of 16 bytes are swizzled so that
// neither the copies nor ldmatrix have bank conflicts. An operand whose rows are not whole, aligned chunks (an odd
// width, a view with an offset) is read element by element, which is several times slower.
//
// Layout:
//   - Tiles are 128×128 with four warps of 64×64: 64 FLOPs per byte from the L2 cache, and 4 KiB from shared memory per
//     warp for 64·64·16 multiply-adds. Tiles are processed 8 rows of tiles at a time, which keeps the columns of W in
//     the L2 cache. Two blocks fit on a multiprocessor (48 KiB and at most 255 registers per thread each), so one
//     multiplies while the other runs its epilogue.
//   - The epilogue goes through shared memory, 32 rows of a warp at a time. In the layout of the accumulators a lane
//     would store 4 bytes per row; here a warp stores whole lines of 128 bytes. What the epilogue reads is prefetched
//     one group ahead. The loop is not unrolled, so the code of the epilogue exists once.
//   - Tiles are 64×64 with four warps of 32×32 (24 KiB, four blocks per multiprocessor) where tiles of 128 would leave
//     multiprocessors idle, and always in float32, whose three products need the registers.
//   - float32 takes three tf32 products, a·w ≈ a_low·w_high + a_high·w_low + a_high·w_high, with an error of 2⁻²² of a
//     product. Tensor cores truncate when they accumulate, so each step of 8 along k starts at zero and is added to the
//     accumulators in float32, which rounds (Ootomo & Yokota 2022, arXiv:2203.03341). An infinite operand has no low
//     part and gives NaN: a tile that is not finite is computed again, and products that are not finite are then
//     replaced by the product of the high parts alone, which is infinite where the operands are.
#pragma once
#include <climits>
#include <stdexcept>
#include "launch.cuh"
#include "vec.cuh"

namespace fastlm::cuda {

// A row-major matrix. aligned: every row starts at a multiple of 16 bytes and is a multiple of 16 bytes long.
template <class T> struct matrix {
  const T* data;
  int64_t stride;
  int rows, columns;
  bool aligned;
};

template <class T> matrix<T> matrix_at(const void* data, int64_t stride, int64_t rows, int64_t columns) {
  if (rows == 1) stride = 0;  // unused, but the address of a row beyond the end must be aligned, too
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * sizeof(T) % 16 == 0;
  return {static_cast<const T*>(data), stride, int(rows), int(columns), aligned && columns * sizeof(T) % 16 == 0};
}

// The operands of a product. One of the strides of W along k and n is 1.
struct gemm_operands {
  const void* a;
  int64_t a_stride;
  const void* w;
  int64_t w_k_stride, w_n_stride;
  int64_t rows, k, n;
  bool tf32;  // float32 operands may be rounded to tf32
};

template <class T> struct gemm_args {
  matrix<T> a, w;  // w: (n, k) where k is contiguous, else (k, n)
  int rows, k, n;
  bool tf32;
};

// The offset of a chunk of 16 bytes of a tile in shared memory. Of rows of 4 chunks, 8 are read at a time, the same
// chunk of each. Of rows along n, ldmatrix reads 8 at a time too; in float32, which it cannot transpose, 4 rows × 2
// chunks are read word by word.
template <class T, int CHUNKS> FASTLM_DEVICE int tile_offset(int row, int chunk) {
  if constexpr (CHUNKS == 4) return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
  else if constexpr (sizeof(T) == 2) return row * CHUNKS * 16 + ((chunk ^ (row & 7)) << 4);
  else return row * CHUNKS * 16 + ((chunk ^ (row & 3) << 1) << 4);
}

constexpr int GEMM_THREADS = 128;

// Loads ROWS × CHUNKS chunks of a matrix, and zeros beyond its end. The chunks of a thread are in one column, a number
// of rows apart that leaves the swizzle unchanged.
template <class T, int ROWS, int CHUNKS> FASTLM_DEVICE void load_tile(unsigned char* tile, const matrix<T>& from,
                                                                      int first_row, int first_column) {
  constexpr int PER = 16 / sizeof(T), ROWS_APART = GEMM_THREADS / CHUNKS;
  const int chunk = int(threadIdx.x) % CHUNKS, chunk_row = int(threadIdx.x) / CHUNKS, row = first_row + chunk_row,
            column = first_column + chunk * PER;
  static_assert(GEMM_THREADS % CHUNKS == 0 && ROWS_APART % (sizeof(T) == 2 || CHUNKS == 4 ? 8 : 4) == 0);
  unsigned char* to = tile + tile_offset<T, CHUNKS>(chunk_row, chunk);
  const T* source = from.data + row * from.stride + column;
  if (from.aligned) {
#pragma unroll
    for (int i = 0; i < ROWS / ROWS_APART; ++i, source += ROWS_APART * from.stride)
      cp_async_16(to + i * ROWS_APART * CHUNKS * 16, source, row + i * ROWS_APART < from.rows && column < from.columns);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < ROWS / ROWS_APART; ++i, source += ROWS_APART * from.stride) {
    vec<T, PER> values;
#pragma unroll
    for (int e = 0; e < PER; ++e)
      values[e] = row + i * ROWS_APART < from.rows && column + e < from.columns ? source[e] : from_float<T>(0.0f);
    values.store(reinterpret_cast<T*>(to + i * ROWS_APART * CHUNKS * 16));
  }
}

// The tile of (2·WARP)² of a block of 2×2 warps. K_CONTIGUOUS is the layout of W.
template <class T, bool K_CONTIGUOUS, int WARP> struct gemm_tile {
  static constexpr int TILE = 2 * WARP, PER = 16 / sizeof(T), STEP = 4 * PER;  // 64 bytes along k
  static constexpr int ROWS = WARP / 16, COLUMNS = WARP / 8;                   // in fragments
  static constexpr int A_BYTES = TILE * 64, STAGE = 2 * A_BYTES, STAGES = 3;
  static constexpr int W_CHUNKS = K_CONTIGUOUS ? 4 : TILE / PER;  // of a row of the tile of W
  // Of the epilogue: rows at a time, and floats between rows, which avoids bank conflicts.
  static constexpr int SCRATCH_ROWS = 32, SCRATCH_STRIDE = WARP + 8;
  static constexpr int SHARED = STAGES * STAGE;
  static_assert(4 * SCRATCH_ROWS * SCRATCH_STRIDE * sizeof(float) <= SHARED);

  float acc[ROWS][COLUMNS][4] = {};

  FASTLM_DEVICE void load(unsigned char* stage, const gemm_args<T>& args, int row, int column, int step) {
    load_tile<T, TILE, 4>(stage, args.a, row, step * STEP);
    if constexpr (K_CONTIGUOUS) load_tile<T, TILE, 4>(stage + A_BYTES, args.w, column, step * STEP);
    else load_tile<T, STEP, W_CHUNKS>(stage + A_BYTES, args.w, step * STEP, column);
  }

  // Reads the fragments of W for the columns of a warp: half `half` of a step, two chunks along k.
  FASTLM_DEVICE void load_w(uint32_t (&w)[COLUMNS][2], const unsigned char* tile, int half, int warp_column, int lane) {
    if constexpr (!K_CONTIGUOUS && sizeof(T) == 4) {
      const int k = half * 8 + lane % 4, n = warp_column + lane / 4;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          w[j][r] = *reinterpret_cast<const uint32_t*>(tile + tile_offset<T, W_CHUNKS>(k + 4 * r, (n + 8 * j) / 4) +
                                                       (n + 8 * j) % 4 * 4);
    } else {
#pragma unroll
      for (int j = 0; j < COLUMNS; j += 2) {
        uint32_t r[4];
        if constexpr (K_CONTIGUOUS)
          ldmatrix_x4(r, tile + tile_offset<T, 4>(warp_column + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2) +
                             j * 8 * 64);
        else
          ldmatrix_x4_trans(r, tile + tile_offset<T, W_CHUNKS>(half * 16 + lane % 16, warp_column / 8 + j + lane / 16));
        w[j][0] = r[0], w[j][1] = r[1], w[j + 1][0] = r[2], w[j + 1][1] = r[3];
      }
    }
  }

  FASTLM_DEVICE void multiply(const unsigned char* stage, int warp_row, int warp_column, int lane, bool tf32,
                              bool high_only) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[ROWS][4], w[COLUMNS][2];
      const unsigned char* at = stage + tile_offset<T, 4>(warp_row + lane % 16, half * 2 + lane / 16);
#pragma unroll
      for (int i = 0; i < ROWS; ++i) ldmatrix_x4(a[i], at + i * 16 * 64);
      load_w(w, stage + A_BYTES, half, warp_column, lane);
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j) mma<T>(acc[i][j], a[i], w[j]);
      } else {
        multiply_float32(a, w, tf32, high_only);
      }
    }
  }

  FASTLM_DEVICE static void split(uint32_t& high, uint32_t& low) {
    const float value = __uint_as_float(high);
    high = to_tf32(value);
    low = tf32_residual(value, high);
  }

  FASTLM_DEVICE void multiply_float32(uint32_t (&a)[ROWS][4], uint32_t (&w)[COLUMNS][2], bool tf32, bool high_only) {
    uint32_t a_low[ROWS][4];
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) split(a[i][e], a_low[i][e]);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      uint32_t w_low[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) split(w[j][e], w_low[e]);
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        if (tf32) {
          mma_tf32(acc[i][j], a[i], w[j]);
        } else {
          float partial[4] = {};
          mma_tf32(partial, a_low[i], w[j]);
          mma_tf32(partial, a[i], w_low);
          mma_tf32(partial, a[i], w[j]);
          if (high_only) {
            float high[4] = {};
            mma_tf32(high, a[i], w[j]);
#pragma unroll
            for (int e = 0; e < 4; ++e) partial[e] = is_finite(partial[e]) ? partial[e] : high[e];
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] += partial[e];
        }
      }
    }
  }

  FASTLM_DEVICE bool finite() const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) all = all && is_finite(acc[i][j][e]);
    return all;
  }

  // Passes the warp's part of C to the epilogue: WARP/8 neighbouring lanes share a row, each with 8 columns.
  template <class Epilogue>
  FASTLM_DEVICE void finish(float* scratch, const gemm_args<T>& args, const Epilogue& epilogue, int first_row,
                            int first_column, int lane) {
    constexpr int LANES = WARP / 8, GROUPS = SCRATCH_ROWS * WARP / 8 / 32, ROWS_AT_ONCE = 32 / LANES;
    const int column = first_column + lane % LANES * 8;
    const auto columns = epilogue.prefetch_columns(column, column < args.n);
#pragma unroll
    for (int begin = 0; begin < WARP; begin += SCRATCH_ROWS) {
      const int row = first_row + begin + lane / LANES;
      auto next_data = epilogue.prefetch(row, column, row < args.rows && column < args.n);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < SCRATCH_ROWS / 16; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float (&c)[4] = acc[begin / 16 + i][j];
            vec<float, 2>{{c[2 * h], c[2 * h + 1]}}.store(scratch + (i * 16 + h * 8 + lane / 4) * SCRATCH_STRIDE +
                                                          j * 8 + lane % 4 * 2);
          }
      __syncwarp();
#pragma unroll 1
      for (int group = 0; group < GROUPS; ++group) {
        const int at = row + group * ROWS_AT_ONCE, next = at + ROWS_AT_ONCE;
        auto data = next_data;
        if (group + 1 < GROUPS) next_data = epilogue.prefetch(next, column, next < args.rows && column < args.n);
        const float* from = scratch + (group * ROWS_AT_ONCE + lane / LANES) * SCRATCH_STRIDE + lane % LANES * 8;
        vec<float, 8> c = vec<float, 8>::load(from);
        epilogue.template finish<LANES>(at, column, c, columns, data, at < args.rows && column < args.n);
      }
    }
  }
};

// The coordinates of a tile in the order of processing: 8 rows of tiles at a time, column by column.
struct tile_coordinates {
  int row, column;
};
FASTLM_DEVICE tile_coordinates coordinates_of(int tile, int tiles_m, int tiles_n) {
  constexpr int GROUP = 8;
  const int group = tile / (GROUP * tiles_n), within = tile - group * GROUP * tiles_n;
  const int remaining = tiles_m - group * GROUP, rows = remaining < GROUP ? remaining : GROUP;
  return {group * GROUP + within % rows, within / rows};
}

// Whether the predicate is true in any thread of the block. `flags` is free shared memory, one word per warp.
FASTLM_DEVICE bool any_of_block(bool predicate, int* flags) {
  const bool of_warp = any(predicate);
  if (threadIdx.x % 32 == 0) flags[threadIdx.x / 32] = of_warp;
  __syncthreads();
  bool found = false;
#pragma unroll
  for (int warp = 0; warp < GEMM_THREADS / 32; ++warp) found = found || flags[warp];
  __syncthreads();
  return found;
}

template <class T, bool K_CONTIGUOUS, int WARP, class Epilogue>
__global__ void __launch_bounds__(GEMM_THREADS, WARP == 64       ? 2
                                                : sizeof(T) == 4 ? 3
                                                                 : 4)
    gemm_kernel(const gemm_args<T> args, const Epilogue epilogue) {
  using tile = gemm_tile<T, K_CONTIGUOUS, WARP>;
  FASTLM_SHARED(shared);
  const int tiles_m = (args.rows + tile::TILE - 1) / tile::TILE, tiles_n = (args.n + tile::TILE - 1) / tile::TILE;
  const tile_coordinates coordinates = coordinates_of(int(blockIdx.x), tiles_m, tiles_n);
  const int row = coordinates.row * tile::TILE, column = coordinates.column * tile::TILE,
            k_steps = (args.k + tile::STEP - 1) / tile::STEP;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, warp_row = warp / 2 * WARP,
            warp_column = warp % 2 * WARP;
  const bool idle = row + warp_row >= args.rows || column + warp_column >= args.n;  // a warp without results only loads

  tile product;
#pragma unroll 1
  for (bool high_only = false;; high_only = true) {
#pragma unroll
    for (int step = 0; step < tile::STAGES - 1; ++step) {
      if (step < k_steps) product.load(shared + step * tile::STAGE, args, row, column, step);
      cp_async_commit();
    }
    int stage = 0, free = tile::STAGES - 1;
#pragma unroll 1
    for (int step = 0; step < k_steps; ++step) {
      cp_async_wait<tile::STAGES - 2>();
      __syncthreads();  // this stage is loaded for all warps, and the previous one is free
      if (step + tile::STAGES - 1 < k_steps)
        product.load(shared + free * tile::STAGE, args, row, column, step + tile::STAGES - 1);
      cp_async_commit();
      if (!idle) product.multiply(shared + stage * tile::STAGE, warp_row, warp_column, lane, args.tf32, high_only);
      free = stage;
      stage = stage + 1 == tile::STAGES ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
    if (sizeof(T) == 2 || args.tf32 || high_only ||
        !any_of_block(!idle && !product.finite(), reinterpret_cast<int*>(shared)))
      break;
    product = tile();
  }
  if (!idle) {
    float* scratch = reinterpret_cast<float*>(shared) + warp * tile::SCRATCH_ROWS * tile::SCRATCH_STRIDE;
    product.finish(scratch, args, epilogue, row + warp_row, column + warp_column, lane);
  }
}

template <class T, bool K_CONTIGUOUS, int WARP, class Epilogue> void gemm_launch(const gemm_operands& with,
                                                                                 const Epilogue& epilogue,
                                                                                 stream_t stream) {
  using tile = gemm_tile<T, K_CONTIGUOUS, WARP>;
  const int64_t tiles = (with.rows + tile::TILE - 1) / tile::TILE * ((with.n + tile::TILE - 1) / tile::TILE);
  if (tiles > INT_MAX || with.rows > INT_MAX - 128 || with.n > INT_MAX - 128 || with.k > INT_MAX - 128)
    throw std::runtime_error("a product beyond the range of 32-bit sizes");
  const gemm_args<T> args{matrix_at<T>(with.a, with.a_stride, with.rows, with.k),
                          K_CONTIGUOUS ? matrix_at<T>(with.w, with.w_n_stride, with.n, with.k)
                                       : matrix_at<T>(with.w, with.w_k_stride, with.k, with.n),
                          int(with.rows),
                          int(with.k),
                          int(with.n),
                          with.tf32};
  FASTLM_LAUNCH((gemm_kernel<T, K_CONTIGUOUS, WARP, Epilogue>), dim3(unsigned(tiles)), GEMM_THREADS, tile::SHARED,
                stream, args, epilogue);
}

// An epilogue is a struct with these functions. Those that need no data return no_data{}.
//   auto prefetch_columns(int column, bool inside) const
//     loads what all rows of a group of columns need; the columns of a lane do not change
//   auto prefetch(int row, int column, bool inside) const
//     loads what one group needs, ahead of its use
//   template <int LANES> void finish(int row, int column, vec<float, 8>& c, columns, data, bool inside) const
//     stores the results; called by whole warps, with LANES lanes per row
struct no_data {};

// WARP is 64, or 32 for few tiles and in float32.
template <class T, int WARP, class Epilogue> void gemm(const gemm_operands& with, const Epilogue& epilogue,
                                                       stream_t stream) {
  if (with.w_k_stride == 1 || with.k == 1) gemm_launch<T, true, WARP>(with, epilogue, stream);
  else gemm_launch<T, false, WARP>(with, epilogue, stream);
}

// Whether there are enough tiles of 128 for all multiprocessors of this GPU. The results do not depend on it: the order
// of the sum along k is the same.
inline bool fills_gpu(int64_t rows, int64_t n) { return (rows + 127) / 128 * ((n + 127) / 128) >= multiprocessors(); }

// The product with the tiles that suit its sizes.
template <class T, class Epilogue> void multiply(const gemm_operands& operands, const Epilogue& epilogue,
                                                 stream_t stream) {
  if constexpr (sizeof(T) == 2)
    if (fills_gpu(operands.rows, operands.n)) return gemm<T, 64>(operands, epilogue, stream);
  gemm<T, 32>(operands, epilogue, stream);
}

}  // namespace fastlm::cuda
