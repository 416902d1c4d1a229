// mda_coeffs: D (p, p) float64 -> c (p,), diameter (); the search is in select_solve.h.
#include <tuple>
#include <vector>

#include "aggregate/cuda_binding.h"
#include "aggregate/select_solve.h"
#include "common/bind.h"
#include "common/tensor.h"

namespace dashpot::aggregate {
namespace {

using Outputs = std::tuple<Tensor, Tensor>;

Outputs outputs(const Tensor& d, int64_t p) {
  return {d.new_empty({p}, Dtype::kFloat64), d.new_empty({}, Dtype::kFloat64)};
}

Outputs mda_coeffs_forward(const Tensor& d, int f) {
  const int p = static_cast<int>(d.size(0));
  const Outputs out = outputs(d, p);
  const auto& [c, diameter] = out;
  const py::gil_scoped_release release;
  std::vector<double> work(mda_work_size(p));
  mda_solve(Alone{}, d.as<double>(), p, f, work.data(), c.as<double>(), diameter.as<double>());
  return out;
}

#ifdef DASHPOT_CUDA
Outputs mda_coeffs_forward_cuda(const Tensor& d, int f) {
  const int p = static_cast<int>(d.size(0));
  const Outputs out = outputs(d, p);
  const auto& [c, diameter] = out;
  const Place place = place_of(d);
  const Work work(d, mda_work_size(p), place.device);
  mda_coeffs_cuda(d.as<double>(), p, f, work.get(), c.as<double>(), diameter.as<double>(),
                  place.device, place.stream);
  return out;
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("mda_coeffs_forward", &mda_coeffs_forward);
#ifdef DASHPOT_CUDA
  m.def("mda_coeffs_forward_cuda", &mda_coeffs_forward_cuda);
#endif
}

}  // namespace dashpot::aggregate
