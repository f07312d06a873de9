// Each OS thread runs blocks one after another, and the threads of a block as fibers.
#include "fibers.h"
#include <dlfcn.h>
#include <link.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace fastlm::emulation {

thread_local constinit Fiber* current = nullptr;

packed3 thread_index() { return current->index; }
packed3 block_index() { return current->block->index; }
packed3 block_size() { return current->block->size; }
packed3 grid_size() { return current->block->grid; }
unsigned char* shared_memory() { return current->block->shared; }

// The limits of the smallest supported GPU. There are few multiprocessors, so that work is divided by their number at
// the sizes of the tests, too.
int shared_memory_limit() { return 99 << 10; }
int multiprocessors() { return 4; }

std::string index_name(packed3 index) {
  return "(" + std::to_string(unsigned(index.xy)) + ", " + std::to_string(unsigned(index.xy >> 32)) + ", " +
         std::to_string(index.z) + ")";
}
std::string name_of(const Block& block, int thread) { return "thread " + index_name(block.fibers[thread].index); }

void fail(const Fiber& thread, const std::string& what, void* place) {
  Block& block = *thread.block;
  block.error = "block " + index_name(block.index) + ", " + name_of(block, thread.number) + ": " + what;
  block.place = place;
  current = nullptr;
  void* abandoned;
  switch_fibers(&abandoned, block.host_stack_pointer);
  __builtin_unreachable();
}

void assertion_failed(const char* condition, const char* file, int line) {
  const std::string path = file;
  fail(*current, "assertion failed: " + std::string(condition) + ", " + path.substr(path.rfind('/') + 1) + ":" +
                     std::to_string(line));
}

static std::string name_of(Meeting meeting, int line) {
  static constexpr const char* names[] = {"__syncwarp", "a barrier", "a shuffle", "a vote", "ldmatrix", "mma"};
  return std::string(names[int(meeting)]) + " of line " + std::to_string(line);
}

void diverged(Fiber& self, Meeting meeting, int line) {
  const Warp& warp = *self.warp;
  const std::string here = "divergent barrier: it waits at " + name_of(meeting, line);
  if (warp.exited)
    fail(self, here + " and " + std::to_string(warp.exited) + " other threads of its warp have ended",
         __builtin_return_address(0));
  fail(self, here + ", other threads of its warp at " + name_of(warp.meeting, warp.line), __builtin_return_address(0));
}

// `self` waits or has ended: switches to the next warp that can run.
static void leave_warp(Fiber* self) {
  Block& block = *self->block;
  for (int i = 1; i <= block.warp_count; ++i) {
    Warp& warp = block.warps[(self->warp->number + i) % block.warp_count];
    if (!warp.blocked && !warp.ended) {
      go_on_with(self, warp.next);
      return;
    }
  }
  if (block.ended_warps == block.warp_count) {
    current = nullptr;
    switch_fibers(&self->stack_pointer, block.host_stack_pointer);
    __builtin_unreachable();
  }
  for (int id = 0; id < Barriers; ++id)
    if (const Barrier& barrier = block.barriers[id]; barrier.warps) {
      const Fiber& waits = *block.warps[std::countr_zero(barrier.members)].next;
      fail(waits, "divergent barrier: it waits at " +
                      (id ? "barrier " + std::to_string(id) : std::string("__syncthreads")) + " of line " +
                      std::to_string(barrier.line) + " with " + std::to_string(barrier.warps * Lanes) + " threads of " +
                      std::to_string(barrier.threads) + ", and the others have ended or wait elsewhere");
    }
  __builtin_unreachable();
}

static void wait_for_warps(Fiber* self, int id, int threads, int line) {
  Warp& warp = *self->warp;
  Block& block = *self->block;
  Barrier& barrier = block.barriers[id];
  if (barrier.warps == 0) {
    barrier.threads = threads;
    barrier.line = line;
  } else if (id == 0 && barrier.line != line)
    fail(*self, "divergent barrier: it waits at __syncthreads of line " + std::to_string(line) +
                    ", other warps at that of line " + std::to_string(barrier.line));
  else if (barrier.threads != threads)
    fail(*self, "barrier " + std::to_string(id) + " is for " + std::to_string(threads) + " threads here and for " +
                    std::to_string(barrier.threads) + " elsewhere");
  barrier.members |= 1u << warp.number;
  warp.next = self;
  if (++barrier.warps * Lanes < barrier.threads) {
    warp.blocked = true;
    leave_warp(self);
    return;
  }
  synchronise(block, barrier.members);
  for (uint32_t left = barrier.members; left; left &= left - 1) block.warps[std::countr_zero(left)].blocked = false;
  barrier.warps = 0;
  barrier.members = 0;
}

