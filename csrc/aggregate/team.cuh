// A block of threads as a team, and where its matrices lie: in shared memory if they fit, else in
// global memory, which the caches hold.
#pragma once

#include "aggregate/team.h"
#include "common/cuda.cuh"
#include "common/numeric.cuh"

namespace dashpot::aggregate {
namespace {

struct Block {
  int rank, size;
  double* slots;  // (32,) shared, for max

  __device__ void sync() const { __syncthreads(); }
  // The largest of all threads' values; every thread calls it and gets it.
  __device__ double max(double value) const {
#pragma unroll
    for (int far = 16; far > 0; far /= 2) {
      value = fmax(value, __shfl_xor_sync(0xffffffffu, value, far));
    }
    __syncthreads();  // the slots' last readers are done
    if (rank % 32 == 0) slots[rank / 32] = value;
    __syncthreads();
    double most = slots[0];
    for (int warp = 1; warp < size / 32; ++warp) most = fmax(most, slots[warp]);
    return most;
  }
};

}  // namespace
}  // namespace dashpot::aggregate
