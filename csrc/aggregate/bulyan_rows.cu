// bulyan_rows: sqdist (p, p) float64 -> chosen (p,) bool by one block; see bulyan_select.h.
//
// Scores and orders lie in global memory, which the caches hold; nothing is read by the host.
#include "aggregate/bulyan_select.h"
#include "aggregate/cuda.h"
#include "aggregate/team.cuh"

namespace dashpot::aggregate {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    bulyan_rows_kernel(const double* sqdist, int p, int f, double* work, bool* chosen) {
  const Block team{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), nullptr};
  bulyan_select(team, sqdist, p, f, work, chosen);
}

}  // namespace

void bulyan_rows_cuda(const double* sqdist, int p, int f, double* work, bool* chosen, int device,
                      void* stream) {
  const DeviceGuard guard(device);
  launch(&bulyan_rows_kernel, dim3(1), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), sqdist,
         p, f, work, chosen);
}

}  // namespace dashpot::aggregate
