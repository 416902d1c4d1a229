// sparse_simplex_projection: u (R, n), total (R,) -> x (R, n), tau (R,) and its backward; a row is
// a column of columns.cuh of its own, taken by a warp where it is short, else by a block.
#include "transport/columns.cuh"
#include "transport/cuda.h"

namespace dashpot::transport {
namespace {

constexpr int64_t kWarpRow = 1024;  // entries up to which a row is one warp's

template <class T, class U>
struct RowEntries {
  const U* row;
  __device__ __forceinline__ T operator()(int64_t i) const { return device_cast<T>(row[i]); }
};

template <class T, class U, int L>
__global__ void __launch_bounds__(kThreads)
    project_kernel(const U* input, const T* total, int64_t n, int64_t k, bool keep, U* output,
                   T* tau) {
  using RowLists = Lists<T, 1, L ? L : 1>;
  DASHPOT_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ typename Team<T, 1>::Slots slots;
  RowLists* const lists = reinterpret_cast<RowLists*>(shared);
  const int64_t row = blockIdx.x;
  Team<T, 1> team{slots, n};
  const Scores<T, 1, RowEntries<T, U>> scores{
      {input + row * n},
      keep ? reinterpret_cast<T*>(shared + (L ? sizeof(RowLists) : 0)) : nullptr};
  List<T, L ? L : 1> top;
  const Found<T> found = choose<L>(team, scores, lists, top, k, total[row], false);
  for (int64_t i = team.lane(); i < n; i += team.lanes()) {
    const T score = scores.at(i);
    output[row * n + i] = device_cast<U>(found.has(i, score) ? score - found.theta : T(0));
  }
  if (threadIdx.x == 0) tau[row] = found.theta;
}

// du = g - mean over the support, dtotal = that mean; 0 elsewhere.
template <class T, class U>
__global__ void __launch_bounds__(kThreads)
    project_backward_kernel(const U* grad_output, const U* output, int64_t n, U* grad_input,
                            T* grad_total) {
  __shared__ typename Team<T, 1>::Slots slots;
  const int64_t row = blockIdx.x;
  Team<T, 1> team{slots, n};
  Pair<T> mine{0, 0};
  for (int64_t i = team.lane(); i < n; i += team.lanes()) {
    if (device_cast<T>(output[row * n + i]) > 0) {
      mine.first += device_cast<T>(grad_output[row * n + i]);
      mine.second += 1;
    }
  }
  const Pair<T> sum = team.all(mine, Sum{});
  const T mean = sum.second > 0 ? sum.first / sum.second : T(0);
  for (int64_t i = team.lane(); i < n; i += team.lanes()) {
    const bool chosen = device_cast<T>(output[row * n + i]) > 0;
    const T grad = chosen ? device_cast<T>(grad_output[row * n + i]) - mean : T(0);
    grad_input[row * n + i] = device_cast<U>(grad);
  }
  if (threadIdx.x == 0) grad_total[row] = mean;
}

int threads_for(int64_t n) { return n <= kWarpRow ? 32 : kThreads; }

template <class T, class U, int L>
void project(const U* input, const T* total, U* output, T* tau, int64_t rows, int64_t n, int64_t k,
             int64_t shared_limit, cudaStream_t stream) {
  const int64_t lists = L ? sizeof(Lists < T, 1, L ? L : 1 >) : 0;
  const int64_t scores = n * static_cast<int64_t>(sizeof(T));
  const bool keep = lists + scores <= shared_limit;
  launch(&project_kernel<T, U, L>, dim3(static_cast<unsigned>(rows)), dim3(threads_for(n)),
         lists + (keep ? scores : 0), stream, input, total, n, k, keep, output, tau);
}

}  // namespace

void project_cuda(const void* input, Dtype dtype, const void* total, void* output, void* tau,
                  int64_t rows, int64_t n, int64_t k, int device, void* stream) {
  const DeviceGuard guard(device);
  dispatch_device(dtype, [&](auto element) {
    using U = decltype(element);
    using T = std::conditional_t<std::is_same_v<U, double>, double, float>;
    const auto run = k <= kLongList ? &project<T, U, kLongList> : &project<T, U, 0>;
    run(static_cast<const U*>(input), static_cast<const T*>(total), static_cast<U*>(output),
        static_cast<T*>(tau), rows, n, k, shared_limit(device) - kReserved,
        static_cast<cudaStream_t>(stream));
  });
}

void project_backward_cuda(const void* grad_output, const void* output, Dtype dtype,
                           void* grad_input, void* grad_total, int64_t rows, int64_t n, int device,
                           void* stream) {
  const DeviceGuard guard(device);
  dispatch_device(dtype, [&](auto element) {
    using U = decltype(element);
    using T = std::conditional_t<std::is_same_v<U, double>, double, float>;
    launch(&project_backward_kernel<T, U>, dim3(static_cast<unsigned>(rows)), dim3(threads_for(n)),
           0, static_cast<cudaStream_t>(stream), static_cast<const U*>(grad_output),
           static_cast<const U*>(output), n, static_cast<U*>(grad_input),
           static_cast<T*>(grad_total));
  });
}

}  // namespace dashpot::transport
