// Opens the module and walks the registrations; never edited for an op.
#include <string>

#include "common/bind.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace {

// What this module was built with, for `python -m dashpot info`.
pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = __VERSION__;
#ifdef DASHPOT_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#ifdef DASHPOT_CUDA_VERSION
  info["cuda_version"] = DASHPOT_CUDA_VERSION;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(DASHPOT_MODULE, m) {
  m.doc() = "Compiled kernels of dashpot; called through dashpot's public functions.";
  m.def("build_info", &build_info, "Compiler and CUDA version of this build.");
  m.def(
      "cpu_isa", [] { return dashpot::isa_name(dashpot::isa()); },
      "Instruction set that the CPU kernels use: avx512, avx2 or baseline.");
  m.def("set_cpu_isa", &dashpot::set_isa, pybind11::arg("name"),
        "Use a lesser instruction set than the machine's best, or None for the best; for tests.");
  for (const dashpot::Binder bind : dashpot::binders()) bind(m);
}
