// The module: the functions that the other files of this folder bind, the architectures that it is compiled for, and
// the CUDA versions of the runtime and the driver.
#include "operands.h"

namespace fastlm::bindings {

struct no_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
};

static int64_t runtime_version(const no_arguments&) { return cuda::runtime_version(); }
FASTLM_BINDING(runtime_version)

static int64_t driver_version(const no_arguments&) { return cuda::driver_version(); }
FASTLM_BINDING(driver_version)

}  // namespace fastlm::bindings

#define FASTLM_INIT_OF(module) PyInit_##module
#define FASTLM_INIT(macro) FASTLM_INIT_OF(macro)

PyMODINIT_FUNC FASTLM_INIT(FASTLM_MODULE)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, FASTLM_TEXT(FASTLM_MODULE)};
  PyObject* module = PyModule_Create(&definition);
  for (fastlm::binding* each = fastlm::binding::first; module && each; each = each->next)
    if (PyModule_AddFunctions(module, each->definition) < 0) Py_CLEAR(module);
  // "80,90,100,120": there is code for each of them, and PTX of the first
  if (module && PyModule_AddStringConstant(module, "archs", FASTLM_CUDA_ARCHS) < 0) Py_CLEAR(module);
  return module;
}
