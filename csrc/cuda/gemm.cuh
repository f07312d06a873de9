// Tile products on tensor cores:  C = A·W, with an epilogue that meets every run of 8 columns of C in float32, once,
// before anything is stored
//
// A is (rows, k) with unit stride along k; W is (k, n) with unit stride along k (a Linear's weight, W1 or W2ᵀ) or along
// n (a Conv1D's): neither is ever copied. 2·rows·k·n FLOP. A block owns a tile of C; per step of k it moves 64 bytes of
// each of its rows and columns into shared memory by cp.async, three stages deep, in chunks of 16 bytes that are
// swizzled so that neither the copies nor ldmatrix meet a bank twice. An operand whose rows do not consist of whole,
// aligned chunks (an odd width, a view that begins anywhere) is read element by element instead: as right, and several
// times slower.
//
// 1. Tile 128×128, four warps of 64×64. A step of 64 bytes is 2·128·128·32 FLOP for 16 KiB from the L2 cache: 64 FLOP a
// byte, so sm_80's 312 TFLOP/s ask
//    for 4.9 TB/s, what its L2 cache just gives; tiles are walked 8 rows of them at a time, which keeps W's columns
//    there. From shared memory a warp takes 4 KiB for 64·64·16 products: half of what the tensor cores' rate would let
//    it take (8 warps of 64×32: three quarters). Three stages are 48 KiB, and a thread has 255 registers at most: two
//    blocks to a multiprocessor on every architecture (sm_86 has 100 KiB, a block takes 49), so that one multiplies
//    while the other is in its epilogue. Used: 214 registers. Predicted on sm_80: 70–75 % of the peak at k = 768, bound
//    by the epilogue and by the last wave of tiles.
// 2. The epilogue goes through shared memory, 32 rows of a warp at a time, in a loop that is not unrolled: the
// accumulators' own layout would give
//    4 bytes a lane to a row, half-written sectors of 32 bytes, and one copy of the epilogue's code for every
//    accumulator. A row of a warp leaves in whole lines of 128 bytes; what the epilogue reads is fetched one run ahead.
//    Predicted: stores at full width; about 5 % of a product with k = 768. A thread's copies stand below one another,
//    so that a step costs it one address and additions for each operand: 60 instructions a step beside 64 of the tensor
//    cores and 16 ldmatrix (addresses made one by one were 110).
// 3. Tile 64×64, four warps of 32×32, where tiles of 128 would leave multiprocessors without work: half the FLOP a
// byte, 24 KiB and 100 registers, so
//    four blocks to a multiprocessor. In float32 always: a warp of 64×64 spills 400 bytes a thread with what 4. holds,
//    and 16 FLOP a byte ask the L2 cache for 2.5 TB/s only.
// 4. float32 in three tf32 products, a·w ≈ a_low·w_high + a_high·w_low + a_high·w_high: what is left out is 2⁻²² of a
// product. The tensor cores
//    truncate as they add, so each step of 8 along k starts from zero and is added to the total by an FADD, which
//    rounds (Ootomo & Yokota 2022, arXiv:2203.03341): the error grows as that of a chain of FMA does, without a bias.
//    Predicted on sm_80: 156/3 less the FADDs, about 40 TFLOP/s against 19.5 of FMA. An infinite operand has no second
//    part, and gives NaN: a tile that is not finite in the end is multiplied again, and where a step gives no number
//    there, the high parts alone count, which are infinite where the operands are.
#pragma once
#include <climits>
#include <initializer_list>
#include <stdexcept>
#include "launch.cuh"
#include "vec.cuh"

