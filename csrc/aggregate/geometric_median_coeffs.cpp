// geometric_median_coeffs: D (q, q) float64 -> c (q,), iters (); the steps are in center_solve.h.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "aggregate/center_solve.h"
#include "aggregate/cuda_binding.h"
#include "common/bind.h"
#include "common/tensor.h"

namespace dashpot::aggregate {
namespace {

using Outputs = std::tuple<Tensor, Tensor>;

Outputs outputs(const Tensor& d, int64_t q) {
  return {d.new_empty({q}, Dtype::kFloat64), d.new_empty({}, Dtype::kInt64)};
}

Outputs geometric_median_coeffs_forward(const Tensor& d, const std::optional<Tensor>& weights,
                                        double nu, int n_iter, double tol,
                                        const std::string& start) {
  const int q = static_cast<int>(d.size(0));
  const Outputs out = outputs(d, q);
  const auto& [c, iters] = out;
  const py::gil_scoped_release release;
  std::vector<double> work(center_work_size(q));
  geometric_median_solve(Alone{}, d.as<double>(), q, weights ? weights->as<double>() : nullptr,
                         {nu, n_iter, tol, start == "last"}, work.data(), c.as<double>(),
                         iters.as<int64_t>());
  return out;
}

#ifdef DASHPOT_CUDA
Outputs geometric_median_coeffs_forward_cuda(const Tensor& d, const std::optional<Tensor>& weights,
                                             double nu, int n_iter, double tol,
                                             const std::string& start) {
  const int q = static_cast<int>(d.size(0));
  const Outputs out = outputs(d, q);
  const auto& [c, iters] = out;
  const Place place = place_of(d);
  const Work work(d, center_work_size(q), place.device);
  geometric_median_coeffs_cuda(d.as<double>(), q, weights ? weights->as<double>() : nullptr,
                               {nu, n_iter, tol, start == "last"}, work.get(), c.as<double>(),
                               iters.as<int64_t>(), place.device, place.stream);
  return out;
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("geometric_median_coeffs_forward", &geometric_median_coeffs_forward);
#ifdef DASHPOT_CUDA
  m.def("geometric_median_coeffs_forward_cuda", &geometric_median_coeffs_forward_cuda);
#endif
}

}  // namespace dashpot::aggregate
