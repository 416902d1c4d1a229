// random_plan: the plan of random routes that are drawn in both passes and never stored; plan.cuh.
#include "experts/plan.cuh"

namespace dashpot::experts {

void random_plan_cuda(const CudaPlan& plan, const DeviceRoute& route, int32_t* scratch, int device,
                      void* stream) {
  const DeviceGuard guard(device);
  make_plan(plan, DrawnIds{route}, scratch, stream);
}

}  // namespace dashpot::experts
