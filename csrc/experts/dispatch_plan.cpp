// dispatch_plan: ids (T, k) int32 -> counts, routed, offsets (E,), order (R,), rank (T, k); plan.h.
#include "common/bind.h"
#include "experts/cuda.h"
#include "experts/plan.h"

namespace dashpot::experts {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

PlanShape shape_of(const Tensor& ids, int64_t experts, std::optional<int64_t> capacity,
                   int64_t align) {
  if (ids.dtype != Dtype::kInt32) throw std::invalid_argument("expert_idx: expected int32");
  const int64_t k = ids.size(1);
  return {ids.size(0), k, experts, align, capacity};
}

Outputs dispatch_plan_forward(const Tensor& ids, const std::optional<Tensor>& scores,
                              int64_t experts, std::optional<int64_t> capacity,
                              const std::string& priority, int64_t align) {
  const PlanShape shape = shape_of(ids, experts, capacity, align);
  const Plan plan(ids, shape);
  const Outputs out = plan.outputs();
  const int threads = num_threads();
  const py::gil_scoped_release release;
  make_plan(ids.as<int32_t>(), scores ? &*scores : nullptr, priority, shape, plan, threads);
  return out;
}

#ifdef DASHPOT_CUDA
Outputs dispatch_plan_forward_cuda(const Tensor& ids, const std::optional<Tensor>&, int64_t experts,
                                   std::optional<int64_t> capacity, const std::string& priority,
                                   int64_t align) {
  const PlanShape shape = shape_of(ids, experts, capacity, align);
  const Plan plan(ids, shape);
  const CudaPlan work = cuda_plan(plan, shape, priority);
  const Tensor scratch = ids.new_empty({plan_scratch(work)}, Dtype::kInt32);
  const Place place = place_of(ids);
  dispatch_plan_cuda(work, ids.as<int32_t>(), scratch.as<int32_t>(), place.device, place.stream);
  return plan.outputs();
}

std::optional<std::string> dispatch_plan_supports_cuda(const py::args& args) {
  if (!args[1].is_none()) return "has no order by score";
  return too_many_experts(py::cast<int64_t>(args[2]));
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("dispatch_plan_forward", &dispatch_plan_forward);
#ifdef DASHPOT_CUDA
  m.def("dispatch_plan_forward_cuda", &dispatch_plan_forward_cuda);
  m.def("dispatch_plan_supports_cuda", &dispatch_plan_supports_cuda);
#endif
}

}  // namespace dashpot::experts
