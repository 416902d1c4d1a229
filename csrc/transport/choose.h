// What a column of a transport problem chooses: its threshold, and the least score that is taken.
//
//     t = [s - theta]+ / gamma on the k largest s, sum t = b (semi-dual); theta = 0 (dual)
//
// A vector holds a number of each column of a tile. For k <= kListed the k + 1 largest of each are
// kept in registers, one walk over the scores. For other k the scores above the last evaluation's
// level are counted; where that are k, or a few more or fewer (near.h), the k largest are known.
// Else, for k <= kSorted, they are sorted (sorted.h); or a few walks find the threshold without a
// bound (Newton on sum [s - theta]+ from the last evaluation's, monotone and finite from its first
// step on) and, if more than k scores lie above it, the k-th largest (counts at levels between,
// again from the last evaluation's).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/simd.h"
#include "transport/near.h"
#include "transport/problem.h"
#include "transport/sorted.h"

namespace dashpot::transport {

inline constexpr int kListed = 8;     // k up to which the largest are kept in registers
inline constexpr int kMaxLanes = 16;  // of any instruction set

// A tile: scores (m, lanes) and what is found for each of its columns. T: the state's type.
template <class T>
struct Tile {
  T* scores;    // (m, lanes); -inf for a forbidden pair and in lanes without a column
  T* row_sums;  // (m, lanes), added to; written where it is fresh
  bool fresh = false;
  double* totals = nullptr;  // (m,) or null: takes the sums over the lanes in row_sums' place
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
  bool counted = false;     // excess and count, of the scores above level, are known
  T excess[kMaxLanes], count[kMaxLanes];
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

// By numbers chosen by the mask: GCC makes a mask itself into a vector lane by lane.
template <class T, Isa isa>
DASHPOT_INLINE bool any(Mask<T, isa> mask) {
  const Vec<T, isa> zero = {}, flags = mask ? zero + T(1) : zero;
  uint64_t words[sizeof flags / 8], all = 0;
  __builtin_memcpy(words, &flags, sizeof flags);
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

// Two running sums of it. The number as integers: it takes the units that floating point leaves.
template <class T, Isa isa>
struct Counted {
  using Ints = Vec<IntOf<T>, isa>;
  Vec<T, isa> excess[2] = {};
  Ints count[2] = {};

  DASHPOT_INLINE void add(Vec<T, isa> score, Vec<T, isa> level, int u) {
    const Vec<T, isa> gap = score - level, zero = {};
    const Ints none = {}, one = none + 1;
    excess[u] += gap > zero ? gap : zero;
    count[u] += gap > zero ? one : none;
  }
  DASHPOT_INLINE Above<T, isa> all() const {
    return {excess[0] + excess[1], __builtin_convertvector(count[0] + count[1], Vec<T, isa>)};
  }
};

template <class T, Isa isa>
DASHPOT_INLINE Above<T, isa> above(const Tile<T>& tile, Vec<T, isa> level) {
  constexpr int kWidth = kLanes<T, isa>;
  Counted<T, isa> counted;
  int64_t i = 0;
  for (; i + 2 <= tile.m; i += 2) {
    for (int u = 0; u < 2; ++u) {
      counted.add(load<T, isa>(tile.scores + (i + u) * kWidth), level, u);
    }
  }
  if (i < tile.m) counted.add(load<T, isa>(tile.scores + i * kWidth), level, 0);
  return counted.all();
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

// The next number above each lane.
template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> next_above(Vec<T, isa> x) {
  using Ints = Vec<IntOf<T>, isa>;
  const Vec<T, isa> positive_zero = x + T(0);
  const Ints next = in_order<T, isa>(reinterpret_cast<Ints>(positive_zero)) + 1;
  const auto number = reinterpret_cast<Vec<T, isa>>(in_order<T, isa>(next));
  return x < std::numeric_limits<T>::infinity() ? number : x;
}

template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> highest_of(const Tile<T>& tile) {
  Vec<T, isa> highest = fill<T, isa>(-std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < tile.m; ++i) {
    const Vec<T, isa> score = load<T, isa>(tile.scores + i * kLanes<T, isa>);
    highest = score > highest ? score : highest;
  }
  return highest;
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
    const V step = count > k ? up : -next_above<T, isa>(-down);
    next = gap <= T(8) ? step : zero + kInfinity;
    // Not inside: neighbours in floating point; the scores equal to high are tied for the last.
    const V exact = count == k ? inside : zero;
    const V just_above = next_above<T, isa>(trial);
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

// From the last evaluation's level, `start`, with the scores above it: where that is not their
// number k, the scores next to the level change sides, at most Q - 1 of them. False where a column
// has more of them to change, or has fewer than k scores above its threshold.
template <int Q, class T, Isa isa>
DASHPOT_INLINE bool choose_near(const Tile<T>& tile, Vec<T, isa> start, const Above<T, isa>& at,
                                Vec<T, isa> dead, Choice<T, isa>* found) {
  using V = Vec<T, isa>;
  const V infinity = fill<T, isa>(std::numeric_limits<T>::infinity());
  const V zero = {}, one = zero + T(1), k = zero + T(tile.k);
  const V budget = tile.gamma * load<T, isa>(tile.mass);
  const V below = at.count < k ? one : zero;
  V distance = at.count < k ? k - at.count : at.count - k;
  distance = dead > zero ? zero : distance;
  V inner = start, outer = start, change = zero;
  if constexpr (Q > 0) {
    V near[Q];
    const Side<T, isa> side(start, below);
    nearest<Q, T, isa>(side, tile.scores, tile.m, near);
    for (int q = 0; q < Q; ++q) {
      change += distance > T(q) ? near[q] - start : zero;
      inner = distance == T(q + 1) ? near[q] : inner;
      outer = distance == T(q) ? near[q] : outer;
    }
  }
  const V last = below > zero ? inner : outer, next = below > zero ? outer : inner;
  const V excess = at.excess + (below > zero ? change : -change);
  found->theta = tile.dual ? zero : start + (excess - budget) / k;
  found->bound = distance > zero ? last : next_above<T, isa>(start);
  V less = found->theta < found->bound ? zero : one;  // 1 where fewer than k lie above theta
  less = dead > zero ? zero : less;
  if (!tile.dual && any<T, isa>(less > zero)) return false;

  const V middle = next + (last - next) * T(0.5);
  found->level = middle > found->theta ? middle : found->theta;
  found->level = distance > zero ? found->level : start;
  const V rival = next > found->theta ? next : -infinity;
  found->tied = rival == last ? one : zero;
  found->tied = distance > zero ? found->tied : zero;
  const V floor = tile.dual ? zero : -infinity;
  found->bound = found->bound > floor ? found->bound : floor;
  found->bound = dead > zero ? infinity : found->bound;
  if (!tile.dual) found->theta = dead > zero ? -infinity : found->theta;
  return true;
}

// choose_near where no column is further from k than the lists are long.
template <class T, Isa isa>
DASHPOT_INLINE bool choose_again(const Tile<T>& tile, Vec<T, isa> start, const Above<T, isa>& at,
                                 Vec<T, isa> dead, Choice<T, isa>* found) {
  using V = Vec<T, isa>;
  const V k = V{} + T(tile.k);
  V distance = at.count < k ? k - at.count : at.count - k;
  distance = dead > V{} ? V{} : distance;
  if (!any<T, isa>(distance > T(0))) return choose_near<0, T, isa>(tile, start, at, dead, found);
  if (!any<T, isa>(distance > T(3))) return choose_near<4, T, isa>(tile, start, at, dead, found);
  if (!any<T, isa>(distance > T(5))) return choose_near<6, T, isa>(tile, start, at, dead, found);
  if (!any<T, isa>(distance > T(7))) return choose_near<8, T, isa>(tile, start, at, dead, found);
  return false;
}

template <class T, Isa isa>
DASHPOT_INLINE Choice<T, isa> choose_by_threshold(const Tile<T>& tile) {
  using V = Vec<T, isa>;
  const V infinity = fill<T, isa>(std::numeric_limits<T>::infinity());
  const V zero = {}, one = zero + T(1), k = zero + T(tile.k);
  const V budget = tile.gamma * load<T, isa>(tile.mass), start = load<T, isa>(tile.level);
  const bool sorted = tile.k <= kSorted && tile.k < tile.m;
  if (sorted && !any<T, isa>(start < infinity)) return choose_sorted<T, isa>(tile);
  Above<T, isa> at;
  if (tile.counted) {
    at = {load<T, isa>(tile.excess), load<T, isa>(tile.count)};
  } else {
    at = above<T, isa>(tile, start);
  }
  V highest = zero, dead = zero;
  const bool empty = any<T, isa>(at.count == zero);
  if (empty) {
    highest = highest_of<T, isa>(tile);
    dead = highest == -infinity ? one : zero;
  }
  Choice<T, isa> found;
  if (tile.k < tile.m && choose_again<T, isa>(tile, start, at, dead, &found)) return found;
  if (sorted) return choose_sorted<T, isa>(tile);
  if (!empty) highest = highest_of<T, isa>(tile);
  const V least = highest - budget;
  found.tied = zero;
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