namespace fastlm::cuda {

// Row-major, rows `stride` elements apart. chunked: every row begins at, and ends after, a whole chunk of 16 bytes.
template <class T> struct matrix {
  const T* data;
  int64_t stride;
  int rows, columns;
  bool chunked;
};

template <class T> matrix<T> matrix_at(const void* data, int64_t stride, int64_t rows, int64_t columns) {
  if (rows == 1)
    stride =
        0;  // of no meaning; yet a copy of nothing, for a row beyond the end, wants its address aligned like any other
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * sizeof(T) % 16 == 0;
  return {static_cast<const T*>(data), stride, int(rows), int(columns), aligned && columns * sizeof(T) % 16 == 0};
}

// What a launcher is given of a product: W's strides along k and n, one of which is 1.
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

// Where a chunk of 16 bytes of a tile in shared memory lies. Rows of 4 chunks are read 8 at a time, the same chunk of
// each. Rows along n: 8 at a time too by ldmatrix; in float32, which it cannot transpose, 4 rows × 2 chunks, word by
// word.
template <class T, int CHUNKS> FASTLM_DEVICE int tile_offset(int row, int chunk) {
  if constexpr (CHUNKS == 4) return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
  else if constexpr (sizeof(T) == 2) return row * CHUNKS * 16 + ((chunk ^ (row & 7)) << 4);
  else return row * CHUNKS * 16 + ((chunk ^ (row & 3) << 1) << 4);
}

constexpr int GEMM_THREADS = 128;

// ROWS × CHUNKS chunks of a matrix, zeros beyond its end. A thread's chunks stand below one another, as many rows apart
// as leave the swizzle as it is.
template <class T, int ROWS, int CHUNKS> FASTLM_DEVICE void load_tile(unsigned char* tile, const matrix<T>& from,
                                                                      int first_row, int first_column) {
  constexpr int PER = 16 / sizeof(T), APART = GEMM_THREADS / CHUNKS;
  const int chunk = int(threadIdx.x) % CHUNKS, place = int(threadIdx.x) / CHUNKS, row = first_row + place,
            column = first_column + chunk * PER;
  static_assert(GEMM_THREADS % CHUNKS == 0 && APART % (sizeof(T) == 2 || CHUNKS == 4 ? 8 : 4) == 0);
  unsigned char* to = tile + tile_offset<T, CHUNKS>(place, chunk);
  const T* source = from.data + row * from.stride + column;
  if (from.chunked) {
#pragma unroll
    for (int i = 0; i < ROWS / APART; ++i, source += APART * from.stride)
      cp_async_16(to + i * APART * CHUNKS * 16, source, row + i * APART < from.rows && column < from.columns);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < ROWS / APART; ++i, source += APART * from.stride) {
    vec<T, PER> values;
#pragma unroll
    for (int e = 0; e < PER; ++e)
      values[e] = row + i * APART < from.rows && column + e < from.columns ? source[e] : from_float<T>(0.0f);
    values.store(reinterpret_cast<T*>(to + i * APART * CHUNKS * 16));
  }
}

// The tile (2·WARP)² of a block of 2×2 warps. K_CONTIGUOUS: of W.
template <class T, bool K_CONTIGUOUS, int WARP> struct gemm_tile {
  static constexpr int TILE = 2 * WARP, PER = 16 / sizeof(T), STEP = 4 * PER;  // STEP along k: 64 bytes
  static constexpr int ROWS = WARP / 16, COLUMNS = WARP / 8;                   // of fragments
  static constexpr int A_BYTES = TILE * 64, STAGE = 2 * A_BYTES, STAGES = 3;
  static constexpr int W_CHUNKS = K_CONTIGUOUS ? 4 : TILE / PER;  // of a row of W's tile
  static constexpr int PASS = 32,
                       PITCH = WARP + 8;  // rows and floats a row of the epilogue's passes: 8 rows apart in banks
  static constexpr int SHARED = STAGES * STAGE;
  static_assert(4 * PASS * PITCH * sizeof(float) <= SHARED);

  float total[ROWS][COLUMNS][4] = {};

  FASTLM_DEVICE void load(unsigned char* stage, const gemm_args<T>& args, int row, int column, int step) {
    load_tile<T, TILE, 4>(stage, args.a, row, step * STEP);
    if constexpr (K_CONTIGUOUS) load_tile<T, TILE, 4>(stage + A_BYTES, args.w, column, step * STEP);
    else load_tile<T, STEP, W_CHUNKS>(stage + A_BYTES, args.w, step * STEP, column);
  }

  // The fragments of W for the columns of a warp: half `half` of the step, two chunks along k.
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
                              bool again) {
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
          for (int j = 0; j < COLUMNS; ++j) mma<T>(total[i][j], a[i], w[j]);
      } else {
        multiply_float32(a, w, tf32, again);
      }
    }
  }

  FASTLM_DEVICE static void split(uint32_t& high, uint32_t& low) {
    const float value = __uint_as_float(high);
    high = to_tf32(value);
    low = tf32_residual(value, high);
  }

  FASTLM_DEVICE void multiply_float32(uint32_t (&a)[ROWS][4], uint32_t (&w)[COLUMNS][2], bool tf32, bool again) {
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
          mma_tf32(total[i][j], a[i], w[j]);
        } else {
          float part[4] = {};
          mma_tf32(part, a_low[i], w[j]);
          mma_tf32(part, a[i], w_low);
          mma_tf32(part, a[i], w[j]);
          if (again) {
            float high[4] = {};
            mma_tf32(high, a[i], w[j]);
#pragma unroll
            for (int e = 0; e < 4; ++e) part[e] = is_finite(part[e]) ? part[e] : high[e];
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) total[i][j][e] += part[e];
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
        for (int e = 0; e < 4; ++e) all = all && is_finite(total[i][j][e]);
    return all;
  }

  // Hands the warp's part of C to the epilogue: WARP/8 neighbouring lanes share a row, each with 8 columns of it.
  template <class Epilogue>
  FASTLM_DEVICE void finish(float* pass, const gemm_args<T>& args, const Epilogue& epilogue, int first_row,
                            int first_column, int lane) {
    constexpr int LANES = WARP / 8, RUNS = PASS * WARP / 8 / 32, AT_ONCE = 32 / LANES;  // rows at once
    const int column = first_column + lane % LANES * 8;
    const auto columns = epilogue.fetch_columns(column, column < args.n);
#pragma unroll
    for (int begin = 0; begin < WARP; begin += PASS) {
      const int row = first_row + begin + lane / LANES;
      auto ahead = epilogue.fetch(row, column, row < args.rows && column < args.n);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < PASS / 16; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float (&c)[4] = total[begin / 16 + i][j];
            vec<float, 2>{{c[2 * h], c[2 * h + 1]}}.store(pass + (i * 16 + h * 8 + lane / 4) * PITCH + j * 8 +
                                                          lane % 4 * 2);
          }
      __syncwarp();
#pragma unroll 1
      for (int run = 0; run < RUNS; ++run) {
        const int at = row + run * AT_ONCE, next = at + AT_ONCE;
        auto fetched = ahead;
        if (run + 1 < RUNS) ahead = epilogue.fetch(next, column, next < args.rows && column < args.n);
        const float* from = pass + (run * AT_ONCE + lane / LANES) * PITCH + lane % LANES * 8;
        vec<float, 8> c = vec<float, 8>::load(from);
        epilogue.template finish<LANES>(at, column, c, columns, fetched, at < args.rows && column < args.n);
      }
    }
  }
};

