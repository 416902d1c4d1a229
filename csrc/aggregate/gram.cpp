// gram: K_ij = sum_k g_ik g_jk, rows (p, d) -> (p, p) float64; the loops are in pairs.h.
#include <string>

#include "aggregate/pairs.h"
#include "aggregate/pairs_cuda.h"
#include "common/bind.h"

namespace dashpot::aggregate {
namespace {

Tensor gram_forward(const std::vector<Tensor>& grads, const std::optional<Tensor>& mask, int64_t p,
                    const std::string& accum) {
  return pairs_forward<Product>(grads, mask, p, accum == "fp64");
}

#ifdef DASHPOT_CUDA
Tensor gram_forward_cuda(const std::vector<Tensor>& grads, const std::optional<Tensor>& mask,
                         int64_t p, const std::string& accum) {
  return pairs_forward_cuda(grads, mask, p, PairSum::kProduct, accum == "fp64");
}

std::optional<std::string> gram_supports_cuda(const py::args& args) {
  return too_many_workers(py::cast<int64_t>(args[2]));
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("gram_forward", &gram_forward);
#ifdef DASHPOT_CUDA
  m.def("gram_forward_cuda", &gram_forward_cuda);
  m.def("gram_supports_cuda", &gram_supports_cuda);
#endif
}

}  // namespace dashpot::aggregate
