// krum_coeffs: D (p, p) float64 -> c (p,), scores (p,); the solve is in select_solve.h.
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
  return {d.new_empty({p}, Dtype::kFloat64), d.new_empty({p}, Dtype::kFloat64)};
}

Outputs krum_coeffs_forward(const Tensor& d, int k, int neighbours, bool squared) {
  const int p = static_cast<int>(d.size(0));
  const Outputs out = outputs(d, p);
  const auto& [c, scores] = out;
  const py::gil_scoped_release release;
  std::vector<double> work(krum_work_size(p));
  krum_solve(Alone{}, d.as<double>(), p, k, neighbours, squared, work.data(), c.as<double>(),
             scores.as<double>());
  return out;
}

#ifdef DASHPOT_CUDA
Outputs krum_coeffs_forward_cuda(const Tensor& d, int k, int neighbours, bool squared) {
  const int p = static_cast<int>(d.size(0));
  const Outputs out = outputs(d, p);
  const auto& [c, scores] = out;
  const Place place = place_of(d);
  const Work work(d, krum_work_size(p), place.device);
  krum_coeffs_cuda(d.as<double>(), p, k, neighbours, squared, work.get(), c.as<double>(),
                   scores.as<double>(), place.device, place.stream);
  return out;
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("krum_coeffs_forward", &krum_coeffs_forward);
#ifdef DASHPOT_CUDA
  m.def("krum_coeffs_forward_cuda", &krum_coeffs_forward_cuda);
#endif
}

}  // namespace dashpot::aggregate
