// nnm_coeffs: D (p, p) float64 -> M (p, p); the solve is in select_solve.h.
#include <vector>

#include "aggregate/cuda_binding.h"
#include "aggregate/select_solve.h"
#include "common/bind.h"
#include "common/tensor.h"

namespace dashpot::aggregate {
namespace {

Tensor nnm_coeffs_forward(const Tensor& d, int f) {
  const int p = static_cast<int>(d.size(0));
  const Tensor mixing = d.new_empty({p, p}, Dtype::kFloat64);
  const py::gil_scoped_release release;
  std::vector<double> work(nnm_work_size(p));
  nnm_solve(Alone{}, d.as<double>(), p, f, work.data(), mixing.as<double>());
  return mixing;
}

#ifdef DASHPOT_CUDA
Tensor nnm_coeffs_forward_cuda(const Tensor& d, int f) {
  const int p = static_cast<int>(d.size(0));
  const Tensor mixing = d.new_empty({p, p}, Dtype::kFloat64);
  const Place place = place_of(d);
  const Work work(d, nnm_work_size(p), place.device);
  nnm_coeffs_cuda(d.as<double>(), p, f, work.get(), mixing.as<double>(), place.device,
                  place.stream);
  return mixing;
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("nnm_coeffs_forward", &nnm_coeffs_forward);
#ifdef DASHPOT_CUDA
  m.def("nnm_coeffs_forward_cuda", &nnm_coeffs_forward_cuda);
#endif
}

}  // namespace dashpot::aggregate
