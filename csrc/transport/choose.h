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

// Lanes as bits, all or none set. GCC 12 takes comparisons of 512 bits apart that are joined or
// serve more than one choice: here each serves one, and what follows is bitwise.
template <class T, Isa isa>
using Bits = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, isa>;

template <class T, Isa isa>
DASHPOT_INLINE Bits<T, isa> higher(Vec<T, isa> x, Vec<T, isa> y) {
  const Bits<T, isa> none = {};
  const auto all = reinterpret_cast<Vec<T, isa>>(~none);  // floats: GCC 12 takes integers apart
  return reinterpret_cast<Bits<T, isa>>(x > y ? all : reinterpret_cast<Vec<T, isa>>(none));
}

template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> select(Bits<T, isa> lanes, Vec<T, isa> x, Vec<T, isa> y) {
  return reinterpret_cast<Vec<T, isa>>((lanes & reinterpret_cast<Bits<T, isa>>(x)) |
                                       (~lanes & reinterpret_cast<Bits<T, isa>>(y)));
}

template <class T, Isa isa>
DASHPOT_INLINE bool some_of(Bits<T, isa> lanes) {
  uint64_t words[sizeof lanes / 8], all = 0;
  __builtin_memcpy(words, &lanes, sizeof lanes);
  for (const uint64_t word : words) all |= word;
  return all != 0;
}

// The next number above x, finite.
template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> next_above(Vec<T, isa> x) {
  const Vec<T, isa> zero = {};
  const auto bits = reinterpret_cast<Bits<T, isa>>(x + zero);  // -0 becomes 0
  return reinterpret_cast<Vec<T, isa>>(bits + 1 + 2 * higher<T, isa>(zero, x));
}

// A search at work, lane by lane: the scores above `level` were just looked at.
template <class T, Isa isa>
struct Search {
  using V = Vec<T, isa>;
  using B = Bits<T, isa>;
  V budget, least;    // gamma b; theta without a bound is not less
  V level;            // last looked at, or to be looked at next
  Above<T, isa> at;   // there
  V low, high;        // more than k scores lie above low, fewer above high:
  V of_low, of_high;  // how many
  V excess_high;
  B open;     // not found yet
  B bare;     // at most k scores lie above theta without a bound, which is sought
  B stepped;  // level is a step of Newton's from where `before` scores were above,
  V before;
  B from_left;  // and which lay before the root
};

// The scores nearest to a level that are needed to end a search.
inline constexpr int kNear = 4;

template <class T, Isa isa>
DASHPOT_INLINE void take(Bits<T, isa> lanes, Vec<T, isa> theta, Vec<T, isa> bound,
                         Vec<T, isa> level, Choice<T, isa>* found) {
  found->theta = select<T, isa>(lanes, theta, found->theta);
  found->bound = select<T, isa>(lanes, bound, found->bound);
  found->level = select<T, isa>(lanes, level, found->level);
}

// Open lanes have at most kNear scores more or less than k above their level: the k-th and the next
// largest from the kNear + 1 scores next to it, above or below. One walk.
template <class T, Isa isa>
DASHPOT_INLINE void end_nearby(const Tile<T>& tile, Search<T, isa>& search, Choice<T, isa>* found) {
  using V = Vec<T, isa>;
  using B = Bits<T, isa>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const V zero = {}, one = zero + T(1), k = zero + T(tile.k), lowest = zero - kInfinity;
  const V level = search.level, more = search.at.count - k;
  const B many = higher<T, isa>(more, zero);
  // Above: the lowest first; below: the highest.
  const V sign = select<T, isa>(many, -one, one);
  const V limit = select<T, isa>(many, -level, next_above<T, isa>(level));
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
  const V steps = more * -sign;
  V passed = zero, last = lowest, next = lowest;
  for (int q = 0; q <= kNear; ++q) {
    const V gap = near[q] - level * sign;
    passed += steps > T(q) ? gap : zero;
    last = steps > T(q) ? near[q] : last;
    next = steps > T(q - 1) ? near[q] : next;
  }
  const V kth = select<T, isa>(many, -next, last), outside = select<T, isa>(many, -last, next);
  V theta = level + (search.at.excess + passed - search.budget) / k;
  theta = tile.dual ? zero : theta;
  const V bound = kth > theta ? kth : theta;
  const B short_of = higher<T, isa>(theta, kth) | higher<T, isa>(search.least, kth);
  const B done = search.open & (tile.dual ? B{} - 1 : ~short_of);
  const V middle = outside + (kth - outside) * T(0.5);
  V level_next = middle < kth ? middle : outside;
  level_next = level_next > theta ? level_next : theta;
  take<T, isa>(done, theta, bound, level_next, found);
  const B tied = done & ~higher<T, isa>(kth, outside) & higher<T, isa>(outside, theta);
  found->tied = select<T, isa>(tied, one, found->tied);
  search.open &= ~done;
  // Fewer than k stay positive.
  search.bare |= search.open;
  search.stepped = B{};
  search.level = kth > search.least ? kth : search.least;
}