void barrier(int id, int threads, int line) {
  Fiber* self = current;
  Warp& warp = *self->warp;
  if (id == 0) threads = self->block->threads;
  if (id < 0 || id >= Barriers || threads <= 0 || threads % Lanes || threads > self->block->threads)
    fail(*self, "barrier " + std::to_string(id) + " for " + std::to_string(threads) +
                    " threads: there are 0 to 15, for multiples of 32 up to the block");
  if (warp.arrived == 0) {
    warp.barrier = id;
    warp.barrier_threads = threads;
  } else if (warp.meeting == Meeting::barrier && (warp.barrier != id || warp.barrier_threads != threads))
    fail(*self, "divergent barrier: it waits at barrier " + std::to_string(id) +
                    ", other threads of its warp at barrier " + std::to_string(warp.barrier));
  meet(self, Meeting::barrier, line, [=](Warp&) { wait_for_warps(self, id, threads, line); });
}

void sync_warp(int line) {
  Fiber* self = current;
  meet(self, Meeting::sync_warp, line, [](Warp& warp) { synchronise(*warp.block, 1u << warp.number); });
}

[[noreturn]] static void live() {
  current->block->launch->body(current->block->launch->arguments);
  Fiber* self = current;
  Warp& warp = *self->warp;
  if (warp.arrived)
    fail(*self, "divergent barrier: it has ended, and " + std::to_string(warp.arrived) +
                    " other threads of its warp wait at " + name_of(warp.meeting, warp.line));
  self->exited = true;
  if (++warp.exited < Lanes) {
    int lane = self->lane;
    do lane = (lane + 1) % Lanes;
    while (warp.lanes[lane].exited);
    go_on_with(self, warp.lanes + lane);
  } else {
    warp.ended = true;
    ++self->block->ended_warps;
    leave_warp(self);
  }
  __builtin_unreachable();
}

static uintptr_t new_stack() {
  const size_t page = sysconf(_SC_PAGESIZE);
  void* memory =
      mmap(nullptr, StackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of a thread");
  mprotect(memory, page, PROT_NONE);  // detects a stack overflow
  return uintptr_t(memory) + page;
}

struct Machine {
  Block block{};
  std::vector<Fiber> fibers = std::vector<Fiber>(MostThreads);
  std::vector<Warp> warps = std::vector<Warp>(MostWarps);

  void prepare(const Launch& launch) {
    block.fibers = fibers.data();
    block.warps = warps.data();
    block.launch = &launch;
    block.threads = launch.threads;
    block.warp_count = launch.threads / Lanes;
    const dim3 size = launch.shape.block, grid = launch.shape.grid;
    block.size = {size.x | uint64_t(size.y) << 32, size.z};
    block.grid = {grid.x | uint64_t(grid.y) << 32, grid.z};
    block.recent = 0;
    for (int i = 0; i < block.threads; ++i) {
      Fiber& fiber = fibers[i];
      if (!fiber.stack) fiber.stack = new_stack();
      fiber.block = &block;
      fiber.warp = &warps[i / Lanes];
      fiber.number = i;
      fiber.lane = i % Lanes;
      fiber.index = {i % size.x | uint64_t(i / size.x % size.y) << 32, i / size.x / size.y};
    }
    resize_shared(block, launch.shape.shared_bytes);
    follow_results(block);
  }

  void run(uint64_t number) {
    const dim3 grid = block.launch->shape.grid;
    const packed3 index = {number % grid.x | number / grid.x % grid.y << 32, number / grid.x / grid.y};
    block.index = index;
    block.number = uint32_t(number);
    block.ended_warps = 0;
    forget_shared(block);
    for (Barrier& barrier : block.barriers) barrier = {};
    for (int w = 0; w < block.warp_count; ++w) {
      Warp& warp = warps[w];
      warp.lanes = &fibers[w * Lanes];
      warp.block = &block;
      warp.number = w;
      warp.arrived = warp.exited = 0;
      warp.blocked = warp.ended = false;
      warp.next = warp.lanes;
      std::fill_n(warp.seen, block.warp_count, block.now);
      warp.least_seen = block.now;
    }
    for (int i = 0; i < block.threads; ++i) {
      Fiber& fiber = fibers[i];
      fiber.exited = false;
      fiber.copies.clear();
      fiber.landed = 0;
      fiber.groups = 0;
      // Stack tops are staggered, because equal distances would map them to the same cache lines.
      void** top = reinterpret_cast<void**>(fiber.stack + StackBytes - 64 - i % 16 * 832);
#if defined(__x86_64__)
      *--top = nullptr;  // the return address that a call would push
      *--top = reinterpret_cast<void*>(&live);
#else
      *--top = reinterpret_cast<void*>(&live);
      *--top = nullptr;
#endif
      fiber.stack_pointer = top;
    }
    current = &fibers[0];
    switch_fibers(&block.host_stack_pointer, fibers[0].stack_pointer);
    if (block.error.empty() && !guards_intact(block))
      block.error = "block " + index_name(index) + ": the bytes around shared memory were written";
  }
};

// Machines are reused by the next launch, because creating their stacks is slow.
static std::mutex machines_mutex;
static std::vector<std::unique_ptr<Machine>> machines;

static std::unique_ptr<Machine> take_machine() {
  std::lock_guard lock(machines_mutex);
  if (machines.empty()) return std::make_unique<Machine>();
  auto machine = std::move(machines.back());
  machines.pop_back();
  return machine;
}
static void give_back(std::unique_ptr<Machine> machine) {
  std::lock_guard lock(machines_mutex);
  machines.push_back(std::move(machine));
}

static unsigned os_threads() {
  if (const char* wanted = std::getenv("FASTLM_CUDA_EMULATION_THREADS")) return std::max(1, std::atoi(wanted));
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof cores, &cores) == 0 ? std::max(1, CPU_COUNT(&cores)) : 1;
}

