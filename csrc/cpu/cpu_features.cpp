// Which modules this CPU and its operating system can run: asked once at import, before a module for a wider
// instruction set is loaded.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include <dlfcn.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

struct Caches {
  int64_t l1d = 0, l2 = 0, l3 = 0;  // bytes; 0 where unknown
};

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero where the CPU does not have the leaf.
Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(uint32_t word, int index) { return (word >> index) & 1; }

// The register files that the operating system saves on a context switch. Without that the instructions of an extension
// fault, although the CPU has it.
uint64_t enabled_state() {
  if (!bit(cpuid(1).ecx, 27)) return 0;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

bool saves(uint64_t state) { return (enabled_state() & state) == state; }
constexpr uint64_t Ymm = 0x6, Zmm = 0xe6, Tiles = 0x60000;

bool has_avx2() {
  uint32_t one = cpuid(1).ecx, seven = cpuid(7).ebx;
  return saves(Ymm) && bit(one, 28) && bit(one, 12) && bit(one, 29) && bit(seven, 5);  // AVX, FMA, F16C, AVX2
}

bool has_avx512() {
  uint32_t seven = cpuid(7).ebx;
  return has_avx2() && saves(Zmm) && bit(seven, 16) && bit(seven, 17) && bit(seven, 28) && bit(seven, 30) &&
         bit(seven, 31);  // F, DQ, CD, BW, VL
}

bool has_avx512_bf16() { return has_avx512() && bit(cpuid(7, 1).eax, 5); }

bool has_amx() {
  uint32_t seven = cpuid(7).edx;
  return saves(Tiles) && bit(seven, 24) && bit(seven, 22);  // AMX-TILE, AMX-BF16
}

// Linux requires a process to ask for the tile registers, 8 kB per thread.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long RequestPermission = 0x1023, TileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, RequestPermission, TileData) == 0;
#else
  return false;
#endif
}

std::vector<std::string> isas() {
  std::vector<std::string> usable;
  if (has_amx() && has_avx512_bf16() && may_use_tiles()) usable.push_back("amx");
  if (has_avx512_bf16()) usable.push_back("avx512_bf16");
  if (has_avx512()) usable.push_back("avx512");
  if (has_avx2()) usable.push_back("avx2");
  usable.push_back("baseline");
  return usable;
}

std::string text(std::initializer_list<uint32_t> words) {
  std::string bytes;
  for (uint32_t word : words) bytes.append(reinterpret_cast<const char*>(&word), 4);
  return bytes.c_str();  // up to the first zero
}

std::string vendor() {
  Registers r = cpuid(0);
  return text({r.ebx, r.edx, r.ecx});
}

std::string brand() {
  std::string name;
  for (uint32_t leaf : {0x80000002u, 0x80000003u, 0x80000004u}) {
    Registers r = cpuid(leaf);
    name += text({r.eax, r.ebx, r.ecx, r.edx});
  }
  size_t begin = name.find_first_not_of(' '), end = name.find_last_not_of(' ');
  return begin == std::string::npos ? "" : name.substr(begin, end - begin + 1);
}

// Family and model as the vendors number them, with the extended fields where they apply.
int family() {
  uint32_t signature = cpuid(1).eax, base = signature >> 8 & 0xf;
  return base == 0xf ? base + (signature >> 20 & 0xff) : base;
}

int model() {
  uint32_t signature = cpuid(1).eax, base = signature >> 8 & 0xf, low = signature >> 4 & 0xf;
  return base == 0x6 || base == 0xf ? (signature >> 12 & 0xf0) | low : low;
}

struct Models {
  int family, first, last;
  const char* name;
};

// Virtual machines often hide the brand, but not family and model. Ranges as in Linux's arch/x86/kernel/cpu/amd.c.
constexpr Models Amd[] = {
    {0x17, 0x00, 0x2f, "zen1"}, {0x17, 0x50, 0x5f, "zen1"}, {0x17, 0x30, 0x4f, "zen2"}, {0x17, 0x60, 0x7f, "zen2"},
    {0x17, 0x90, 0x91, "zen2"}, {0x17, 0xa0, 0xaf, "zen2"}, {0x18, 0x00, 0xff, "zen1"}, {0x19, 0x00, 0x0f, "zen3"},
    {0x19, 0x20, 0x5f, "zen3"}, {0x19, 0x10, 0x1f, "zen4"}, {0x19, 0x60, 0xaf, "zen4"}, {0x1a, 0x00, 0x2f, "zen5"},
    {0x1a, 0x40, 0x4f, "zen5"}, {0x1a, 0x60, 0x7f, "zen5"}, {0x1a, 0x50, 0x5f, "zen6"}, {0x1a, 0x80, 0xaf, "zen6"},
    {0x1a, 0xc0, 0xcf, "zen6"},
};

