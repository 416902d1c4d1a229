// geometric_median_coeffs and centered_clipping_coeffs: D (q, q) float64 -> c (q,), all steps in
// one launch of one block; the solves are in center_solve.h.
#include "aggregate/center_solve.h"
#include "aggregate/cuda.h"
#include "aggregate/team.cuh"

namespace dashpot::aggregate {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads, 1)
    geometric_median_coeffs_kernel(const double* d, int q, const double* weights,
                                   MedianOptions options, double* work, double* c, int64_t* iters) {
  DASHPOT_DYNAMIC_SHARED(double, shared);
  const Block team{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), nullptr};
  geometric_median_solve(team, d, q, weights, options, work ? work : shared, c, iters);
}

__global__ void __launch_bounds__(kThreads, 1)
    centered_clipping_coeffs_kernel(const double* d, int q, double tau, int n_iter, double* work,
                                    double* c) {
  DASHPOT_DYNAMIC_SHARED(double, shared);
  const Block team{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), nullptr};
  centered_clipping_solve(team, d, q, tau, n_iter, work ? work : shared, c);
}

size_t shared_bytes(const double* work, int q) {
  return work ? 0 : static_cast<size_t>(center_work_size(q)) * sizeof(double);
}

}  // namespace

void geometric_median_coeffs_cuda(const double* d, int q, const double* weights,
                                  const MedianOptions& options, double* work, double* c,
                                  int64_t* iters, int device, void* stream) {
  const DeviceGuard guard(device);
  launch(&geometric_median_coeffs_kernel, dim3(1), dim3(kThreads), shared_bytes(work, q),
         static_cast<cudaStream_t>(stream), d, q, weights, options, work, c, iters);
}

void centered_clipping_coeffs_cuda(const double* d, int q, double tau, int n_iter, double* work,
                                   double* c, int device, void* stream) {
  const DeviceGuard guard(device);
  launch(&centered_clipping_coeffs_kernel, dim3(1), dim3(kThreads), shared_bytes(work, q),
         static_cast<cudaStream_t>(stream), d, q, tau, n_iter, work, c);
}

}  // namespace dashpot::aggregate
