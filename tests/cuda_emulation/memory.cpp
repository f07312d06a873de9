// Checks every load and store of the kernels. In shared memory an access must be in bounds, must not read unwritten
// memory, and must not race with another thread. In global memory it must be in a tensor of the launch and must not
// race with another block.
//
// The time of a block advances with each synchronisation. A warp records up to which time the accesses of each other
// warp happen before its own; between the threads of a warp, __syncwarp and barriers order accesses. For each word of
// shared memory the last write and the reads since are recorded, and for each byte if a word is accessed in parts.
#include "fibers.h"
#include <sys/mman.h>
#include <cstdlib>
#include <stdexcept>

namespace fastlm::emulation {

static constexpr unsigned char GuardByte = 0xA5;

void resize_shared(Block& block, size_t bytes) {
  if (!block.shared) {
    void* memory =
        mmap(nullptr, shared_memory_limit() + 2 * Guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the shared memory of a block");
    block.shared = static_cast<unsigned char*>(memory) + Guard;
    std::memset(memory, GuardByte, Guard);
  }
  block.shared_bytes = bytes;
  std::memset(block.shared + bytes, GuardByte, Guard);
  const size_t words = (bytes + 3) / 4;
  if (block.shared_storage.size() < words * 5) block.shared_storage.resize(words * 5);
  block.shared_cells = {block.shared_storage.data(), block.shared_storage.data() + words};
}

void forget_shared(Block& block) {
  if (block.now > 0xF0000000u || block.now == 0) {
    std::fill(block.shared_storage.begin(), block.shared_storage.end(), Cell{});
    block.now = 1;
  }
  block.began = ++block.now;
}

void follow_results(Block& block) {
  block.results.clear();
  for (const Extent& extent : block.launch->extents) {
    if (!extent.writable) continue;
    const size_t words = extent.bytes / 4 + 2;
    std::unique_ptr<Cell[], void (*)(void*)> storage(static_cast<Cell*>(std::calloc(words * 5, sizeof(Cell))),
                                                     std::free);  // untouched pages take no memory
    if (!storage) throw std::bad_alloc();
    const Cells cells{storage.get(), storage.get() + words};
    block.results.push_back({cells, std::move(storage)});
  }
}

bool guards_intact(const Block& block) {
  constexpr size_t looked_at = 128;
  for (size_t i = 0; i < looked_at; ++i)
    if (block.shared[-1 - ptrdiff_t(i)] != GuardByte || block.shared[block.shared_bytes + i] != GuardByte) return false;
  return true;
}

void synchronise(Block& block, uint32_t warps) {
  const uint32_t now = ++block.now;
  if (std::popcount(warps) == block.warp_count) {
    for (int w = 0; w < block.warp_count; ++w) {
      std::fill_n(block.warps[w].seen, block.warp_count, now);
      block.warps[w].least_seen = now;
    }
    return;
  }
  uint32_t seen[MostWarps] = {};
  for (uint32_t left = warps; left; left &= left - 1) {
    const int w = std::countr_zero(left);
    for (int i = 0; i < block.warp_count; ++i) seen[i] = std::max(seen[i], block.warps[w].seen[i]);
  }
  uint32_t least = now;
  for (int i = 0; i < block.warp_count; ++i) {
    if (warps >> i & 1) seen[i] = now;
    least = std::min(least, seen[i]);
  }
  for (uint32_t left = warps; left; left &= left - 1) {
    Warp& warp = block.warps[std::countr_zero(left)];
    std::copy_n(seen, block.warp_count, warp.seen);
    warp.least_seen = least;
  }
}

namespace {

enum class Way { read, write, begin_copy, land_copy };
// ldmatrix reads for the whole warp, so even the thread that gave the address needs a __syncwarp after its writes.
enum class Where { shared, shared_for_warp, global };

[[noreturn]] void race(Fiber& thread, Where where, uint32_t offset, const char* mine, int other, const char* theirs,
                       void* place) {
  const std::string whose = other < 0 ? "several other threads" : name_of(*thread.block, other);
  fail(thread,
       std::string(where == Where::global ? "race in global memory: it " : "race in shared memory: it ") + mine +
           " byte " + std::to_string(offset) + (where == Where::global ? " of a result" : "") + ", which " + whose +
           " " + theirs + " with no barrier in between",
       place);
}

// Whether the access of thread `other` at `time` happens before the accesses of this thread now.
[[gnu::always_inline]] inline bool ordered(const Fiber& thread, int other, uint32_t time) {
  return other == thread.number || time < thread.warp->seen[other / Lanes];
}

template <Way way, Where where> [[gnu::always_inline]] inline void check(Cell& cell, Fiber& thread, uint32_t offset,
                                                                         void* place) {
  constexpr bool for_warp = where == Where::shared_for_warp;
  Block& block = *thread.block;
  const bool has_write = cell.written >= block.began;
  if constexpr (way == Way::land_copy) {
    cell.writer &= uint16_t(~Cell::Pending);
    cell.written = block.now;
    return;
  }
  if (!has_write) {
    if constexpr (way == Way::read && where != Where::global)
      fail(thread, "reads byte " + std::to_string(offset) + " of shared memory, which nothing has written", place);
  } else {
    const int writer = cell.writer & Cell::Thread;
    if (cell.writer & Cell::Pending) [[unlikely]]
      fail(thread,
           std::string(way == Way::read ? "reads" : "writes") + " byte " + std::to_string(offset) +
               " of shared memory, which cp.async of " + name_of(block, writer) +
               " is still copying to: it has not waited",
           place);
    if (for_warp ? cell.written >= thread.warp->seen[writer / Lanes] : !ordered(thread, writer, cell.written))
        [[unlikely]]
      race(thread, where, offset,
           for_warp           ? "reads for its warp"
           : way == Way::read ? "reads"
                              : "writes",
           writer, "wrote", place);
  }
  const uint32_t my_bit = 1u << thread.warp->number;
  const bool has_reads = cell.readers && cell.read >= block.began;
  if constexpr (way == Way::read) {
    const uint16_t me = for_warp ? Cell::Several : uint16_t(thread.number);
    if (!has_reads || cell.read < thread.warp->least_seen || (cell.reader == me && !for_warp)) {
      cell.readers = my_bit;
      cell.reader = me;
    } else {
      cell.readers |= my_bit;
      if (cell.reader != me) cell.reader = Cell::Several;
    }
    cell.read = block.now;
  } else {
    if (has_reads && cell.reader != thread.number)
      for (uint32_t left = cell.readers; left; left &= left - 1)
        if (cell.read >= thread.warp->seen[std::countr_zero(left)]) [[unlikely]]
          race(thread, where, offset, "writes", cell.reader == Cell::Several ? -1 : cell.reader, "read", place);
    cell.readers = 0;
    cell.written = block.now;
    cell.writer = uint16_t(thread.number) | (way == Way::begin_copy ? Cell::Pending : 0);
  }
}

bool same(const Cell& a, const Cell& b) { return std::memcmp(&a, &b, sizeof(Cell)) == 0; }

template <Way way, Where where> [[gnu::noinline]] void check_parts(Fiber& thread, Cells cells, uint32_t word,
                                                                   uint32_t first, uint32_t end, void* place) {
  Block& block = *thread.block;
  Cell& cell = cells.of_words[word];
  Cell* bytes = &cells.of_bytes[word * 4];
  if (!(cell.written >= block.began && cell.writer & Cell::Split)) {
    std::fill_n(bytes, 4, cell);
    cell.written = block.now;
    cell.writer = Cell::Split;
  }
  for (uint32_t i = first; i < end; ++i) check<way, where>(bytes[i], thread, word * 4 + i, place);
  if (same(bytes[0], bytes[1]) && same(bytes[0], bytes[2]) && same(bytes[0], bytes[3])) cell = bytes[0];
}

template <Way way, Where where> [[gnu::always_inline]] inline void check_words(Fiber& thread, Cells cells,
                                                                               uint32_t offset, uint32_t bytes,
                                                                               void* place) {
  Block& block = *thread.block;
  const uint32_t end = offset + bytes;
  for (uint32_t word = offset / 4; word * 4 < end; ++word) {
    Cell& cell = cells.of_words[word];
    const uint32_t first = offset > word * 4 ? offset - word * 4 : 0, last = std::min(end - word * 4, 4u);
    if (last - first < 4 || (cell.written >= block.began && cell.writer & Cell::Split)) [[unlikely]]
      check_parts<way, where>(thread, cells, word, first, last, place);
    else check<way, where>(cell, thread, word * 4, place);
  }
}
template <Way way, Where where = Where::shared>
[[gnu::always_inline]] inline void check_shared(Fiber& thread, uint32_t offset, uint32_t bytes, void* place) {
  check_words<way, where>(thread, thread.block->shared_cells, offset, bytes, place);
}

std::string hex(uintptr_t address) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", size_t(address));
  return text;
}

[[gnu::noinline]] void outside_shared(Fiber& thread, uintptr_t address, size_t bytes, bool write, void* place) {
  const Block& block = *thread.block;
  fail(thread,
       std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at " +
           std::to_string(ptrdiff_t(address - uintptr_t(block.shared))) + " of the " +
           std::to_string(block.shared_bytes) + " bytes of shared memory",
       place);
}

[[gnu::noinline]] void outside_global(Fiber& thread, uintptr_t address, size_t bytes, bool write, void* place) {
  std::string what = std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at " + hex(address);
  const Extent* nearest = nullptr;
  ptrdiff_t distance = 0;
  for (const Extent& extent : thread.block->launch->extents) {
    if (address - extent.begin < extent.bytes && address - extent.begin + bytes <= extent.bytes)
      fail(thread, what + ", in " + extent.what + ", which it may only read", place);
    const ptrdiff_t off = address < extent.begin ? ptrdiff_t(address - extent.begin)
                                                 : ptrdiff_t(address + bytes - extent.begin - extent.bytes);
    if (!nearest || std::abs(off) < std::abs(distance)) nearest = &extent, distance = off;
  }
  if (nearest && std::abs(distance) < 1 << 20)
    what += ", " + std::to_string(std::abs(distance)) +
            (distance < 0 ? " bytes before the beginning of " : " bytes past the end of ") + nearest->what + " of " +
            std::to_string(nearest->bytes) + " bytes at " + hex(nearest->begin);
  else what += ", which lies in no argument of the launch";
  fail(thread, what, place);
}

[[gnu::always_inline]] inline bool lies_in(const Extent& extent, uintptr_t address, size_t bytes, bool write) {
  return address - extent.begin + bytes <= extent.bytes && address >= extent.begin && (extent.writable || !write);
}

[[gnu::noinline]] void race_of_blocks(Fiber& thread, const Extent& extent, uintptr_t address, uint32_t other,
                                      bool write, bool other_writes, void* place) {
  const dim3 grid = thread.block->launch->shape.grid;
  const uint32_t block = other - 1;
  const packed3 index = {block % grid.x | uint64_t(block / grid.x % grid.y) << 32, block / grid.x / grid.y};
  fail(thread,
       "race in global memory: it " + std::string(write ? "writes" : "reads") + " byte " +
           std::to_string(address - extent.begin) + " of " + extent.what + " of " + std::to_string(extent.bytes) +
           " bytes, which " + (other == Accesses::Several ? "several blocks " : "block " + index_name(index) + " ") +
           (other_writes ? "write" : "read") + " in the same launch",
       place);
}

// The blocks of a launch are not ordered: no block may access what another writes, whichever of them runs first here.
// Each therefore records its access before it looks for the other's. The unit is two bytes, so single bytes are not
// checked.
[[gnu::always_inline]] inline void check_writer(Fiber& thread, const Extent& extent, uintptr_t address, size_t bytes,
                                                bool write, void* place) {
  if (!extent.writable) return;
  // Within the block, as in shared memory. The writable grants come first in a launch.
  const Cells cells = thread.block->results[&extent - thread.block->launch->extents.data()].cells;
  const uint32_t offset = uint32_t(address - (extent.begin & ~uintptr_t(3)));
  if (write) check_words<Way::write, Where::global>(thread, cells, offset, uint32_t(bytes), place);
  else check_words<Way::read, Where::global>(thread, cells, offset, uint32_t(bytes), place);
  if (!extent.accesses || bytes < 2) return;
  const uint32_t me = thread.block->number + 1;
  const uintptr_t first = extent.begin & ~uintptr_t(1);
  for (size_t i = (address - first) / 2, end = (address - first + bytes) / 2; i < end; ++i) {
    auto& [writer, reader] = extent.accesses[i];
    uint32_t written = writer.load(), read = reader.load();
    if (write && written != me) {
      written = writer.exchange(me);
      read = reader.load();
    } else if (!write && written != me && read != me && read != Accesses::Several) {
      while (read != me && read != Accesses::Several &&
             !reader.compare_exchange_weak(read, read ? Accesses::Several : me)) {}
      written = writer.load();
    }
    if (written && written != me) [[unlikely]]
      race_of_blocks(thread, extent, address, written, write, true, place);
    if (write && read && read != me) [[unlikely]]
      race_of_blocks(thread, extent, address, read, write, false, place);
  }
}

[[gnu::always_inline]] inline void check_global(Fiber& thread, uintptr_t address, size_t bytes, bool write,
                                                void* place) {
  Block& block = *thread.block;
  const std::vector<Extent>& extents = block.launch->extents;
  if (lies_in(extents[block.recent], address, bytes, write))
    return check_writer(thread, extents[block.recent], address, bytes, write, place);
  for (size_t i = 0; i < extents.size(); ++i)
    if (lies_in(extents[i], address, bytes, write)) {
      block.recent = i;
      return check_writer(thread, extents[i], address, bytes, write, place);
    }
  outside_global(thread, address, bytes, write, place);
}

template <bool write> [[gnu::always_inline]] inline void check_access(Fiber& thread, uintptr_t address, size_t bytes,
                                                                      void* place) {
  Block& block = *thread.block;
  const uintptr_t offset = address - uintptr_t(block.shared);
  if (offset + Guard < block.shared_bytes + 2 * Guard) {
    if (offset >= block.shared_bytes || offset + bytes > block.shared_bytes) [[unlikely]]
      outside_shared(thread, address, bytes, write, place);
    check_shared<write ? Way::write : Way::read>(thread, uint32_t(offset), uint32_t(bytes), place);
  } else check_global(thread, address, bytes, write, place);
}

[[gnu::noinline]] void misaligned(Fiber& thread, uintptr_t address, size_t bytes, void* place) {
  fail(thread, "misaligned access of " + std::to_string(bytes) + " bytes at " + hex(address), place);
}

template <bool write, bool aligned> [[gnu::always_inline]] inline void access(void* at, size_t bytes, void* place) {
  Fiber* thread = current;
  const uintptr_t address = uintptr_t(at);
  if (!thread || address - thread->stack < StackBytes) return;
  if (aligned && address % bytes) [[unlikely]]
    misaligned(*thread, address, bytes, place);
  check_access<write>(*thread, address, bytes, place);
}

}  // namespace

void misaligned_vector(const void* address, int bytes) {
  if (!current) std::abort();
  misaligned(*current, uintptr_t(address), bytes, __builtin_return_address(0));
  __builtin_unreachable();
}

void read_row(Fiber& thread, const void* shared, void* place) {
  Block& block = *thread.block;
  const uintptr_t address = uintptr_t(shared), offset = address - uintptr_t(block.shared);
  if (address % 16) [[unlikely]]
    misaligned(thread, address, 16, place);
  if (offset >= block.shared_bytes || offset + 16 > block.shared_bytes) [[unlikely]]
    outside_shared(thread, address, 16, false, place);
  check_shared<Way::read, Where::shared_for_warp>(thread, uint32_t(offset), 16, place);
}

void copy_async(void* shared, const void* global, int bytes, bool valid) {
  Fiber& thread = *current;
  Block& block = *thread.block;
  void* const place = __builtin_return_address(0);
  const uintptr_t address = uintptr_t(shared), offset = address - uintptr_t(block.shared);
  if (address % bytes) misaligned(thread, address, bytes, place);
  if (offset >= block.shared_bytes || offset + bytes > block.shared_bytes)
    outside_shared(thread, address, bytes, true, place);
  if (uintptr_t(global) % bytes)
    misaligned(thread, uintptr_t(global), bytes, place);  // also for a copy of 0 bytes, as in CUDA
  Copy& copy = thread.copies.emplace_back(Copy{uint32_t(offset), bytes, thread.groups, {}});
  if (valid) {
    check_global(thread, uintptr_t(global), bytes, false, place);
    std::memcpy(copy.data, global, bytes);
  }
  check_shared<Way::begin_copy>(thread, uint32_t(offset), bytes, place);
}

void copy_async_commit() { ++current->groups; }

void copy_async_wait(int under_way) {
  Fiber& thread = *current;
  Block& block = *thread.block;
  for (; thread.landed < thread.copies.size(); ++thread.landed) {
    const Copy& copy = thread.copies[thread.landed];
    if (int64_t(copy.group) >= int64_t(thread.groups) - under_way) break;
    std::memcpy(block.shared + copy.offset, copy.data, copy.bytes);
    check_shared<Way::land_copy>(thread, copy.offset, copy.bytes, nullptr);
  }
  if (thread.landed == thread.copies.size()) {
    thread.copies.clear();
    thread.landed = 0;
  }
}

static thread_local std::vector<Extent> grants;

std::vector<Extent> granted() { return grants; }

}  // namespace fastlm::emulation

