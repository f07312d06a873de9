// Numbers as they are stored, their conversions, vectors of up to 16 bytes an access, and the functions of one number.
#pragma once
#include "launch.cuh"

namespace fastlm::cuda {

struct alignas(2) bf16 {
  uint16_t bits;
};
struct alignas(2) fp16 {
  uint16_t bits;
};

template <class T> inline constexpr DType dtype_of = DType::float32;
template <> inline constexpr DType dtype_of<bf16> = DType::bfloat16;
template <> inline constexpr DType dtype_of<fp16> = DType::float16;

// Calls function.template operator()<T>() for the T that dtype names: with_dtype(dtype, [&]<class T>() { … }).
template <class F> void with_dtype(DType dtype, F&& function) {
  switch (dtype) {
    case DType::float32: return function.template operator()<float>();
    case DType::bfloat16: return function.template operator()<bf16>();
    case DType::float16: return function.template operator()<fp16>();
  }
}

FASTLM_DEVICE float to_float(float x) { return x; }
FASTLM_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FASTLM_DEVICE float to_float(fp16 x) {
#ifdef FASTLM_CUDA_EMULATION
  return emulation::half_to_float(x.bits);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#endif
}

FASTLM_DEVICE bool is_finite(float x) { return x - x == 0; }

// Rounds to the nearest, ties to even; beyond the largest number lies infinity; a NaN becomes 0x7FFF, as the conversion
// instructions have it.
template <class T> FASTLM_DEVICE T from_float(float x);
template <> FASTLM_DEVICE float from_float<float>(float x) { return x; }
template <> FASTLM_DEVICE bf16 from_float<bf16>(float x) {
  bf16 y;
#ifdef FASTLM_CUDA_EMULATION
  y.bits = emulation::float_to_bfloat(x);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
  return y;
}
template <> FASTLM_DEVICE fp16 from_float<fp16>(float x) {
  fp16 y;
#ifdef FASTLM_CUDA_EMULATION
  y.bits = emulation::float_to_half(x);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
  return y;
}

// Two numbers of 16 bits in a register, the first in the lower half: how mma and ldmatrix hold them.
template <class T> FASTLM_DEVICE uint32_t pack2(float low, float high);
template <> FASTLM_DEVICE uint32_t pack2<bf16>(float low, float high) {
#ifdef FASTLM_CUDA_EMULATION
  return emulation::float_to_bfloat(low) | uint32_t(emulation::float_to_bfloat(high)) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}
template <> FASTLM_DEVICE uint32_t pack2<fp16>(float low, float high) {
#ifdef FASTLM_CUDA_EMULATION
  return emulation::float_to_half(low) | uint32_t(emulation::float_to_half(high)) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

// N numbers side by side in memory, N·sizeof(T) a power of two. An access is one instruction up to 16 bytes and asks
// for addresses aligned to it; beyond, it is several of 16.
template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) vec {
  static constexpr int Bytes = N * sizeof(T);
  static_assert((Bytes & (Bytes - 1)) == 0);

  T at[N];

  FASTLM_DEVICE T& operator[](int i) { return at[i]; }
  FASTLM_DEVICE const T& operator[](int i) const { return at[i]; }

#ifdef FASTLM_CUDA_EMULATION
  FASTLM_DEVICE static vec load(const T* from) { return emulation::load<vec, Bytes>(from); }
  FASTLM_DEVICE void store(T* to) const { emulation::store<vec, Bytes>(to, *this); }
#else
  FASTLM_DEVICE static vec load(const T* from) { return *reinterpret_cast<const vec*>(from); }
  FASTLM_DEVICE void store(T* to) const { *reinterpret_cast<vec*>(to) = *this; }
#endif
};

// 2^x to about two units in the last place, 0 below 2^-126: one instruction, for softmax's weights.
FASTLM_DEVICE float exp2_fast(float x) {
#ifdef FASTLM_CUDA_EMULATION
  return emulation::exp2_flushed(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Accurate to one or two units in the last place.
FASTLM_DEVICE float exp_(float x) { return expf(x); }
FASTLM_DEVICE float log_(float x) { return logf(x); }
FASTLM_DEVICE float erf_(float x) { return erff(x); }

}  // namespace fastlm::cuda
