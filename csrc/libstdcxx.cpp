// What the headers of GCC 11 and later refer to and the libraries of manylinux_2_28 (glibc 2.28, libstdc++ of GCC 8) do
// not have. Each module has its own, hidden, so that a wheel loads where they are older than the compiler's.
#include <exception>
#include <new>

#if defined(__linux__) && defined(__GLIBCXX__)
#define FASTLM_HIDDEN extern "C" __attribute__((visibility("hidden")))

// Read where reference counts are atomic only if there are threads, GLIBC_2.32
FASTLM_HIDDEN char __libc_single_threaded;
char __libc_single_threaded = 0;

// std::__throw_bad_array_new_length(), GLIBCXX_3.4.29
FASTLM_HIDDEN void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// exception_ptr::_M_addref() and _M_release(), CXXABI_1.3.13. No exception that passes through a module's
// exception_ptr, as pybind11's do, is counted or freed: the library's reference to it stays.
FASTLM_HIDDEN void add_reference(std::exception_ptr*) noexcept
    __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void add_reference(std::exception_ptr*) noexcept {}

FASTLM_HIDDEN void release(void** pointer) noexcept __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void release(void** pointer) noexcept { *pointer = nullptr; }
#endif
