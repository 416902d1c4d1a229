// krum_coeffs, nnm_coeffs and mda_coeffs: D (p, p) float64 -> coefficients, by one block of
// threads; the solves are in select_solve.h.
//
// Nothing is read by the host: MDA's search, too, is decided on the device.
#include "aggregate/cuda.h"
#include "aggregate/select_solve.h"
#include "aggregate/team.cuh"

namespace dashpot::aggregate {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads, 1)
    krum_coeffs_kernel(const double* d, int p, int k, int neighbours, bool squared, double* work,
                       double* c, double* scores) {
  DASHPOT_DYNAMIC_SHARED(double, shared);
  const Block team{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), nullptr};
  krum_solve(team, d, p, k, neighbours, squared, work ? work : shared, c, scores);
}

__global__ void __launch_bounds__(kThreads, 1)
    nnm_coeffs_kernel(const double* d, int p, int f, double* work, double* mixing) {
  DASHPOT_DYNAMIC_SHARED(double, shared);
  const Block team{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), nullptr};
  nnm_solve(team, d, p, f, work ? work : shared, mixing);
}

__global__ void __launch_bounds__(kThreads, 1)
    mda_coeffs_kernel(const double* d, int p, int f, double* work, double* c, double* diameter) {
  DASHPOT_DYNAMIC_SHARED(double, shared);
  __shared__ double slots[32];
  const Block team{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), slots};
  mda_solve(team, d, p, f, work ? work : shared, c, diameter);
}

// Shared memory of a launch: none where global memory was given.
size_t shared_bytes(const double* work, int64_t numbers) {
  return work ? 0 : static_cast<size_t>(numbers) * sizeof(double);
}

}  // namespace

void krum_coeffs_cuda(const double* d, int p, int k, int neighbours, bool squared, double* work,
                      double* c, double* scores, int device, void* stream) {
  const DeviceGuard guard(device);
  launch(&krum_coeffs_kernel, dim3(1), dim3(kThreads), shared_bytes(work, krum_work_size(p)),
         static_cast<cudaStream_t>(stream), d, p, k, neighbours, squared, work, c, scores);
}

void nnm_coeffs_cuda(const double* d, int p, int f, double* work, double* mixing, int device,
                     void* stream) {
  const DeviceGuard guard(device);
  launch(&nnm_coeffs_kernel, dim3(1), dim3(kThreads), shared_bytes(work, nnm_work_size(p)),
         static_cast<cudaStream_t>(stream), d, p, f, work, mixing);
}

void mda_coeffs_cuda(const double* d, int p, int f, double* work, double* c, double* diameter,
                     int device, void* stream) {
  const DeviceGuard guard(device);
  launch(&mda_coeffs_kernel, dim3(1), dim3(kThreads), shared_bytes(work, mda_work_size(p)),
         static_cast<cudaStream_t>(stream), d, p, f, work, c, diameter);
}

}  // namespace dashpot::aggregate
