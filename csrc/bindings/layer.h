// What the bindings of compiled layers share: lists of layers as arguments, and their projections.
#pragma once
#include "arguments.h"
#include "dispatch.h"
#include "storage.h"
#include "weights.h"
#include "../cpu/layer.h"

namespace fastlm::bindings {

inline void check_list(PyObject* list, const char* name) {
  if (!PyList_Check(list)) throw type_error(std::string(name) + ": expected a list, got " + Py_TYPE(list)->tp_name);
}

// An entry of a tuple that must have so many.
inline argument entry(PyObject* tuple, Py_ssize_t i, Py_ssize_t size, const char* list, const char* name) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != size)
    throw type_error(std::string(list) + ": expected tuples of " + std::to_string(size) + ", got " + text_of(tuple));
  return {PyTuple_GET_ITEM(tuple, i), name};
}

// Code that shards or resizes weights between two calls may leave a storage too short for its tensors.
inline void check_storages(PyObject* tuple, PyObject* names) {
  PyTypeObject* const type = reinterpret_cast<PyTypeObject*>(torch_api::get().tensor);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i)
    if (PyObject* const value = PyTuple_GET_ITEM(tuple, i); PyObject_TypeCheck(value, type))
      check_storage_of({value, PyUnicode_AsUTF8(PyTuple_GET_ITEM(names, i))});
}

// The argument `layers`: tuples with the fields of a Layer, whose names are the argument `names`. There must be at
// least one, and `count` of them unless that is -1.
template <class Layer> std::vector<Layer> layers_from(PyObject* names, PyObject* list, Py_ssize_t count,
                                                      const std::string& expected) {
  check_list(list, "layers");
  if (!PyTuple_Check(names)) throw type_error("names: expected a tuple");
  const Py_ssize_t size = PyList_GET_SIZE(list);
  if (size == 0 || (count >= 0 && size != count)) throw_argument_error("layers", expected, std::to_string(size));
  std::vector<Layer> found;
  found.reserve(size_t(size));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    PyObject* const fields = PyList_GET_ITEM(list, i);
    entry(fields, 0, PyTuple_GET_SIZE(names), "layers", "");
    Py_INCREF(fields);
    const reference owned(fields);  // Python code that runs while tensors are read may change the list
    found.emplace_back(keyword_values{"a layer", &PyTuple_GET_ITEM(fields, 0), 0, names});
    found.back().check_all_taken();
    check_storages(fields, names);
  }
  if (Py_ssize_t(found.size()) != size) throw_argument_error("layers", expected, std::to_string(found.size()));
  return found;
}

template <class T> layer_projection<T> projection_from(const tensor& weight, const tensor& bias, bool conv1d,
                                                       int64_t inputs, int64_t outputs) {
  return {weight_layout(conv1d).matrix<const T>(weight, inputs, outputs), bias.contiguous_as<const T>(outputs),
          outputs};
}

// Of an up projection, or of a first one.
inline int64_t outputs_of(const tensor& weight, bool conv1d) {
  weight.check_rank(2);
  return weight_layout(conv1d).outputs(weight);
}

// The dtypes that the operators take: the weight in that of the call or float32, the bias in the weight's.
template <class T> void check_norm(const tensor& weight, const tensor& bias = {}) {
  if (weight.given() && weight.type != dtype::float32) weight.as<const T>();
  if (bias.given() && bias.type != weight.type)
    throw_argument_error(bias.name, name_of(weight.type) + ", as the weight", name_of(bias.type));
}

inline void check_key_and_value(const tensor& key, const tensor& value) {
  if (key.given() != value.given()) throw_argument_error("value", "a tensor if key is one, else None", "the other");
}

}  // namespace fastlm::bindings