// For tests/cuda_emulation/backend.py: permits the next launches of this OS thread to read, and write if `writable`,
// this memory; and revokes all permissions.
extern "C" __attribute__((visibility("default"))) void fastlm_emulation_allow(const void* begin, size_t bytes,
                                                                              int writable) {
  if (bytes)
    fastlm::emulation::grants.push_back(
        {uintptr_t(begin), bytes, writable != 0, writable ? "a result" : "an argument"});
}
extern "C" __attribute__((visibility("default"))) void fastlm_emulation_forget() { fastlm::emulation::grants.clear(); }

// The functions that the instrumentation calls.
using fastlm::emulation::access;
extern "C" {
#define HOOKS(bytes)                                                                                            \
  void __tsan_read##bytes(void* at) { access<false, true>(at, bytes, __builtin_return_address(0)); }            \
  void __tsan_write##bytes(void* at) { access<true, true>(at, bytes, __builtin_return_address(0)); }            \
  void __tsan_unaligned_read##bytes(void* at) { access<false, false>(at, bytes, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* at) { access<true, false>(at, bytes, __builtin_return_address(0)); } \
  void __tsan_volatile_read##bytes(void* at) { access<false, true>(at, bytes, __builtin_return_address(0)); }   \
  void __tsan_volatile_write##bytes(void* at) { access<true, true>(at, bytes, __builtin_return_address(0)); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#undef HOOKS
void __tsan_read_range(void* at, unsigned long bytes) { access<false, false>(at, bytes, __builtin_return_address(0)); }
void __tsan_write_range(void* at, unsigned long bytes) { access<true, false>(at, bytes, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
