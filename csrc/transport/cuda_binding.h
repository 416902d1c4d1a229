// What the family's bindings share on CUDA.
#pragma once

#ifdef DASHPOT_CUDA

#include <optional>
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

}  // namespace dashpot::transport

#endif
