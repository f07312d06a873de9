// Whether the memory of a tensor holds all of its elements as they are.
#pragma once
#include "arguments.h"

namespace fastlm::bindings {

// Where a tensor's elements are: the address of the first, the offset of the last, and the bytes of one.
struct extent {
  const char* data;
  int64_t last = 0, count = 1, bytes;

  void add(int64_t size, int64_t stride) {
    count *= size;
    last += (size - 1) * stride;
  }
};

inline bool from_dlpack(PyObject* object, extent& found) {
  const auto from_object = torch_api::get().from_object;
  dlpack_tensor given;
  if (!from_object) return false;
  if (from_object(object, &given) != 0) return PyErr_Clear(), false;
  if (given.rank > 0 && !given.strides) return false;
  found.data = static_cast<const char*>(given.data) + given.byte_offset;
  found.bytes = given.element.bits * given.element.lanes / 8;
  for (int i = 0; i < given.rank; ++i) found.add(given.sizes[i], given.strides[i]);
  return true;
}

inline int64_t integer_of(PyObject* object) {
  const reference owned(object);
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

inline void from_attributes(PyObject* object, extent& found) {
  const torch_api& torch = torch_api::get();
  const reference shape(PyObject_GetAttr(object, torch.shape)), stride(PyObject_CallMethodNoArgs(object, torch.stride));
  found.data = reinterpret_cast<const char*>(integer_of(PyObject_CallMethodNoArgs(object, torch.data_ptr)));
  found.bytes = integer_of(PyObject_GetAttrString(object, "itemsize"));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(shape.get()); ++i)
    found.add(PyLong_AsLongLong(PyTuple_GET_ITEM(shape.get(), i)),
              PyLong_AsLongLong(PyTuple_GET_ITEM(stride.get(), i)));
  if (PyErr_Occurred()) throw python_error();
}

// given: a tensor, of any dtype and device. The negative bit, which x.conj().imag has, says that memory holds −x.
inline void check_storage_of(argument given) {
  PyObject* const object = given.value;
  const torch_api& torch = torch_api::get();
  extent tensor;
  if (!from_dlpack(object, tensor)) from_attributes(object, tensor);
  if (tensor.count == 0) return;
  if (reference(PyObject_CallMethodNoArgs(object, torch.is_neg)).get() == Py_True)
    throw_argument_error(given.name, "a tensor without the negative bit; call resolve_neg()", "one with it");
  const reference storage(PyObject_CallMethodNoArgs(object, torch.untyped_storage));
  const int64_t size = integer_of(PyObject_CallMethodNoArgs(storage.get(), torch.nbytes));
  if (size == 0) throw_argument_error(given.name, "a tensor with storage", "one whose storage was freed");
  const int64_t begin = integer_of(PyObject_CallMethodNoArgs(storage.get(), torch.data_ptr));
  const int64_t needed = reinterpret_cast<int64_t>(tensor.data) - begin + (tensor.last + 1) * tensor.bytes;
  if (size < needed)
    throw_argument_error(given.name,
                         "a storage of at least " + std::to_string(needed) + " bytes, for its shape and strides",
                         "one of " + std::to_string(size));
}

}  // namespace fastlm::bindings
