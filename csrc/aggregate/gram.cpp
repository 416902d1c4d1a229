// gram: K_ij = sum_k g_ik g_jk, rows (p, d) -> (p, p) float64; the loops are in pairs.h.
#include <string>

#include "aggregate/cuda_binding.h"
#include "aggregate/pairs.h"
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
  const Rows rows(grads, p);
  const bool wide = accum == "fp64" || rows.dtype == Dtype::kFloat64;
  const PairsScratch narrow_size = gram_scratch(rows), wide_size = pairs_scratch(rows);
  const Tensor out = grads[0].new_empty({p, p}, Dtype::kFloat64);  // (p, p)
  const Tensor partials =
      grads[0].new_empty({std::max(narrow_size.partials, wide_size.partials)}, Dtype::kFloat64);
  const Tensor note = grads[0].new_empty({narrow_size.notes}, Dtype::kInt32);
  const bool* live = mask ? mask->as<bool>() : nullptr;
  const Place place = place_of(grads[0]);
  if (!wide) {
    gram_cuda(rows, live, partials.as<double>(), note.as<int>(), out.as<double>(), place.device,
              place.stream);
  }
  gram_wide_cuda(rows, live, wide ? nullptr : note.as<int>(), static_cast<int>(narrow_size.notes),
                 partials.as<double>(), out.as<double>(), place.device, place.stream);
  return out;
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