// What was seen at search.level: lanes that are done, the others' next level.
template <class T, Isa isa>
DASHPOT_INLINE void look(const Tile<T>& tile, int round, Search<T, isa>& search,
                         Choice<T, isa>* found) {
  using V = Vec<T, isa>;
  using B = Bits<T, isa>;
  const V zero = {}, one = zero + T(1), k = zero + T(tile.k);
  const V level = search.level, count = search.at.count, excess = search.at.excess;
  const V some = count > one ? count : one;
  const B none = ~higher<T, isa>(count, zero);
  const B many = higher<T, isa>(count, k), few = higher<T, isa>(k, count);
  // The sum is convex: a step of Newton's from anywhere lands before the root or on it.
  V newton = level + (excess - search.budget) / some;
  newton = select<T, isa>(none, search.least, newton);
  newton = newton > search.least ? newton : search.least;
  newton = tile.dual ? zero : newton;
  const B left = ~higher<T, isa>(level, newton);

  // k scores and their threshold is not above the level: they are the k largest, all positive.
  const B exact = ~many & ~few & ~higher<T, isa>(newton, level) & search.open & ~search.bare;
  search.bare |= (search.stepped | left) & ~many;
  // No other set of scores than before the step: its root. (A rounded step may fall short and bring
  // a score back.)
  const B rose = higher<T, isa>(count, search.before), fell = higher<T, isa>(search.before, count);
  const B same = (none & left) | (~none & search.stepped & ~fell & (search.from_left | ~rose));
  const B settled = search.bare & search.open & ~exact & (tile.dual ? left : same);
  V root = select<T, isa>(none, level, newton);
  root = tile.dual ? zero : root;
  take<T, isa>(exact, newton, next_above<T, isa>(level), level, found);
  take<T, isa>(settled, root, root, root, found);
  search.open &= ~(exact | settled);

  const B lower = few & higher<T, isa>(search.high, level);
  search.low = select<T, isa>(many, level, search.low);
  search.of_low = select<T, isa>(many, count, search.of_low);
  search.high = select<T, isa>(lower, level, search.high);
  search.of_high = select<T, isa>(lower, count, search.of_high);
  search.excess_high = select<T, isa>(lower, excess, search.excess_high);

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
  const B step = higher<T, isa>(newton, trial);
  trial = select<T, isa>(step, newton, trial);
  const B inside = higher<T, isa>(trial, search.low) & higher<T, isa>(search.high, trial);
  trial = select<T, isa>(inside, trial, middle);
  // Neighbours in floating point: the scores equal to high are tied for the last.
  const B apart = higher<T, isa>(trial, search.low) & higher<T, isa>(search.high, trial);
  const B tied = ~apart & search.open & ~search.bare;
  V shared = search.high + (search.excess_high - search.budget) / k;
  shared = tile.dual ? zero : shared;
  take<T, isa>(tied, shared, search.high, search.high, found);
  found->tied = select<T, isa>(tied, one, found->tied);
  search.open &= ~tied;

  search.stepped = (step & inside) | search.bare;
  search.level = select<T, isa>(search.bare, newton, trial);
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
  search.budget = tile.gamma * load<T, isa>(tile.mass);
  search.least = tile.dual ? zero : highest - search.budget;
  search.level = start;
  search.low = -infinity;
  search.high = highest;
  search.of_low = zero + T(tile.m);
  search.of_high = search.excess_high = zero;
  const Bits<T, isa> none = {};
  search.open = higher<T, isa>(highest, -infinity);  // others are dead
  search.bare = tile.k < tile.m ? none : ~none;
  search.stepped = search.from_left = none;
  search.before = infinity;
  Choice<T, isa> found;
  found.theta = found.level = -infinity;  // of dead lanes
  found.bound = infinity;
  found.tied = zero;
  for (int round = 0;; ++round) {
    const V before = search.level;
    look<T, isa>(tile, round, search, &found);
    if (!some_of<T, isa>(search.open)) return found;
    // A few scores away, all of them: count no more.
    const V more = search.at.count - k, away = more > zero ? more : -more;
    const auto far = higher<T, isa>(away, zero + T(kNear)) | search.bare | search.stepped;
    if (!some_of<T, isa>(far & search.open)) {
      search.level = before;
      end_nearby<T, isa>(tile, search, &found);
      if (!some_of<T, isa>(search.open)) return found;
    }
    search.at = above<T, isa>(tile, search.level);
  }
}

}  // namespace dashpot::transport
