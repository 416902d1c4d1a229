// Columns of a transport problem, a vector of them at a time: lane = column, rows pass by.
//
// Semi-dual, scores s = alpha - C (m,) of a column with mass b:
//     t = [s - theta]+ / gamma on the k largest s, sum t = b;   value = max t.s - Omega(t)
// Dual, s = alpha + beta - C: the same with theta = 0; value = Omega+(s).
// Both: t_i = (s_i - theta) / gamma where s_i >= bound. Negative entropy has exp in their place.
//
// The scores of a tile of columns are formed once and stay in the cache (m x lanes), where they are
// walked over: once for k <= kListed (the k + 1 largest of each lane in registers), else a few
// times for the threshold (Newton on sum [s - theta]+, from below monotone and finite) and, if its
// support exceeds k, for the k-th largest (bisection on counts). No sort. Row sums gather in m
// vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/math.h"
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
  T mass[kMaxLanes];   // b
  T theta[kMaxLanes];  // threshold; for negative entropy gamma * log-sum-exp(s / gamma)
  T sum[kMaxLanes];    // column sums of T
  double value[kMaxLanes];
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

template <int K, class T, Isa isa>
DASHPOT_INLINE Choice<T, isa> choose_listed(const Tile<T>& tile) {
  using V = Vec<T, isa>;
  const V lowest = fill<T, isa>(-std::numeric_limits<T>::infinity());
  const V zero = {}, one = zero + T(1);
  V top[K + 1];
  largest<K, T, isa>(tile.scores, tile.m, top);
  Choice<T, isa> found;
  if (tile.dual) {
    found.theta = zero;
    found.bound = top[K - 1] > zero ? top[K - 1] : zero;
    found.tied = (top[K] == top[K - 1]) & (top[K] > zero) ? one : zero;
    return found;
  }
  const V budget = tile.gamma * load<T, isa>(tile.mass);
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

// Over the scores above `level`: sum (s - level) and their number.
template <class T, Isa isa>
DASHPOT_INLINE void above(const Tile<T>& tile, Vec<T, isa> level, Vec<T, isa>* excess,
                          Vec<T, isa>* count) {
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
  *excess = sums[0] + sums[1];
  *count = counts[0] + counts[1];
}

template <class T, Isa isa>
DASHPOT_INLINE Choice<T, isa> choose_by_threshold(const Tile<T>& tile) {
  using V = Vec<T, isa>;
  constexpr int kWidth = kLanes<T, isa>;
  const V infinity = fill<T, isa>(std::numeric_limits<T>::infinity());
  const V zero = {}, one = zero + T(1), k = zero + T(tile.k);
  const V budget = tile.gamma * load<T, isa>(tile.mass);
  V highest = -infinity;
  for (int64_t i = 0; i < tile.m; ++i) {
    const V score = load<T, isa>(tile.scores + i * kWidth);
    highest = score > highest ? score : highest;
  }
  const Mask<T, isa> dead = highest == -infinity;
  Choice<T, isa> found;
  V excess, count;
  if (tile.dual) {
    found.theta = zero;
    above<T, isa>(tile, zero, &excess, &count);
  } else {
    // From theta = highest - budget the root lies ahead; each step lands before it or on it.
    found.theta = dead ? zero : highest - budget;
    // A rounded step may fall short and bring a score back: the count must fall for another one.
    V before = infinity;
    for (;;) {
      above<T, isa>(tile, found.theta, &excess, &count);
      const Mask<T, isa> moving = (count > zero) & (count < before);
      found.theta = moving ? found.theta + (excess - budget) / count : found.theta;
      if (!any<T, isa>(moving)) break;
      before = count;
    }
  }
  found.theta = dead ? -infinity : found.theta;
  found.bound = dead ? infinity : found.theta;
  found.tied = zero;
  Mask<T, isa> over = (count > k) & ~dead;
  if (tile.k >= tile.m || !any<T, isa>(over)) return found;

  // The k-th largest lies in (low, high]: more than k scores above low, fewer than k above high.
  V low = found.theta, high = highest, of_low = count, of_high = zero;
  V level = low;
  for (int round = 0; any<T, isa>(over); ++round) {
    // By halves in turn with a guess from the counts; towards the ends neither may stall.
    const V part = (of_low - k) / (of_low - of_high);
    const V guess = low + (high - low) * (round % 2 ? part : zero + T(0.5));
    const V middle = low + (high - low) * T(0.5);
    const V trial = (guess > low) & (guess < high) ? guess : middle;
    const Mask<T, isa> open = over & (trial > low) & (trial < high);
    level = open ? trial : level;
    above<T, isa>(tile, level, &excess, &count);
    const Mask<T, isa> exact = open & (count == k);
    low = open & (count > k) ? level : low;
    of_low = open & (count > k) ? count : of_low;
    high = open & (count < k) ? level : high;
    of_high = open & (count < k) ? count : of_high;
    // Neighbours in floating point: the scores equal to high are tied for the last places.
    const Mask<T, isa> tied = over & ~open;
    found.bound = exact ? level : tied ? high : found.bound;
    found.tied = tied ? one : found.tied;
    over = over & ~exact & ~tied;
    for (int lane = 0; lane < kWidth; ++lane) {
      if (exact[lane]) {
        found.bound[lane] =
            std::nextafter(static_cast<T>(level[lane]), std::numeric_limits<T>::infinity());
      }
    }
  }
  if (!tile.dual) {
    const V base = found.bound;
    above<T, isa>(tile, base, &excess, &count);  // base itself counts as 0
    const Mask<T, isa> cut = found.bound > found.theta;
    found.theta = cut ? base + (excess - budget) / k : found.theta;
  }
  return found;
}

// t of the chosen scores into row sums, column sums and values.
template <class T, Isa isa>
DASHPOT_INLINE void apply(Tile<T>& tile, const Choice<T, isa>& found) {
  using V = Vec<T, isa>;
  constexpr int kWidth = kLanes<T, isa>;
  const V zero = {}, infinity = fill<T, isa>(std::numeric_limits<T>::infinity());
  const V inverse = zero + 1 / tile.gamma;
  const V bound = found.tied > zero ? infinity : found.bound;
  V sums = zero, squares = zero;
  for (int64_t i = 0; i < tile.m; ++i) {
    const V score = load<T, isa>(tile.scores + i * kWidth);
    const V gap = score >= bound ? score - found.theta : zero;
    const V t = gap * inverse;
    store<T, isa>(tile.row_sums + i * kWidth, load<T, isa>(tile.row_sums + i * kWidth) + t);
    sums += t;
    squares += gap * t;
  }
  store<T, isa>(tile.sum, sums);
  store<T, isa>(tile.theta, found.theta);
  for (int lane = 0; lane < kWidth; ++lane) {
    double square = squares[lane];
    if (found.tied[lane] > 0) {  // of equal scores the first rows are taken
      const T last = found.bound[lane], theta = found.theta[lane];
      int64_t room = tile.k;
      for (int64_t i = 0; i < tile.m; ++i) room -= tile.scores[i * kWidth + lane] > last;
      T sum = 0;
      square = 0;
      for (int64_t i = 0; i < tile.m; ++i) {
        const T score = tile.scores[i * kWidth + lane];
        if (score > last || (score == last && room-- > 0)) {
          const T t = (score - theta) / tile.gamma;
          tile.row_sums[i * kWidth + lane] += t;
          sum += t;
          square += static_cast<double>(score - theta) * t;
        }
      }
      tile.sum[lane] = sum;
    }
    tile.value[lane] = square / 2;
    if (!tile.dual && tile.mass[lane] > 0 && std::isfinite(found.theta[lane])) {
      tile.value[lane] += static_cast<double>(found.theta[lane]) * tile.mass[lane];
    }
  }
}

// Negative entropy: t = exp(s / gamma - 1) (dual), b softmax(s / gamma) (semi-dual).
template <class T, Isa isa>
DASHPOT_INLINE void entropic(Tile<T>& tile) {
  using V = Vec<T, isa>;
  constexpr int kWidth = kLanes<T, isa>;
  const V zero = {}, lowest = fill<T, isa>(-std::numeric_limits<T>::infinity());
  const T inverse = 1 / tile.gamma;
  V shift = zero + tile.gamma, factor = zero + T(1), sums = zero;
  if (!tile.dual) {
    V highest = lowest;
    for (int64_t i = 0; i < tile.m; ++i) {
      const V score = load<T, isa>(tile.scores + i * kWidth);
      highest = score > highest ? score : highest;
    }
    shift = highest == lowest ? zero : highest;
    for (int64_t i = 0; i < tile.m; ++i) {
      sums += exp<T, isa>((load<T, isa>(tile.scores + i * kWidth) - shift) * inverse);
    }
    const V mass = load<T, isa>(tile.mass);
    factor = sums > zero ? mass / sums : zero;
    store<T, isa>(tile.theta, shift + tile.gamma * log<T, isa>(sums));
    sums = zero;
  }
  for (int64_t i = 0; i < tile.m; ++i) {
    const V score = load<T, isa>(tile.scores + i * kWidth);
    const V t = factor * exp<T, isa>((score - shift) * inverse);
    store<T, isa>(tile.row_sums + i * kWidth, load<T, isa>(tile.row_sums + i * kWidth) + t);
    sums += t;
  }
  store<T, isa>(tile.sum, sums);
  for (int lane = 0; lane < kWidth; ++lane) {
    const double b = tile.mass[lane];
    if (tile.dual) {
      tile.value[lane] = static_cast<double>(tile.gamma) * tile.sum[lane];
    } else {
      const bool open = b > 0 && std::isfinite(tile.theta[lane]);
      tile.value[lane] = open ? b * (tile.theta[lane] - tile.gamma * std::log(b)) : 0;
    }
  }
}

// choose_listed<k> for k <= K known at run time.
template <int K, class T, Isa isa>
DASHPOT_INLINE Choice<T, isa> choose_up_to(const Tile<T>& tile) {
  if constexpr (K > 1) {
    if (tile.k < K) return choose_up_to<K - 1, T, isa>(tile);
  }
  return choose_listed<K, T, isa>(tile);
}

template <class T>
struct SolveTile {
  template <Isa isa>
  static DASHPOT_INLINE void run(Tile<T>* tile) {
    if (tile->reg == Reg::kNegentropy) return entropic<T, isa>(*tile);
    const bool listed = tile->reg == Reg::kSparse && tile->k <= kListed;
    apply<T, isa>(
        *tile, listed ? choose_up_to<kListed, T, isa>(*tile) : choose_by_threshold<T, isa>(*tile));
  }
};

// Tiles whose scores are formed together: neighbours in memory, so that a row's cache lines and its
// page serve all of them.
inline constexpr int kGroup = 4;

// Scores of the columns [first, first + live) as kGroup tiles (kGroup, m, lanes):
// s_i = alpha_i + shift - C; -inf in the lanes without a column.
template <class T, class C>
struct FillTiles {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* scores, const T* alpha, const T* shift, const C* cost,
                                 int64_t m, int64_t n, int64_t live) {
    constexpr int kWidth = kLanes<T, isa>;
    const int64_t whole = live / kWidth, rest = live % kWidth;
    Vec<T, isa> base[kGroup];
    for (int g = 0; g < kGroup; ++g) base[g] = load<T, isa>(shift + g * kWidth);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t g = 0; g < whole; ++g) {
        store<T, isa>(scores + (g * m + i) * kWidth,
                      base[g] + alpha[i] - load_as<T, isa>(cost + i * n + g * kWidth));
      }
      if (rest == 0) continue;
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const int64_t j = whole * kWidth + lane;
        scores[(whole * m + i) * kWidth + lane] =
            lane < rest ? shift[j] + alpha[i] - convert<T>(cost[i * n + j])
                        : -std::numeric_limits<T>::infinity();
      }
    }
  }
};

