// Python functions with named arguments. A function's arguments are the fields of one struct, each filled by keyword:
//
//   struct linear_forward_arguments : keyword_arguments {
//     using keyword_arguments::keyword_arguments;
//     tensor x = keyword("x"), bias = keyword_or_none("bias");
//     int threads = keyword("threads");
//   };
//   static void linear_forward(const linear_forward_arguments& a) { … }
//   FASTLM_BINDING(linear_forward)
//
// FASTLM_BINDING adds the function to the module under its own name, so a new operator is a new file. The function runs
// without the GIL and must not touch Python objects. Callers give keywords in the order of the fields: each is then
// found at once; any other order costs a search.
#pragma once
#include <Python.h>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#include "tensor.h"
#include "../activation.h"

namespace fastlm {

// The value of one argument. It converts to the type of the field that it initialises.
struct argument {
  PyObject* value;
  const char* name;

  operator fastlm::tensor() const { return {value, name}; }
  operator fastlm::dtype() const { return dtype_from(value, name); }
  operator bool() const {
    if (value != Py_True && value != Py_False) wrong_type("a bool");
    return value == Py_True;
  }
  operator int64_t() const { return integer(value); }
  operator int() const {
    const int64_t wide = integer(value);
    if (wide != int(wide)) throw_argument_error(name, "a 32-bit integer", std::to_string(wide));
    return int(wide);
  }
  operator double() const {
    const double number = PyFloat_AsDouble(value);
    if (number == -1 && PyErr_Occurred()) PyErr_Clear(), wrong_type("a number");
    return number;
  }
  operator float() const { return float(operator double()); }
  operator activation_kind() const {
    const int64_t number = integer(value);
    if (number < 0 || number > int64_t(activation_kind::relu))
      throw_argument_error(name, "the number of an activation", std::to_string(number));
    return activation_kind(number);
  }
  operator std::vector<int64_t>() const {
    return list<int64_t>([this](PyObject* item) { return integer(item); });
  }
  operator std::vector<fastlm::tensor>() const {
    return list<fastlm::tensor>([this](PyObject* item) { return fastlm::tensor(item, name); });
  }

 private:
  [[noreturn]] void wrong_type(const char* expected) const {
    throw type_error(std::string(name) + ": expected " + expected + ", got " + Py_TYPE(value)->tp_name);
  }
  int64_t integer(PyObject* object) const {
    const int64_t number = PyLong_AsLongLong(object);
    if (number == -1 && PyErr_Occurred()) {
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw python_error();
      PyErr_Clear(), wrong_type("an integer");
    }
    return number;
  }
  template <class T, class Convert> std::vector<T> list(Convert convert) const {
    if (!PyList_Check(value) && !PyTuple_Check(value)) wrong_type("a list");
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
    std::vector<T> items;
    items.reserve(size_t(size));
    for (Py_ssize_t i = 0; i < size && i < PySequence_Fast_GET_SIZE(value); ++i)
      items.push_back(convert(PySequence_Fast_GET_ITEM(value, i)));
    return items;
  }
};

// What Python passed in one call.
struct keyword_values {
  const char* function;
  PyObject* const* values;
  Py_ssize_t positional;
  PyObject* names;  // a tuple; null without keywords
};

class keyword_arguments {
  keyword_values given;
  Py_ssize_t count, next = 0, taken = 0;
  uint64_t used = 0;  // one bit for each keyword that a field has taken

  bool is_named(Py_ssize_t i, const char* name, size_t length) const {
    PyObject* const key = PyTuple_GET_ITEM(given.names, i);
    return size_t(PyUnicode_GET_LENGTH(key)) == length && PyUnicode_IS_COMPACT_ASCII(key) &&
           std::memcmp(PyUnicode_1BYTE_DATA(key), name, length) == 0;
  }

 public:
  explicit keyword_arguments(const keyword_values& given)
      : given(given), count(given.names ? PyTuple_GET_SIZE(given.names) : 0) {
    if (given.positional) throw type_error(std::string(given.function) + "() takes keyword arguments only");
    if (count > 64) throw type_error(std::string(given.function) + "() got too many keyword arguments");
  }

  // After the fields are filled: every keyword must have been one of them.
  void check_all_taken() const {
    for (Py_ssize_t i = 0; taken < count && i < count; ++i)
      if (!(used >> i & 1))
        throw type_error(std::string(given.function) + "() got an unexpected keyword argument '" +
                         text_of(PyTuple_GET_ITEM(given.names, i)) + "'");
  }

 protected:
  argument keyword(const char* name) {
    const size_t length = std::strlen(name);
    for (Py_ssize_t tried = 0; tried < count; ++tried) {
      const Py_ssize_t i = next;
      next = next + 1 < count ? next + 1 : 0;
      if (is_named(i, name, length)) {
        used |= uint64_t(1) << i;
        ++taken;
        return {given.values[i], name};
      }
    }
    throw type_error(std::string(given.function) + "() missing keyword argument '" + name + "'");
  }
  // A tensor or None, which gives a tensor that is not `given`.
  tensor keyword_or_none(const char* name) {
    const argument found = keyword(name);
    if (found.value != Py_None) return found;
    tensor none;
    none.name = name;
    return none;
  }
};

struct without_gil {
  PyThreadState* state = PyEval_SaveThread();
  ~without_gil() { PyEval_RestoreThread(state); }
};

inline PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* to_python(double value) { return PyFloat_FromDouble(value); }

// body(), with its C++ exceptions as Python's.
template <class Body> PyObject* translating_exceptions(Body body) {
  try {
    return body();
  } catch (const python_error&) {  // is set already
  } catch (const value_error& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const type_error& error) { PyErr_SetString(PyExc_TypeError, error.what()); } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) { PyErr_SetString(PyExc_RuntimeError, error.what()); } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "unknown C++ exception");
  }
  return nullptr;
}

// A function of the module. All of them form a list, which the module's initialisation reads.
struct binding {
  PyMethodDef definition[2] = {};  // a list of one, as PyModule_AddFunctions takes it
  binding* next;
  static inline binding* first = nullptr;

  using function_type = PyObject*(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names);

  binding(const char* name, function_type* function) : next(first) {
    definition[0] = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
                     METH_FASTCALL | METH_KEYWORDS, nullptr};
    first = this;
  }
};

template <class Arguments, class Result>
PyObject* call(const char* name, Result (*function)(const Arguments&), PyObject* const* values, Py_ssize_t positional,
               PyObject* names) {
  return translating_exceptions([&]() -> PyObject* {
    const Arguments arguments(keyword_values{name, values, positional, names});
    arguments.check_all_taken();
    auto run = [&] {
      const without_gil released;
      return function(arguments);
    };
    if constexpr (std::is_void_v<Result>) {
      run();
      Py_RETURN_NONE;
    } else {
      return to_python(run());
    }
  });
}

#define FASTLM_BINDING(function)                                                                               \
  static ::fastlm::binding function##_binding(                                                                 \
      #function, [](PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) -> PyObject* { \
        return ::fastlm::call(#function, function, values, positional, names);                                 \
      });

}  // namespace fastlm
