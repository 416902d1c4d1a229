// How a source file adds its functions to the module: one DASHPOT_BIND block, no shared list.
//
//   DASHPOT_BIND(m) { m.def("gram_forward", &gram_forward); }
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace dashpot {

using Binder = void (*)(pybind11::module_&);

inline std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}

struct Registered {
  explicit Registered(Binder binder) { binders().push_back(binder); }
};

}  // namespace dashpot

#define DASHPOT_BIND(m)                                      \
  static void dashpot_bind(pybind11::module_& m);            \
  static const dashpot::Registered registered(dashpot_bind); \
  static void dashpot_bind(pybind11::module_& m)
