// random_plan: seed, offset -> the plan of route_random's ids; plan.h.
//
// On the CPU the ids are drawn once, into `rank`, where the sort then writes each id's slot. On
// CUDA both passes draw them again.
#include "common/bind.h"
#include "experts/cuda.h"
#include "experts/plan.h"

namespace dashpot::experts {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs random_plan_forward(const Tensor& seed, const Tensor& offset, int64_t units, int experts,
                            int k, bool replace, int64_t passes, std::optional<int64_t> capacity,
                            const std::string& priority, int64_t align) {
  const PlanShape shape{passes * units, k, experts, align, capacity};
  const Plan plan(seed, shape);
  const Route route = route_of(seed, offset, units, experts, k, replace);
  const Outputs out = plan.outputs();
  const int threads = num_threads();
  const py::gil_scoped_release release;
  int32_t* const ids = plan.rank.as<int32_t>();
  choose_all(route, shape.tokens, ids, threads);
  make_plan(ids, nullptr, priority, shape, plan, threads);
  return out;
}

#ifdef DASHPOT_CUDA
Outputs random_plan_forward_cuda(const Tensor& seed, const Tensor& offset, int64_t units,
                                 int experts, int k, bool replace, int64_t passes,
                                 std::optional<int64_t> capacity, const std::string& priority,
                                 int64_t align) {
  const PlanShape shape{passes * units, k, experts, align, capacity};
  const Plan plan(seed, shape);
  const CudaPlan work = cuda_plan(plan, shape, priority);
  const Tensor scratch = seed.new_empty({plan_scratch(work)}, Dtype::kInt32);
  const Place place = place_of(seed);
  random_plan_cuda(work, {seed.as<int64_t>(), offset.as<int64_t>(), units, experts, k, replace},
                   scratch.as<int32_t>(), place.device, place.stream);
  return plan.outputs();
}

std::optional<std::string> random_plan_supports_cuda(const py::args& args) {
  if (py::cast<int64_t>(args[4]) > kMaxDrawn) {
    return "draws at most " + std::to_string(kMaxDrawn) + " choices again";
  }
  return too_many_experts(py::cast<int64_t>(args[3]));
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("random_plan_forward", &random_plan_forward);
#ifdef DASHPOT_CUDA
  m.def("random_plan_forward_cuda", &random_plan_forward_cuda);
  m.def("random_plan_supports_cuda", &random_plan_supports_cuda);
#endif
}

}  // namespace dashpot::experts