// Row sums of a chunk: to[i] = the sum of m vectors' lanes.
template <class T>
struct SumLanes {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* vectors, int64_t m, double* to) {
    for (int64_t i = 0; i < m; ++i)
      to[i] = sum_lanes<T, isa>(load<T, isa>(vectors + i * kLanes<T, isa>));
  }
};

// One evaluation of one problem's chunk of columns [begin, end). alpha (m,), beta (n,) or null,
// b (n,), cost (m, n); out: row_sums (m,), column (n,) theta or the column sums of T, the value.
template <class T, class C>
double evaluate_columns(const Options& options, const T* alpha, const T* beta, const T* b,
                        const C* cost, int64_t begin, int64_t end, double* row_sums, T* column) {
  const int64_t lanes = vector_bytes(isa()) / sizeof(T), m = options.m;
  std::vector<T> room((kGroup + 1) * m * lanes);
  Tile<T> tile{room.data(),
               room.data() + kGroup * m * lanes,
               m,
               options.k,
               static_cast<T>(options.gamma),
               options.reg,
               options.dual,
               {},
               {},
               {},
               {}};
  double value = 0;
  for (int64_t first = begin; first < end; first += kGroup * lanes) {
    const int64_t live = std::min(kGroup * lanes, end - first);
    T shift[kGroup * kMaxLanes] = {};
    if (beta) std::copy_n(beta + first, live, shift);
    run_on_isa<FillTiles<T, C>>(room.data(), alpha, static_cast<const T*>(shift), cost + first, m,
                                options.n, live);
    for (int64_t start = 0; start < live; start += lanes) {
      tile.scores = room.data() + start * m;
      const int64_t count = std::min(lanes, live - start);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        tile.mass[lane] = lane < count ? b[first + start + lane] : T(0);
      }
      run_on_isa<SolveTile<T>>(&tile);
      for (int64_t lane = 0; lane < count; ++lane) {
        column[first + start + lane] = options.dual ? tile.sum[lane] : tile.theta[lane];
        value += tile.value[lane];
      }
    }
  }
  run_on_isa<SumLanes<T>>(static_cast<const T*>(tile.row_sums), m, row_sums);
  return value;
}

// Columns per chunk: the same cut for any number of threads and lanes; at most 16 chunks.
inline int64_t columns_per_chunk(int64_t n) {
  const int64_t least = (n + 15) / 16;
  return std::max<int64_t>(64, (least + 63) / 64 * 64);
}

}  // namespace dashpot::transport
