// ot_value_grad: alpha (B, m), beta (B, n) or None, cost (B, m, n), or x (B, m, d) with y (B, n,
// d), a (B, m), b (B, n), smoothing (B,) and level (B, n) or None -> obj (B,), a - T 1 (B, m), b -
// T^T 1 (dual) or beta (B, n), level (B, n) (smoothed) or (B, 0). One read of the cost, or none.
#include <optional>
#include <string>
#include <tuple>

#include "common/bind.h"
#include "transport/cuda_binding.h"
#include "transport/evaluate.h"
#include "transport/points.h"

namespace dashpot::transport {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Maybe = std::optional<Tensor>;

Outputs outputs_of(const Tensor& alpha, const Tensor& b, bool smoothed) {
  const int64_t batch = alpha.size(0), m = alpha.size(1), n = b.size(1);
  return {alpha.new_empty({batch}, alpha.dtype), alpha.new_empty({batch, m}, alpha.dtype),
          alpha.new_empty({batch, n}, alpha.dtype),
          alpha.new_empty({batch, smoothed ? n : 0}, alpha.dtype)};
}

// Problem p of the smoothed dual, in double: shares (h - level) / mu magnify the rounding of h.
template <class T, class C>
void evaluate_smoothed(Options options, const Cost<C>& cost, int64_t p, const Tensor& alpha,
                       const Tensor& beta, const Tensor& a, const Tensor& b,
                       const Tensor& smoothing, const Maybe& start, const Outputs& out,
                       int threads) {
  const int64_t m = options.m, n = options.n;
  const auto wide = [&](const Tensor& from, int64_t count) {
    return std::vector<double>(from.as<T>() + p * count, from.as<T>() + (p + 1) * count);
  };
  const auto x = wide(alpha, m), y = wide(beta, n), rows = wide(a, m), columns = wide(b, n);
  std::vector<double> level = start ? wide(*start, n) : std::vector<double>(n);
  options.smoothing = smoothing.as<T>()[p];
  const auto& [obj, grad_alpha, column, to_level] = out;
  Scratch<double> scratch;
  evaluate<double, C, T>(options, 1, x.data(), y.data(), cost, rows.data(), columns.data(),
                         obj.template as<T>() + p, grad_alpha.template as<T>() + p * m,
                         column.template as<T>() + p * n, level.data(), nullptr, scratch, threads);
  std::copy(level.begin(), level.end(), to_level.template as<T>() + p * n);
}

Outputs ot_value_grad_forward(const Tensor& alpha, const Maybe& beta, const Tensor& cost,
                              const Maybe& y, const Tensor& a, const Tensor& b,
                              const Maybe& smoothing, const Maybe& level, const std::string& metric,
                              const std::string& reg, double gamma, int64_t max_nz) {
  const int64_t batch = alpha.size(0), m = alpha.size(1), n = b.size(1);
  const Options options{m, n, max_nz, gamma, reg_of(reg), beta.has_value()};
  const Outputs out = outputs_of(alpha, b, smoothing.has_value());
  const int threads = num_threads();
  with_cost(cost, y, metric, m, n, false, false, [&](const auto& all) {
    using C = typename std::decay_t<decltype(all)>::Element;
    using T = StateOf<C>;
    if (smoothing) {
      for (int64_t p = 0; p < batch; ++p) {
        evaluate_smoothed<T>(options, all.at(p, m * n), p, alpha, *beta, a, b, *smoothing, level,
                             out, threads);
      }
      return;
    }
    Scratch<T> scratch;
    evaluate<T, C, T>(options, batch, alpha.as<T>(), beta ? beta->as<T>() : nullptr, all, a.as<T>(),
                      b.as<T>(), std::get<0>(out).as<T>(), std::get<1>(out).as<T>(),
                      std::get<2>(out).as<T>(), nullptr, nullptr, scratch, threads);
  });
  return out;
}

std::optional<std::string> ot_value_grad_supports(const py::args& args) {
  return cannot_take(py::cast<Tensor>(args[2]), py::cast<Maybe>(args[3]),
                     py::cast<Tensor>(args[0]).size(1));
}

#ifdef DASHPOT_CUDA
Outputs ot_value_grad_forward_cuda(const Tensor& alpha, const Maybe& beta, const Tensor& cost,
                                   const Maybe& y, const Tensor& a, const Tensor& b,
                                   const Maybe& smoothing, const Maybe& level,
                                   const std::string& metric, const std::string& reg, double gamma,
                                   int64_t max_nz) {
  const Tensor to_level = alpha.new_empty({alpha.size(0), smoothing ? b.size(1) : 0}, alpha.dtype);
  const auto found = evaluate_on_device(
      alpha, beta ? &*beta : nullptr, cost_on_device(cost, false, y, metric_of(metric)), a, b,
      reg_of(reg), gamma, max_nz, smoothing ? smoothing->data : nullptr,
      level ? level->data : nullptr, to_level.data);
  return std::tuple_cat(found, std::make_tuple(to_level));
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("ot_value_grad_forward", &ot_value_grad_forward);
  m.def("ot_value_grad_supports", &ot_value_grad_supports);
#ifdef DASHPOT_CUDA
  m.def("ot_value_grad_forward_cuda", &ot_value_grad_forward_cuda);
  m.def("ot_value_grad_supports_cuda", &ot_value_grad_supports);
#endif
}

}  // namespace dashpot::transport
