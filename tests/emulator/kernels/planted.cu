// Kernels that are wrong, each in one way that the emulator, or AddressSanitizer with it, reports.
#include <memory>

#include "common/cuda.cuh"
#include "table.h"

namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

// ---- Reported by the emulator ------------------------------------------------------------------

__global__ void lane_outside_mask_kernel() {
  if (threadIdx.x < 16) __shfl_sync(0x0000FFFFu, 1.0f, 20);
}

__global__ void caller_outside_mask_kernel() { __shfl_sync(0xFFFFFFFEu, 1.0f, 1); }

__global__ void odd_width_kernel() { __shfl_down_sync(kAll, 1.0f, 1, 12); }

__global__ void exited_lane_kernel() {
  if (threadIdx.x >= 16) return;
  __shfl_xor_sync(kAll, 1.0f, 16);
}

// Right for full warps only: launched with 40 threads.
__global__ void absent_lane_kernel() { __shfl_down_sync(kAll, 1.0f, 16); }

__global__ void different_intrinsics_kernel() {
  if (threadIdx.x < 16) {
    __shfl_sync(kAll, 1.0f, 0);
  } else {
    __ballot_sync(kAll, 1);
  }
}

__global__ void different_masks_kernel() { __syncwarp(threadIdx.x == 0 ? 0x00000003u : kAll); }

__global__ void different_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void deadlock_kernel() {
  if (threadIdx.x >= 48) return;
  if (threadIdx.x < 16) {
    __syncthreads();
  } else if (threadIdx.x < 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void trap_kernel() {
  if (threadIdx.x == 3) __trap();
}

__global__ void nothing_kernel() {}

// ---- Reported by AddressSanitizer and its companions -------------------------------------------

template <int kSize>
__global__ void static_overflow_kernel(int past) {
  __shared__ float values[kSize];
  float* start = values;
  start[threadIdx.x + past] = 1.0f;
}

__global__ void row_overflow_kernel(int past) {
  __shared__ float values[4][32];
  values[1][threadIdx.x + past] = 1.0f;
}

__global__ void dynamic_overflow_kernel(int past) {
  DASHPOT_DYNAMIC_SHARED(float, values);
  values[threadIdx.x + past] = 1.0f;
}

__global__ void local_overflow_kernel(int past) {
  float values[32];
  for (int i = 0; i < 32; ++i) values[i] = static_cast<float>(i);
  float* volatile start = values;
  __syncthreads();  // the array lives on a stack that is left and entered again
  start[threadIdx.x + past] = 1.0f;
}

__global__ void global_overflow_kernel(float* values, int past) {
  values[threadIdx.x + past] = 1.0f;
}

__global__ void misaligned_kernel(float* values, int past) {
  *reinterpret_cast<float4*>(values + past) = make_float4(1, 2, 3, 4);
}

// ---- Launchers -------------------------------------------------------------------------------

template <auto kKernel, int kThreads, int kSharedBytes, int... kArguments>
void run() {
  dashpot::launch(kKernel, 2, kThreads, kSharedBytes, nullptr, kArguments...);
}

template <auto kKernel, int kThreads>
void run_on_heap() {
  auto values = std::make_unique<float[]>(32);
  dashpot::launch(kKernel, 1, kThreads, 0, nullptr, values.get(), 1);
}

// Right for as many elements as the tensor has.
void fill(float* values, int n) {
  dashpot::launch(global_overflow_kernel, 1, n, 0, nullptr, values, 0);
}

const Entry entries[] = {
    {"lane_outside_mask", run<lane_outside_mask_kernel, 32, 0>},
    {"caller_outside_mask", run<caller_outside_mask_kernel, 32, 0>},
    {"odd_width", run<odd_width_kernel, 32, 0>},
    {"exited_lane", run<exited_lane_kernel, 32, 0>},
    {"absent_lane", run<absent_lane_kernel, 40, 0>},
    {"different_intrinsics", run<different_intrinsics_kernel, 32, 0>},
    {"different_masks", run<different_masks_kernel, 32, 0>},
    {"different_barriers", run<different_barriers_kernel, 64, 0>},
    {"deadlock", run<deadlock_kernel, 64, 0>},
    {"trap", run<trap_kernel, 32, 0>},
    {"too_many_threads", run<nothing_kernel, 1025, 0>},
    {"too_much_shared", run<nothing_kernel, 32, 228 * 1024>},
    {"static_overflow", run<static_overflow_kernel<32>, 32, 0, 1>},
    {"row_overflow", run<row_overflow_kernel, 32, 0, 1>},
    {"dynamic_overflow", run<dynamic_overflow_kernel, 32, 32 * sizeof(float), 1>},
    {"local_overflow", run<local_overflow_kernel, 32, 0, 1>},
    {"global_overflow", run_on_heap<global_overflow_kernel, 32>},
    {"misaligned", run_on_heap<misaligned_kernel, 1>},
    {"fill", fill},
};

}  // namespace
