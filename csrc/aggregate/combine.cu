// combine: u = sum_i c_i g_i, rows (p, d), c (p,) float64 -> S updates (n_s,), one streaming pass.
//
// A block lists the rows with c_i != 0 in shared memory (the others are never read: their NaN must
// not leak), then each thread owns kVector neighbouring coordinates, 16 bytes where every pointer
// allows it, and loads kAhead rows before it uses the first. Blocks take chunks from the last to
// the first: the Gram pass before went forwards, so what it read last is still in the L2 cache.
#include "aggregate/cuda.h"
#include "aggregate/rows.cuh"

namespace dashpot::aggregate {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 8;

// N neighbouring elements, moved as one 16-byte word (or, for N = 1, as they are). The word is what
// makes the compiler use one instruction: __half and __nv_bfloat16 copy element by element.
template <class T, int N>
union Packed {
  __device__ Packed() {}
  uint4 word;
  T value[N];
  __device__ __forceinline__ void load(const T* from) {
    if constexpr (N * sizeof(T) == 16) {
      word = *reinterpret_cast<const uint4*>(from);
    } else {
      value[0] = from[0];
    }
  }
  __device__ __forceinline__ void store(T* to) const {
    if constexpr (N * sizeof(T) == 16) {
      *reinterpret_cast<uint4*>(to) = word;
    } else {
      to[0] = value[0];
    }
  }
};

template <class Acc, class T, int kVector>
__global__ void __launch_bounds__(kThreads, 2)
    combine_kernel(const __grid_constant__ Table table, const double* coeffs, int64_t chunks) {
  __shared__ int live[kMaxWorkers];
  __shared__ Acc weight[kMaxWorkers];
  __shared__ int total;
  const int p = table.p;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p; i += kThreads) {
    if (coeffs[i] == 0) continue;  // NaN stays: it must show
    int place = 0;
    for (int j = 0; j < i; ++j) place += coeffs[j] != 0;
    live[place] = i;
    weight[place] = static_cast<Acc>(coeffs[i]);
    atomicMax(&total, place + 1);
  }
  __syncthreads();
  const int q = total;
  const Span span = span_of(table, chunks - 1 - blockIdx.x);
  const void* const* rows = table.row + span.segment * p;
  T* out = static_cast<T*>(table.out[span.segment]) + span.begin;

  const int64_t k = int64_t{threadIdx.x} * kVector;
  const bool whole = k + kVector <= span.length;
  const int64_t count =
      whole ? kVector : span.length - k;  // coordinates of this thread, may be <= 0
  if (count <= 0) return;
  Acc sum[kVector] = {};
  for (int first = 0; first < q; first += kAhead) {
    Packed<T, kVector> ahead[kAhead];
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      if (first + r >= q) continue;
      const T* row = static_cast<const T*>(rows[live[first + r]]) + span.begin + k;
      if (whole) {
        ahead[r].load(row);
      } else {
        for (int s = 0; s < kVector; ++s) ahead[r].value[s] = s < count ? row[s] : row[0];
      }
    }
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      if (first + r >= q) continue;
      const Acc c = weight[first + r];
#pragma unroll
      for (int s = 0; s < kVector; ++s)
        sum[s] = fma(c, device_cast<Acc>(ahead[r].value[s]), sum[s]);
    }
  }
  if (whole) {
    Packed<T, kVector> result;
#pragma unroll
    for (int s = 0; s < kVector; ++s) result.value[s] = device_cast<T>(sum[s]);
    result.store(out + k);
  } else {
#pragma unroll
    for (int s = 0; s < kVector; ++s) {
      if (s < count) out[k + s] = device_cast<T>(sum[s]);
    }
  }
}

// Whether every row and output starts on a multiple of 16 bytes.
bool aligned(const Rows& rows, const std::vector<void*>& out) {
  uintptr_t bits = 0;
  for (const void* row : rows.pointers) bits |= reinterpret_cast<uintptr_t>(row);
  for (const void* one : out) bits |= reinterpret_cast<uintptr_t>(one);
  return bits % 16 == 0;
}

template <class T, int kVector>
void run(const Rows& rows, const double* coeffs, const std::vector<void*>& out,
         cudaStream_t stream) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for_each_table(rows, kThreads * kVector, out, [&](const Table& table, int64_t chunks) {
    launch(&combine_kernel<Acc, T, kVector>, dim3(static_cast<unsigned>(chunks)), dim3(kThreads), 0,
           stream, table, coeffs, chunks);
  });
}

}  // namespace

void combine_cuda(const Rows& rows, const double* coeffs, const std::vector<void*>& out, int device,
                  void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch_device(rows.dtype, [&](auto element) {
    using T = decltype(element);
    if (aligned(rows, out)) {
      run<T, 16 / sizeof(T)>(rows, coeffs, out, on);
    } else {
      run<T, 1>(rows, coeffs, out, on);
    }
  });
}

}  // namespace dashpot::aggregate
