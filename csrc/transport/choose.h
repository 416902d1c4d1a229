// What a column of a transport problem chooses: its threshold, and the least score that is taken.
//
//     t = [s - theta]+ / gamma on the k largest s, sum t = b (semi-dual); theta = 0 (dual)
//
// A vector holds a number of each column of a tile. For k <= kListed the k + 1 largest of each are
// kept in registers, one walk over the scores; else a few walks find the threshold without a bound
// (Newton on sum [s - theta]+ from the last evaluation's, monotone and finite from its first step
// on) and, if more than k scores lie above it, the k-th largest (counts at levels between, again
// from the last evaluation's). No sort.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/simd.h"
#include "transport/problem.h"

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

// The next number above x, finite.
template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> next_above(Vec<T, isa> x) {
  using Bits = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, isa>;
  const Vec<T, isa> zero = {};
  const Bits bits = reinterpret_cast<Bits>(x + zero);  // -0 becomes 0
  return reinterpret_cast<Vec<T, isa>>(x < zero ? bits - 1 : bits + 1);
}

// A search at work, lane by lane: the scores above `level` were just looked at.
template <class T, Isa isa>
struct Search {
  using V = Vec<T, isa>;
  V budget, least;    // gamma b; theta without a bound is not less
  V level;            // last looked at, or to be looked at next
  Above<T, isa> at;   // there
  V low, high;        // more than k scores lie above low, fewer above high
  V of_low, of_high;  // how many
  V excess_high;
  V open;     // 1: not found yet
  V bare;     // 1: at most k scores lie above theta without a bound, which is sought
  V stepped;  // 1: level is a step of Newton's from where `before` scores were above,
  V before;
  V from_left;  // 1: and which lay before the root
};

// The scores nearest to a level that are needed to end a search.
inline constexpr int kNear = 4;

// Open lanes have at most kNear scores more or less than k above their level: the k-th and the next
// largest from the kNear + 1 scores next to it, above or below. One walk.
template <class T, Isa isa>
DASHPOT_INLINE void end_nearby(const Tile<T>& tile, Search<T, isa>& search,
                               Choice<T, isa>* found) {
  using V = Vec<T, isa>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const V zero = {}, one = zero + T(1), k = zero + T(tile.k), lowest = zero - kInfinity;
  const V level = search.level, more = search.at.count - k;
  const V sign = more > zero ? -one : one;  // above: the lowest first; below: the highest
  const V limit = more > zero ? -level : next_above<T, isa>(level);
  V near[kNear + 1];
  for (V& one_of : near) one_of = lowest;
  for (int64_t i = 0; i < tile.m; ++i) {
    const V score = load<T, isa>(tile.scores + i * kLanes<T, isa>) * sign;
    V falling = score < limit ? score : lowest;
    for (V& one_of : near) {
      const V higher = one_of > falling ? one_of : falling;
      falling = one_of > falling ? falling : one_of;
      one_of = higher;
    }
  }
  // Signed, `steps` scores are passed: above they leave the sum, below they enter it.
  const V steps = more > zero ? more : -more;
  V passed = zero, last = lowest, next = lowest;
  for (int q = 0; q <= kNear; ++q) {
    const V gap = near[q] - level * sign;
    passed += steps > T(q) ? gap : zero;
    last = steps == T(q + 1) ? near[q] : last;
    next = steps == T(q) ? near[q] : next;
  }
  const V kth = more > zero ? -next : last, outside = more > zero ? -last : next;
  V theta = level + (search.at.excess + passed - search.budget) / k;
  theta = tile.dual ? zero : theta;
  const V bound = kth > theta ? kth : theta;
  V fine = (theta <= kth ? one : zero) * (kth >= search.least ? one : zero);
  fine = tile.dual ? one : fine;
  const V done = fine * search.open;
  const V middle = outside + (kth - outside) * T(0.5);
  V level_next = middle < kth ? middle : outside;
  level_next = level_next > theta ? level_next : theta;
  const V tied = done * (kth == outside ? one : zero) * (outside > theta ? one : zero);
  found->theta = done > zero ? theta : found->theta;
  found->bound = done > zero ? bound : found->bound;
  found->level = done > zero ? level_next : found->level;
  found->tied = tied > zero ? one : found->tied;
  search.open -= done;
  // Fewer than k stay positive.
  search.bare = search.open > zero ? one : search.bare;
  search.stepped = zero;
  search.level = kth > search.least ? kth : search.least;
}

