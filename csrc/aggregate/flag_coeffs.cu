// flag_coeffs: K (p, p) float64 -> c (p,) by one block of threads; the solve is in flag_solve.h.
//
// The matrices lie in shared memory (p up to about 60), else in global memory, which the L2 cache
// holds. Nothing is read by the host: the number of steps is decided on the device.
#include "aggregate/cuda.h"
#include "aggregate/team.cuh"
#include "common/jacobi.cuh"

namespace dashpot::aggregate {
namespace {

struct SolverBlock : Block {
  __device__ void eigh(double* a, double* vectors, double* values, double* scratch, int n) const {
    jacobi_eigh(a, vectors, values, scratch, n);
  }
};

__global__ void __launch_bounds__(384, 1)
    flag_coeffs_kernel(const double* k, int p, FlagOptions options, double* work, double* c,
                       double* v, double* objective, int64_t* iters) {
  DASHPOT_DYNAMIC_SHARED(double, shared);
  const SolverBlock team{{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), nullptr}};
  flag_solve(team, k, p, options, work ? work : shared, c, v, objective, iters);
}

// A matrix of order p has (p/2)^2 blocks to rotate at once.
int threads_for(int p) { return p <= 16 ? 128 : p <= 32 ? 256 : 384; }

}  // namespace

bool fits_block(int64_t numbers, int device) {
  const int64_t kStatic = 1 << 10;  // what a block may hold besides
  return numbers * static_cast<int64_t>(sizeof(double)) + kStatic <= shared_limit(device);
}

void flag_coeffs_cuda(const double* k, int p, const FlagOptions& options, double* work, double* c,
                      double* v, double* objective, int64_t* iters, int device, void* stream) {
  const DeviceGuard guard(device);
  const size_t shared = work ? 0 : flag_work_size(p) * sizeof(double);
  launch(&flag_coeffs_kernel, dim3(1), dim3(threads_for(p)), shared,
         static_cast<cudaStream_t>(stream), k, p, options, work, c, v, objective, iters);
}

}  // namespace dashpot::aggregate
