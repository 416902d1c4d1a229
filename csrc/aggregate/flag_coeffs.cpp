// flag_coeffs: K (p, p) float64 -> c (p,); the solve is in flag_solve.h, on one thread.
#include <optional>
#include <string>
#include <tuple>

#include "aggregate/cuda_binding.h"
#include "aggregate/flag_solve.h"
#include "common/bind.h"
#include "common/eigh.h"
#include "common/tensor.h"

namespace dashpot::aggregate {
namespace {

struct Solver : Alone {
  void eigh(double* a, double* vectors, double* values, double* scratch, int n) const {
    dashpot::eigh(a, vectors, values, scratch, n);
  }
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // c (p,), v (p,), objective, iters

Outputs outputs(const Tensor& k, int64_t p) {
  return {k.new_empty({p}, Dtype::kFloat64), k.new_empty({p}, Dtype::kFloat64),
          k.new_empty({}, Dtype::kFloat64), k.new_empty({}, Dtype::kInt64)};
}

FlagOptions options_of(std::optional<int> m, int n_iter, double lam, double eps, double power,
                       const std::string& pair, const std::string& output, double tol) {
  const FlagOutput scale = output == "official" ? kOfficial
                           : output == "paper"  ? kPaper
                                                : kRescaled;
  return {m.value_or(0), n_iter, lam, eps, power, pair == "objective", scale, tol};
}

Outputs flag_coeffs_forward(const Tensor& k, std::optional<int> m, int n_iter, double lam,
                            double eps, double power, const std::string& pair,
                            const std::string& output, double tol) {
  const FlagOptions options = options_of(m, n_iter, lam, eps, power, pair, output, tol);
  const int p = static_cast<int>(k.size(0));
  const Outputs out = outputs(k, p);
  const auto& [c, v, objective, iters] = out;
  const py::gil_scoped_release release;
  std::vector<double> work(flag_work_size(p));
  flag_solve(Solver{}, k.as<double>(), p, options, work.data(), c.as<double>(), v.as<double>(),
             objective.as<double>(), iters.as<int64_t>());
  return out;
}

#ifdef DASHPOT_CUDA
Outputs flag_coeffs_forward_cuda(const Tensor& k, std::optional<int> m, int n_iter, double lam,
                                 double eps, double power, const std::string& pair,
                                 const std::string& output, double tol) {
  const FlagOptions options = options_of(m, n_iter, lam, eps, power, pair, output, tol);
  const int p = static_cast<int>(k.size(0));
  const Outputs out = outputs(k, p);
  const auto& [c, v, objective, iters] = out;
  const Place place = place_of(k);
  const Work work(k, flag_work_size(p), place.device);
  flag_coeffs_cuda(k.as<double>(), p, options, work.get(), c.as<double>(), v.as<double>(),
                   objective.as<double>(), iters.as<int64_t>(), place.device, place.stream);
  return out;
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("flag_coeffs_forward", &flag_coeffs_forward);
#ifdef DASHPOT_CUDA
  m.def("flag_coeffs_forward_cuda", &flag_coeffs_forward_cuda);
#endif
}

}  // namespace dashpot::aggregate
