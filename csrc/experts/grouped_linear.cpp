// grouped_linear: y_r = W_e x_r + b_e for rows r of segment e; one product of torch per segment.
//
// Backward: dx = dy W_e, dW_e = dy^T x, db_e = sum dy; zeros for a segment without rows.
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "experts/products.h"

namespace dashpot::experts {
namespace {

using MaybeTensor = std::optional<Tensor>;

Tensor grouped_linear_forward(const Tensor& xp, const Tensor& weight, const MaybeTensor& bias,
                              const Tensor& offsets) {
  const int64_t rows = xp.size(0), n = weight.size(1);
  const std::vector<Segment> segments = segments_of(offsets, rows);
  const Tensor y = xp.new_empty({rows, n}, xp.dtype);
  int64_t end = 0;
  for (size_t e = 0; e < segments.size(); ++e) {
    const auto [begin, count] = segments[e];
    end = begin + count;
    if (count == 0) continue;
    linear(rows_of(xp, begin, count), expert_of(weight, e),
           bias ? expert_of(*bias, e) : py::object(), rows_of(y, begin, count));
  }
  zero(y, end * n, (rows - end) * n);
  return y;
}

std::tuple<MaybeTensor, MaybeTensor, MaybeTensor> grouped_linear_backward(
    const Tensor& grad_y, const Tensor& xp, const Tensor& weight, const MaybeTensor& bias,
    const Tensor& offsets, const std::vector<bool>& needs) {
  const int64_t rows = xp.size(0), k = xp.size(1), experts = weight.size(0), n = weight.size(1);
  const std::vector<Segment> segments = segments_of(offsets, rows);
  std::tuple<MaybeTensor, MaybeTensor, MaybeTensor> grads;
  auto& [grad_xp, grad_weight, grad_bias] = grads;
  if (needs[0]) grad_xp = xp.new_empty({rows, k}, xp.dtype);
  if (needs[1]) grad_weight = weight.new_empty({experts, n, k}, weight.dtype);
  if (needs[2] && bias) grad_bias = bias->new_empty({experts, n}, bias->dtype);
  int64_t end = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const auto [begin, count] = segments[e];
    end = begin + count;
    if (grad_bias) column_sums(grad_y, begin, count, n, *grad_bias, e);
    if (count == 0) {
      if (grad_weight) zero(*grad_weight, e * n * k, n * k);
      continue;
    }
    const py::object dy = rows_of(grad_y, begin, count);
    if (grad_xp) multiply(dy, expert_of(weight, e), rows_of(*grad_xp, begin, count));
    if (grad_weight) {
      multiply(dy.attr("t")(), rows_of(xp, begin, count), expert_of(*grad_weight, e));
    }
  }
  if (grad_xp) zero(*grad_xp, end * k, (rows - end) * k);
  return grads;
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("grouped_linear_forward", &grouped_linear_forward);
  m.def("grouped_linear_backward", &grouped_linear_backward);
}

}  // namespace dashpot::experts