// What was seen at search.level: lanes that are done, the others' next level. Flags are 0 or 1 and
// joined by products: GCC 12 takes joined comparisons of 512 bits apart.
template <class T, Isa isa>
DASHPOT_INLINE void look(const Tile<T>& tile, int round, Search<T, isa>& search,
                         Choice<T, isa>* found) {
  using V = Vec<T, isa>;
  const V zero = {}, one = zero + T(1), k = zero + T(tile.k);
  const V level = search.level, count = search.at.count, excess = search.at.excess;
  const V some = count > zero ? count : one, lacks = one - (count > zero ? one : zero);
  const V many = count > k ? one : zero, few = count < k ? one : zero;
  // The sum is convex: a step of Newton's from anywhere lands before the root or on it.
  V newton = level + (excess - search.budget) / some;
  newton = lacks > zero ? search.least : newton;
  newton = newton > search.least ? newton : search.least;
  newton = tile.dual ? zero : newton;
  const V left = newton >= level ? one : zero;

  // k scores and their threshold is not above the level: they are the k largest, all positive.
  const V low_enough = newton <= level ? one : zero;
  const V exact = (one - many) * (one - few) * low_enough * search.open * (one - search.bare);
  V bare = search.stepped + left;
  bare = bare * (one - many) + search.bare;
  search.bare = bare > zero ? one : zero;
  // No other set of scores than before the step: its root. (A rounded step may fall short and bring
  // a score back.)
  V settled = count > search.before ? search.from_left : zero;
  settled += count == search.before ? one : zero;
  settled = lacks * left + (one - lacks) * settled * search.stepped;
  settled = (tile.dual ? left : settled) * search.bare * (search.open - exact);
  V root = lacks > zero ? level : newton;
  root = tile.dual ? zero : root;
  const V above_level = next_above<T, isa>(level);
  found->theta = exact > zero ? newton : found->theta;
  found->bound = exact > zero ? above_level : found->bound;
  found->level = exact > zero ? level : found->level;
  found->theta = settled > zero ? root : found->theta;
  found->bound = settled > zero ? root : found->bound;
  found->level = settled > zero ? root : found->level;
  search.open -= exact + settled;

  const V lower = few * (level < search.high ? one : zero);
  search.low = many > zero ? level : search.low;
  search.of_low = many > zero ? count : search.of_low;
  search.high = lower > zero ? level : search.high;
  search.of_high = lower > zero ? count : search.of_high;
  search.excess_high = lower > zero ? excess : search.excess_high;

  // As if scores thinned out exponentially, their mean excess being what it is; later by the
  // bracket.
  const V floor = search.low > search.least ? search.low : search.least;
  const V width = search.high - floor, middle = floor + width * T(0.5);
  V trial = level + excess * T(2) * (count - k) / (some * (count + k));
  if (round >= 4) {
    const V part = (search.of_low - k) / (search.of_low - search.of_high);
    trial = round % 2 ? floor + width * part : middle;
  }
  trial = trial > floor ? trial : floor;
  V step = newton > trial ? one : zero;
  trial = newton > trial ? newton : trial;
  V inside = (trial > search.low ? one : zero) * (trial < search.high ? one : zero);
  trial = inside > zero ? trial : middle;
  step *= inside;
  // Neighbours in floating point: the scores equal to high are tied for the last.
  inside = (trial > search.low ? one : zero) * (trial < search.high ? one : zero);
  const V tied = (one - inside) * search.open * (one - search.bare);
  V shared = search.high + (search.excess_high - search.budget) / k;
  shared = tile.dual ? zero : shared;
  found->theta = tied > zero ? shared : found->theta;
  found->bound = tied > zero ? search.high : found->bound;
  found->level = tied > zero ? search.high : found->level;
  found->tied = tied > zero ? one : found->tied;
  search.open -= tied;

  step += search.bare;
  search.stepped = step > zero ? one : zero;
  search.level = search.bare > zero ? newton : trial;
  search.before = count;
  search.from_left = left;
}

template <class T, Isa isa>
DASHPOT_INLINE Choice<T, isa> choose_by_threshold(const Tile<T>& tile) {
  using V = Vec<T, isa>;
  constexpr int kWidth = kLanes<T, isa>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const V zero = {}, one = zero + T(1), infinity = zero + kInfinity, k = zero + T(tile.k);
  V start = load<T, isa>(tile.level);
  start = tile.dual ? (start > zero ? start : zero) : start;
  V highest = -infinity;
  Search<T, isa> search;
  search.at = {zero, zero};
  for (int64_t i = 0; i < tile.m; ++i) {
    const V score = load<T, isa>(tile.scores + i * kWidth), gap = score - start;
    highest = score > highest ? score : highest;
    search.at.excess += gap > zero ? gap : zero;
    search.at.count += gap > zero ? one : zero;
  }
  const V dead = highest == -infinity ? one : zero;
  search.budget = tile.gamma * load<T, isa>(tile.mass);
  search.least = tile.dual ? zero : highest - search.budget;
  search.level = start;
  search.low = -infinity;
  search.high = highest;
  search.of_low = zero + T(tile.m);
  search.of_high = search.excess_high = zero;
  search.open = dead > zero ? zero : one;
  search.bare = tile.k < tile.m ? zero : one;
  search.stepped = search.from_left = zero;
  search.before = infinity;
  Choice<T, isa> found;
  found.theta = found.level = -infinity;  // of dead lanes
  found.bound = infinity;
  found.tied = zero;
  for (int round = 0;; ++round) {
    const V before = search.level;
    look<T, isa>(tile, round, search, &found);
    if (!any<T, isa>(search.open > zero)) return found;
    // A few scores away, all of them: count no more.
    const V more = search.at.count - k, away = more > zero ? more : -more;
    const V far = search.open * ((away > T(kNear) ? one : zero) + search.bare + search.stepped);
    if (!any<T, isa>(far > zero)) {
      search.level = before;
      end_nearby<T, isa>(tile, search, &found);
      if (!any<T, isa>(search.open > zero)) return found;
    }
    search.at = above<T, isa>(tile, search.level);
  }
}

}  // namespace dashpot::transport
