// Tensor-core products of a warp, what loads their operands from shared memory, and copies from global to shared memory
// that run beside the arithmetic.
//
// Fragments, of lane = 4·group + t (group 0…7, t 0…3); a register holds two 16-bit numbers of neighbouring columns (a)
// or rows (b), the lower first:
//   m16n8k16  a[0] = A[group][2t…]  a[1] = A[group + 8][2t…]  a[2] = A[group][2t + 8…]  a[3] = A[group + 8][2t + 8…]
//             b[0] = B[2t…][group]  b[1] = B[2t + 8…][group]
//             c[0], c[1] = C[group][2t, 2t + 1]  c[2], c[3] = C[group + 8][2t, 2t + 1]
//   m16n8k8 (tf32)  a[0] = A[group][t]  a[1] = A[group + 8][t]  a[2] = A[group][t + 4]  a[3] = A[group + 8][t + 4]
//                   b[0] = B[t][group]  b[1] = B[t + 4][group];  c as above
// ldmatrix reads matrices of 8 rows of 16 bytes, whose addresses lanes 8i…8i + 7 give for matrix i (x2: lanes 0…15).
// Lane 4·group + t gets of each matrix the pair at row `group`, columns 2t, 2t + 1; transposed: the column `group` of
// rows 2t, 2t + 1.
#pragma once
#include "vec.cuh"

namespace fastlm::cuda {

#ifdef FASTLM_CUDA_EMULATION

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
FASTLM_DEVICE int anew(int x) { return x; }

FASTLM_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 16, valid);
}
FASTLM_DEVICE void cp_async_4(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 4, valid);
}
FASTLM_DEVICE void cp_async_commit() { emulation::copy_async_commit(); }
template <int N> FASTLM_DEVICE void cp_async_wait() { emulation::copy_async_wait(N); }

#else

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

// c += a·b of 16×8×16, summed in float32.
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
// c += a·b of 16×8×8; the operands are float32 whose lower 13 bits the hardware ignores: to_tf32 rounds them first.
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

// x, as a number that the compiler knows nothing of: what a loop computes with it is computed in each round, where
// otherwise all of a tile's addresses would be kept in registers from one to the next.
FASTLM_DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Where `valid` is false, zeros are written and the global address is not read. The 16-byte copies go past the L1
// cache.
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
// Waits until at most the last N committed groups of this thread are under way; what other threads copied is there only
// after a barrier, too.
template <int N> FASTLM_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

#endif

// What rounding to `near` took away from x, rounded itself. The lower 13 bits of `near` are no part of it.
FASTLM_DEVICE uint32_t rest_in_tf32(float x, uint32_t near) { return to_tf32(x - __uint_as_float(near & 0xFFFFE000u)); }

}  // namespace fastlm::cuda
