// A torch.Tensor as the kernels see it: address, element type, sizes and strides.
//
// This is the only place that reads tensors. It reads their attributes through Python's C API, so the extension
// includes no torch header and one build serves every version of PyTorch. A tensor must be on the module's device and
// must have storage. Kernels take typed pointers and views from the accessors below, which check element type and
// layout and name the argument that is wrong.
#pragma once
#include <Python.h>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

// The device type of all tensors of this module, as in the attributes torch.Tensor.is_cpu and is_cuda.
#ifndef FASTLM_DEVICE
#define FASTLM_DEVICE cpu
#endif
#define FASTLM_TEXT_OF(token) #token
#define FASTLM_TEXT(macro) FASTLM_TEXT_OF(macro)

namespace fastlm {

struct bf16;
struct fp16;

// A Python exception is set.
struct python_error {};
// These become Python's ValueError and TypeError.
struct value_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct type_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// "argument: expected X, got Y"
[[noreturn]] inline void throw_argument_error(const char* argument, const std::string& expected,
                                              const std::string& got) {
  throw value_error(std::string(argument) + ": expected " + expected + ", got " + got);
}

// Owns one reference.
class reference {
  PyObject* object;

 public:
  explicit reference(PyObject* object) : object(object) {
    if (!object) throw python_error();
  }
  ~reference() { Py_DECREF(object); }
  reference(const reference&) = delete;
  reference& operator=(const reference&) = delete;
  PyObject* get() const { return object; }
};

inline std::string text_of(PyObject* object) {
  const reference text(PyObject_Str(object));
  const char* utf8 = PyUnicode_AsUTF8(text.get());
  if (!utf8) throw python_error();
  return utf8;
}

enum class dtype : uint8_t { float32, bfloat16, float16, boolean, int32, int64 };
inline constexpr const char* DtypeNames[] = {"float32", "bfloat16", "float16", "bool", "int32", "int64"};
inline constexpr int Dtypes = std::size(DtypeNames);
inline std::string name_of(dtype type) { return std::string("torch.") + DtypeNames[int(type)]; }

template <class T> inline constexpr dtype dtype_of = [] { static_assert(!sizeof(T), "not an element type"); }();
template <> inline constexpr dtype dtype_of<float> = dtype::float32;
template <> inline constexpr dtype dtype_of<bf16> = dtype::bfloat16;
template <> inline constexpr dtype dtype_of<fp16> = dtype::float16;
template <> inline constexpr dtype dtype_of<bool> = dtype::boolean;
template <> inline constexpr dtype dtype_of<int32_t> = dtype::int32;
template <> inline constexpr dtype dtype_of<int64_t> = dtype::int64;

// DLPack's description of a tensor, which owns nothing, and the start of its table of functions.
struct dlpack_tensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t rank;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } element;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};
struct dlpack_functions {
  struct {
    uint32_t major, minor;
  } version;
  void *previous, *allocate, *owned_from_object, *owned_to_object;
  int (*from_object)(void* object, dlpack_tensor* out);  // 0, or −1 with a Python exception
};

enum class dlpack_device : int32_t { cpu = 1, cuda = 2 };

// The element types of DLPack: a code and a number of bits.
inline bool dtype_from_dlpack(uint8_t code, uint8_t bits, dtype& type) {
  switch (code << 8 | bits) {
    case 2 << 8 | 32: return type = dtype::float32, true;
    case 4 << 8 | 16: return type = dtype::bfloat16, true;
    case 2 << 8 | 16: return type = dtype::float16, true;
    case 6 << 8 | 8: return type = dtype::boolean, true;
    case 0 << 8 | 32: return type = dtype::int32, true;
    case 0 << 8 | 64: return type = dtype::int64, true;
  }
  return false;
}

// What is needed of torch, looked up once.
struct torch_api {
  int (*from_object)(void*, dlpack_tensor*) = nullptr;  // null where torch does not offer it
  PyObject *tensor, *dtypes[Dtypes];                    // torch.Tensor, torch.float32, …
  PyObject *dtype_name, *shape, *stride, *data_ptr, *device, *is_here, *untyped_storage, *nbytes, *is_neg;  // names

