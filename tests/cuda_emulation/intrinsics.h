// The functions of csrc/cuda/intrinsics.cuh for the CPU. The build of the emulated kernels includes this header first,
// and the definition of FASTLM_CUDA_INTRINSICS takes the place of the original.
//
// `line` identifies the source line of a call: threads that wait at different lines are a divergent barrier.
#pragma once
#define FASTLM_CUDA_INTRINSICS
#include "cuda/dtype.h"
#include "cuda_emulation.h"

#define FASTLM_DEVICE __device__ __forceinline__
#define FASTLM_SHARED(name) unsigned char* const name = ::fastlm::emulation::shared_memory()
#define FASTLM_ASSERT(condition) \
  ((condition) ? void() : ::fastlm::emulation::assertion_failed(#condition, __FILE__, __LINE__))

namespace fastlm::cuda {

using emulation::launch;
using emulation::multiprocessors;

FASTLM_DEVICE void named_barrier(int id, int threads, int line = __builtin_LINE()) {
  emulation::barrier(id, threads, line);
}

template <class V> FASTLM_DEVICE V shuffle(V value, int lane, int line = __builtin_LINE()) {
  return emulation::shuffle(value, lane, line);
}
template <class V> FASTLM_DEVICE V shuffle_xor(V value, int mask, int line = __builtin_LINE()) {
  return emulation::shuffle(value, int(threadIdx.x % 32) ^ mask, line);
}
template <class V> FASTLM_DEVICE V shuffle_down(V value, int count, int line = __builtin_LINE()) {
  const int lane = int(threadIdx.x % 32);
  return emulation::shuffle(value, lane + count < 32 ? lane + count : lane, line);
}
FASTLM_DEVICE uint32_t ballot(bool predicate, int line = __builtin_LINE()) {
  return emulation::ballot(predicate, line);
}
FASTLM_DEVICE bool any(bool predicate, int line = __builtin_LINE()) { return emulation::ballot(predicate, line) != 0; }
FASTLM_DEVICE bool all(bool predicate, int line = __builtin_LINE()) {
  return emulation::ballot(predicate, line) == 0xFFFFFFFFu;
}

FASTLM_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared, int line = __builtin_LINE()) {
  emulation::spread(emulation::ldmatrix(shared, 4, false, line), r);
}
FASTLM_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, int line = __builtin_LINE()) {
  emulation::spread(emulation::ldmatrix(shared, 4, true, line), r);
}
FASTLM_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* shared, int line = __builtin_LINE()) {
  emulation::spread(emulation::ldmatrix(shared, 2, false, line), r);
}
FASTLM_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared, int line = __builtin_LINE()) {
  emulation::spread(emulation::ldmatrix(shared, 2, true, line), r);
}

template <class T> FASTLM_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                          int line = __builtin_LINE()) {
  static_assert(dtype_of<T> != DType::float32);
  emulation::spread(
      emulation::mma(emulation::floats{c[0], c[1], c[2], c[3]}, emulation::words{a[0], a[1], a[2], a[3]}, b[0], b[1],
                     dtype_of<T> == DType::bfloat16 ? emulation::products::bf16 : emulation::products::fp16, line),
      c);
}
FASTLM_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            int line = __builtin_LINE()) {
  emulation::spread(emulation::mma(emulation::floats{c[0], c[1], c[2], c[3]}, emulation::words{a[0], a[1], a[2], a[3]},
                                   b[0], b[1], emulation::products::tf32, line),
                    c);
}
FASTLM_DEVICE uint32_t to_tf32(float x) { return emulation::float_to_tf32(x); }

FASTLM_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 16, valid);
}
FASTLM_DEVICE void cp_async_4(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 4, valid);
}
FASTLM_DEVICE void cp_async_commit() { emulation::copy_async_commit(); }
template <int N> FASTLM_DEVICE void cp_async_wait() { emulation::copy_async_wait(N); }

FASTLM_DEVICE int opaque(int x) { return x; }

FASTLM_DEVICE float to_float(fp16 x) { return emulation::half_to_float(x.bits); }
FASTLM_DEVICE bf16 to_bf16(float x) { return {emulation::float_to_bfloat(x)}; }
FASTLM_DEVICE fp16 to_fp16(float x) { return {emulation::float_to_half(x)}; }
FASTLM_DEVICE uint32_t pack_bf16(float low, float high) {
  return emulation::float_to_bfloat(low) | uint32_t(emulation::float_to_bfloat(high)) << 16;
}
FASTLM_DEVICE uint32_t pack_fp16(float low, float high) {
  return emulation::float_to_half(low) | uint32_t(emulation::float_to_half(high)) << 16;
}
FASTLM_DEVICE float exp2_fast(float x) { return emulation::exp2_flushed(x); }
FASTLM_DEVICE float multiply_rounded(float x, float y) {
  float product = x * y;
  asm("" : "+m"(product));  // the compiler would fuse it with an addition
  return product;
}

template <class V> FASTLM_DEVICE V load_vector(const void* from) { return emulation::load<V, sizeof(V)>(from); }
template <class V> FASTLM_DEVICE void store_vector(void* to, const V& vector) {
  emulation::store<V, sizeof(V)>(to, vector);
}

}  // namespace fastlm::cuda
