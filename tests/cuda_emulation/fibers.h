// The internals of the emulator: blocks, warps and their threads, each a fiber with its own stack.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>
#include "cuda_emulation.h"

namespace fastlm::emulation {

constexpr int Lanes = 32, MostThreads = 1024, MostWarps = MostThreads / Lanes, Barriers = 16;
constexpr size_t StackBytes = 128 << 10;

struct Warp;
struct Block;

// A pending cp.async, whose bytes reach shared memory when the thread waits for it.
struct Copy {
  uint32_t offset;
  int32_t bytes;
  uint32_t group;
  alignas(16) unsigned char data[16];
};

struct Fiber {
  void* stack_pointer;  // while another fiber runs
  uintptr_t stack;      // the lowest address of its stack
  Warp* warp;
  Block* block;
  int number, lane;  // in the block, in the warp
  bool exited;
  packed3 index;
  std::vector<Copy> copies;  // in the order of their start
  size_t landed;             // number of completed copies
  uint32_t groups;           // number of committed groups
};

// The rendezvous points of a warp.
enum class Meeting : uint8_t { sync_warp, barrier, shuffle, vote, ldmatrix, mma };

struct Warp {
  Fiber* lanes;
  Block* block;
  int number;
  int arrived, exited;
  Meeting meeting;
  int line;
  int barrier, barrier_threads;  // at a barrier
  bool blocked, ended;
  Fiber* next;               // the first to continue when the warp runs again
  uint32_t seen[MostWarps];  // accesses of warp w before time seen[w] happen before this warp's accesses now
  uint32_t least_seen;       // the minimum of seen
  int parity;                // double-buffers exchanges: a lane may start the next one before all have read this one
  uint64_t values[2][Lanes];
  uint32_t votes[2];
  const void* addresses[Lanes];
  words matrices[Lanes];
  alignas(32) uint32_t a[4][Lanes];
  alignas(32) uint32_t b[2][Lanes];
  alignas(32) float c[16][8];
  alignas(32) float product[16][8];
};

struct Barrier {
  int threads, warps, line;  // expected, arrived, where
  uint32_t members;          // one bit per waiting warp
};

// The blocks that accessed two bytes: 1 + the number of one, Several, or 0.
struct Accesses {
  std::atomic<uint32_t> writer, reader;
  static constexpr uint32_t Several = ~0u;
};

struct Extent {
  uintptr_t begin;
  size_t bytes;
  bool writable;
  const char* what;
  std::shared_ptr<Accesses[]> accesses{};  // per two bytes, if writable
};

// One launch, shared by the OS threads that run its blocks.
struct Launch {
  launch_shape shape;
  void (*body)(const void*);
  const void* arguments;
  std::vector<Extent> extents;
  int threads;  // of a block
};

// The last accesses to a word of shared memory, at times of the block. A time before the start of the block means
// never.
struct Cell {
  uint32_t written, read;
  uint32_t readers;  // one bit per warp: reads since the last write that no barrier has ordered
  uint16_t writer;   // a thread number with flags
  uint16_t reader;   // a thread number, or Several
  static constexpr uint16_t Thread = 0x3FF, Pending = 0x8000, Split = 0x4000, Several = 0xFFFF;
};

struct Cells {
  Cell *of_words, *of_bytes;  // of_bytes for words that are Split
};
struct Result {
  Cells cells;
  std::unique_ptr<Cell[], void (*)(void*)> storage;
};

// Runs blocks one after another: the stacks, and shared memory with its recorded accesses.
struct Block {
  Fiber* fibers;
  Warp* warps;
  int threads, warp_count, ended_warps;
  const Launch* launch;
  packed3 index, size, grid;
  uint32_t number;  // in the grid
  void* host_stack_pointer;
  Barrier barriers[Barriers];
  unsigned char* shared;
  size_t shared_bytes;
  Cells shared_cells;
  std::vector<Cell> shared_storage;
  std::vector<Result> results;  // of the writable grants of the launch, which come first
  uint32_t now, began;
  size_t recent;  // the extent of the last access
  std::string error;
  void* place;  // code address
};

extern thread_local constinit Fiber* current __attribute__((tls_model("initial-exec")));

// Ends the launch with a report of the kernel, block and thread.
[[noreturn]] void fail(const Fiber& thread, const std::string& what, void* place = nullptr);
std::string name_of(const Block& block, int thread);
std::string index_name(packed3 index);

// memory.cpp
constexpr size_t Guard = 4096;  // bytes on either side of shared memory
void resize_shared(Block& block, size_t bytes);
void follow_results(Block& block);
void forget_shared(Block& block);  // a new block, whose shared memory is unwritten
bool guards_intact(const Block& block);
void synchronise(Block& block, uint32_t warps);  // orders all earlier accesses of these warps before later ones
void read_row(Fiber& thread, const void* shared, void* place);  // 16 bytes, for ldmatrix
std::vector<Extent> granted();                                  // to launches of this OS thread

// Switches from fiber `from` to `to`. It is inlined at each rendezvous, so that the processor predicts the jump.
[[gnu::always_inline]] inline void switch_fibers(void** from, void* to) {
#if defined(__x86_64__)
  asm volatile(
      "lea -128(%%rsp), %%rsp\n"  // the red zone may be in use
      "push %%rbp\n"
      "lea 1f(%%rip), %%rax\n"
      "push %%rax\n"
      "mov %%rsp, (%%rdi)\n"
      "mov %%rsi, %%rsp\n"
      "pop %%rax\n"
      "jmp *%%rax\n"
      "1: pop %%rbp\n"
      "lea 128(%%rsp), %%rsp\n"
      : "+D"(from), "+S"(to)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2",
        "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
        "memory", "cc");
#elif defined(__aarch64__)
  register void** x0 asm("x0") = from;
  register void* x1 asm("x1") = to;
  asm volatile(
      "adr x2, 1f\n"
      "stp x29, x2, [sp, #-16]!\n"
      "mov x2, sp\n"
      "str x2, [x0]\n"
      "mov sp, x1\n"
      "ldp x29, x2, [sp], #16\n"
      "br x2\n"
      "1:\n"
      : "+r"(x0), "+r"(x1)
      :
      : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17", "x19",
        "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30", "v0", "v1", "v2", "v3", "v4", "v5", "v6",
        "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22",
        "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31", "memory", "cc");
#else
#error "the emulator switches between fibers on x86-64 and AArch64"
#endif
}

[[gnu::always_inline]] inline void go_on_with(Fiber* self, Fiber* next) {
  current = next;
  switch_fibers(&self->stack_pointer, next->stack_pointer);
}

[[noreturn]] void diverged(Fiber& self, Meeting meeting, int line);

// The rendezvous of all lanes of a warp. The last lane to arrive completes it and continues, and the others follow in
// lane order. A lane that has ended, or waits elsewhere, is an error.
template <class Complete> [[gnu::always_inline]] inline void meet(Fiber* self, Meeting meeting, int line,
                                                                  Complete complete) {
  Warp* warp = self->warp;
  if (warp->arrived == 0) {
    warp->meeting = meeting;
    warp->line = line;
    if (warp->exited) [[unlikely]]
      diverged(*self, meeting, line);
  } else if (warp->meeting != meeting || warp->line != line) [[unlikely]]
    diverged(*self, meeting, line);
  if (++warp->arrived < Lanes) go_on_with(self, warp->lanes + (self->lane + 1) % Lanes);
  else {
    warp->arrived = 0;
    complete(*warp);
  }
}

}  // namespace fastlm::emulation
