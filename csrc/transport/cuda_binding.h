// What the family's bindings share on CUDA.
#pragma once

#ifdef DASHPOT_CUDA

#include <optional>
#include <string>
#include <tuple>

#include "common/tensor.h"
#include "transport/cuda.h"

namespace dashpot::transport {

// alpha, a (B, m), b (B, n), beta (B, n) for the dual, cost (B, m, n) -> value (B,), a - T 1 (B,
// m), and what the op says of the columns (B, n).
inline std::tuple<Tensor, Tensor, Tensor> evaluate_on_device(const Tensor& alpha,
                                                             const Tensor* beta, const Tensor& cost,
                                                             const Tensor& a, const Tensor& b,
                                                             Reg reg, double gamma, int64_t k) {
  const int64_t batch = cost.size(0), m = cost.size(1), n = cost.size(2);
  const int64_t chunks = device_chunks(n, element_size(cost.dtype));
  const Tensor obj = alpha.new_empty({batch}, alpha.dtype);
  const Tensor grad_alpha = alpha.new_empty({batch, m}, alpha.dtype);
  const Tensor column = alpha.new_empty({batch, n}, alpha.dtype);
  const Tensor row_sums = alpha.new_empty({batch * chunks * m}, alpha.dtype);
  const Tensor values = alpha.new_empty({batch * chunks}, Dtype::kFloat64);
  const Place place = place_of(alpha);
  evaluate_cuda({{m, n, k, gamma, reg, beta != nullptr},
                 batch,
                 cost.dtype,
                 cost.data,
                 alpha.data,
                 beta ? beta->data : nullptr,
                 a.data,
                 b.data,
                 obj.data,
                 grad_alpha.data,
                 column.data,
                 row_sums.data,
                 values.as<double>()},
                place.device, place.stream);
  return {obj, grad_alpha, column};
}

using SolveOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// As regularized_ot.cpp says.
inline SolveOutputs solve_on_device(const Settings& settings, const Tensor& cost, const Tensor& a,
                                    const Tensor& b, const Tensor& alpha, const Tensor& beta,
                                    bool by_rows) {
  const int64_t batch = cost.size(0), m = a.size(1), n = b.size(1);
  const SolveOutputs out{a.new_empty({batch, m}, a.dtype),      a.new_empty({batch, n}, a.dtype),
                         a.new_empty({batch}, a.dtype),         a.new_empty({batch, 2}, a.dtype),
                         a.new_empty({batch, 2}, a.dtype),      a.new_empty({batch}, a.dtype),
                         a.new_empty({batch, 4}, Dtype::kInt32)};
  const auto& [to_alpha, to_beta, value, row_error, col_error, gap, counts] = out;
  const Tensor room = a.new_empty({batch * solve_numbers(m, n)}, Dtype::kFloat64);
  const Place place = place_of(a);
  solve_cuda({settings, batch, by_rows, cost.data, a.data, b.data, alpha.data, beta.data,
              room.as<double>(), to_alpha.data, to_beta.data, value.data, row_error.data,
              col_error.data, gap.data, counts.as<int32_t>()},
             cost.dtype, place.device, place.stream);
  return out;
}

// None, or why the kernel cannot take the call.
inline std::optional<std::string> too_long_for_a_block(const Tensor& cost, int64_t m, int64_t n) {
  if (solve_fits(m, n, cost.dtype, place_of(cost).device)) return std::nullopt;
  return "keeps the potentials in a block's shared memory, got " + std::to_string(m) +
         " rows and " + std::to_string(n) + " columns";
}

}  // namespace dashpot::transport

#endif
