// The keywords, vector types and functions of CUDA C++ that csrc/cuda uses, for a C++ compiler. Each thread of a block
// is a fiber (fibers.cpp); fibers rendezvous at barriers, warp collectives, ldmatrix and mma (collectives.cpp). The
// kernels are compiled with the thread sanitizer's instrumentation, whose functions check every load and store
// (memory.cpp).
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) alignas(n)

struct alignas(8) float2 {
  float x, y;
};
struct float3 {
  float x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

__forceinline__ float2 make_float2(float x, float y) { return {x, y}; }
__forceinline__ float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
__forceinline__ int2 make_int2(int x, int y) { return {x, y}; }
__forceinline__ int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
__forceinline__ uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
__forceinline__ uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace fastlm::emulation {

// Passed in registers, so that the instrumentation sees no memory accesses.
typedef float floats __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(16)));

struct packed3 {  // three unsigned numbers in registers
  uint64_t xy, z;
};
[[gnu::const]] packed3 thread_index();
[[gnu::const]] packed3 block_index();
[[gnu::const]] packed3 block_size();
[[gnu::const]] packed3 grid_size();
__forceinline__ uint3 unpack(packed3 p) { return {unsigned(p.xy), unsigned(p.xy >> 32), unsigned(p.z)}; }

[[gnu::const]] unsigned char* shared_memory();
[[noreturn]] void assertion_failed(const char* condition, const char* file, int line);

void barrier(int id, int threads, int line);
void sync_warp(int line);
uint64_t exchange(uint64_t value, int lane, int line);
uint32_t ballot(bool predicate, int line);
words ldmatrix(const void* shared, int matrices, bool transposed, int line);
enum class products { bf16, fp16, tf32 };
floats mma(floats c, words a, uint32_t b0, uint32_t b1, products kind, int line);
void copy_async(void* shared, const void* global, int bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int under_way);

template <class V> __forceinline__ V shuffle(V value, int lane, int line) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8);
  if constexpr (sizeof(V) == 4) return std::bit_cast<V>(uint32_t(exchange(std::bit_cast<uint32_t>(value), lane, line)));
  else return std::bit_cast<V>(exchange(std::bit_cast<uint64_t>(value), lane, line));
}

template <class V, class R, int N> __forceinline__ void spread(V from, R (&to)[N]) {
  for (int i = 0; i < N; ++i) to[i] = from[i];
}

// Vectors are accessed in units of up to 16 bytes, as by a GPU instruction; the compiler alone would access elements.
// It also makes the checks faster.
template <int Bytes> struct unit_of {
  typedef uint32_t type __attribute__((vector_size(16), may_alias));
};
template <> struct unit_of<2> {
  typedef uint16_t type __attribute__((may_alias));
};
template <> struct unit_of<4> {
  typedef uint32_t type __attribute__((may_alias));
};
template <> struct unit_of<8> {
  typedef uint64_t type __attribute__((may_alias));
};
[[noreturn]] void misaligned_vector(const void* address, int bytes);
template <class V, int Bytes> __forceinline__ V load(const void* from) {
  using unit = typename unit_of<Bytes>::type;
  if (uintptr_t(from) % sizeof(unit)) [[unlikely]]
    misaligned_vector(from, sizeof(unit));
  struct units {
    unit at[Bytes / sizeof(unit)];
  } whole;
  for (size_t i = 0; i < Bytes / sizeof(unit); ++i) whole.at[i] = static_cast<const unit*>(from)[i];
  return std::bit_cast<V>(whole);
}
template <class V, int Bytes> __forceinline__ void store(void* to, const V& vector) {
  using unit = typename unit_of<Bytes>::type;
  if (uintptr_t(to) % sizeof(unit)) [[unlikely]]
    misaligned_vector(to, sizeof(unit));
  struct units {
    unit at[Bytes / sizeof(unit)];
  };
  const units whole = std::bit_cast<units>(vector);
  for (size_t i = 0; i < Bytes / sizeof(unit); ++i) static_cast<unit*>(to)[i] = whole.at[i];
}

// Conversions with the same bits as the instructions of a GPU.
__forceinline__ uint16_t float_to_bfloat(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7FFF : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

__forceinline__ uint16_t float_to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) return 0x7FFF;
  if (size >= 0x47800000) return uint16_t(sign | 0x7C00);  // 2^16 and more
  if (size < 0x38800000)  // subnormal: adding 0.5 leaves multiples of 2^-24, rounded by the addition, in the lower bits
    return uint16_t(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3F000000));
  return uint16_t(sign | ((size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13));  // may round to infinity
}

__forceinline__ float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, size = h & 0x7FFF;
  if (size > 0x7C00) return std::bit_cast<float>(0x7FFFFFFFu);
  if (size == 0x7C00) return std::bit_cast<float>(sign | 0x7F800000);
  if (size < 0x0400) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(float(size) * 0x1p-24f));
  return std::bit_cast<float>(sign | ((size << 13) + 0x38000000));
}

// Rounds to 10 bits of mantissa, ties away from zero. The lower 13 bits are undefined in tf32: they get a pattern that
// shows their use.
__forceinline__ uint32_t float_to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7FFFFFFF;
  return (bits & 0x7F800000) == 0x7F800000 ? bits : ((bits + 0x1000) & 0xFFFFE000) | 0x1555;
}

__forceinline__ float exp2_flushed(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

int shared_memory_limit();
int multiprocessors();

struct launch_shape {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
};
// Runs body(arguments) in every thread; the bytes of the arguments may be read. Throws std::runtime_error.
void run(const launch_shape& shape, void (*body)(const void*), const void* arguments, size_t argument_bytes);

template <class... Parameters, class Stream>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
            std::type_identity_t<Parameters>... parameters) {
  struct call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } const it{kernel, {parameters...}};
  run(
      {name, grid, block, shared_bytes},
      [](const void* at) {
        std::apply(static_cast<const call*>(at)->kernel, static_cast<const call*>(at)->parameters);
      },
      &it, sizeof it);
}

}  // namespace fastlm::emulation

#define threadIdx (::fastlm::emulation::unpack(::fastlm::emulation::thread_index()))
#define blockIdx (::fastlm::emulation::unpack(::fastlm::emulation::block_index()))
#define blockDim (::fastlm::emulation::unpack(::fastlm::emulation::block_size()))
#define gridDim (::fastlm::emulation::unpack(::fastlm::emulation::grid_size()))

// The line identifies the barrier: threads that wait at different lines are a divergent barrier.
__forceinline__ void __syncthreads(int line = __builtin_LINE()) { ::fastlm::emulation::barrier(0, 0, line); }
__forceinline__ void __syncwarp(int line = __builtin_LINE()) { ::fastlm::emulation::sync_warp(line); }

__forceinline__ float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
__forceinline__ float __int_as_float(int x) { return std::bit_cast<float>(x); }
__forceinline__ unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
__forceinline__ int __float_as_int(float x) { return std::bit_cast<int>(x); }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
__forceinline__ int __popc(unsigned x) { return std::popcount(x); }
__forceinline__ int __clz(int x) { return std::countl_zero(unsigned(x)); }
__forceinline__ int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
__forceinline__ float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __expf(float x) { return expf(x); }
__forceinline__ float __logf(float x) { return logf(x); }
template <class T> __forceinline__ T __ldg(const T* from) { return *from; }

using std::max;
using std::min;
