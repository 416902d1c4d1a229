// dispatch_plan: ids (T, k) int32 on the device -> the plan; the kernels are in plan.cuh.
#include "experts/plan.cuh"

namespace dashpot::experts {

int64_t plan_scratch(const CudaPlan& plan) { return (plan_warps(plan) + 1) * plan.experts; }

void dispatch_plan_cuda(const CudaPlan& plan, const int32_t* ids, int32_t* scratch, int device,
                        void* stream) {
  const DeviceGuard guard(device);
  make_plan(plan, StoredIds{ids}, scratch, stream);
}

}  // namespace dashpot::experts
