// The counting sort behind dispatch_plan and random_plan on CUDA: three launches, five where a
// capacity goes by choice. No atomics on floats, no host synchronisation.
//
//   plan_count_kernel   a warp counts its share of the ids in shared memory [E]; order = -1
//   plan_scan_kernel    one block: prefix of each expert's counts over the warps, then over experts
//   plan_place_kernel   a warp takes its ids 32 at a time: lanes with the same id find each other
//   by
//                       ballots on the id's bits, so that ranks are stable without atomics
//
// A warp is a block of its own: its counters need no barrier between warps, and shared memory is
// O(E). Ids come from memory or are drawn again (`Ids`). With capacity by choice the same three
// kernels first rank the ids in the order of priority (Order::kPriority) and leave in `rank` who is
// kept (0) and who is not (-1). Bytes: 4n read twice, 8n written; about 2 log2 E ballots for 32
// ids.
#pragma once

#include "common/numeric.cuh"
#include "experts/cuda.h"
#include "experts/philox.h"

namespace dashpot::experts {

// Ids a warp takes: at least so many that its counters are no more than its ids.
inline int64_t plan_share(const CudaPlan& plan) {
  return plan.experts > 1024 ? plan.experts : 1024;
}

inline int64_t plan_warps(const CudaPlan& plan) {
  const int64_t n = plan.tokens * plan.k, share = plan_share(plan);
  return n == 0 ? 1 : (n + share - 1) / share;
}

namespace {

enum class Order { kFlat, kPriority };

constexpr int kScanThreads = 256;

// Ids as they lie in memory.
struct StoredIds {
  const int32_t* ids;
  __device__ __forceinline__ int at(int64_t i, int64_t) const { return ids[i]; }
};

// Ids drawn again.
struct DrawnIds {
  DeviceRoute route;
  __device__ __forceinline__ int at(int64_t i, int64_t k) const {
    int32_t ids[kMaxDrawn];
    const int64_t t = i / k;
    const int j = static_cast<int>(i - t * k);
    const Route drawn{static_cast<uint64_t>(*route.seed),
                      static_cast<uint64_t>(*route.offset),
                      route.units,
                      route.experts,
                      j + 1,
                      route.replace};
    choose(drawn, t, ids);
    return ids[j];
  }
};

// The id that comes q-th, and its flat index; -1 if it does not count.
template <Order order, class Ids>
__device__ __forceinline__ int take(const CudaPlan& plan, const Ids& ids, int64_t q, int64_t* i) {
  *i = q;
  if constexpr (order == Order::kPriority) *i = q % plan.tokens * plan.k + q / plan.tokens;
  if (order == Order::kFlat && plan.by_choice && plan.rank[*i] < 0) return -1;
  const int id = ids.at(*i, plan.k);
  return id >= 0 && id < plan.experts ? id : -1;
}

template <Order order, class Ids>
__global__ void __launch_bounds__(32)
    plan_count_kernel(CudaPlan plan, Ids ids, int64_t share, int32_t* counts) {
  DASHPOT_DYNAMIC_SHARED(int32_t, count);
  for (int e = threadIdx.x; e < plan.experts; e += 32) count[e] = 0;
  __syncwarp();
  const int64_t n = plan.tokens * plan.k, begin = blockIdx.x * share;
  const int64_t end = begin + share < n ? begin + share : n;
  for (int64_t q = begin + threadIdx.x; q < end; q += 32) {
    int64_t i;
    const int id = take<order>(plan, ids, q, &i);
    if (id >= 0) atomicAdd(&count[id], 1);
  }
  __syncwarp();
  int32_t* out = counts + blockIdx.x * plan.experts;
  for (int e = threadIdx.x; e < plan.experts; e += 32) out[e] = count[e];
  const int64_t step = int64_t{gridDim.x} * 32;
  for (int64_t r = int64_t{blockIdx.x} * 32 + threadIdx.x; r < plan.slots; r += step) {
    plan.order[r] = -1;
  }
}

// counts (warps, E) -> the first slot of each warp's ids of e (flat) or their first place among the
// expert's ids (priority); last (E,): the slot after an expert's last row.
template <Order order>
__global__ void __launch_bounds__(kScanThreads)
    plan_scan_kernel(CudaPlan plan, int64_t warps, int32_t* counts, int32_t* last) {
  __shared__ int64_t sums[kScanThreads];
  int64_t carry = 0;  // slots of the experts before
  for (int64_t first = 0; first < plan.experts; first += kScanThreads) {
    const int64_t e = first + threadIdx.x;
    const bool inside = e < plan.experts;
    int32_t total = 0;
    for (int64_t w = 0; inside && w < warps; ++w) {
      const int32_t count = counts[w * plan.experts + e];
      counts[w * plan.experts + e] = total;
      total += count;
    }
    if constexpr (order == Order::kPriority) {
      if (inside) plan.routed[e] = total;
      continue;
    }
    int64_t kept = total;
    if (!plan.by_choice) {
      if (inside) plan.routed[e] = total;
      if (plan.capacity >= 0 && kept > plan.capacity) kept = plan.capacity;
    }
    const int64_t span = (kept + plan.align - 1) / plan.align * plan.align;
    sums[threadIdx.x] = span;
    __syncthreads();
    for (int step = 1; step < kScanThreads; step *= 2) {
      const int64_t before = static_cast<int>(threadIdx.x) >= step ? sums[threadIdx.x - step] : 0;
      __syncthreads();
      sums[threadIdx.x] += before;
      __syncthreads();
    }
    const int64_t stop = carry + sums[threadIdx.x], start = stop - span;
    carry += sums[kScanThreads - 1];
    __syncthreads();
    if (!inside) continue;
    plan.counts[e] = static_cast<int32_t>(kept);
    plan.offsets[e] = static_cast<int32_t>(stop);
    last[e] = static_cast<int32_t>(start + kept);
    for (int64_t w = 0; w < warps; ++w) {
      counts[w * plan.experts + e] += static_cast<int32_t>(start);
    }
  }
}

template <Order order, class Ids>
__global__ void __launch_bounds__(32)
    plan_place_kernel(CudaPlan plan, Ids ids, int64_t share, const int32_t* counts,
                      const int32_t* last) {
  DASHPOT_DYNAMIC_SHARED(int32_t, next);
  const int32_t* mine = counts + blockIdx.x * plan.experts;
  for (int e = threadIdx.x; e < plan.experts; e += 32) next[e] = mine[e];
  __syncwarp();
  int bits = 0;
  while ((int64_t{1} << bits) < plan.experts) ++bits;
  const int64_t n = plan.tokens * plan.k, begin = blockIdx.x * share;
  const int64_t end = begin + share < n ? begin + share : n;
  const unsigned before = (1u << threadIdx.x) - 1;
  for (int64_t q = begin; q < end; q += 32) {
    int64_t i = 0;
    const bool inside = q + threadIdx.x < end;
    const int id = inside ? take<order>(plan, ids, q + threadIdx.x, &i) : -1;
    unsigned same = __ballot_sync(0xFFFFFFFFu, id >= 0);
    for (int bit = 0; bit < bits; ++bit) {
      const unsigned set = __ballot_sync(0xFFFFFFFFu, (id >> bit) & 1);
      same &= (id >> bit) & 1 ? set : ~set;
    }
    const int32_t base = id >= 0 ? next[id] : 0;
    __syncwarp();
    if (id >= 0 && (same & before) == 0) next[id] = base + __popc(same);
    __syncwarp();
    if (!inside) continue;
    const int32_t place = base + __popc(same & before);
    if constexpr (order == Order::kPriority) {
      plan.rank[i] = id >= 0 && place < plan.capacity ? 0 : -1;
    } else {
      const bool room = id >= 0 && place < last[id];
      if (room) plan.order[place] = static_cast<int32_t>(i);
      plan.rank[i] = room ? place : -1;
    }
  }
}

template <Order order, class Ids>
void plan_pass(const CudaPlan& plan, const Ids& ids, int32_t* scratch, cudaStream_t stream) {
  const int64_t warps = plan_warps(plan), share = plan_share(plan);
  int32_t* const last = scratch + warps * plan.experts;
  const dim3 grid(static_cast<unsigned>(warps));
  const size_t shared = plan.experts * sizeof(int32_t);
  launch(&plan_count_kernel<order, Ids>, grid, dim3(32), shared, stream, plan, ids, share, scratch);
  launch(&plan_scan_kernel<order>, dim3(1), dim3(kScanThreads), 0, stream, plan, warps, scratch,
         last);
  launch(&plan_place_kernel<order, Ids>, grid, dim3(32), shared, stream, plan, ids, share, scratch,
         last);
}

template <class Ids>
void make_plan(const CudaPlan& plan, const Ids& ids, int32_t* scratch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (plan.by_choice) plan_pass<Order::kPriority>(plan, ids, scratch, on);
  plan_pass<Order::kFlat>(plan, ids, scratch, on);
}

}  // namespace
}  // namespace dashpot::experts
