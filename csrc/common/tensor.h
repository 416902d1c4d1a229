// A torch tensor seen from C++ without torch's headers: pointer, dtype, shape, stream.
//
// The module is bound to the Python version only. A tensor's fields are read through Python
// attributes (about 0.1 us each), outputs are made by the input's own `new_empty`, so that they
// come from torch's allocator. Shapes and values were checked by the public function; what is
// checked here again is only what would make a kernel read wrong memory.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace dashpot {

namespace py = pybind11;

// Python names used on every call, interned once. Leaked on purpose: they outlive the module.
struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* numel = PyUnicode_InternFromString("numel");
  PyObject* dim = PyUnicode_InternFromString("dim");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
  PyObject* new_empty = PyUnicode_InternFromString("new_empty");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* get_num_threads = PyUnicode_InternFromString("get_num_threads");
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* tensor_type = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
  PyObject* dtype_keyword = Py_BuildValue("(s)", "dtype");
  PyObject* dtypes[kDtypes] = {};
  Names() {
    if (!torch) throw py::error_already_set();
    for (int i = 0; i < kDtypes; ++i) {
      dtypes[i] = PyObject_GetAttrString(torch, kDtypeNames[i]);
      if (!dtypes[i]) throw py::error_already_set();
    }
  }
};

inline const Names& names() {
  static const Names* all = new Names;
  return *all;
}

inline py::object call(PyObject* self, PyObject* method) {
  PyObject* result = PyObject_CallMethodNoArgs(self, method);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline int64_t call_int(PyObject* self, PyObject* method) {
  return PyLong_AsLongLong(call(self, method).ptr());
}

// A dense, contiguous tensor on the CPU or a CUDA device.
struct Tensor {
  py::object object;
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t numel = 0;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t dim() const { return call_int(object.ptr(), names().dim); }
  int64_t size(int64_t axis) const { return py::cast<int64_t>(object.attr("size")(axis)); }
  int device() const { return static_cast<int>(call_int(object.ptr(), names().get_device)); }

  static Tensor from(py::handle handle) {
    const Names& name = names();
    Tensor tensor;
    tensor.object = py::reinterpret_borrow<py::object>(handle);
    const py::object contiguous = call(handle.ptr(), name.is_contiguous);
    if (contiguous.ptr() != Py_True) {
      throw std::invalid_argument("dashpot kernels take contiguous tensors");
    }
    tensor.data =
        reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(call(handle.ptr(), name.data_ptr).ptr()));
    tensor.numel = call_int(handle.ptr(), name.numel);
    const auto dtype =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(handle.ptr(), name.dtype));
    for (int i = 0; i < kDtypes; ++i) {
      if (dtype.ptr() == name.dtypes[i]) {
        tensor.dtype = static_cast<Dtype>(i);
        return tensor;
      }
    }
    throw std::invalid_argument("dashpot kernels have no code for " +
                                py::cast<std::string>(py::str(dtype)));
  }

  // An uninitialised, contiguous tensor on this one's device.
  Tensor new_empty(std::initializer_list<int64_t> shape, Dtype type) const {
    py::tuple size(shape.size());
    int64_t numel = 1;
    size_t axis = 0;
    for (const int64_t length : shape) {
      size[axis++] = length;
      numel *= length;
    }
    return new_empty(size, numel, type);
  }

  // size: a tuple or torch.Size that holds `numel` elements.
  Tensor new_empty(const py::object& size, int64_t numel, Dtype type) const {
    const Names& name = names();
    Tensor tensor;
    tensor.dtype = type;
    tensor.numel = numel;
    PyObject* const arguments[] = {object.ptr(), size.ptr(), name.dtypes[static_cast<int>(type)]};
    tensor.object = py::reinterpret_steal<py::object>(
        PyObject_VectorcallMethod(name.new_empty, arguments, 2, name.dtype_keyword));
    if (!tensor.object) throw py::error_already_set();
    tensor.data = reinterpret_cast<void*>(
        PyLong_AsUnsignedLongLong(call(tensor.object.ptr(), name.data_ptr).ptr()));
    return tensor;
  }
};

// An uninitialised, contiguous tensor of another one's shape.
inline Tensor empty_like(const Tensor& like, Dtype type) {
  return like.new_empty(like.object.attr("shape"), like.numel, type);
}

// Where a CUDA kernel runs: torch's current stream of a tensor's device, read on every call.
struct Place {
  int device;
  void* stream;
};

inline Place place_of(const Tensor& tensor) {
#ifdef DASHPOT_EMULATE
  return {0, nullptr};
#else
  // The raw getter is what torch's own compiler uses; it is private, so the public one stands by.
  static PyObject* const raw = [] {
    PyObject* module = PyObject_GetAttrString(names().torch, "_C");
    PyObject* getter = PyObject_GetAttrString(module, "_cuda_getCurrentRawStream");
    if (!getter) PyErr_Clear();
    return getter;
  }();
  const int device = tensor.device();
  const py::object stream =
      raw ? py::reinterpret_borrow<py::object>(raw)(device)
          : py::module_::import("torch.cuda").attr("current_stream")(device).attr("cuda_stream");
  return {device, reinterpret_cast<void*>(py::cast<uintptr_t>(stream))};
#endif
}

// The threads of the next parallel region: what the user gave torch, whichever OpenMP it uses.
inline int num_threads() {
  return static_cast<int>(call_int(names().torch, names().get_num_threads));
}

}  // namespace dashpot

namespace pybind11::detail {

template <>
struct type_caster<dashpot::Tensor> {
  PYBIND11_TYPE_CASTER(dashpot::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    const int is_tensor = PyObject_IsInstance(source.ptr(), dashpot::names().tensor_type);
    if (is_tensor < 0) throw error_already_set();
    if (is_tensor) value = dashpot::Tensor::from(source);
    return is_tensor;
  }
  static handle cast(const dashpot::Tensor& tensor, return_value_policy, handle) {
    return tensor.object.inc_ref();
  }
};

}  // namespace pybind11::detail