// Constants of the kernels are in the module.
static std::vector<Extent> module_image() {
  std::vector<Extent> image;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        std::vector<Extent> segments;
        bool ours = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_LOAD) continue;
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          segments.push_back({begin, header.p_memsz, false, "the module"});
          ours |= reinterpret_cast<uintptr_t>(&module_image) - begin < header.p_memsz;
        }
        if (ours) *static_cast<std::vector<Extent>*>(out) = segments;
        return int(ours);
      },
      &image);
  return image;
}

// "file:line, from file:line": the place and its callers by inlining, if addr2line is installed.
static std::string source_of(void* place) {
  Dl_info module;
  if (!place || !dladdr(place, &module)) return "";
  char command[4096];
  const uintptr_t before = uintptr_t(place) - 1 - uintptr_t(module.dli_fbase);  // inside the call instruction
  std::snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%zx 2>/dev/null", module.dli_fname, size_t(before));
  FILE* output = popen(command, "r");
  if (!output) return "";
  std::string places;
  char line[512];
  while (std::fgets(line, sizeof line, output)) {
    std::string one = line;
    one = one.substr(0, one.find_first_of(" \n"));
    if (!one.empty() && one[0] != '?' && !one.starts_with("cuda_emulation.h"))
      places += (places.empty() ? "\n  at " : ", from ") + one;
  }
  pclose(output);
  return places;
}

void run(const launch_shape& shape, void (*body)(const void*), const void* arguments, size_t argument_bytes) {
  std::string kernel = shape.kernel;
  if (kernel.starts_with('('))
    kernel = kernel.substr(1, kernel.size() - 2);  // the launch macro has parentheses around names with commas
  const auto refuse = [&](const std::string& why) { throw std::runtime_error(kernel + ": " + why); };
  const uint64_t threads = uint64_t(shape.block.x) * shape.block.y * shape.block.z,
                 blocks = uint64_t(shape.grid.x) * shape.grid.y * shape.grid.z;
  if (threads == 0 || threads > MostThreads || shape.block.z > 64)
    refuse("invalid configuration: " + std::to_string(threads) + " threads in a block");
  if (threads % Lanes) refuse(std::to_string(threads) + " threads in a block are not whole warps");
  if (blocks == 0 || shape.grid.x > 0x7FFFFFFF || shape.grid.y > 65535 || shape.grid.z > 65535)
    refuse("invalid configuration: a grid of " + std::to_string(shape.grid.x) + " x " + std::to_string(shape.grid.y) +
           " x " + std::to_string(shape.grid.z));
  if (shape.shared_bytes > size_t(shared_memory_limit()))
    refuse("invalid argument: " + std::to_string(shape.shared_bytes) + " bytes of shared memory");

  Launch launch{shape, body, arguments, granted(), int(threads)};
  if (blocks > 1)
    for (Extent& extent : launch.extents)
      if (extent.writable) {
        auto* accesses = static_cast<Accesses*>(
            std::calloc(extent.bytes / 2 + 2, sizeof(Accesses)));  // untouched pages take no memory
        if (!accesses) throw std::bad_alloc();
        extent.accesses = {accesses, [](Accesses* at) { std::free(at); }};
      }
  // A buffer that may be read and written is found by its writable grant, which records the blocks.
  std::stable_partition(launch.extents.begin(), launch.extents.end(),
                        [](const Extent& extent) { return extent.writable; });
  launch.extents.push_back({uintptr_t(arguments), argument_bytes, false, "the kernel's arguments"});
  static const std::vector<Extent> image = module_image();
  launch.extents.insert(launch.extents.end(), image.begin(), image.end());

  std::atomic<uint64_t> next = 0;
  std::mutex mutex;
  uint64_t failed = ~uint64_t(0);
  std::string error;
  const auto work = [&] {
    auto machine = take_machine();
    machine->prepare(launch);
    for (uint64_t i; (i = next++) < blocks;) {
      machine->run(i);
      if (machine->block.error.empty()) continue;
      next = blocks;  // stops the other OS threads
      std::lock_guard lock(mutex);
      if (i < failed) {
        failed = i;
        error = machine->block.error + source_of(machine->block.place);
      }
      machine->block.error.clear();
    }
    machine->block.results.clear();
    give_back(std::move(machine));
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < std::min<uint64_t>(os_threads(), blocks); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (!error.empty()) throw std::runtime_error(kernel + ", " + error);
}

}  // namespace fastlm::emulation
