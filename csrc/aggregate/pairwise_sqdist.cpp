// pairwise_sqdist: D_ij = sum_k (g_ik - g_jk)^2, rows (p, d) -> (p, p) float64; loops in pairs.h.
// norms: D_ii = sum_k g_ik^2 in place of 0.
#include "aggregate/cuda_binding.h"
#include "aggregate/pairs.h"
#include "common/bind.h"

namespace dashpot::aggregate {
namespace {

Tensor pairwise_sqdist_forward(const std::vector<Tensor>& grads, const std::optional<Tensor>& mask,
                               int64_t p, bool norms) {
  return norms ? pairs_forward<SquaredDifference<true>>(grads, mask, p, false)
               : pairs_forward<SquaredDifference<false>>(grads, mask, p, false);
}

#ifdef DASHPOT_CUDA
Tensor pairwise_sqdist_forward_cuda(const std::vector<Tensor>& grads,
                                    const std::optional<Tensor>& mask, int64_t p, bool norms) {
  const Rows rows(grads, p);
  const PairsScratch size = pairs_scratch(rows);
  const Tensor out = grads[0].new_empty({p, p}, Dtype::kFloat64);  // (p, p)
  const Tensor partials = grads[0].new_empty({size.partials}, Dtype::kFloat64);
  const Tensor note = grads[0].new_empty({size.notes}, Dtype::kInt32);
  const Place place = place_of(grads[0]);
  sqdist_cuda(rows, mask ? mask->as<bool>() : nullptr, norms, partials.as<double>(), note.as<int>(),
              out.as<double>(), place.device, place.stream);
  return out;
}

std::optional<std::string> pairwise_sqdist_supports_cuda(const py::args& args) {
  return too_many_workers(py::cast<int64_t>(args[2]));
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("pairwise_sqdist_forward", &pairwise_sqdist_forward);
#ifdef DASHPOT_CUDA
  m.def("pairwise_sqdist_forward_cuda", &pairwise_sqdist_forward_cuda);
  m.def("pairwise_sqdist_supports_cuda", &pairwise_sqdist_supports_cuda);
#endif
}

}  // namespace dashpot::aggregate