// A run of 8 columns in memory, of which `count` exist. whole: all 8 do, aligned to 16 bytes; the launcher knows.
inline bool in_whole_runs(int64_t columns, std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  return columns % 8 == 0;
}
template <class T> FASTLM_DEVICE vec<T, 8> load_run(const T* from, int count, bool whole) {
  if (whole && count > 0) return vec<T, 8>::load(from);
  vec<T, 8> run;
#pragma unroll
  for (int e = 0; e < 8; ++e) run[e] = e < count ? from[e] : from_float<T>(0.0f);
  return run;
}
template <class T> FASTLM_DEVICE void store_run(const vec<float, 8>& c, T* to, int count, bool whole) {
  vec<T, 8> run;
#pragma unroll
  for (int e = 0; e < 8; ++e) run[e] = from_float<T>(c[e]);
  if (whole) return run.store(to);
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (e < count) to[e] = run[e];
}

// (row, column) of a block's tile: 8 tiles of rows at a time, column by column.
struct tile_place {
  int row, column;
};
FASTLM_DEVICE tile_place place_of_tile(int tile, int tiles_m, int tiles_n) {
  constexpr int GROUP = 8;
  const int group = tile / (GROUP * tiles_n), within = tile - group * GROUP * tiles_n;
  const int left = tiles_m - group * GROUP, rows = left < GROUP ? left : GROUP;
  return {group * GROUP + within % rows, within / rows};
}

// Whether any thread of the block says so. `flags`: a word of free shared memory for each warp, free again afterwards.
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
  const tile_place place = place_of_tile(int(blockIdx.x), tiles_m, tiles_n);
  const int row = place.row * tile::TILE, column = place.column * tile::TILE,
            steps = (args.k + tile::STEP - 1) / tile::STEP;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, warp_row = warp / 2 * WARP,
            warp_column = warp % 2 * WARP;
  const bool idle =
      row + warp_row >= args.rows || column + warp_column >= args.n;  // a warp beyond the end only helps to load

  tile product;
#pragma unroll 1
  for (bool again = false;; again = true) {
#pragma unroll
    for (int step = 0; step < tile::STAGES - 1; ++step) {
      if (step < steps) product.load(shared + step * tile::STAGE, args, row, column, step);
      cp_async_commit();
    }
    int stage = 0, free = tile::STAGES - 1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<tile::STAGES - 2>();
      __syncthreads();  // this stage has come for all, and all are done with the one before it, which is now free
      if (step + tile::STAGES - 1 < steps)
        product.load(shared + free * tile::STAGE, args, row, column, step + tile::STAGES - 1);
      cp_async_commit();
      if (!idle) product.multiply(shared + stage * tile::STAGE, warp_row, warp_column, lane, args.tf32, again);
      free = stage;
      stage = stage + 1 == tile::STAGES ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
    if (sizeof(T) == 2 || args.tf32 || again ||
        !any_of_block(!idle && !product.finite(), reinterpret_cast<int*>(shared)))
      break;
    product = tile();
  }
  if (!idle) {
    float* pass = reinterpret_cast<float*>(shared) + warp * tile::PASS * tile::PITCH;
    product.finish(pass, args, epilogue, row + warp_row, column + warp_column, lane);
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

// An epilogue is a struct with
//   auto fetch_columns(int column, bool inside) const: what all rows of a run's columns need of memory; a lane has the
//   same columns throughout auto fetch(int row, int column, bool inside) const: what one run needs, asked for early
//   template <int LANES> void finish(int row, int column, vec<float, 8>& c, columns, fetched, bool inside) const: by
//   whole warps, LANES lanes to a row
// and nothing{} is what one fetches that needs nothing.
struct nothing {};

// WARP: 64, or 32 where there are few tiles; 32 in float32, whose three products need the registers.
template <class T, int WARP, class Epilogue> void gemm(const gemm_operands& with, const Epilogue& epilogue,
                                                       stream_t stream) {
  if (with.w_k_stride == 1 || with.k == 1) gemm_launch<T, true, WARP>(with, epilogue, stream);
  else gemm_launch<T, false, WARP>(with, epilogue, stream);
}

}  // namespace fastlm::cuda
