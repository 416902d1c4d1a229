// regularized_ot: cost (B, m, n), or (B, n, m) with by_rows, or x (B, m, d) with y (B, n, d), a,
// alpha (B, m), b, beta (B, n) -> the potentials found, value (B,), row_error, col_error (B, 2) in
// L1 and Linf, gap (B,) and counts (B, 4): iterations, evaluations, tied columns, status. A whole
// solve per problem (solve.h): a batch is divided over threads by problems, a single problem by
// columns.
#include <optional>
#include <string>
#include <tuple>

#include "common/bind.h"
#include "transport/cuda_binding.h"
#include "transport/points.h"
#include "transport/solve.h"

namespace dashpot::transport {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A problem whose evaluations take some microseconds is not worth a second thread.
inline constexpr int64_t kShared = 1 << 16;

Outputs regularized_ot_forward(const Tensor& cost, const Tensor& a, const Tensor& b,
                               const Tensor& alpha, const Tensor& beta, bool by_rows,
                               const std::string& reg, double gamma, int64_t max_nz,
                               const std::string& formulation, const std::string& solver,
                               int64_t max_iter, double tol, double smoothing, double lr,
                               const std::optional<Tensor>& points, const std::string& metric) {
  const int64_t batch = cost.size(0), m = a.size(1), n = b.size(1);
  const Settings settings{{m, n, max_nz, gamma, reg_of(reg), formulation == "dual"},
                          solver_of(solver),
                          max_iter,
                          tol,
                          smoothing,
                          lr};
  const Outputs out{a.new_empty({batch, m}, a.dtype),      a.new_empty({batch, n}, a.dtype),
                    a.new_empty({batch}, a.dtype),         a.new_empty({batch, 2}, a.dtype),
                    a.new_empty({batch, 2}, a.dtype),      a.new_empty({batch}, a.dtype),
                    a.new_empty({batch, 4}, Dtype::kInt32)};
  const auto& [to_alpha, to_beta, value, row_error, col_error, gap, counts] = out;
  const int threads = num_threads();
  with_cost(cost, points, metric, m, n, by_rows, true, [&](const auto& all) {
    using C = typename std::decay_t<decltype(all)>::Element;
    using T = StateOf<C>;
    const bool shared = batch < threads && m * n >= kShared;
    parallel_for(batch, shared ? 1 : threads, [&](int64_t p) {
      std::vector<double> x(alpha.as<T>() + p * m, alpha.as<T>() + (p + 1) * m);
      std::vector<double> y(beta.as<T>() + p * n, beta.as<T>() + (p + 1) * n);
      Solve<T, C> solve(settings, all.at(p, m * n), a.as<T>() + p * m, b.as<T>() + p * n,
                        shared ? threads : 1);
      const Report found = solve(x.data(), y.data());
      std::copy(x.begin(), x.end(), to_alpha.as<T>() + p * m);
      std::copy(y.begin(), y.end(), to_beta.as<T>() + p * n);
      value.as<T>()[p] = static_cast<T>(found.value);
      row_error.as<T>()[2 * p] = static_cast<T>(found.row_l1);
      row_error.as<T>()[2 * p + 1] = static_cast<T>(found.row_max);
      col_error.as<T>()[2 * p] = static_cast<T>(found.col_l1);
      col_error.as<T>()[2 * p + 1] = static_cast<T>(found.col_max);
      gap.as<T>()[p] = static_cast<T>(found.gap);
      int32_t* const numbers = counts.as<int32_t>() + 4 * p;
      numbers[0] = found.iterations;
      numbers[1] = found.evaluations;
      numbers[2] = found.tied;
      numbers[3] = found.status;
    });
  });
  return out;
}

std::optional<std::string> regularized_ot_supports(const py::args& args) {
  return cannot_take(py::cast<Tensor>(args[0]), py::cast<std::optional<Tensor>>(args[15]),
                     py::cast<Tensor>(args[1]).size(1));
}

#ifdef DASHPOT_CUDA
Outputs regularized_ot_forward_cuda(const Tensor& cost, const Tensor& a, const Tensor& b,
                                    const Tensor& alpha, const Tensor& beta, bool by_rows,
                                    const std::string& reg, double gamma, int64_t max_nz,
                                    const std::string& formulation, const std::string& solver,
                                    int64_t max_iter, double tol, double smoothing, double lr,
                                    const std::optional<Tensor>& points,
                                    const std::string& metric) {
  const int64_t m = a.size(1), n = b.size(1);
  const Settings settings{{m, n, max_nz, gamma, reg_of(reg), formulation == "dual"},
                          solver_of(solver),
                          max_iter,
                          tol,
                          smoothing,
                          lr};
  return solve_on_device(settings, cost_on_device(cost, by_rows, points, metric_of(metric)), a, b,
                         alpha, beta);
}

std::optional<std::string> regularized_ot_supports_cuda(const py::args& args) {
  const Tensor a = py::cast<Tensor>(args[1]), b = py::cast<Tensor>(args[2]);
  if (const auto reason = regularized_ot_supports(args)) return reason;
  return too_long_for_a_block(py::cast<Tensor>(args[0]), !args[15].is_none(), a.size(1), b.size(1));
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("regularized_ot_forward", &regularized_ot_forward);
  m.def("regularized_ot_supports", &regularized_ot_supports);
#ifdef DASHPOT_CUDA
  m.def("regularized_ot_forward_cuda", &regularized_ot_forward_cuda);
  m.def("regularized_ot_supports_cuda", &regularized_ot_supports_cuda);
#endif
}

}  // namespace dashpot::transport
