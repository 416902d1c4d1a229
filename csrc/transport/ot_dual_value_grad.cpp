// ot_dual_value_grad: alpha (B, m), beta (B, n), cost (B, m, n), a (B, m), b (B, n) ->
// D (B,), a - T 1 (B, m), b - T^T 1 (B, n); one read of the cost (columns.h).
#include <optional>
#include <string>
#include <tuple>

#include "common/bind.h"
#include "transport/cuda_binding.h"
#include "transport/evaluate.h"

namespace dashpot::transport {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

Outputs ot_dual_value_grad_forward(const Tensor& alpha, const Tensor& beta, const Tensor& cost,
                                   const Tensor& a, const Tensor& b, const std::string& reg,
                                   double gamma, int64_t max_nz) {
  const int64_t batch = cost.size(0), m = cost.size(1), n = cost.size(2);
  const Options options{m, n, max_nz, gamma, reg_of(reg), true};
  const Outputs out{alpha.new_empty({batch}, alpha.dtype), alpha.new_empty({batch, m}, alpha.dtype),
                    alpha.new_empty({batch, n}, alpha.dtype)};
  const auto& [obj, grad_alpha, grad_beta] = out;
  const int threads = num_threads();
  const py::gil_scoped_release release;
  dispatch_floating(cost.dtype, [&](auto element) {
    using C = decltype(element);
    using T = std::conditional_t<std::is_same_v<C, double>, double, float>;
    Scratch<T> scratch;
    evaluate<T, C, T>(options, batch, alpha.as<T>(), beta.as<T>(), {cost.as<C>(), n, 1}, a.as<T>(),
                      b.as<T>(), obj.as<T>(), grad_alpha.as<T>(), grad_beta.as<T>(), nullptr,
                      nullptr, scratch, threads);
  });
  return out;
}

std::optional<std::string> ot_dual_value_grad_supports(const py::args& args) {
  return too_many_rows(py::cast<Tensor>(args[2]).size(1));
}

#ifdef DASHPOT_CUDA
Outputs ot_dual_value_grad_forward_cuda(const Tensor& alpha, const Tensor& beta, const Tensor& cost,
                                        const Tensor& a, const Tensor& b, const std::string& reg,
                                        double gamma, int64_t max_nz) {
  return evaluate_on_device(alpha, &beta, cost_on_device(cost), a, b, reg_of(reg), gamma, max_nz);
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("ot_dual_value_grad_forward", &ot_dual_value_grad_forward);
  m.def("ot_dual_value_grad_supports", &ot_dual_value_grad_supports);
#ifdef DASHPOT_CUDA
  m.def("ot_dual_value_grad_forward_cuda", &ot_dual_value_grad_forward_cuda);
  m.def("ot_dual_value_grad_supports_cuda", &ot_dual_value_grad_supports);
#endif
}

}  // namespace dashpot::transport
