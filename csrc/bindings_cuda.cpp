// Python ↔ launchers of the CUDA kernels, of the real module and of the emulated one. Arguments are addresses and sizes that fastlm/ops has checked; nothing
// here knows torch or CUDA's headers: the host's compiler alone sees this file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <array>
#include <cstdint>
#include <utility>
#include "cuda/device.h"
#include "cuda/dtype.h"

namespace py = pybind11;
using namespace py::literals;
using namespace fastlm::cuda;

using address = uintptr_t;
template <class T = void> static T* at(address a) { return reinterpret_cast<T*>(a); }

using queue = std::pair<int, address>;  // (device, stream)
using strides3 = std::array<int64_t, 3>;
using strides4 = std::array<int64_t, 4>;

// Calls launcher(stream) without the GIL, on the queue's device.
template <class Launcher> static void launch(queue where, Launcher launcher) {
  py::gil_scoped_release nogil;
#ifdef FASTLM_CUDA_EMULATION
  struct Forget {
    ~Forget() { forget(); }
  } after;
#else
  use_device(where.first);
#endif
  launcher(reinterpret_cast<stream_t>(where.second));
}

// layernorm_residual

// gelu_mlp

// linear_cross_entropy

// attention

PYBIND11_MODULE(FASTLM_MODULE, m) {
  py::enum_<DType>(m, "dtype").value("float32", DType::float32).value("bfloat16", DType::bfloat16).value("float16", DType::float16);
#ifdef FASTLM_CUDA_EMULATION
  m.def("allow", [](address begin, size_t bytes, bool writable) { allow(at<>(begin), bytes, writable); }, "begin"_a, "bytes"_a, "writable"_a);
#else
  m.attr("archs") = FASTLM_CUDA_ARCHS;  // "80,90,100,120": of the code inside; PTX of the last
  m.def("runtime_version", &runtime_version);
  m.def("driver_version", &driver_version);
#endif
}
