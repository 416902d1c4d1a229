// ot_dual_value_grad, ot_semidual_value_grad and ot_value_grad on CUDA: two launches, one read of
// the cost, or none where it is made from points.
//
//   ot_columns_kernel   a block takes neighbouring tiles of columns (evaluate.cuh): column outputs,
//                       its row sums (m,) and value
//   ot_finish_kernel    a - row sums over the blocks, and the value in float64
//
// 256 threads: 32 lanes of rows by 8 columns in float32 (16 x 16 for 16-bit costs, 64 x 4 in
// float64). The row sums of at most 256 blocks go through memory: 1/8 of the cost's bytes where
// there are that many, in float32.
#include "transport/cuda.h"
#include "transport/source.cuh"

namespace dashpot::transport {
namespace {

constexpr int kShortList = 4;

template <class T, class Source, int L>
__global__ void __launch_bounds__(kThreads)
    ot_columns_kernel(Options options, int64_t chunks, int64_t tiles, Source source, const T* alpha,
                      const T* beta, const T* b, bool keep, T* row_sums, double* values, T* column,
                      const T* smoothing, const T* level, T* to_level) {
  constexpr int kColumns = Source::kColumns;
  using Form = Gain<T, typename Source::Column>;
  using TileLists = Lists<T, kColumns, L ? L : 1>;
  DASHPOT_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ typename Team<T, kColumns>::Slots slots;
  TileLists* const lists = reinterpret_cast<TileLists*>(shared);
  T* const room = reinterpret_cast<T*>(shared + (L ? sizeof(TileLists) : 0));
  const int64_t m = options.m, n = options.n;
  const int64_t problem = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  Team<T, kColumns> team{slots, m};
  if (smoothing) options.smoothing = smoothing[problem];
  double value = 0;
  const int64_t end = (chunk + 1) * tiles / chunks;
  for (int64_t tile = chunk * tiles / chunks, first = tile; tile < end; ++tile) {
    const int64_t j = tile * kColumns + team.column(), at = problem * n + j;
    const bool live = j < n;
    const Scores<T, kColumns, Form> scores{
        Form{alpha + problem * m, live && beta ? beta[at] : T(0), source.at(problem, j), live},
        keep ? room + team.column() : nullptr};
    const T mass = live ? b[at] : T(0);
    T* const sums = row_sums + blockIdx.x * m;
    ColumnSums<T> found;
    if (L == 0 && smoothing) {
      T here = live && level ? level[at] : T(0);
      found = solve_smoothed(team, scores, options, here, sums, tile > first);
      if (team.lane() == 0 && live) to_level[at] = here;
    } else {
      found = solve_column<L>(team, scores, lists, options, mass, sums, tile > first);
    }
    if (team.lane() == 0 && live) {
      const T gamma = static_cast<T>(options.gamma);
      column[at] = options.dual                      ? mass - found.sum
                   : options.reg == Reg::kNegentropy ? gamma + gamma * log(mass) - found.theta
                                                     : -found.theta;
    }
    double tile_value = live ? found.value : 0.0;
#pragma unroll
    for (int far = 1; far < kColumns; far *= 2) {
      tile_value += __shfl_xor_sync(kAll, tile_value, far);
    }
    value += tile_value;
  }
  if (threadIdx.x == 0) values[blockIdx.x] = value;
}

// Grid: B x blocks of kThreads rows; the first block of a problem makes its value too.
template <class T>
__global__ void __launch_bounds__(kThreads)
    ot_finish_kernel(Options options, int64_t chunks, int64_t blocks, const T* alpha, const T* beta,
                     const T* a, const T* b, const T* row_sums, const double* values, T* grad_alpha,
                     T* obj) {
  __shared__ double slots[kWarps];
  const int64_t m = options.m, n = options.n;
  const int64_t problem = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int64_t i = block * kThreads + threadIdx.x;
  if (i < m) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += row_sums[(problem * chunks + c) * m + i];
    grad_alpha[problem * m + i] = static_cast<T>(a[problem * m + i] - sum);
  }
  if (block > 0) return;
  double value = 0;
  for (int64_t r = threadIdx.x; r < m; r += kThreads) {
    value += static_cast<double>(a[problem * m + r]) * alpha[problem * m + r];
  }
  for (int64_t j = threadIdx.x; beta && j < n; j += kThreads) {
    value += static_cast<double>(b[problem * n + j]) * beta[problem * n + j];
  }
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads) value -= values[problem * chunks + c];
#pragma unroll
  for (int far = 16; far > 0; far /= 2) value += __shfl_xor_sync(kAll, value, far);
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kWarps; ++warp) value += slots[warp];
  obj[problem] = static_cast<T>(value);
}

template <int L, class T, class Source>
void run(const CudaEvaluation& evaluation, const Source& source, int64_t shared_limit,
         cudaStream_t stream) {
  constexpr int kColumns = Source::kColumns;
  const Options& options = evaluation.options;
  const int64_t chunks = device_chunks(options.n, 32 / kColumns);
  const int64_t tiles = (options.n + kColumns - 1) / kColumns;
  const int64_t lists = L ? sizeof(Lists < T, kColumns, L ? L : 1 >) : 0;
  const int64_t scores = options.m * kColumns * static_cast<int64_t>(sizeof(T));
  const bool keep = lists + scores <= shared_limit;
  const auto* alpha = static_cast<const T*>(evaluation.alpha);
  const auto* beta = static_cast<const T*>(evaluation.beta);
  const auto* b = static_cast<const T*>(evaluation.b);
  auto* row_sums = static_cast<T*>(evaluation.row_sums);
  launch(&ot_columns_kernel<T, Source, L>, dim3(static_cast<unsigned>(evaluation.batch * chunks)),
         dim3(kThreads), lists + (keep ? scores : 0), stream, options, chunks, tiles, source, alpha,
         beta, b, keep, row_sums, evaluation.values, static_cast<T*>(evaluation.column),
         static_cast<const T*>(evaluation.smoothing), static_cast<const T*>(evaluation.level),
         static_cast<T*>(evaluation.to_level));
  const int64_t blocks = (options.m + kThreads - 1) / kThreads;
  launch(&ot_finish_kernel<T>, dim3(static_cast<unsigned>(evaluation.batch * blocks)),
         dim3(kThreads), 0, stream, options, chunks, blocks, alpha, beta,
         static_cast<const T*>(evaluation.a), b, row_sums, evaluation.values,
         static_cast<T*>(evaluation.grad_alpha), static_cast<T*>(evaluation.obj));
}

}  // namespace

void evaluate_cuda(const CudaEvaluation& evaluation, int device, void* stream) {
  const DeviceGuard guard(device);
  const Options& options = evaluation.options;
  const bool listed = options.reg == Reg::kSparse && !evaluation.smoothing;
  with_source(evaluation.cost, options.m, options.n, [&](auto state, const auto& source) {
    using T = decltype(state);
    const int64_t limit = shared_limit(device) - kReserved;
    const auto on = static_cast<cudaStream_t>(stream);
    if (listed && options.k <= kShortList) {
      run<kShortList, T>(evaluation, source, limit, on);
    } else if (listed && options.k <= kLongList) {
      run<kLongList, T>(evaluation, source, limit, on);
    } else {
      run<0, T>(evaluation, source, limit, on);
    }
  });
}

}  // namespace dashpot::transport
