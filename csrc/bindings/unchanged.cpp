// unchanged(dicts, keys, values, empty): whether dicts[i] has values[i] itself at keys[i], or nothing where that is
// None, and whether all dicts of `empty` are empty. Tells whether modules still are as they were when their layers were
// described. It is compiled, because a model has thousands of such entries and they are compared in every step.
#include <algorithm>
#include "arguments.h"

namespace fastlm::bindings {

// How many entries ahead memory is prefetched. When a model's weights went through the caches, it is in none of them.
constexpr Py_ssize_t Ahead = 16;

static void prefetch_keys(PyObject* dict) {
  if (!PyDict_Check(dict)) return;
  const char* const keys = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  for (int i = 0; i < 3; ++i) __builtin_prefetch(keys + 64 * i);
}

static PyObject* unchanged(PyObject*, PyObject* const* values, Py_ssize_t count, PyObject*) {
  return translating_exceptions([&]() -> PyObject* {
    const bool tuples =
        count == 4 && std::all_of(values, values + 4, [](PyObject* each) { return PyTuple_Check(each); });
    if (!tuples || PyTuple_GET_SIZE(values[0]) != PyTuple_GET_SIZE(values[1]) ||
        PyTuple_GET_SIZE(values[0]) != PyTuple_GET_SIZE(values[2]))
      throw type_error("unchanged() takes tuples of dicts, as many keys and values, and of dicts");
    auto dict_of = [&](int list, Py_ssize_t i) {
      PyObject* const dict = PyTuple_GET_ITEM(values[list], i);
      if (!PyDict_Check(dict))
        throw type_error(std::string("unchanged(): expected a dict, got ") + Py_TYPE(dict)->tp_name);
      return dict;
    };
    const Py_ssize_t entries = PyTuple_GET_SIZE(values[0]), empty = PyTuple_GET_SIZE(values[3]);
    for (Py_ssize_t i = 0; i < empty; ++i) {
      if (i + Ahead < empty) __builtin_prefetch(PyTuple_GET_ITEM(values[3], i + Ahead));
      if (PyDict_GET_SIZE(dict_of(3, i))) Py_RETURN_FALSE;
    }
    for (Py_ssize_t i = 0; i < entries; ++i) {
      if (i + 2 * Ahead < entries) __builtin_prefetch(PyTuple_GET_ITEM(values[0], i + 2 * Ahead));
      if (i + Ahead < entries) prefetch_keys(PyTuple_GET_ITEM(values[0], i + Ahead));
      PyObject* const found = PyDict_GetItemWithError(dict_of(0, i), PyTuple_GET_ITEM(values[1], i));
      if (!found && PyErr_Occurred()) throw python_error();
      if ((found ? found : Py_None) != PyTuple_GET_ITEM(values[2], i)) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
  });
}
static binding unchanged_binding("unchanged", unchanged);

}  // namespace fastlm::bindings
