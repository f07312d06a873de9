// No result depends on how many threads there are, bit for bit: sums over parts are cut by sizes alone; where the
// number of threads cuts the work, no sum is cut.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastlm {

// For streaming work: a part is worth at least 64 kB of traffic (waking a thread costs about as much as streaming half
// of that); 64 parts feed any machine's cores.
inline int64_t parts_for(int64_t items, int64_t bytes_per_item) {
  return std::max<int64_t>(1, std::min<int64_t>({items * bytes_per_item / 65536, items, 64}));
}

// body(part) once for each part, in any order on any thread. Each thread begins with a run of its own, the same one in
// every call of as many parts: what it wrote in one call is in its own cache in the next, which may be all that it
// shares with no other thread. Then it helps those that are late. Bodies must not throw: an exception cannot leave the
// parallel region.
template <class Body> void parallel_parts(int64_t parts, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && parts > 1) {
    constexpr int MostRuns = 64;
    struct alignas(64) position {
      std::atomic<int64_t> next;
    } runs[MostRuns];
    const int count = int(std::min<int64_t>({threads, parts, MostRuns}));
    for (int run = 0; run < count; ++run) runs[run].next.store(parts * run / count, std::memory_order_relaxed);
#pragma omp parallel num_threads( \
        threads)  // always the same number: libgomp would end and restart threads if it changed
    for (int late = 0, own = omp_get_thread_num() % count; late < count; ++late) {
      const int run = (own + late) % count;
      const int64_t end = parts * (run + 1) / count;
      std::atomic<int64_t>& next = runs[run].next;
      while (next.load(std::memory_order_relaxed) < end)  // a look takes the counter from no other thread
        if (const int64_t part = next.fetch_add(1, std::memory_order_relaxed); part < end) body(part);
    }
    return;
  }
#endif
  (void)threads;
  for (int64_t part = 0; part < parts; ++part) body(part);
}

// body(begin, end, part): the items cut into `parts` runs of equal length, one call each.
template <class Body> void parallel_for(int64_t items, int64_t parts, int threads, const Body& body) {
  parallel_parts(parts, threads, [&](int64_t part) { body(items * part / parts, items * (part + 1) / parts, part); });
}

struct aligned_free {
  void operator()(void* p) const { std::free(p); }
};
using buffer = std::unique_ptr<float[], aligned_free>;

// Cache-line aligned and not initialised.
inline buffer make_buffer(int64_t count) {
  return buffer(static_cast<float*>(std::aligned_alloc(64, size_t((count * 4 + 63) / 64 * 64 + 64))));
}

// This thread's own working memory, kept from call to call: freshly mapped pages cost more than the kernels that would
// write to them. One user at a time: a kernel asks once and divides what it gets. Grows to a few MB (block sizes are
// bounded), never shrinks.
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
