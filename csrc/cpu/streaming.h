// Streaming stores, for results larger than the caches. An ordinary store first reads the line that it overwrites, a
// third of the traffic of an operator that reads as much as it writes, and evicts lines that are still useful.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace fastlm {

#ifdef __SSE2__
inline constexpr bool CanStream = true;
#else
inline constexpr bool CanStream = false;
#endif

// Whether to stream the results of an operator with so many bytes of traffic: measured to pay from four times the
// last-level cache on. Where the system does not report its size, that of a small server is assumed.
inline bool exceeds_cache(int64_t bytes) {
  int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
  size = reported;
#endif
  return CanStream && bytes > 4 * (size > 0 ? size : 32 << 20);
}

// Copies a row from L1, with streaming stores for the whole cache lines of the target. end_streaming() must follow
// before other threads read it.
template <class T> void stream_row(const T* from, int64_t count, T* to) {
  const char* source = reinterpret_cast<const char*>(from);
  char* target = reinterpret_cast<char*>(to);
  const int64_t bytes = count * int64_t(sizeof(T));
#ifdef __SSE2__
  const int64_t first = std::min(bytes, int64_t(-reinterpret_cast<uintptr_t>(target) & 63));
  std::memcpy(target, source, size_t(first));
  int64_t i = first;
  for (; i + 64 <= bytes; i += 64)
    for (int64_t j = i; j < i + 64; j += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j)));
  std::memcpy(target + i, source + i, size_t(bytes - i));
#else
  std::memcpy(target, source, size_t(bytes));
#endif
}

// Streaming stores are not ordered; this makes those of the calling thread visible.
inline void end_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace fastlm
