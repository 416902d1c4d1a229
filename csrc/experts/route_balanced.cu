// route_balanced: seed, offset -> ids (U,) int32 with equal counts; see philox.h.
//
//   balanced_count_kernel   how many units each bucket gets (B,)
//   balanced_scan_kernel    one block: the place of each bucket's first unit
//   balanced_deal_kernel    (key, unit) to its bucket (U,), in whatever order threads come
//   balanced_rank_kernel    place among all = first of the bucket + number of smaller pairs in it
//
// Keys are uniform by construction, so that cutting their range into B = U / 32 parts is nearly the
// whole sort: a bucket of about 32 pairs is compared with each of them, from the cache. A pair
// holds its unit, so ranks do not depend on the order within a bucket, and the atomics, on integers
// only, leave the same bits each time. Keys are drawn twice. Bytes: 8U written, 8U read, 4U
// written, B counters; a radix sort of the pairs moves 16U in each of its passes.
#include "common/numeric.cuh"
#include "experts/cuda.h"
#include "experts/philox.h"

namespace dashpot::experts {

int64_t balanced_buckets(int64_t units) {
  constexpr int64_t kUnitsEach = 32, kMost = 1 << 20;
  const int64_t buckets = (units + kUnitsEach - 1) / kUnitsEach;
  return buckets < kMost ? buckets : kMost;
}

namespace {

constexpr int kThreads = 256, kScanThreads = 1024;

__device__ __forceinline__ uint32_t key_of(const DeviceBalance& route, int64_t unit) {
  return philox(static_cast<uint64_t>(*route.seed), static_cast<uint64_t>(*route.offset),
                static_cast<uint32_t>(unit), kBalancedBlock)
      .word[0];
}

__global__ void __launch_bounds__(kThreads)
    balanced_count_kernel(DeviceBalance route, int buckets, int32_t* counts) {
  const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit < route.units) atomicAdd(&counts[index_of(key_of(route, unit), buckets)], 1);
}

// next (B,): counts -> the sum of those before.
__global__ void __launch_bounds__(kScanThreads) balanced_scan_kernel(int buckets, int32_t* next) {
  __shared__ int32_t sums[kScanThreads];
  const int thread = threadIdx.x;
  int32_t carry = 0;
  for (int first = 0; first < buckets; first += kScanThreads) {
    const int b = first + thread;
    const int32_t count = b < buckets ? next[b] : 0;
    sums[thread] = count;
    __syncthreads();
    for (int step = 1; step < kScanThreads; step *= 2) {
      const int32_t before = thread >= step ? sums[thread - step] : 0;
      __syncthreads();
      sums[thread] += before;
      __syncthreads();
    }
    if (b < buckets) next[b] = carry + sums[thread] - count;
    carry += sums[kScanThreads - 1];
    __syncthreads();
  }
}

// next: where a bucket's first pair goes -> where it ends.
__global__ void __launch_bounds__(kThreads)
    balanced_deal_kernel(DeviceBalance route, int buckets, int32_t* next, uint64_t* pairs) {
  const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit >= route.units) return;
  const uint32_t key = key_of(route, unit);
  const int32_t place = atomicAdd(&next[index_of(key, buckets)], 1);
  pairs[place] = uint64_t{key} << 32 | static_cast<uint64_t>(unit);
}

__global__ void __launch_bounds__(kThreads)
    balanced_rank_kernel(DeviceBalance route, int buckets, const int32_t* ends,
                         const uint64_t* pairs, int32_t* ids) {
  const int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= route.units) return;
  const uint64_t pair = pairs[p];
  const int b = index_of(static_cast<uint32_t>(pair >> 32), buckets);
  const int64_t begin = b == 0 ? 0 : ends[b - 1], end = ends[b];
  int64_t position = begin;
  for (int64_t i = begin; i < end; ++i) position += pairs[i] < pair;
  ids[static_cast<uint32_t>(pair)] = static_cast<int32_t>(position * route.experts / route.units);
}

}  // namespace

void route_balanced_cuda(const DeviceBalance& route, int32_t* counts, int64_t* pairs, int32_t* ids,
                         int device, void* stream) {
  if (route.units == 0) return;
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const int buckets = static_cast<int>(balanced_buckets(route.units));
  auto* const entries = reinterpret_cast<uint64_t*>(pairs);
  const dim3 grid(static_cast<unsigned>((route.units + kThreads - 1) / kThreads));
  check_cuda(cudaMemsetAsync(counts, 0, buckets * sizeof(int32_t), on), "clearing counters");
  launch(&balanced_count_kernel, grid, dim3(kThreads), 0, on, route, buckets, counts);
  launch(&balanced_scan_kernel, dim3(1), dim3(kScanThreads), 0, on, buckets, counts);
  launch(&balanced_deal_kernel, grid, dim3(kThreads), 0, on, route, buckets, counts, entries);
  launch(&balanced_rank_kernel, grid, dim3(kThreads), 0, on, route, buckets, counts, entries, ids);
}

}  // namespace dashpot::experts
