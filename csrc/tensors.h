// Tensors as arguments of Python functions, by DLPack: for module.cpp, which is the one file that knows Python.
//
// PyTorch >= 2.10 offers DLPack's table of C functions, which describe a tensor in tens of nanoseconds. Its Python method
// __dlpack__, which nanobind calls and which serves all others, takes 10 us for each of forty tensors in a step: with a few
// thousand rows, as long as everything else that the host does.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>

namespace flashcl {

namespace nb = nanobind;

// What a kernel is told of a tensor. Holds no reference: the caller keeps the tensor alive.
struct Described {
  static constexpr int MOST = 4;  // dimensions

  void* pointer;
  nb::dlpack::device device;
  nb::dlpack::dtype type;
  int dimensions;
  int64_t sizes[MOST], steps[MOST];

  bool read(const nb::dlpack::dltensor& t) {
    if (t.ndim > MOST) return false;
    pointer = static_cast<char*>(t.data) + t.byte_offset, device = t.device, type = t.dtype, dimensions = t.ndim;
    std::copy_n(t.shape, dimensions, sizes);
    int64_t step = 1;
    for (int i = dimensions - 1; i >= 0; step *= sizes[i--]) steps[i] = t.strides ? t.strides[i] : step;
    return true;
  }

  int64_t size() const {
    int64_t product = 1;
    for (int i = 0; i < dimensions; ++i) product *= sizes[i];
    return product;
  }

  bool contiguous() const {
    int64_t step = 1;
    for (int i = dimensions - 1; i >= 0; step *= sizes[i--])
      if (sizes[i] != 1 && steps[i] != step) return size() == 0;
    return true;
  }
};

// A tensor of T (any type: void) with so many dimensions (any number: -1).
template <class T, int NDIM = -1, bool CONTIGUOUS = false>
class Tensor {
 public:
  using Element = T;

  T* data() const { return static_cast<T*>(is_.pointer); }
  int ndim() const { return is_.dimensions; }
  int64_t shape(int i) const { return is_.sizes[i]; }
  int64_t stride(int i) const { return is_.steps[i]; }
  int64_t size() const { return is_.size(); }
  nb::dlpack::dtype dtype() const { return is_.type; }
  int device_type() const { return is_.device.device_type; }
  int device_id() const { return is_.device.device_id; }

  bool fits(const Described& tensor) {
    is_ = tensor;
    return (std::is_void_v<T> || is_.type == nb::detail::dtype_traits<T>::value) &&
           (NDIM < 0 || is_.dimensions == NDIM) && (!CONTIGUOUS || is_.contiguous());
  }

 private:
  Described is_;
};

// DLPack's table of C functions, version 1, as far as it is used.
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* older;
  void *allocate, *managed_from_object, *object_from_managed;
  int (*from_object)(void* object, nb::dlpack::dltensor* out);  // 0: done; the Python error is set otherwise
};

// That of a type, or null. The last one is remembered: all tensors are of one type.
inline const ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* known = nullptr;
  static const ExchangeApi* api = nullptr;
  if (type == known) return api;
  known = type, api = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
    const auto* found = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    while (found && found->major > 1) found = found->older;
    if (found && found->major == 1 && found->from_object) api = found;
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  return api;
}

inline bool describe(nb::handle object, bool writable, Described& out) {
  if (const ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
    nb::dlpack::dltensor t;
    if (api->from_object(object.ptr(), &t) == 0) return out.read(t);
    PyErr_Clear();
    return false;
  }
  const auto read = [&](const auto& array) {
    nb::dlpack::dltensor t;
    t.data = const_cast<void*>(static_cast<const void*>(array.data())), t.byte_offset = 0;
    t.device = {array.device_type(), array.device_id()}, t.dtype = array.dtype(), t.ndim = int(array.ndim());
    t.shape = const_cast<int64_t*>(array.shape_ptr()), t.strides = const_cast<int64_t*>(array.stride_ptr());
    return out.read(t);
  };
  if (writable) {
    nb::ndarray<> array;
    return nb::try_cast(object, array, false) && read(array);
  }
  nb::ndarray<nb::ro> array;
  return nb::try_cast(object, array, false) && read(array);
}

}  // namespace flashcl

namespace nanobind::detail {

template <class T, int NDIM, bool CONTIGUOUS>
struct type_caster<flashcl::Tensor<T, NDIM, CONTIGUOUS>> {
  using Type = flashcl::Tensor<T, NDIM, CONTIGUOUS>;
  NB_TYPE_CASTER(Type, const_name("Tensor"))

  bool from_python(handle object, uint8_t, cleanup_list*) noexcept {
    flashcl::Described tensor;
    return object.is_valid() && !object.is_none() && flashcl::describe(object, !std::is_const_v<T>, tensor) &&
           value.fits(tensor);
  }
};

}  // namespace nanobind::detail
