// The CUDA and PTX operations that the kernels use: kernel launches, shared memory, barriers, warp collectives,
// tensor-core products, asynchronous copies and conversions. Except for device.cu, no other file names a CUDA function.
//
// A build for another target defines FASTLM_CUDA_INTRINSICS in a header that it includes first and provides the same
// functions there.
#ifndef FASTLM_CUDA_INTRINSICS
#define FASTLM_CUDA_INTRINSICS
#undef NDEBUG  // FASTLM_ASSERT checks values in release builds too
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <cuda_runtime.h>
#include "dtype.h"

#define FASTLM_DEVICE __device__ __forceinline__

namespace fastlm::cuda {

// Launches

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Launches a kernel. Throws std::runtime_error with the name of the kernel and the reason if the launch fails.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            stream_t stream, std::type_identity_t<Parameters>... parameters) {
  constexpr size_t default_limit = 48 << 10;  // a kernel must opt in to more shared memory than this
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > default_limit)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  void* addresses[] = {&parameters...};
  check(cudaLaunchKernel(function, grid, block, addresses, shared_bytes, stream), name);
}

// Shared memory and assertions

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];

#define FASTLM_SHARED(name) unsigned char* const name = ::fastlm::cuda::dynamic_shared_memory
#define FASTLM_ASSERT(condition) assert(condition)

// Barriers

// Barrier `id` (1 to 15; 0 is __syncthreads) for `threads` threads of the block, a multiple of 32.
FASTLM_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Warp collectives. All 32 threads of the warp must take part. shuffle_down returns the own value in the last `count`
// lanes.

template <class V> FASTLM_DEVICE V shuffle(V value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }
template <class V> FASTLM_DEVICE V shuffle_xor(V value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
template <class V> FASTLM_DEVICE V shuffle_down(V value, int count) {
  return __shfl_down_sync(0xFFFFFFFFu, value, count);
}
FASTLM_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xFFFFFFFFu, predicate); }
FASTLM_DEVICE bool any(bool predicate) { return __any_sync(0xFFFFFFFFu, predicate); }
FASTLM_DEVICE bool all(bool predicate) { return __all_sync(0xFFFFFFFFu, predicate); }

// Matrix fragments. With lane = 4·group + t (group 0…7, t 0…3), a register holds two 16-bit numbers of neighbouring
// columns (a) or rows (b), the first in the lower half:
//   m16n8k16  a[0] = A[group][2t…]  a[1] = A[group + 8][2t…]  a[2] = A[group][2t + 8…]  a[3] = A[group + 8][2t + 8…]
//             b[0] = B[2t…][group]  b[1] = B[2t + 8…][group]
//             c[0], c[1] = C[group][2t, 2t + 1]  c[2], c[3] = C[group + 8][2t, 2t + 1]
//   m16n8k8 (tf32)  a[0] = A[group][t]  a[1] = A[group + 8][t]  a[2] = A[group][t + 4]  a[3] = A[group + 8][t + 4]
//                   b[0] = B[t][group]  b[1] = B[t + 4][group];  c as above
// ldmatrix reads matrices of 8 rows of 16 bytes; lanes 8i…8i + 7 give the row addresses of matrix i (x2: lanes 0…15).
// Lane 4·group + t receives from each matrix row `group`, columns 2t and 2t + 1; transposed: column `group`, rows 2t
// and 2t + 1.

FASTLM_DEVICE uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

FASTLM_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
FASTLM_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
FASTLM_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}
FASTLM_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}

// c += a·b, 16×8×16, accumulated in float32.
template <class T> FASTLM_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(dtype_of<T> != DType::float32);
  if constexpr (dtype_of<T> == DType::bfloat16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a·b, 16×8×8. The hardware ignores the lower 13 bits of the float32 operands; to_tf32 rounds them first.
FASTLM_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FASTLM_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Asynchronous copies from global to shared memory. If `valid` is false, zeros are written and the global address is
// not read. 16-byte copies bypass the L1 cache.

FASTLM_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
FASTLM_DEVICE void cp_async_4(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}
FASTLM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last N committed groups of this thread are pending. Copies of other threads are visible only
// after a barrier as well.
template <int N> FASTLM_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Returns x, which the compiler then treats as unknown. A loop recomputes what it derives from x in each iteration;
// otherwise the compiler would keep all addresses of a tile in registers from one iteration to the next.
FASTLM_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Conversions round to nearest, ties to even. Values beyond the largest number become infinity, a NaN becomes 0x7FFF.

FASTLM_DEVICE float to_float(fp16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}
FASTLM_DEVICE bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
FASTLM_DEVICE fp16 to_fp16(float x) {
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
FASTLM_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
FASTLM_DEVICE uint32_t pack_fp16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 2^x with an error of about two units in the last place, 0 below 2^-126. One instruction, used for softmax weights.
FASTLM_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x·y, rounded: never fused with an addition that follows.
FASTLM_DEVICE float multiply_rounded(float x, float y) { return __fmul_rn(x, y); }

// Memory accesses of a whole vector V, which is aligned to its size or to 16 bytes.

template <class V> FASTLM_DEVICE V load_vector(const void* from) { return *static_cast<const V*>(from); }
template <class V> FASTLM_DEVICE void store_vector(void* to, const V& vector) { *static_cast<V*>(to) = vector; }

}  // namespace fastlm::cuda

#endif
