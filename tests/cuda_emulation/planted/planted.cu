// Small kernels for the tests of the emulator. The run-time argument `bad` switches on an error that must be reported;
// without it the same kernel must pass.
#include <stdexcept>
#include <string>
#include "philox.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm::cuda {

struct Arguments {
  const float* in;
  float* out;
  int count, bad;
};

// Each thread writes its own word and reads one of the next warp.
__global__ void neighbour(Arguments a) {
  FASTLM_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  shared[threadIdx.x] = 0;
  __syncthreads();
  shared[threadIdx.x] = a.in[threadIdx.x];
  if (a.bad != 1) __syncthreads();
  const float other = shared[(threadIdx.x + WarpSize) % blockDim.x];
  if (a.bad != 2) __syncthreads();  // or the next write races with another thread's read
  shared[threadIdx.x] = 2 * other;
  a.out[threadIdx.x] = shared[threadIdx.x];
}

// Within a warp, __syncwarp is enough.
__global__ void neighbour_in_warp(Arguments a) {
  FASTLM_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  shared[threadIdx.x] = 0;
  __syncthreads();
  shared[threadIdx.x] = a.in[threadIdx.x];
  if (a.bad != 1) __syncwarp();
  a.out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// Two threads write the halves of one word, which is no race; or both write the same half.
__global__ void halves(Arguments a) {
  FASTLM_SHARED(memory);
  bf16* shared = reinterpret_cast<bf16*>(memory);
  shared[a.bad ? threadIdx.x & ~1 : threadIdx.x] = from_float<bf16>(a.in[threadIdx.x]);
  __syncthreads();
  a.out[threadIdx.x] = to_float(shared[(threadIdx.x + 1) % blockDim.x]);
}

// Pairs of warps synchronise by their own barriers.
__global__ void named(Arguments a) {
  FASTLM_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int pair = threadIdx.x / 64;
  shared[threadIdx.x] = a.in[threadIdx.x];
  named_barrier(1 + pair, 64);
  a.out[threadIdx.x] = shared[a.bad ? threadIdx.x ^ 64 : threadIdx.x ^ 32];
}

__global__ void bounds(Arguments a) {
  FASTLM_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x, last = blockDim.x - 1;
  shared[a.bad == 1 && i == last ? i + 1 : i] = a.in[i];
  __syncthreads();
  float value = shared[a.bad == 2 && i == 0 ? -1 : i];
  if (a.bad == 3 && i == last) value += a.in[a.count];
  if (a.bad == 4 && i == 0) value += a.in[-1];
  a.out[a.bad == 5 && i == last ? a.count : i] = value;
  if (a.bad == 6 && i == 7) const_cast<float*>(a.in)[i] = 0;
  if (a.bad == 7 && i == 7) *reinterpret_cast<float*>(16) = value;
  if (a.bad == 8 && i == 7) vec<float, 4>::load(a.in + 1).store(a.out);
}

__global__ void unwritten(Arguments a) {
  FASTLM_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  if (!a.bad || threadIdx.x != 5) shared[threadIdx.x] = a.in[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void divergent(Arguments a) {
  const bool first = threadIdx.x < WarpSize;
  if (a.bad == 1 && threadIdx.x == 3) return;  // one thread of a warp
  if (a.bad == 2 && first) return;             // a warp
  if (a.bad == 3 && first) __syncthreads();    // a barrier of another line
  else __syncthreads();
  if (a.bad != 4 || threadIdx.x % 2) a.out[threadIdx.x] = warp_sum(a.in[threadIdx.x]);
  if (a.bad == 5) named_barrier(3, first ? 64 : 96);
}

__global__ void copies(Arguments a) {
  FASTLM_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  cp_async_16(shared + 4 * i, a.in + 4 * i, true);
  cp_async_commit();
  cp_async_16(shared + 4 * (blockDim.x + i), a.in + (a.bad == 6), false);
  cp_async_commit();
  if (a.bad == 1) cp_async_wait<2>();
  else cp_async_wait<1>();
  float value = shared[4 * i + 1];  // its own
  if (a.bad == 2) value += shared[4 * (i ^ 1)];
  if (a.bad == 3) value += shared[4 * (blockDim.x + i)];
  if (a.bad != 4) cp_async_wait<0>();
  __syncthreads();
  if (a.bad == 5) cp_async_16(shared + 4 * i, a.in + 4 * i, true);
  a.out[i] = value + shared[4 * (blockDim.x + (i ^ 33))] + shared[4 * (i ^ 33)];
}

__global__ void asserted(Arguments a) {
  FASTLM_ASSERT(a.bad == 0 || threadIdx.x != 40);
  a.out[threadIdx.x] = a.in[threadIdx.x];
}

// out (16, 8) = a (16, 16) bᵀ, b (8, 16), through shared memory and ldmatrix; `bad` swaps two registers of a.
template <class T> __global__ void product(Arguments a) {
  FASTLM_SHARED(memory);
  T* left = reinterpret_cast<T*>(memory);
  T* right = left + 16 * 16;
  for (int i = threadIdx.x; i < 16 * 16; i += WarpSize) left[i] = from_float<T>(a.in[i]);
  for (int i = threadIdx.x; i < 8 * 16; i += WarpSize) right[i] = from_float<T>(a.in[256 + i]);
  __syncwarp();
  uint32_t x[4], y[2];
  float c[4] = {};
  const int lane = threadIdx.x;
  ldmatrix_x4(x, left + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x2(y, right + lane % 8 * 16 + lane / 8 % 2 * 8);
  if (a.bad) {
    const uint32_t swapped = x[1];
    x[1] = x[2];
    x[2] = swapped;
  }
  mma<T>(c, x, y);
  for (int i = 0; i < 4; ++i) a.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

// The same with b (16, 8), row by row, which ldmatrix transposes.
template <class T> __global__ void product_transposed(Arguments a) {
  FASTLM_SHARED(memory);
  T* right = reinterpret_cast<T*>(memory);
  for (int i = threadIdx.x; i < 16 * 8; i += WarpSize) right[i] = from_float<T>(a.in[256 + i]);
  __syncwarp();
  const int lane = threadIdx.x, group = lane / 4, t = lane % 4;
  uint32_t x[4], y[2];
  float c[4] = {1, 2, 3, 4};
  for (int i = 0; i < 4; ++i) {
    const float* from = a.in + (group + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    x[i] = pack2<T>(from[0], from[1]);
  }
  ldmatrix_x2_trans(y, right + lane % 16 * 8);
  mma<T>(c, x, y);
  for (int i = 0; i < 4; ++i) a.out[(group + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i] - (i + 1);
}

__global__ void product_tf32(Arguments a) {
  const int lane = threadIdx.x, group = lane / 4, t = lane % 4;
  uint32_t x[4], y[2];
  float c[4] = {};
  for (int i = 0; i < 4; ++i) x[i] = to_tf32(a.in[(group + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) y[i] = to_tf32(a.in[128 + group * 8 + t + i * 4]);
  mma_tf32(c, x, y);
  for (int i = 0; i < 4; ++i) a.out[(group + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

// ldmatrix needs a __syncwarp before it if another lane wrote the rows, and after it before they are overwritten.
__global__ void matrix_order(Arguments a) {
  FASTLM_SHARED(memory);
  uint32_t* shared = reinterpret_cast<uint32_t*>(memory);
  for (int i = 0; i < 4; ++i) shared[threadIdx.x * 4 + i] = threadIdx.x;
  if (a.bad != 1) __syncwarp();
  uint32_t x[4];
  ldmatrix_x4(x, shared + threadIdx.x * 4);
  if (a.bad != 2) __syncwarp();
  shared[threadIdx.x / WarpSize * 128 + threadIdx.x % WarpSize] = x[0];
  a.out[threadIdx.x] = float(x[3]);
}

__global__ void collectives(Arguments a) {
  FASTLM_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int lane = threadIdx.x % WarpSize;
  const float x = a.in[threadIdx.x];
  float* out = a.out + threadIdx.x;
  const int n = blockDim.x;
  out[0 * n] = shuffle(x, 5);
  out[1 * n] = shuffle_xor(x, 9);
  out[2 * n] = shuffle_down(x, 7);
  out[3 * n] = float(any(x > 1.5f)) + 2 * float(all(x > -1.5f)) + 4 * float(ballot(x > 0) >> lane & 1);
  out[4 * n] = warp_sum(x);
  out[5 * n] = block_sum(x, shared);
  out[6 * n] = block_max(x, shared);
  out[7 * n] = float(shuffle(double(x) + 1e-9, 3) - double(shuffle(x, 3)));
}

__global__ void dropped(Arguments a, dropout drop) {
  const int row = blockIdx.x;
  for (int column = threadIdx.x; column < a.count; column += blockDim.x)
    a.out[row * a.count + column] = kept(uint64_t(*drop.seed), drop.threshold, column, row, 7) ? drop.scale : 0;
}

// Every grid dimension, a two-dimensional block, and threads that end early.
__global__ void indices(Arguments a) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x,
            block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int i = block * int(blockDim.x * blockDim.y) + thread;
  if (i >= a.count) return;
  a.out[i] = float(threadIdx.x + 100 * threadIdx.y + 1000 * blockIdx.x + 10000 * blockIdx.y + 100000 * blockIdx.z);
}

// Each block writes its own part of the result.
__global__ void blocks(Arguments a) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  a.out[i] = a.in[threadIdx.x];
  if (a.bad == 1 && blockIdx.x > 0 && threadIdx.x == 3) a.out[0] = 1;
  if (a.bad == 2 && threadIdx.x == 3) a.out[i] += a.out[3];
  if (a.bad == 5 && blockIdx.x == 0 && threadIdx.x == 3) a.out[i] += a.out[i + 96];  // before the last block writes it
  if (a.bad != 3) __syncwarp();
  if (a.bad == 3 || a.bad == 4) a.out[i] += a.out[i ^ 1];
}

}  // namespace fastlm::cuda

using namespace fastlm::cuda;

static std::string error;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Null, or the report.
EXPORT const char* planted(const char* name, const float* in, float* out, int count, int bad, int threads, int shared) {
  const Arguments a{in, out, count, bad};
  const std::string wanted = name;
  try {
#define PLANTED(kernel) \
  if (wanted == #kernel) return FASTLM_LAUNCH((kernel), 1, threads, shared, nullptr, a), nullptr
    PLANTED(neighbour);
    PLANTED(neighbour_in_warp);
    PLANTED(halves);
    PLANTED(named);
    PLANTED(bounds);
    PLANTED(unwritten);
    PLANTED(divergent);
    PLANTED(copies);
    PLANTED(asserted);
    PLANTED(product<bf16>);
    PLANTED(product<fp16>);
    PLANTED(product_transposed<bf16>);
    PLANTED(product_transposed<fp16>);
    PLANTED(product_tf32);
    PLANTED(matrix_order);
    PLANTED(collectives);
    if (wanted == "indices") return FASTLM_LAUNCH(indices, dim3(3, 2, 2), dim3(16, 4), 0, nullptr, a), nullptr;
    if (wanted == "blocks") return FASTLM_LAUNCH(blocks, 4, 32, 0, nullptr, a), nullptr;
    return "no such kernel";
  } catch (const std::runtime_error& failure) {
    error = failure.what();
    return error.c_str();
  }
}

EXPORT const char* planted_dropout(float* out, int rows, int columns, double p, const int64_t* seed) {
  try {
    FASTLM_LAUNCH(dropped, rows, 64, 0, nullptr, Arguments{nullptr, out, columns, 0}, make_dropout(p, seed));
    return nullptr;
  } catch (const std::runtime_error& failure) {
    error = failure.what();
    return error.c_str();
  }
}

EXPORT void planted_round(const float* in, int64_t count, uint16_t* bf16_out, uint16_t* fp16_out, uint32_t* tf32_out) {
  for (int64_t i = 0; i < count; ++i) {
    bf16_out[i] = from_float<bf16>(in[i]).bits;
    fp16_out[i] = from_float<fp16>(in[i]).bits;
    tf32_out[i] = to_tf32(in[i]);
  }
}

EXPORT void planted_widen(float* bf16_out, float* fp16_out) {
  for (uint32_t i = 0; i < 65536; ++i) {
    bf16_out[i] = to_float(bf16{uint16_t(i)});
    fp16_out[i] = to_float(fp16{uint16_t(i)});
  }
}
