// centered_clipping_coeffs: D (q, q) float64 -> c (q,); the steps are in center_solve.h.
#include <vector>

#include "aggregate/center_solve.h"
#include "aggregate/cuda_binding.h"
#include "common/bind.h"
#include "common/tensor.h"

namespace dashpot::aggregate {
namespace {

Tensor centered_clipping_coeffs_forward(const Tensor& d, double tau, int n_iter) {
  const int q = static_cast<int>(d.size(0));
  const Tensor c = d.new_empty({q}, Dtype::kFloat64);
  const py::gil_scoped_release release;
  std::vector<double> work(center_work_size(q));
  centered_clipping_solve(Alone{}, d.as<double>(), q, tau, n_iter, work.data(), c.as<double>());
  return c;
}

#ifdef DASHPOT_CUDA
Tensor centered_clipping_coeffs_forward_cuda(const Tensor& d, double tau, int n_iter) {
  const int q = static_cast<int>(d.size(0));
  const Tensor c = d.new_empty({q}, Dtype::kFloat64);
  const Place place = place_of(d);
  const Work work(d, center_work_size(q), place.device);
  centered_clipping_coeffs_cuda(d.as<double>(), q, tau, n_iter, work.get(), c.as<double>(),
                                place.device, place.stream);
  return c;
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("centered_clipping_coeffs_forward", &centered_clipping_coeffs_forward);
#ifdef DASHPOT_CUDA
  m.def("centered_clipping_coeffs_forward_cuda", &centered_clipping_coeffs_forward_cuda);
#endif
}

}  // namespace dashpot::aggregate
