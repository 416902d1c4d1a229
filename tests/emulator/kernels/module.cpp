// The module that test_emulator.py loads: call(name, *integers) runs a function of table.h.
#include <Python.h>

#include "table.h"

namespace {

PyObject* call(PyObject*, PyObject* parameters) {
  try {
    const char* name = PyUnicode_AsUTF8(PyTuple_GetItem(parameters, 0));
    auto found = table().find(name ? name : "");
    if (found == table().end()) throw std::invalid_argument("no such function");
    Arguments arguments;
    for (Py_ssize_t i = 1; i < PyTuple_Size(parameters); ++i) {
      arguments.push_back(PyLong_AsLongLong(PyTuple_GetItem(parameters, i)));
    }
    if (PyErr_Occurred()) return nullptr;
    found->second(arguments);
    Py_RETURN_NONE;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {{"call", call, METH_VARARGS, nullptr}, {}};

}  // namespace

#define INIT_OF(name) PyInit_##name
#define INIT(name) INIT_OF(name)
#define QUOTE_OF(name) #name
#define QUOTE(name) QUOTE_OF(name)

PyMODINIT_FUNC INIT(DASHPOT_MODULE)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, QUOTE(DASHPOT_MODULE), nullptr, -1,
                                   methods};
  return PyModule_Create(&definition);
}
