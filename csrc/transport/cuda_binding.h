// What the family's bindings share on CUDA.
#pragma once

#ifdef DASHPOT_CUDA

#include <optional>
#include <string>
#include <tuple>

#include "common/tensor.h"
#include "transport/cuda.h"

namespace dashpot::transport {

inline CudaCost cost_on_device(const Tensor& cost, bool by_rows = false) {
  return {cost.data, cost.dtype, by_rows};
}
inline CudaCost cost_on_device(const Tensor& cost, bool by_rows, const std::optional<Tensor>& y,
                               Metric metric) {
  if (!y) return cost_on_device(cost, by_rows);
  return {cost.data, cost.dtype, false, y->data, cost.size(2), metric};
}

// alpha, a (B, m), b (B, n), beta (B, n) for the dual -> value (B,), a - T 1 (B, m), and what the
// op says of the columns (B, n).
inline std::tuple<Tensor, Tensor, Tensor> evaluate_on_device(
    const Tensor& alpha, const Tensor* beta, const CudaCost& cost, const Tensor& a, const Tensor& b,
    Reg reg, double gamma, int64_t k, const void* smoothing = nullptr, const void* level = nullptr,
    void* to_level = nullptr) {
  const int64_t batch = alpha.size(0), m = alpha.size(1), n = b.size(1);
  const int64_t chunks = device_chunks(n, element_size(cost.dtype));
  const Tensor obj = alpha.new_empty({batch}, alpha.dtype);
  const Tensor grad_alpha = alpha.new_empty({batch, m}, alpha.dtype);
  const Tensor column = alpha.new_empty({batch, n}, alpha.dtype);
  const Tensor row_sums = alpha.new_empty({batch * chunks * m}, alpha.dtype);
  const Tensor values = alpha.new_empty({batch * chunks}, Dtype::kFloat64);
  const Place place = place_of(alpha);
  evaluate_cuda({{m, n, k, gamma, reg, beta != nullptr},
                 batch,
                 cost,
                 alpha.data,
                 beta ? beta->data : nullptr,
                 a.data,
                 b.data,
                 obj.data,
                 grad_alpha.data,
                 column.data,
                 row_sums.data,
                 values.as<double>(),
                 smoothing,
                 level,
                 to_level},
                place.device, place.stream);
  return {obj, grad_alpha, column};
}

using SolveOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// As regularized_ot.cpp says.
inline SolveOutputs solve_on_device(const Settings& settings, const CudaCost& cost, const Tensor& a,
                                    const Tensor& b, const Tensor& alpha, const Tensor& beta) {
  const int64_t batch = a.size(0), m = a.size(1), n = b.size(1);
  const SolveOutputs out{a.new_empty({batch, m}, a.dtype),      a.new_empty({batch, n}, a.dtype),
                         a.new_empty({batch}, a.dtype),         a.new_empty({batch, 2}, a.dtype),
                         a.new_empty({batch, 2}, a.dtype),      a.new_empty({batch}, a.dtype),
                         a.new_empty({batch, 4}, Dtype::kInt32)};
  const auto& [to_alpha, to_beta, value, row_error, col_error, gap, counts] = out;
  const Tensor room = a.new_empty({batch * solve_numbers(m, n)}, Dtype::kFloat64);
  const Place place = place_of(a);
  solve_cuda({settings, batch, cost, a.data, b.data, alpha.data, beta.data, room.as<double>(),
              to_alpha.data, to_beta.data, value.data, row_error.data, col_error.data, gap.data,
              counts.as<int32_t>()},
             place.device, place.stream);
  return out;
}

// None, or why the kernel cannot take the call.
inline std::optional<std::string> too_long_for_a_block(const Tensor& cost, bool of_points,
                                                       int64_t m, int64_t n) {
  if (solve_fits(m, n, cost.dtype, of_points, place_of(cost).device)) return std::nullopt;
  return std::string("keeps the potentials") + (of_points ? " and the cost of points" : "") +
         " in a block's shared memory, got " + std::to_string(m) + " rows and " +
         std::to_string(n) + " columns";
}

}  // namespace dashpot::transport

#endif
