// Parallel loops and scratch memory. Results do not depend on the number of threads, bit for bit: reductions are cut by
// sizes only, and where the number of threads cuts the work, no reduction is cut.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void* order);
extern "C" void __tsan_release(void* order);
#define FASTLM_NOT_INSTRUMENTED __attribute__((no_sanitize("thread"), noinline))
#else
#define FASTLM_NOT_INSTRUMENTED
#endif

namespace fastlm {

// ThreadSanitizer does not see how libgomp, which is not instrumented, starts and joins threads. A build for it
// declares that what precedes happens_before(&order) precedes what follows happens_after(&order); otherwise these do
// nothing.
struct order {};
inline void happens_before([[maybe_unused]] order* each) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(each);
#endif
}
inline void happens_after([[maybe_unused]] order* each) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(each);
#endif
}

#ifdef _OPENMP
// Calls body(thread) on each of `threads` threads. Each reads its arguments before the order is declared.
template <class Body> FASTLM_NOT_INSTRUMENTED void on_threads(int threads, const Body& body) {
  order start, finish;
  happens_before(&start);
#pragma omp parallel num_threads(threads)
  {
    happens_after(&start);
    body(omp_get_thread_num());
    happens_before(&finish);
  }
  happens_after(&finish);
}
#endif

// The number of parts for memory-bound work. A part is at least 64 kB of traffic (waking a thread costs about as much
// as half of that); 64 parts are enough for any machine.
inline int64_t parts_for(int64_t items, int64_t bytes_per_item) {
  return std::max<int64_t>(1, std::min<int64_t>({items * bytes_per_item / 65536, items, 64}));
}

// From 1 to `most` parts for work that is split for several threads only. If there is one for each thread, all threads
// have as many.
inline int64_t parts_of_threads(int64_t wanted, int64_t most, int threads) {
  const int64_t parts = threads == 1 ? 1 : std::clamp<int64_t>(wanted, 1, most);
  return parts > threads ? parts / threads * threads : parts;
}

// Calls body(part) once for each part, in any order, on any thread. Each thread starts with a range of its own, which
// is the same in every call with as many parts, so that data it wrote in one call is in its own cache in the next. Then
// it takes parts from threads that are late. Bodies must not throw: an exception cannot leave the parallel region.
template <class Body> void parallel_parts(int64_t parts, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && parts > 1) {
    constexpr int MaxRanges = 64;
    struct alignas(64) position {
      std::atomic<int64_t> next;
    } ranges[MaxRanges];
    const int count = int(std::min<int64_t>({threads, parts, MaxRanges}));
    for (int range = 0; range < count; ++range)
      ranges[range].next.store(parts * range / count, std::memory_order_relaxed);
    // Always the same number of threads: libgomp would stop and restart threads if it changed.
    on_threads(threads, [&](int thread) {
      for (int late = 0, own = thread % count; late < count; ++late) {
        const int range = (own + late) % count;
        const int64_t end = parts * (range + 1) / count;
        std::atomic<int64_t>& next = ranges[range].next;
        while (next.load(std::memory_order_relaxed) < end)  // a load leaves the line shared between threads
          if (const int64_t part = next.fetch_add(1, std::memory_order_relaxed); part < end) body(part);
      }
    });
    return;
  }
#endif
  (void)threads;
  for (int64_t part = 0; part < parts; ++part) body(part);
}

// Calls body(begin, end, part) for each of `parts` ranges of nearly equal length.
template <class Body> void parallel_for(int64_t items, int64_t parts, int threads, const Body& body) {
  parallel_parts(parts, threads, [&](int64_t part) { body(items * part / parts, items * (part + 1) / parts, part); });
}

struct aligned_free {
  void operator()(void* p) const { std::free(p); }
};
using buffer = std::unique_ptr<float[], aligned_free>;

// Aligned to cache lines and not initialised.
inline buffer make_buffer(int64_t count) {
  return buffer(static_cast<float*>(std::aligned_alloc(64, size_t((count * 4 + 63) / 64 * 64 + 64))));
}

// Scratch memory of the calling thread, which is kept between calls: mapping new pages costs more than the kernels
// that write to them. A kernel calls this once and divides the memory. It grows to a few MB, as block sizes are
// bounded, and never shrinks.
inline float* scratch(int64_t count) {
  thread_local buffer memory;
  thread_local int64_t size = 0;
  if (size < count) {
    memory = make_buffer(count);
    size = count;
  }
  return memory.get();
}

}  // namespace fastlm