  // The caller holds the GIL. The object is never freed: it lives as long as the process.
  static const torch_api& get() {
    static const torch_api* found = nullptr;
    if (!found) found = new torch_api();
    return *found;
  }

 private:
  torch_api() {
    const reference torch(PyImport_ImportModule("torch"));
    auto attribute = [&](const char* name) {
      PyObject* value = PyObject_GetAttrString(torch.get(), name);
      if (!value) throw python_error();
      return value;
    };
    tensor = attribute("Tensor");
    if (PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__")) {
      const void* table = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
      if (const auto* functions = static_cast<const dlpack_functions*>(table); table && functions->version.major == 1)
        from_object = functions->from_object;
      Py_DECREF(capsule);
    }
    PyErr_Clear();
    for (int i = 0; i < Dtypes; ++i) dtypes[i] = attribute(DtypeNames[i]);
    dtype_name = PyUnicode_InternFromString("dtype");
    shape = PyUnicode_InternFromString("shape");
    stride = PyUnicode_InternFromString("stride");
    data_ptr = PyUnicode_InternFromString("data_ptr");
    device = PyUnicode_InternFromString("device");
    untyped_storage = PyUnicode_InternFromString("untyped_storage");
    is_neg = PyUnicode_InternFromString("is_neg");
    nbytes = PyUnicode_InternFromString("nbytes");
    is_here = PyUnicode_InternFromString("is_" FASTLM_TEXT(FASTLM_DEVICE));
  }
};

inline dtype dtype_from(PyObject* object, const char* argument) {
  const torch_api& torch = torch_api::get();
  for (int i = 0; i < Dtypes; ++i)
    if (object == torch.dtypes[i]) return dtype(i);
  throw_argument_error(argument, "a dtype that the kernels know", text_of(object));
}

// `count` rows of `width` contiguous elements, `stride` elements apart.
template <class T> struct row_view {
  T* data;
  int64_t count, width, stride;
};

struct tensor {
  static constexpr int MaxRank = 8;  // of strided tensors; contiguous ones may have any

  const char* name = "";  // of the argument
  void* data = nullptr;   // null: the argument is None, or has no elements
  dtype type{};
  bool contiguous = true;
  int rank = -1;                             // -1: the argument is None
  int64_t count = 0, width = 0;              // elements; size of the last dimension
  int64_t sizes[MaxRank], strides[MaxRank];  // the first `rank` are set; none are where rank > MaxRank

  tensor() = default;

