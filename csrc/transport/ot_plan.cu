// ot_plan on CUDA: one launch, one read of the cost (or none where it is made from points).
//
// A block takes a tile of columns (columns.cuh). Up to 16 places are the lists that choose them, as
// they are sorted. More: what is chosen has before it only what is chosen, so the place of an entry
// is the number of scores before it in its column, counted over the scores that are kept: k m
// comparisons per column, no sort and no atomics.
#include "transport/cuda.h"
#include "transport/source.cuh"

namespace dashpot::transport {
namespace {

template <class T, class Source, int L>
__global__ void __launch_bounds__(kThreads)
    ot_plan_kernel(Options options, int64_t tiles, Source source, const T* alpha, const T* beta,
                   const T* b, bool keep, int32_t* rows, T* values) {
  constexpr int kColumns = Source::kColumns;
  using Form = Gain<T, typename Source::Column>;
  using TileLists = Lists<T, kColumns, L ? L : 1>;
  DASHPOT_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ typename Team<T, kColumns>::Slots slots;
  TileLists* const lists = reinterpret_cast<TileLists*>(shared);
  T* const room = reinterpret_cast<T*>(shared + (L ? sizeof(TileLists) : 0));
  const int64_t m = options.m, n = options.n, k = options.k;
  const int64_t problem = blockIdx.x / tiles;
  Team<T, kColumns> team{slots, m};
  const int64_t j = blockIdx.x % tiles * kColumns + team.column(), at = problem * n + j;
  const bool live = j < n;
  const Scores<T, kColumns, Form> scores{
      Form{alpha + problem * m, live && beta ? beta[at] : T(0), source.at(problem, j), live},
      keep ? room + team.column() : nullptr};
  const T mass = live ? b[at] : T(0), gamma = static_cast<T>(options.gamma);
  int32_t* const to_row = rows + problem * k * n + j;
  T* const to_value = values + problem * k * n + j;
  if (L == 0 && options.reg == Reg::kNegentropy) {  // every row, in its order
    const Soft<T> soft = soften(team, scores, gamma, mass, options.dual);
    for (int64_t i = team.lane(); live && i < m; i += team.lanes()) {
      to_row[i * n] = static_cast<int32_t>(i);
      to_value[i * n] = soft.factor * exp((scores.at(i) - soft.shift) / gamma);
    }
    return;
  }
  List<T, L ? L : 1> top;
  const Found<T> found = choose<L>(team, scores, lists, top, k, gamma * mass, options.dual);
  if constexpr (L > 0) {
#pragma unroll
    for (int q = 0; q < L; ++q) {  // no break: the list's places must stay constants
      if (!live || q >= k || q % team.lanes() != team.lane()) continue;
      const bool filled = top.value[q] > found.theta;
      to_row[q * n] = filled ? top.row[q] : -1;
      to_value[q * n] = filled ? (top.value[q] - found.theta) / gamma : T(0);
    }
  } else {
    __syncthreads();  // from here on threads read each other's scores
    Pair<T> mine{0, 0};
    for (int64_t i = team.lane(); i < m; i += team.lanes()) {
      const T score = scores.at(i);
      if (!found.has(i, score) || !(score > found.theta)) continue;
      int64_t place = 0;
      for (int64_t r = 0; r < m; ++r) {
        const T other = scores.at(r);
        place += other > score || (other == score && r < i);
      }
      to_row[place * n] = static_cast<int32_t>(i);
      to_value[place * n] = (score - found.theta) / gamma;
      mine.first += 1;
    }
    const int64_t filled = static_cast<int64_t>(team.all(mine, Sum{}).first);
    for (int64_t q = filled + team.lane(); live && q < k; q += team.lanes()) {
      to_row[q * n] = -1;
      to_value[q * n] = 0;
    }
  }
}

template <int L, class T, class Source>
void run(const CudaPlan& plan, const Source& source, int64_t shared_limit, cudaStream_t stream) {
  constexpr int kColumns = Source::kColumns;
  const Options& options = plan.options;
  const int64_t tiles = (options.n + kColumns - 1) / kColumns;
  const int64_t lists = L ? sizeof(Lists < T, kColumns, L ? L : 1 >) : 0;
  const int64_t scores = options.m * kColumns * static_cast<int64_t>(sizeof(T));
  const bool keep = lists + scores <= shared_limit;
  launch(&ot_plan_kernel<T, Source, L>, dim3(static_cast<unsigned>(plan.batch * tiles)),
         dim3(kThreads), lists + (keep ? scores : 0), stream, options, tiles, source,
         static_cast<const T*>(plan.alpha), static_cast<const T*>(plan.beta),
         static_cast<const T*>(plan.b), keep, plan.rows, static_cast<T*>(plan.values));
}

}  // namespace

void plan_cuda(const CudaPlan& plan, int device, void* stream) {
  const DeviceGuard guard(device);
  const Options& options = plan.options;
  with_source(plan.cost, options.m, options.n, [&](auto state, const auto& source) {
    using T = decltype(state);
    const int64_t limit = shared_limit(device) - kReserved;
    const auto on = static_cast<cudaStream_t>(stream);
    if (options.reg == Reg::kSparse && options.k <= kLongList) {
      run<kLongList, T>(plan, source, limit, on);
    } else {
      run<0, T>(plan, source, limit, on);
    }
  });
}

}  // namespace dashpot::transport
