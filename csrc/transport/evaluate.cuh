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

// A column by the k <= L largest (L > 0), the threshold, or negative entropy (L = 0).
template <int L, class T, int kColumns, class Form>
__device__ ColumnSums<T> solve_column(Team<T, kColumns>& team,
                                      const Scores<T, kColumns, Form>& scores,
                                      Lists<T, kColumns, L ? L : 1>* lists, const Options& options,
                                      T mass, T* sums, bool add) {
  const T gamma = static_cast<T>(options.gamma), inverse = 1 / gamma;
  Found<T> found;
  if constexpr (L > 0) {
    List<T, L> top;
#pragma unroll
    for (int q = 0; q < L; ++q) top.value[q] = lowest<T>(), top.row[q] = INT32_MAX;
    read_scores(team, scores, [&](int64_t i, T score) { top.insert(score, static_cast<int>(i)); });
    merge_lists(top, lists);
    found = choose_listed(top, static_cast<int>(options.k), gamma * mass, options.dual);
  } else {
    T highest = lowest<T>();
    read_scores(team, scores, [&](int64_t, T score) { highest = Max{}(highest, score); });
    highest = team.all({highest, highest}, Max{}).first;
    if (options.reg == Reg::kNegentropy) {
      T shift = gamma, factor = 1, theta = 0;
      if (!options.dual) {
        shift = highest == lowest<T>() ? T(0) : highest;
        Pair<T> mine{0, 0};
        for (int64_t i = team.lane(); i < team.m; i += team.lanes()) {
          mine.first += exp((scores.at(i) - shift) * inverse);
        }
        const T total = team.all(mine, Sum{}).first;
        factor = total > 0 ? mass / total : T(0);
        theta = shift + gamma * log(total);
      }
      const T sum = apply(team, scores, sums, add, [&](int64_t, T score, T&) {
                      return factor * exp((score - shift) * inverse);
                    }).first;
      if (options.dual) return {theta, sum, options.gamma * static_cast<double>(sum), nothing<T>()};
      const bool counts = mass > 0 && theta > lowest<T>();
      const double b = mass;
      return {theta, sum, counts ? b * (theta - options.gamma * log(b)) : 0.0, nothing<T>()};
    }
    const int64_t k = options.k;
    found =
        choose_by_threshold(team, scores, highest, static_cast<T>(k), gamma * mass, options.dual);
  }
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