  tensor(PyObject* object, const char* name) : name(name) {
    const torch_api& torch = torch_api::get();
    if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(torch.tensor)))
      throw type_error(std::string(name) + ": expected a tensor, got " + Py_TYPE(object)->tp_name);
    if (!read_dlpack(object)) read_attributes(object);
    // The address of a view into freed storage is its offset, a small number.
    if (count > 0 && reinterpret_cast<uintptr_t>(data) >> 32 == 0) check_storage(object);
  }

  // Whether the argument is a tensor and not None.
  bool given() const { return rank >= 0; }

  // The address, of elements of type T; null for None.
  template <class T> T* as() const {
    constexpr dtype wanted = dtype_of<std::remove_const_t<T>>;
    if (given() && type != wanted) throw_argument_error(name, name_of(wanted), name_of(type));
    return static_cast<T*>(data);
  }
  template <class T> T* as(int wanted_rank) const {
    check_rank(wanted_rank);
    return as<T>();
  }
  // The same of a contiguous tensor of any rank with so many elements.
  template <class T> T* contiguous_as(int64_t elements) const {
    if (given() && (!contiguous || count != elements))
      throw_argument_error(name, "a contiguous tensor of " + std::to_string(elements) + " elements", layout());
    return as<T>();
  }
  // The tensor as rows of its last dimension: contiguous and of any rank, or 2-D with a contiguous last dimension.
  template <class T> row_view<T> rows() const {
    T* const address = as<T>();
    if (!given()) return {};
    if (contiguous && rank > 0) return {address, width ? count / width : 0, width, width};
    if (rank != 2 || (strides[1] != 1 && width != 1))
      throw_argument_error(name, "rows with a contiguous last dimension", layout());
    return {address, sizes[0], width, strides[0]};
  }
  // The same, checked to be so many rows of this width.
  template <class T> row_view<T> rows(int64_t wanted_count, int64_t wanted_width) const {
    const row_view<T> view = rows<T>();
    if (given() && (view.count != wanted_count || view.width != wanted_width))
      throw_argument_error(name, std::to_string(wanted_count) + " rows of " + std::to_string(wanted_width), layout());
    return view;
  }

  void check_rank(int wanted) const {
    if (given() && rank != wanted)
      throw_argument_error(name, std::to_string(wanted) + " dimensions", std::to_string(rank));
  }
  // The stride of a dimension that is broadcast where its size is 1.
  int64_t broadcast_stride(int dimension) const { return sizes[dimension] == 1 ? 0 : strides[dimension]; }

  // "shape (2, 3) and strides (3, 1)", for error messages
  std::string layout() const {
    if (rank > MaxRank) return std::to_string(rank) + " dimensions";
    auto list = [this](const int64_t* numbers) {
      std::string text = "(";
      for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
      return text + (rank == 1 ? ",)" : ")");
    };
    return "shape " + list(sizes) + " and strides " + list(strides);
  }

 private:
  // False where DLPack does not describe the tensor; its attributes then say why, or are as good.
  bool read_dlpack(PyObject* object) {
    const auto from_object = torch_api::get().from_object;
    dlpack_tensor given;
    if (!from_object) return false;
    if (from_object(object, &given) != 0) return PyErr_Clear(), false;
    if (given.device.type != int32_t(dlpack_device::FASTLM_DEVICE) || given.element.lanes != 1 ||
        (given.rank > 0 && !given.strides) || !dtype_from_dlpack(given.element.code, given.element.bits, type))
      return false;
    data = static_cast<char*>(given.data) + given.byte_offset;
    read_layout(given.rank, [&](int i) { return given.sizes[i]; }, [&](int i) { return given.strides[i]; });
    return true;
  }

  void read_attributes(PyObject* object) {
    const torch_api& torch = torch_api::get();
    {
      const reference here(PyObject_GetAttr(object, torch.is_here));
      if (here.get() != Py_True) {
        const reference device(PyObject_GetAttr(object, torch.device));
        throw_argument_error(name, "a tensor on " FASTLM_TEXT(FASTLM_DEVICE), "one on " + text_of(device.get()));
      }
    }
    const reference own_dtype(PyObject_GetAttr(object, torch.dtype_name));
    type = dtype_from(own_dtype.get(), name);
    const reference shape(PyObject_GetAttr(object, torch.shape)),
        stride(PyObject_CallMethodNoArgs(object, torch.stride)),
        address(PyObject_CallMethodNoArgs(object, torch.data_ptr));
    read_layout(
        int(PyTuple_GET_SIZE(shape.get())), [&](int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.get(), i)); },
        [&](int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(stride.get(), i)); });
    data = PyLong_AsVoidPtr(address.get());
    if (PyErr_Occurred()) throw python_error();  // a symbolic size
  }

  template <class Size, class Stride> void read_layout(int dimensions, Size size_of, Stride stride_of) {
    rank = dimensions;
    count = 1, width = 1;
    for (int i = rank - 1; i >= 0; --i) {
      const int64_t size = size_of(i), stride = stride_of(i);
      contiguous &= size == 1 || stride == count;
      count *= size;
      if (i == rank - 1) width = size;
      if (rank <= MaxRank) sizes[i] = size, strides[i] = stride;
    }
    contiguous |= count == 0;
  }

  void check_storage(PyObject* object) const {
    const reference storage(PyObject_CallMethod(object, "untyped_storage", nullptr)),
        address(PyObject_CallMethod(storage.get(), "data_ptr", nullptr));
    if (!PyLong_AsVoidPtr(address.get()))
      throw_argument_error(name, "a tensor with storage", "one whose storage was freed");
  }
};

}  // namespace fastlm
