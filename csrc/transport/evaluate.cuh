// One evaluation of the dual or semi-dual on the device: what a block does with its tiles.
//
// Semi-dual: t = [s - theta]+ / gamma, value = theta b + gamma/2 |t|^2; dual: theta = 0. Negative
// entropy: t = factor exp((s - shift) / gamma), from a maximum and a sum over the scores that are
// kept. Sums over a tile's columns are shuffles, sums over tiles the block's own, in order; sums
// over blocks are ot_finish_kernel's. So nothing depends on which block comes first.
#pragma once

#include "transport/columns.cuh"

namespace dashpot::transport {
namespace {

template <class C>
constexpr int kColumnsOf = 32 / sizeof(C);  // of a tile

// A column of a stored cost: C_ij = first[i * stride].
template <class T, class C>
struct StoredColumn {
  const C* first;
  int64_t stride;
  __device__ __forceinline__ T operator()(int64_t i) const {
    return device_cast<T>(first[i * stride]);
  }
};

// A column of a cost made from points: |x_i - y|^2, its root, or -x_i . y. Differences do not
// cancel.
template <class T>
struct PointColumn {
  const T *x, *y;  // (m, d), (d,)
  int64_t d;
  Metric metric;

  // The costs of rows first + u * step, those beyond the last as that of the last: y is read once.
  template <int U>
  __device__ __forceinline__ void several(int64_t first, int64_t step, int64_t m,
                                          T (&cost)[U]) const {
    const T* point[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t i = first + u * step;
      point[u] = x + (i < m ? i : m - 1) * d;
      cost[u] = 0;
    }
    for (int64_t q = 0; q < d; ++q) {
      const T here = y[q];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const T number = point[u][q], gap = number - here;
        cost[u] += metric == Metric::kInner ? -number * here : gap * gap;
      }
    }
    if (metric != Metric::kEuclidean) return;
#pragma unroll
    for (int u = 0; u < U; ++u) cost[u] = sqrt(cost[u]);
  }
  __device__ __forceinline__ T operator()(int64_t i) const {
    T cost[1];
    several(i, 0, i + 1, cost);
    return cost[0];
  }
};

// Where the costs of a batch come from, and column j of a problem.
template <class T, class C>
struct StoredCost {
  static constexpr int kColumns = kColumnsOf<C>;
  using Column = StoredColumn<T, C>;
  const C* cost;
  int64_t entries, row, column;  // of a problem; strides
  __device__ __forceinline__ Column at(int64_t problem, int64_t j) const {
    return {cost + problem * entries + j * column, row};
  }
};
template <class T>
struct PointsCost {
  static constexpr int kColumns = kColumnsOf<T>;
  using Column = PointColumn<T>;
  const T *x, *y;  // (B, m, d), (B, n, d)
  int64_t m, n, d;
  Metric metric;
  __device__ __forceinline__ Column at(int64_t problem, int64_t j) const {
    return {x + problem * m * d, y + (problem * n + j) * d, d, metric};
  }
};

// s_i = alpha_i + shift - C_i; -inf where there is no such column.
template <class T, class Column>
struct Gain {
  const T* alpha;
  T shift;
  Column cost;
  bool live;
  __device__ __forceinline__ T operator()(int64_t i) const {
    return live ? (alpha[i] + shift) - cost(i) : lowest<T>();
  }
};

template <int U, class T>
__device__ __forceinline__ void form_several(const Gain<T, PointColumn<T>>& gain, int64_t first,
                                             int64_t step, int64_t m, T (&score)[U]) {
  T cost[U] = {};
  if (gain.live) gain.cost.several(first, step, m, cost);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t i = first + u * step;
    score[u] = gain.live && i < m ? (gain.alpha[i] + gain.shift) - cost[u] : lowest<T>();
  }
}

// What is found for a column; the same in all its threads.
template <class T>
struct ColumnSums {
  T theta, sum;
  double value;
  Found<T> found;  // of the sparse and the l2 problem
};

// t = weigh(i, s, square) for every score: row sums of the tile into sums (m,), by the block's own
// threads; `add`: onto what is there. square: what the column's value takes from an entry.
template <class T, int kColumns, class Form, class Weigh>
__device__ Pair<T> apply(Team<T, kColumns>& team, const Scores<T, kColumns, Form>& scores, T* sums,
                         bool add, Weigh weigh) {
  Pair<T> mine{0, 0};
  const int of_warp = team.lane() - (threadIdx.x % 32) / kColumns;  // lane of the warp's first row
  for (int64_t base = of_warp; base < team.m; base += team.lanes()) {
    const int64_t i = base + team.lane() - of_warp;
    T square = 0;
    T t = i < team.m ? weigh(i, scores.at(i), square) : T(0);
    mine.first += t;
    mine.second += square;
#pragma unroll
    for (int far = 1; far < kColumns; far *= 2) t += __shfl_xor_sync(kAll, t, far);
    if (team.column() == 0 && i < team.m) sums[i] = add ? sums[i] + t : t;
  }
  return team.all(mine, Sum{});
}

template <class T>
__device__ double plain_value(T theta, T squares, T mass, bool dual) {
  const double value = static_cast<double>(squares) / 2;
  const bool counts = !dual && mass > 0 && theta > lowest<T>();
  return counts ? value + static_cast<double>(theta) * mass : value;
}

