// The module of one instruction set: the functions that the other files of this folder bind, and a microbenchmark.
#include "arguments.h"
#include "dispatch.h"
#include "../cpu/peak.h"

namespace fastlm::bindings {

struct multiply_adds_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  fastlm::dtype dtype = keyword("dtype");
  int64_t rounds = keyword("rounds");
  int threads = keyword("threads");
};

static double multiply_adds(const multiply_adds_arguments& a) {
  return dispatch(a.dtype, "dtype",
                  [&]<class T>() { return fastlm::multiply_adds<arithmetic_for<T>>(a.rounds, a.threads); });
}
FASTLM_BINDING(multiply_adds)

}  // namespace fastlm::bindings

#define FASTLM_INIT_OF(module) PyInit_##module
#define FASTLM_INIT(macro) FASTLM_INIT_OF(macro)

PyMODINIT_FUNC FASTLM_INIT(FASTLM_MODULE)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, FASTLM_TEXT(FASTLM_MODULE)};
  PyObject* module = PyModule_Create(&definition);
  for (fastlm::binding* each = fastlm::binding::first; module && each; each = each->next)
    if (PyModule_AddFunctions(module, each->definition) < 0) Py_CLEAR(module);
  return module;
}
