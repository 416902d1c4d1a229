// permute: xp[r] = x[order[r] / k], x (T, d) -> (R, d); backward: dx_t = sum_j dxp[rank_tj].
#include "common/bind.h"
#include "common/tensor.h"
#include "experts/rows.h"

namespace dashpot::experts {
namespace {

Tensor permute_forward(const Tensor& x, const Tensor& order, const Tensor& rank) {
  const int64_t d = x.size(1), k = rank.size(1), slots = order.numel;
  const Tensor xp = x.new_empty({slots, d}, x.dtype);
  const int threads = num_threads();
  const py::gil_scoped_release release;
  const int64_t bytes = d * element_size(x.dtype);
  const bool stream = streams(xp.as<char>(), slots, bytes);
  for_row_blocks(slots, bytes, threads, [&](int64_t begin, int64_t end) {
    gather_rows(x.as<char>(), order.as<int32_t>(), k, begin, end, bytes, stream,
                xp.as<char>() + begin * bytes);
  });
  return xp;
}

Tensor permute_backward(const Tensor& grad_xp, const Tensor&, const Tensor& rank) {
  const int64_t d = grad_xp.size(1), tokens = rank.size(0), k = rank.size(1);
  const Tensor grad_x = grad_xp.new_empty({tokens, d}, grad_xp.dtype);
  const int threads = num_threads();
  const py::gil_scoped_release release;
  dispatch_floating(grad_xp.dtype, [&](auto element) {
    using T = decltype(element);
    sum_rows<T, T>(grad_xp.as<T>(), rank.as<int32_t>(), nullptr, tokens, k, d, threads,
                   grad_x.as<T>());
  });
  return grad_x;
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("permute_forward", &permute_forward);
  m.def("permute_backward", &permute_backward);
}

}  // namespace dashpot::experts