// As in Linux's arch/x86/include/asm/intel-family.h. Model 0x55 is three generations: see microarchitecture().
constexpr Models Intel[] = {
    {6, 0x2a, 0x2a, "sandybridge"},    {6, 0x2d, 0x2d, "sandybridge"},   {6, 0x3a, 0x3a, "ivybridge"},
    {6, 0x3e, 0x3e, "ivybridge"},      {6, 0x3c, 0x3c, "haswell"},       {6, 0x3f, 0x3f, "haswell"},
    {6, 0x45, 0x46, "haswell"},        {6, 0x3d, 0x3d, "broadwell"},     {6, 0x47, 0x47, "broadwell"},
    {6, 0x4f, 0x4f, "broadwell"},      {6, 0x56, 0x56, "broadwell"},     {6, 0x4e, 0x4e, "skylake"},
    {6, 0x5e, 0x5e, "skylake"},        {6, 0x8e, 0x8e, "skylake"},       {6, 0x9e, 0x9e, "skylake"},
    {6, 0xa5, 0xa6, "skylake"},        {6, 0x7d, 0x7e, "icelake"},       {6, 0x6a, 0x6a, "icelake-server"},
    {6, 0x6c, 0x6c, "icelake-server"}, {6, 0x8c, 0x8d, "tigerlake"},     {6, 0xa7, 0xa7, "rocketlake"},
    {6, 0x97, 0x97, "alderlake"},      {6, 0x9a, 0x9a, "alderlake"},     {6, 0xbe, 0xbe, "gracemont"},
    {6, 0xb7, 0xb7, "raptorlake"},     {6, 0xba, 0xba, "raptorlake"},    {6, 0xbf, 0xbf, "raptorlake"},
    {6, 0xaa, 0xaa, "meteorlake"},     {6, 0xac, 0xac, "meteorlake"},    {6, 0xb5, 0xb5, "arrowlake"},
    {6, 0xc5, 0xc6, "arrowlake"},      {6, 0xbd, 0xbd, "lunarlake"},     {6, 0x8f, 0x8f, "sapphirerapids"},
    {6, 0xcf, 0xcf, "emeraldrapids"},  {6, 0xad, 0xae, "graniterapids"}, {6, 0xaf, 0xaf, "sierraforest"},
};

std::string microarchitecture() {
  int f = family(), m = model();
  auto find = [&](const auto& table) -> std::string {
    for (const Models& range : table)
      if (f == range.family && m >= range.first && m <= range.last) return range.name;
    return "";
  };
  if (vendor() == "AuthenticAMD" || vendor() == "HygonGenuine") return find(Amd);
  if (vendor() != "GenuineIntel") return "";
  if (f == 6 && m == 0x55) {  // distinguished by instruction sets
    if (bit(cpuid(7, 1).eax, 5)) return "cooperlake";
    return bit(cpuid(7).ecx, 11) ? "cascadelake" : "skylake-avx512";
  }
  return find(Intel);
}

Caches caches() {
  Caches sizes;
  uint32_t leaf = vendor() == "GenuineIntel" ? 4 : 0x8000001d;  // both have the same layout
  for (uint32_t index = 0; index < 16; ++index) {
    Registers r = cpuid(leaf, index);
    uint32_t type = r.eax & 0x1f, level = r.eax >> 5 & 7;
    if (type == 0) break;
    if (type == 2) continue;  // instructions
    int64_t bytes =
        int64_t((r.ebx >> 22) + 1) * ((r.ebx >> 12 & 0x3ff) + 1) * ((r.ebx & 0xfff) + 1) * (int64_t(r.ecx) + 1);
    if (level == 1) sizes.l1d = bytes;
    if (level == 2) sizes.l2 = bytes;
    if (level == 3) sizes.l3 = bytes;
  }
  return sizes;
}

#else  // not x86: only the generic module

std::vector<std::string> isas() { return {"baseline"}; }
bool has_amx() { return false; }
std::string vendor() { return ""; }
int family() { return 0; }
int model() { return 0; }
std::string microarchitecture() { return ""; }

#if defined(__APPLE__)
int64_t system_size(const char* name) {
  int64_t value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : 0;
}
std::string brand() {
  char name[128] = "";
  size_t size = sizeof name;
  return sysctlbyname("machdep.cpu.brand_string", name, &size, nullptr, 0) == 0 ? name : "";
}
Caches caches() {  // of the performance cores
  return {system_size("hw.perflevel0.l1dcachesize"), system_size("hw.perflevel0.l2cachesize"),
          system_size("hw.l3cachesize")};
}
#else
std::string brand() { return ""; }
Caches caches() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  auto size = [](int name) { return std::max<int64_t>(0, sysconf(name)); };
  return {size(_SC_LEVEL1_DCACHE_SIZE), size(_SC_LEVEL2_CACHE_SIZE), size(_SC_LEVEL3_CACHE_SIZE)};
#else
  return {};
#endif
}
#endif
#endif

#if defined(__linux__)
extern "C"
    [[gnu::weak]] void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);  // null where no library has it
#endif

// The modules are linked to no OpenMP runtime and use the one that torch loads, so that there is one thread pool. Only
// where torch brings none is the compiler's own loaded: by Python, since dlopen itself would require glibc 2.34.
void provide_openmp() {
#if defined(__linux__)
  if (GOMP_parallel) return;
  try {
    pybind11::module_::import("ctypes").attr("CDLL")("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL);
  } catch (const pybind11::error_already_set&) {  // there is none: loading the modules says so
  }
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu_features, m) {
  provide_openmp();
  m.def("isas", [] {
    pybind11::list names;
    for (const std::string& name : isas()) names.append(name);
    return names;
  });
  m.def("has_amx", has_amx);
  m.def("brand", brand);
  m.def("vendor", vendor);
  m.def("family", family);
  m.def("model", model);
  m.def("microarchitecture", microarchitecture);
  m.def("caches", [] {
    Caches sizes = caches();
    return std::tuple(sizes.l1d, sizes.l2, sizes.l3);
  });
}