// Negative entropy: t = factor exp((s - shift) / gamma), from the highest score and, where the sum
// is to be the mass (semi-dual), a sum over the scores.
template <class T>
struct Soft {
  T shift, factor, theta;  // theta: gamma * log-sum-exp(s / gamma) of the semi-dual
};

template <class T, int kColumns, class Form>
__device__ Soft<T> soften(Team<T, kColumns>& team, const Scores<T, kColumns, Form>& scores, T gamma,
                          T mass, bool dual) {
  const T highest = read_highest(team, scores), inverse = 1 / gamma;
  if (dual) return {gamma, T(1), T(0)};
  const T shift = highest == lowest<T>() ? T(0) : highest;
  Pair<T> mine{0, 0};
  for (int64_t i = team.lane(); i < team.m; i += team.lanes()) {
    mine.first += exp((scores.at(i) - shift) * inverse);
  }
  const T total = team.all(mine, Sum{}).first;
  return {shift, total > 0 ? mass / total : T(0), shift + gamma * log(total)};
}

// A column by the k <= L largest (L > 0), the threshold, or negative entropy (L = 0).
template <int L, class T, int kColumns, class Form>
__device__ ColumnSums<T> solve_column(Team<T, kColumns>& team,
                                      const Scores<T, kColumns, Form>& scores,
                                      Lists<T, kColumns, L ? L : 1>* lists, const Options& options,
                                      T mass, T* sums, bool add) {
  const T gamma = static_cast<T>(options.gamma), inverse = 1 / gamma;
  if (L == 0 && options.reg == Reg::kNegentropy) {
    const Soft<T> soft = soften(team, scores, gamma, mass, options.dual);
    const T sum = apply(team, scores, sums, add, [&](int64_t, T score, T&) {
                    return soft.factor * exp((score - soft.shift) * inverse);
                  }).first;
    if (options.dual) return {0, sum, options.gamma * static_cast<double>(sum), nothing<T>()};
    const bool counts = mass > 0 && soft.theta > lowest<T>();
    const double b = mass;
    return {soft.theta, sum, counts ? b * (soft.theta - options.gamma * log(b)) : 0.0,
            nothing<T>()};
  }
  List<T, L ? L : 1> top;
  const Found<T> found = choose<L>(team, scores, lists, top, options.k, gamma * mass, options.dual);
  const Pair<T> total = apply(team, scores, sums, add, [&](int64_t i, T score, T& square) {
    const T gap = found.has(i, score) ? score - found.theta : T(0), t = gap * inverse;
    square = gap * t;
    return t;
  });
  return {found.theta, total.first, plain_value(found.theta, total.second, mass, options.dual),
          found};
}

// The smoothed dual, Omega+ = max {sum theta_i h_i - mu/2 theta_i^2: 0 <= theta <= 1, sum theta <=
// k} with h = [s]+^2 / (2 gamma): theta = clip((h - level) / mu, 0, 1), level >= 0 the least at
// which they sum to k at most, t = theta [s]+ / gamma. Newton on that staircase of ramps from
// `level`, the last evaluation's, in turn with halving the bracket.
template <class T, int kColumns, class Form>
__device__ ColumnSums<T> solve_smoothed(Team<T, kColumns>& team,
                                        const Scores<T, kColumns, Form>& scores,
                                        const Options& options, T& level, T* sums, bool add) {
  const T gamma = static_cast<T>(options.gamma), half = T(0.5) / gamma, k = T(options.k);
  const T mu = static_cast<T>(options.smoothing), inverse = 1 / mu;
  const T near = k * (sizeof(T) == 8 ? T(1e-14) : T(1e-6));
  const auto energy = [&](T score) { return score > 0 ? score * score * half : T(0); };
  T low = 0, high = 0;
  read_scores(team, scores, [&](int64_t, T score) { high = Max{}(high, energy(score)); });
  high = team.all({high, high}, Max{}).first;  // the sum there is 0
  level = level < high ? level : T(0);
  bool open = true, asked = false;
  for (int round = 0; __syncthreads_or(open); ++round) {
    Pair<T> mine{0, 0};  // the sum of theta, and how many are on a ramp
    for (int64_t i = team.lane(); i < team.m; i += team.lanes()) {
      const T share = (energy(scores.at(i)) - level) * inverse;
      mine.first += share < 0 ? T(0) : share > 1 ? T(1) : share;
      mine.second += share > 0 && share < 1 ? T(1) : T(0);
    }
    const Pair<T> at = team.all(mine, Sum{});
    const T excess = at.first - k;
    if (!open) continue;
    if ((excess <= 0 && !(level > 0)) || (excess < near && -excess < near)) {
      open = false;  // the bound is not active, or met
      continue;
    }
    (excess > 0 ? low : high) = level;
    const T step = level + mu * excess / at.second;
    const bool inside = at.second > 0 && step > low && step < high && round % 3 != 2;
    const bool ask = !inside && excess < 0 && !(low > 0) && !asked;  // whether it is active at all
    level = inside ? step : ask ? T(0) : (low + high) / 2;
    asked = asked || ask;
    open = ask || (level > low && level < high);
  }
  const Pair<T> total = apply(team, scores, sums, add, [&](int64_t, T score, T& value) {
    const T h = energy(score), share = (h - level) * inverse;
    const T theta = share < 0 ? T(0) : share > 1 ? T(1) : share;
    value = theta * (h - mu / 2 * theta);
    return score > 0 ? theta * score / gamma : T(0);
  });
  return {0, total.first, static_cast<double>(total.second), nothing<T>()};
}

}  // namespace
}  // namespace dashpot::transport
