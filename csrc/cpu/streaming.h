// Results that no cache can hold: written past it. An ordinary store first reads the line that it is about to
// overwrite, a third of the traffic of an operator that reads as much as it writes, and pushes out what others could
// still use.
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

// Whether to stream the results of an operator that touches so many bytes, each once: from four times the last cache on
// it paid (docs/cpu.md). Where the system does not tell its size, that of a small server's.
inline bool past_cache(int64_t bytes) {
  int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
  size = reported;
#endif
  return CanStream && bytes > 4 * (size > 0 ? size : 32 << 20);
}

// Copies a row that was just made and is in L1, whole lines of the target past the caches. end_streaming() before
// others read it.
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

// Such lines reach memory in no order of their own: this thread's are all there afterwards.
inline void end_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace fastlm
