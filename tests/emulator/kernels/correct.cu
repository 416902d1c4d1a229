// Kernels that are right, one for each thing that the emulator serves.
#include "common/cuda.cuh"
#include "table.h"

namespace {

__device__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  }
  return value;
}

// One sum per block; without kSync, the second stage may read what has not been written.
template <bool kSync>
__global__ void __launch_bounds__(1024)
    block_sum_kernel(const float* __restrict__ input, float* __restrict__ output, int n) {
  __shared__ float partial[32];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    sum += __ldg(&input[i]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = sum;
  if (kSync) __syncthreads();
  if (threadIdx.x < warpSize) {
    sum = warp_sum(threadIdx.x < blockDim.x / warpSize ? partial[threadIdx.x] : 0.0f);
    if (threadIdx.x == 0) output[blockIdx.x] = sum;
  }
}

// Rotates each warp's values through shared memory; without kSync it relies on lanes in lockstep.
template <bool kSync>
__global__ void warp_rotate_kernel(int* output) {
  __shared__ int values[32];
  values[threadIdx.x] = threadIdx.x;
  if (kSync) __syncwarp();
  output[threadIdx.x] = values[(threadIdx.x + 1) % warpSize];
}

__global__ void visit_kernel(int* visits, int* place) {
  int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  visits[i] += 1;
  const unsigned parts[6] = {blockIdx.x,  blockIdx.y,  blockIdx.z,
                             threadIdx.x, threadIdx.y, threadIdx.z};
  for (int part = 0; part < 6; ++part) place[i * 6 + part] = parts[part];
}

__global__ void ticket_kernel(int* counter, int* tickets) {
  tickets[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

template <class T>
__global__ void reverse_kernel(T* values) {
  DASHPOT_DYNAMIC_SHARED(T, staged);
  staged[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x];
}

// What shared memory holds when a block begins; each block leaves something else behind.
__global__ void uninitialised_kernel(float* output) {
  __shared__ float fixed;
  DASHPOT_DYNAMIC_SHARED(float, dynamic);
  output[2 * blockIdx.x] = fixed;
  output[2 * blockIdx.x + 1] = dynamic[0];
  fixed = dynamic[0] = 1.0f;
}

template <class T>
__global__ void shuffle_kernel(int kind, int argument, int width, T* output) {
  constexpr unsigned kAll = 0xFFFFFFFFu;
  T value = static_cast<T>(threadIdx.x) * 3;
  switch (kind) {
    case 0:
      value = __shfl_sync(kAll, value, argument, width);
      break;
    case 1:
      value = __shfl_up_sync(kAll, value, argument, width);
      break;
    case 2:
      value = __shfl_down_sync(kAll, value, argument, width);
      break;
    case 3:
      value = __shfl_xor_sync(kAll, value, argument, width);
      break;
  }
  output[threadIdx.x] = value;
}

// Two halves of a warp that take different branches, then meet again.
__global__ void vote_kernel(unsigned* output) {
  unsigned lane = threadIdx.x, ballot;
  if (lane < 16) {
    ballot = __ballot_sync(0x0000FFFFu, lane % 2);
  } else {
    ballot = __ballot_sync(0xFFFF0000u, lane % 3 == 0);
  }
  unsigned* mine = output + lane * 6;
  mine[0] = ballot;
  mine[1] = __any_sync(0xFFFFFFFFu, lane == 7);
  mine[2] = __all_sync(0xFFFFFFFFu, lane != 7);
  mine[3] = __reduce_add_sync(0xFFFFFFFFu, lane);
  mine[4] = __match_any_sync(0xFFFFFFFFu, lane % 5);
  mine[5] = __popc(__activemask()) > 0;
}

// Threads from `live` on exit before the barriers.
__global__ void exits_kernel(int live, int* output) {
  if (static_cast<int>(threadIdx.x) >= live) return;
  int count = __syncthreads_count(threadIdx.x % 2);
  int all = __syncthreads_and(static_cast<int>(threadIdx.x) < live);
  int any = __syncthreads_or(threadIdx.x == 1000);
  output[threadIdx.x] = count * 4 + all * 2 + any;
}

template <class T>
__global__ void add_kernel(T* total) {
  atomicAdd(total, threadIdx.x + 1);
}
template <class T>
__global__ void extremes_kernel(T* values) {
  T value = static_cast<T>(threadIdx.x * 37 % 101);
  atomicMin(&values[0], value);
  atomicMax(&values[1], value);
  T seen = values[2], next;  // counts by hand, as device code does where no atomic exists
  do {
    next = seen;
    seen = atomicCAS(&values[2], next, next + 1);
  } while (seen != next);
  if (atomicExch(&values[3], 1) == 0) atomicAdd(&values[4], 1);
}

template <class Storage>
__device__ float load(Storage value);
template <>
__device__ float load(__half value) {
  return __half2float(value);
}
template <>
__device__ float load(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ void store(__half* to, float value) { *to = __float2half(value); }
__device__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16(value); }

template <class Storage>
__global__ void widen_kernel(const Storage* narrow, float* wide, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) wide[i] = load(narrow[i]);
}
template <class Storage>
__global__ void narrow_kernel(const float* wide, Storage* narrow, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) store(&narrow[i], wide[i]);
}

// ---- Launchers -------------------------------------------------------------------------------

void block_sum(const float* input, float* output, int n, int blocks, int threads, bool sync) {
  dashpot::launch(sync ? block_sum_kernel<true> : block_sum_kernel<false>, blocks, threads, 0,
                  nullptr, input, output, n);
}

void warp_rotate(int* output, bool sync) {
  dashpot::launch(sync ? warp_rotate_kernel<true> : warp_rotate_kernel<false>, 1, 32, 0, nullptr,
                  output);
}

void visit(int* visits, int* place, int gx, int gy, int gz, int bx, int by, int bz) {
  dashpot::launch(visit_kernel, dim3(gx, gy, gz), dim3(bx, by, bz), 0, nullptr, visits, place);
}

void tickets(int* counter, int* output, int blocks, int threads) {
  dashpot::launch(ticket_kernel, blocks, threads, 0, nullptr, counter, output);
}

void reverse(double* values, int n) {
  dashpot::launch(reverse_kernel<double>, 1, n, n * sizeof(double), nullptr, values);
}

void uninitialised(float* output, int blocks) {
  dashpot::launch(uninitialised_kernel, blocks, 1, sizeof(float), nullptr, output);
}

template <class T>
void shuffle(int kind, int argument, int width, T* output) {
  dashpot::launch(shuffle_kernel<T>, 1, 32, 0, nullptr, kind, argument, width, output);
}

void votes(unsigned* output) { dashpot::launch(vote_kernel, 1, 32, 0, nullptr, output); }

void exits(int threads, int live, int* output) {
  dashpot::launch(exits_kernel, 1, threads, 0, nullptr, live, output);
}

template <class T>
void add(T* total, int blocks, int threads) {
  dashpot::launch(add_kernel<T>, blocks, threads, 0, nullptr, total);
}

void extremes(int* values, int blocks, int threads) {
  dashpot::launch(extremes_kernel<int>, blocks, threads, 0, nullptr, values);
}

template <class Storage>
void widen(const Storage* input, float* output, int n) {
  dashpot::launch(widen_kernel<Storage>, (n + 255) / 256, 256, 0, nullptr, input, output, n);
}

template <class Storage>
void narrow(const float* input, Storage* output, int n) {
  dashpot::launch(narrow_kernel<Storage>, (n + 255) / 256, 256, 0, nullptr, input, output, n);
}

const Entry entries[] = {
    {"block_sum", block_sum},
    {"warp_rotate", warp_rotate},
    {"visit", visit},
    {"tickets", tickets},
    {"reverse", reverse},
    {"uninitialised", uninitialised},
    {"shuffle_int32", shuffle<int>},
    {"shuffle_int64", shuffle<long long>},
    {"shuffle_float32", shuffle<float>},
    {"shuffle_float64", shuffle<double>},
    {"votes", votes},
    {"exits", exits},
    {"add_int32", add<int>},
    {"add_int64", add<unsigned long long>},
    {"add_float32", add<float>},
    {"add_float64", add<double>},
    {"extremes", extremes},
    {"widen_half", widen<__half>},
    {"widen_bfloat16", widen<__nv_bfloat16>},
    {"narrow_half", narrow<__half>},
    {"narrow_bfloat16", narrow<__nv_bfloat16>},
};

}  // namespace
