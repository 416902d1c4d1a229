// route_random: seed, offset -> ids (P*U, k) int32, a thread for each row; see philox.h.
#include "common/numeric.cuh"
#include "experts/cuda.h"
#include "experts/philox.h"

namespace dashpot::experts {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    route_random_kernel(DeviceRoute route, int64_t rows, int32_t* ids) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= rows) return;
  const Route drawn{static_cast<uint64_t>(*route.seed),
                    static_cast<uint64_t>(*route.offset),
                    route.units,
                    route.experts,
                    route.k,
                    route.replace};
  choose(drawn, t, ids + t * route.k);
}

}  // namespace

void route_random_cuda(const DeviceRoute& route, int64_t rows, int32_t* ids, int device,
                       void* stream) {
  const DeviceGuard guard(device);
  const int64_t blocks = (rows + kThreads - 1) / kThreads;
  launch(&route_random_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
         static_cast<cudaStream_t>(stream), route, rows, ids);
}

}  // namespace dashpot::experts
