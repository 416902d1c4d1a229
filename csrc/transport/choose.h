// What a column of a transport problem chooses: its threshold, and the least score that is taken.
//
//     t = [s - theta]+ / gamma on the k largest s, sum t = b (semi-dual); theta = 0 (dual)
//
// A vector holds a number of each column of a tile. For k <= kListed the k + 1 largest of each are
// kept in registers, one walk over the scores; for k <= kSorted, should the last evaluation's level
// not serve again, they are sorted (sorted.h); else a few walks find the threshold without a bound
// (Newton on sum [s - theta]+ from the last evaluation's, monotone and finite from its first step
// on) and, if more than k scores lie above it, the k-th largest (counts at levels between, again
// from the last evaluation's).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/simd.h"
#include "transport/problem.h"
#include "transport/sorted.h"

namespace dashpot::transport {

inline constexpr int kListed = 8;     // k up to which the largest are kept in registers
inline constexpr int kMaxLanes = 16;  // of any instruction set

// A tile: scores (m, lanes) and what is found for each of its columns. T: the state's type.
template <class T>
struct Tile {
  T* scores;    // (m, lanes); -inf for a forbidden pair and in lanes without a column
  T* row_sums;  // (m, lanes), added to
  int64_t m, k;
  T gamma;
  Reg reg;
  bool dual;
  T smoothing, tie;
  T mass[kMaxLanes] = {};   // b
  T theta[kMaxLanes] = {};  // threshold; for negative entropy gamma * log-sum-exp(s / gamma)
  T sum[kMaxLanes] = {};    // column sums of T
  T level[kMaxLanes] = {};  // where the search for what is chosen, or lambda, starts; its end
  T bound[kMaxLanes] = {};  // scores below it are not chosen
  T tied[kMaxLanes] = {};   // 1 where the k-th and the next score tie (options.tie >= 0)
  double value[kMaxLanes] = {};
  Tile(const Options& options, T* scores, T* row_sums)
      : scores(scores),
        row_sums(row_sums),
        m(options.m),
        k(options.k),
        gamma(static_cast<T>(options.gamma)),
        reg(options.reg),
        dual(options.dual),
        smoothing(static_cast<T>(options.smoothing)),
        tie(static_cast<T>(options.tie)) {}
};

template <class T, Isa isa>
using Mask = decltype(Vec<T, isa>{} > Vec<T, isa>{});

template <class T, Isa isa>
DASHPOT_INLINE bool any(Mask<T, isa> mask) {
  uint64_t words[sizeof mask / 8], all = 0;
  __builtin_memcpy(words, &mask, sizeof mask);
  for (const uint64_t word : words) all |= word;
  return all != 0;
}

template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> fill(T value) {
  Vec<T, isa> all;
  for (int i = 0; i < kLanes<T, isa>; ++i) all[i] = value;
  return all;
}

template <class T, Isa isa>
struct Choice {
  Vec<T, isa> theta;  // subtracted from the scores
  Vec<T, isa> bound;  // scores from here on are chosen,
  Vec<T, isa> tied;   // 1 where more than k are, all but these equal to the bound; else 0
  Vec<T, isa> level;  // where the next evaluation's search starts
};

// The K + 1 largest scores of each lane, descending.
template <int K, class T, Isa isa>
DASHPOT_INLINE void largest(const T* scores, int64_t m, Vec<T, isa>* top) {
  for (int q = 0; q <= K; ++q) top[q] = fill<T, isa>(-std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < m; ++i) {
    Vec<T, isa> falling = load<T, isa>(scores + i * kLanes<T, isa>);
    for (int q = 0; q <= K; ++q) {
      const Vec<T, isa> higher = top[q] > falling ? top[q] : falling;
      falling = top[q] > falling ? falling : top[q];
      top[q] = higher;
    }
  }
}

// What is chosen of columns whose K + 1 largest scores are `top`.
template <int K, class T, Isa isa>
DASHPOT_INLINE Choice<T, isa> choose_of(const Vec<T, isa>* top, Vec<T, isa> budget, bool dual) {
  using V = Vec<T, isa>;
  const V lowest = fill<T, isa>(-std::numeric_limits<T>::infinity());
  const V zero = {}, one = zero + T(1);
  Choice<T, isa> found;
  found.level = -lowest;  // lists need none
  if (dual) {
    found.theta = zero;
    found.bound = top[K - 1] > zero ? top[K - 1] : zero;
    found.tied = (top[K] == top[K - 1]) & (top[K] > zero) ? one : zero;
    return found;
  }
  V total = zero;
  Mask<T, isa> full = zero > zero;
  found.theta = top[0];
  for (int q = 0; q < K; ++q) {
    total += top[q];
    const V candidate = (total - budget) / T(q + 1);
    full = top[q] > candidate;
    found.theta = full ? candidate : found.theta;
  }
  found.bound = full ? top[K - 1] : found.theta;
  found.bound = top[0] == lowest ? -lowest : found.bound;  // nothing can be chosen
  found.tied = full & (top[K] == top[K - 1]) ? one : zero;
  return found;
}

template <int K, class T, Isa isa>
DASHPOT_INLINE Choice<T, isa> choose_listed(const Tile<T>& tile) {
  Vec<T, isa> top[K + 1];
  largest<K, T, isa>(tile.scores, tile.m, top);
  return choose_of<K, T, isa>(top, tile.gamma * load<T, isa>(tile.mass), tile.dual);
}

// Over the scores above `level`: sum (s - level) and their number.
template <class T, Isa isa>
struct Above {
  Vec<T, isa> excess, count;
};

template <class T, Isa isa>
DASHPOT_INLINE Above<T, isa> above(const Tile<T>& tile, Vec<T, isa> level) {
  using V = Vec<T, isa>;
  const V zero = {}, one = zero + T(1);
  V sums[2] = {zero, zero}, counts[2] = {zero, zero};
  int64_t i = 0;
  for (; i + 2 <= tile.m; i += 2) {
    for (int u = 0; u < 2; ++u) {
      const V gap = load<T, isa>(tile.scores + (i + u) * kLanes<T, isa>) - level;
      sums[u] += gap > zero ? gap : zero;
      counts[u] += gap > zero ? one : zero;
    }
  }
  if (i < tile.m) {
    const V gap = load<T, isa>(tile.scores + i * kLanes<T, isa>) - level;
    sums[0] += gap > zero ? gap : zero;
    counts[0] += gap > zero ? one : zero;
  }
  return {sums[0] + sums[1], counts[0] + counts[1]};
}

// How many scores lie above `level`, and its neighbours among them: the lowest above it and the
// highest that is not.
template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> count_around(const Tile<T>& tile, Vec<T, isa> level, Vec<T, isa>* up,
                                        Vec<T, isa>* down) {
  using V = Vec<T, isa>;
  const V infinity = fill<T, isa>(std::numeric_limits<T>::infinity()), zero = {}, one = zero + T(1);
  V count = zero, lowest = infinity, highest = -infinity;
  for (int64_t i = 0; i < tile.m; ++i) {
    const V score = load<T, isa>(tile.scores + i * kLanes<T, isa>);
    const V over = score > level ? score : infinity, under = score > level ? -infinity : score;
    count += score > level ? one : zero;
    lowest = over < lowest ? over : lowest;
    highest = under > highest ? under : highest;
  }
  *up = lowest;
  *down = highest;
  return count;
}

template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> next_after(Vec<T, isa> x, T towards) {
  for (int lane = 0; lane < kLanes<T, isa>; ++lane) {
    x[lane] = std::nextafter(static_cast<T>(x[lane]), towards);
  }
  return x;
}

// `found`'s theta is that without a bound, and more than k scores lie above it in some lanes: their
// k-th largest score. It lies in (low, high], more than k scores above low, fewer above high. The
// search begins at the last evaluation's level and walks from score to score while it is near;
// else by halves in turn with a guess from the counts: towards the ends neither may stall.
template <class T, Isa isa>
DASHPOT_INLINE void bound_by_count(const Tile<T>& tile, Vec<T, isa> start, Vec<T, isa> highest,
                                   Vec<T, isa> over, Vec<T, isa> count, Choice<T, isa>* found) {
  using V = Vec<T, isa>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const V zero = {}, one = zero + T(1), k = zero + T(tile.k);
  V low = found->theta, high = highest, of_low = count, of_high = zero, next = start;
  for (int round = 0; any<T, isa>(over > zero); ++round) {
    const V part = (of_low - k) / (of_low - of_high);
    const V middle = low + (high - low) * T(0.5);
    const V guess = round % 2 ? low + (high - low) * part : middle;
    V trial = next > low ? next : guess;
    trial = trial < high ? trial : guess;
    trial = trial > low ? trial : middle;
    trial = trial < high ? trial : middle;
    V inside = trial > low ? one : zero;
    inside = trial < high ? inside : zero;
    V up, down;
    count = count_around<T, isa>(tile, trial, &up, &down);
    const V many = count > k ? inside : zero, few = count < k ? inside : zero;
    low = many > zero ? trial : low;
    of_low = many > zero ? count : of_low;
    high = few > zero ? trial : high;
    of_high = few > zero ? count : of_high;
    const V gap = count > k ? count - k : k - count;
    const V step = count > k ? up : next_after<T, isa>(down, -kInfinity);
    next = gap <= T(8) ? step : zero + kInfinity;
    // Not inside: neighbours in floating point; the scores equal to high are tied for the last.
    const V exact = count == k ? inside : zero;
    const V just_above = next_after<T, isa>(trial, kInfinity);
    V done = over > zero ? exact : zero;
    found->bound = done > zero ? just_above : found->bound;
    found->level = done > zero ? trial : found->level;
    over = done > zero ? zero : over;
    done = inside > zero ? zero : over;
    found->bound = done > zero ? high : found->bound;
    found->level = done > zero ? high : found->level;
    found->tied = done > zero ? one : found->tied;
    over = done > zero ? zero : over;
  }
}

// k <= kSorted: from the sorted list of the largest.
template <class T, Isa isa>
DASHPOT_INLINE Choice<T, isa> choose_sorted(const Tile<T>& tile) {
  using V = Vec<T, isa>;
  const V lowest = fill<T, isa>(-std::numeric_limits<T>::infinity()), zero = {}, one = zero + T(1);
  const V budget = tile.gamma * load<T, isa>(tile.mass);
  V top[kSorted + 1];
  sort_largest<T, isa>(tile.scores, tile.m, top);
  const V last = top[tile.k - 1], next = top[tile.k];
  Choice<T, isa> found;
  found.theta = zero;
  V full = last > zero ? one : zero;  // 1 where all k lie above theta
  if (!tile.dual) {
    // The threshold of all k, from their excess over the k-th: sums that do not cancel.
    V excess = zero;
    for (int64_t q = 0; q < tile.k; ++q) excess += top[q] - last;
    full = excess < budget ? one : zero;
    found.theta = last + (excess - budget) / T(tile.k);
    if (any<T, isa>(full < one)) {
      V total = zero, theta = zero;  // relative to the largest score
      for (int64_t q = 0; q < tile.k; ++q) {
        const V below = top[q] - top[0];
        total += below;
        const V candidate = (total - budget) / T(q + 1);
        theta = below > candidate ? candidate : theta;
      }
      V sum = zero, count = zero;  // a step of Newton's takes off what rounding left
      for (int64_t q = 0; q < tile.k; ++q) {
        const V gap = (top[q] - top[0]) - theta;
        sum += gap > zero ? gap : zero;
        count += gap > zero ? one : zero;
      }
      theta += count > zero ? (sum - budget) / count : zero;
      found.theta = full > zero ? found.theta : top[0] + theta;
    }
  }
  const V middle = next + (last - next) * T(0.5);
  found.bound = full > zero ? last : found.theta;
  found.tied = next == last ? full : zero;
  found.level = middle > found.theta ? middle : found.theta;
  found.level = full > zero ? found.level : found.theta;
  const V dead = top[0] == lowest ? one : zero;  // nothing can be chosen
  if (!tile.dual) found.theta = dead > zero ? lowest : found.theta;
  found.bound = dead > zero ? -lowest : found.bound;
  return found;
}

template <class T, Isa isa>
DASHPOT_INLINE Choice<T, isa> choose_by_threshold(const Tile<T>& tile) {
  using V = Vec<T, isa>;
  constexpr int kWidth = kLanes<T, isa>;
  const V infinity = fill<T, isa>(std::numeric_limits<T>::infinity());
  const V zero = {}, one = zero + T(1), k = zero + T(tile.k);
  const V budget = tile.gamma * load<T, isa>(tile.mass), start = load<T, isa>(tile.level);
  V highest = -infinity;
  Above<T, isa> at{zero, zero};
  for (int64_t i = 0; i < tile.m; ++i) {
    const V score = load<T, isa>(tile.scores + i * kWidth), gap = score - start;
    highest = score > highest ? score : highest;
    at.excess += gap > zero ? gap : zero;
    at.count += gap > zero ? one : zero;
  }
  const V dead = highest == -infinity ? one : zero;
  const V least = highest - budget;
  Choice<T, isa> found;
  found.tied = zero;
  // Last time's level still has k scores above it, and their threshold is not above it: they are
  // the k largest and all stay positive.
  const V cut = tile.dual ? zero : start + (at.excess - budget) / k;
  V kept = at.count == k ? one : zero;
  kept = cut <= start ? kept : zero;
  kept = dead > zero ? one : kept;
  if (tile.k < tile.m && !any<T, isa>(kept < one)) {
    found.theta = dead > zero ? -infinity : cut;
    found.bound = dead > zero ? infinity : next_after<T, isa>(start, infinity[0]);
    found.level = start;
    return found;
  }
  if (tile.k <= kSorted && tile.k < tile.m) return choose_sorted<T, isa>(tile);
  if (tile.dual) {
    found.theta = zero;
    at = above<T, isa>(tile, zero);
  } else {
    // The sum is convex: a step of Newton's from anywhere lands before the root or on it, as does
    // highest - budget; from there on each step does.
    const V step = start + (at.excess - budget) / (at.count > zero ? at.count : one);
    found.theta = at.count > zero ? step : least;
    found.theta = found.theta > least ? found.theta : least;
    found.theta = dead > zero ? zero : found.theta;
    // A rounded step may fall short and bring a score back: the count must fall for another one.
    V before = infinity;
    for (;;) {
      at = above<T, isa>(tile, found.theta);
      V moving = at.count > zero ? one : zero;
      moving = at.count < before ? moving : zero;
      const V ahead = found.theta + (at.excess - budget) / (at.count > zero ? at.count : one);
      found.theta = moving > zero ? ahead : found.theta;
      if (!any<T, isa>(moving > zero)) break;
      before = at.count;
    }
  }
  found.theta = dead > zero ? -infinity : found.theta;
  found.bound = dead > zero ? infinity : found.theta;
  found.level = found.theta;
  V over = at.count > k ? one : zero;
  over = dead > zero ? zero : over;
  if (tile.k >= tile.m || !any<T, isa>(over > zero)) return found;

  bound_by_count<T, isa>(tile, start, highest, over, at.count, &found);
  if (!tile.dual) {
    at = above<T, isa>(tile, found.bound);  // the bound itself counts as 0
    const V theta = found.bound + (at.excess - budget) / k;
    found.theta = found.bound > found.theta ? theta : found.theta;
  }
  return found;
}

}  // namespace dashpot::transport
