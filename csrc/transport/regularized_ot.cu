// regularized_ot on CUDA: the whole solve of a problem by one block, a batch in one launch
// (solve.cuh). Nothing is read by the host: each block stops when its own problem is done. The cost
// of points is made once, in shared memory, which must hold it.
#include "transport/cuda.h"
#include "transport/solve.cuh"

namespace dashpot::transport {
namespace {

// Bytes of shared memory: the vectors and lists, then the cost, or the scores of a tile.
template <class T, class C, int L>
struct Layout {
  int64_t vectors, scores, cost;
  static constexpr int64_t kLists = L ? sizeof(Lists < T, kColumnsOf<C>, L ? L : 1 >) : 0;

  Layout(int64_t m, int64_t n)
      : vectors((kLists + (3 * m + 4 * n) * static_cast<int64_t>(sizeof(T)) + 4 * n + 15) / 16 *
                16),
        scores(m * kColumnsOf<C> * static_cast<int64_t>(sizeof(T))),
        cost(m * n * static_cast<int64_t>(sizeof(C))) {}
};

enum class Keep { kNothing, kScores, kCost };

template <class T, class C, int L>
__global__ void __launch_bounds__(kThreads, 1)
    regularized_ot_kernel(CudaSolve solve, Keep keep, int64_t vectors) {
  using Function = BlockFunction<T, C, L>;
  using TileLists = typename Function::TileLists;
  constexpr int kColumns = Function::kColumns;
  DASHPOT_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ typename Team<T, kColumns>::Slots column_slots;
  __shared__ typename Team<double, 1>::Slots slots;
  const Settings& settings = solve.settings;
  const int64_t m = settings.options.m, n = settings.options.n, problem = blockIdx.x;
  Team<T, kColumns> columns{column_slots, m};
  Team<double, 1> all{slots, m};
  BlockVectors loops{all};

  TileLists* const lists = reinterpret_cast<TileLists*>(shared);
  T* at = reinterpret_cast<T*>(shared + (L ? sizeof(TileLists) : 0));
  const auto take = [&](int64_t count) {
    T* const start = at;
    at += count;
    return start;
  };
  BlockProblem<T, C> block{};
  block.row = solve.cost.by_rows ? 1 : n;
  block.column = solve.cost.by_rows ? m : 1;
  block.alpha = take(m), block.a = take(m), block.row_sums = take(m);
  block.beta = take(n), block.b = take(n), block.level = take(n), block.out = take(n);
  block.tied = reinterpret_cast<int*>(at);
  block.cost = static_cast<const C*>(solve.cost.cost) + problem * m * n;
  if (keep == Keep::kScores) block.scores = reinterpret_cast<T*>(shared + vectors);
  if (keep == Keep::kCost) {
    C* const kept = reinterpret_cast<C*>(shared + vectors);
    if (solve.cost.y) {
      const int64_t d = solve.cost.d;
      const T* const x = static_cast<const T*>(solve.cost.cost) + problem * m * d;
      const T* const y = static_cast<const T*>(solve.cost.y) + problem * n * d;
      loops.each(m * n, [&](int64_t e) {
        const PointColumn<T> points{x, y + e % n * d, d, solve.cost.metric};
        kept[e] = device_cast<C>(points(e / n));
      });
    } else {
      loops.each(m * n, [&](int64_t e) { kept[e] = block.cost[e]; });
    }
    block.cost = kept;
  }
  const T* const a = static_cast<const T*>(solve.a) + problem * m;
  const T* const b = static_cast<const T*>(solve.b) + problem * n;
  const T* const alpha = static_cast<const T*>(solve.alpha) + problem * m;
  const T* const beta = static_cast<const T*>(solve.beta) + problem * n;
  double* const x = solve.room + problem * (m + n + solve_room(m, n));
  double* const room = x + m + n;
  loops.each(m, [&](int64_t i) { block.a[i] = a[i], x[i] = alpha[i]; });
  loops.each(n, [&](int64_t j) { block.b[j] = b[j], block.level[j] = 0, x[m + j] = beta[j]; });
  __syncthreads();

  Function function(settings.options, block, columns, loops, lists);
  Options dual = settings.options;
  dual.dual = true;
  Function smoothed(dual, block, columns, loops, lists);
  Options bare = dual;
  bare.reg = Reg::kL2;
  bare.k = m;
  BlockFunction<T, C, 0> relaxed(bare, block, columns, loops, nullptr);
  const Progress done = climb(loops, function, relaxed, smoothed, room, x, settings);
  const Report found = function.report(x, settings.tol, room);
  loops.each(m, [&](int64_t i) {
    static_cast<T*>(solve.to_alpha)[problem * m + i] = static_cast<T>(x[i]);
  });
  loops.each(n, [&](int64_t j) {
    static_cast<T*>(solve.to_beta)[problem * n + j] = static_cast<T>(room[j]);
  });
  if (threadIdx.x > 0) return;
  static_cast<T*>(solve.value)[problem] = static_cast<T>(found.value);
  static_cast<T*>(solve.row_error)[2 * problem] = static_cast<T>(found.row_l1);
  static_cast<T*>(solve.row_error)[2 * problem + 1] = static_cast<T>(found.row_max);
  static_cast<T*>(solve.col_error)[2 * problem] = static_cast<T>(found.col_l1);
  static_cast<T*>(solve.col_error)[2 * problem + 1] = static_cast<T>(found.col_max);
  static_cast<T*>(solve.gap)[problem] = static_cast<T>(found.gap);
  int32_t* const counts = solve.counts + 4 * problem;
  counts[0] = static_cast<int32_t>(done.iterations);
  counts[1] =
      static_cast<int32_t>(function.evaluations + relaxed.evaluations + smoothed.evaluations);
  counts[2] = found.tied;
  counts[3] = found.status == kInfeasible ? kInfeasible : done.status;
}

template <class T, class C, int L>
void run(const CudaSolve& solve, int64_t limit, cudaStream_t stream) {
  const Options& options = solve.settings.options;
  const Layout<T, C, L> layout(options.m, options.n);
  const Keep keep = layout.vectors + layout.cost <= limit     ? Keep::kCost
                    : layout.vectors + layout.scores <= limit ? Keep::kScores
                                                              : Keep::kNothing;
  const int64_t kept = keep == Keep::kCost     ? layout.cost
                       : keep == Keep::kScores ? layout.scores
                                               : 0;
  launch(&regularized_ot_kernel<T, C, L>, dim3(static_cast<unsigned>(solve.batch)), dim3(kThreads),
         layout.vectors + kept, stream, solve, keep, layout.vectors);
}

}  // namespace

int64_t solve_numbers(int64_t m, int64_t n) { return m + n + solve_room(m, n); }

bool solve_fits(int64_t m, int64_t n, Dtype dtype, bool of_points, int device) {
  bool fits = false;
  dispatch_device(dtype, [&](auto element) {
    using C = decltype(element);
    using T = std::conditional_t<std::is_same_v<C, double>, double, float>;
    const Layout<T, C, kLongList> layout(m, n);
    fits = layout.vectors + (of_points ? layout.cost : 0) <= shared_limit(device) - kReserved;
  });
  return fits;
}

void solve_cuda(const CudaSolve& solve, int device, void* stream) {
  const DeviceGuard guard(device);
  const Options& options = solve.settings.options;
  const bool listed = options.reg == Reg::kSparse && options.k <= kLongList;
  dispatch_device(solve.cost.dtype, [&](auto element) {
    using C = decltype(element);
    using T = std::conditional_t<std::is_same_v<C, double>, double, float>;
    const int64_t limit = shared_limit(device) - kReserved;
    const auto on = static_cast<cudaStream_t>(stream);
    if (listed) {
      run<T, C, kLongList>(solve, limit, on);
    } else {
      run<T, C, 0>(solve, limit, on);
    }
  });
}

}  // namespace dashpot::transport
