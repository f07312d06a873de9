// Numbers as they are stored, their conversions, vectors of up to 16 bytes per access, and elementary functions.
#pragma once
#include <initializer_list>
#include "launch.cuh"

namespace fastlm::cuda {

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

FASTLM_DEVICE bool is_finite(float x) { return x - x == 0; }

template <class T> FASTLM_DEVICE T from_float(float x);
template <> FASTLM_DEVICE float from_float<float>(float x) { return x; }
template <> FASTLM_DEVICE bf16 from_float<bf16>(float x) { return to_bf16(x); }
template <> FASTLM_DEVICE fp16 from_float<fp16>(float x) { return to_fp16(x); }

// Two 16-bit numbers in a register, the first in the lower half, as mma and ldmatrix hold them.
template <class T> FASTLM_DEVICE uint32_t pack2(float low, float high);
template <> FASTLM_DEVICE uint32_t pack2<bf16>(float low, float high) { return pack_bf16(low, high); }
template <> FASTLM_DEVICE uint32_t pack2<fp16>(float low, float high) { return pack_fp16(low, high); }

// The rounding error of `rounded` = to_tf32(x), itself rounded to tf32. The lower 13 bits of `rounded` are undefined.
FASTLM_DEVICE uint32_t tf32_residual(float x, uint32_t rounded) {
  return to_tf32(x - __uint_as_float(rounded & 0xFFFFE000u));
}

// N contiguous numbers; N·sizeof(T) is a power of two. Up to 16 bytes an access is one instruction and needs an address
// aligned to its size; a longer vector takes several accesses of 16 bytes.
template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) vec {
  static_assert((N * sizeof(T) & (N * sizeof(T) - 1)) == 0);

  T at[N];

  FASTLM_DEVICE T& operator[](int i) { return at[i]; }
  FASTLM_DEVICE const T& operator[](int i) const { return at[i]; }

  FASTLM_DEVICE static vec load(const T* from) { return load_vector<vec>(from); }
  FASTLM_DEVICE void store(T* to) const { store_vector(to, *this); }
};

// Groups of 8 columns in memory, of which `count` exist. vectorized: all groups have 8 columns aligned to 16 bytes.
inline bool can_vectorize(int64_t columns, std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  return columns % 8 == 0;
}
template <class T> FASTLM_DEVICE vec<T, 8> load8(const T* from, int count, bool vectorized) {
  if (vectorized && count > 0) return vec<T, 8>::load(from);
  vec<T, 8> group;
#pragma unroll
  for (int e = 0; e < 8; ++e) group[e] = e < count ? from[e] : from_float<T>(0.0f);
  return group;
}
template <class T> FASTLM_DEVICE void store8(const vec<float, 8>& c, T* to, int count, bool vectorized) {
  vec<T, 8> group;
#pragma unroll
  for (int e = 0; e < 8; ++e) group[e] = from_float<T>(c[e]);
  if (vectorized) return group.store(to);
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (e < count) to[e] = group[e];
}

// Accurate to one or two units in the last place.
FASTLM_DEVICE float exp_(float x) { return expf(x); }
FASTLM_DEVICE float log_(float x) { return logf(x); }
FASTLM_DEVICE float erf_(float x) { return erff(x); }
FASTLM_DEVICE float tanh_(float x) { return tanhf(x); }

}  // namespace fastlm::cuda
