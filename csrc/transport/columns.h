// Columns of a transport problem, a vector of them at a time: lane = column, rows pass by.
//
// Semi-dual, scores s = alpha - C (m,) of a column with mass b:
//     t = [s - theta]+ / gamma on the k largest s, sum t = b;   value = max t.s - Omega(t)
// Dual, s = alpha + beta - C: the same with theta = 0; value = Omega+(s).
// Both: t_i = (s_i - theta) / gamma where s_i >= bound. Negative entropy has exp in their place.
//
// The scores of a tile of columns are formed once and stay in the cache (m x lanes), where they are
// walked over to find what is chosen (choose.h) and to apply it. Row sums gather in m vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/aligned.h"
#include "common/math.h"
#include "common/simd.h"
#include "transport/choose.h"

namespace dashpot::transport {

// The sums over the lanes of `rows` vectors, vector(0), vector(1), ..., of at most as many as there
// are lanes.
template <class T, Isa isa, class Vector>
DASHPOT_INLINE void sum_rows(double* to, int64_t rows, const Vector& vector) {
  constexpr int kWidth = kLanes<T, isa>;
  if (rows == kWidth) return store_as_double<T, isa>(to, sums_over_lanes<T, isa>(vector));
  double sums[kMaxLanes];
  const auto or_zero = [&](int r) __attribute__((always_inline)) {
    return r < rows ? vector(r) : Vec<T, isa>{};
  };
  store_as_double<T, isa>(sums, sums_over_lanes<T, isa>(or_zero));
  std::copy_n(sums, rows, to);
}

// t (lanes,) of row i into the tile's row sums.
template <class T, Isa isa>
DASHPOT_INLINE void give(Tile<T>& tile, int64_t i, Vec<T, isa> t) {
  T* const to = tile.row_sums + i * kLanes<T, isa>;
  store<T, isa>(to, tile.fresh ? t : load<T, isa>(to) + t);
}

// Of equal scores the first rows are taken: those of a lane whose k-th score ties with the next.
template <class T>
void apply_tied(Tile<T>& tile, int64_t lane, int64_t lanes, T last, T theta, double* square) {
  const auto score = [&](int64_t i) { return tile.scores[i * lanes + lane]; };
  int64_t room = tile.k;
  for (int64_t i = 0; i < tile.m; ++i) room -= score(i) > last;
  T sum = 0;
  *square = 0;
  for (int64_t i = 0; i < tile.m; ++i) {
    if (score(i) > last || (score(i) == last && room-- > 0)) {
      const T t = (score(i) - theta) / tile.gamma;
      if (tile.totals) {
        tile.totals[i] += t;
      } else {
        tile.row_sums[i * lanes + lane] += t;
      }
      sum += t;
      *square += static_cast<double>(score(i) - theta) * t;
    }
  }
  tile.sum[lane] = sum;
}

// t of the chosen scores into row sums, column sums and values.
template <class T, Isa isa>
DASHPOT_INLINE void apply(Tile<T>& tile, const Choice<T, isa>& found) {
  using V = Vec<T, isa>;
  constexpr int64_t kWidth = kLanes<T, isa>;
  const V zero = {}, infinity = fill<T, isa>(std::numeric_limits<T>::infinity());
  const V inverse = zero + 1 / tile.gamma;
  const V bound = found.tied > zero ? infinity : found.bound;
  const T* const scores = tile.scores;
  double* const totals = tile.totals;
  const int64_t m = tile.m;
  V sums[2] = {zero, zero}, squares[2] = {zero, zero};
  for (int64_t i = 0; i < m; i += kWidth) {
    const int64_t rows = std::min(kWidth, m - i);
    const auto entries = [&](int r) __attribute__((always_inline)) {
      const V score = load<T, isa>(scores + (i + r) * kWidth);
      const V gap = score >= bound ? score - found.theta : zero;
      const V t = gap * inverse;
      sums[r % 2] += t;
      squares[r % 2] += gap * t;
      return t;
    };
    if (totals) {
      sum_rows<T, isa>(totals + i, rows, entries);
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        if (r < rows) give<T, isa>(tile, i + r, entries(r));
      }
    }
  }
  T square[kMaxLanes], tied[kMaxLanes];
  store<T, isa>(square, squares[0] + squares[1]);
  store<T, isa>(tied, found.tied);
  store<T, isa>(tile.sum, sums[0] + sums[1]);
  store<T, isa>(tile.theta, found.theta);
  store<T, isa>(tile.level, found.level);
  store<T, isa>(tile.bound, found.bound);
  for (int lane = 0; lane < kWidth; ++lane) {
    double total = square[lane];
    if (tied[lane] > 0) {
      apply_tied<T>(tile, lane, kWidth, tile.bound[lane], tile.theta[lane], &total);
    }
    tile.value[lane] = total / 2;
    if (!tile.dual && tile.mass[lane] > 0 && std::isfinite(tile.theta[lane])) {
      tile.value[lane] += static_cast<double>(tile.theta[lane]) * tile.mass[lane];
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
    give<T, isa>(tile, i, t);
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

// The smoothed dual: Omega+ = max {sum theta_i h_i - mu / 2 theta_i^2 : 0 <= theta <= 1, sum theta
// <= k}, h = [s]+^2 / (2 gamma); its maximiser is theta = clip((h - lambda) / mu, 0, 1) with lambda
// >= 0, and T = theta [s]+ / gamma. sum theta falls with lambda, a staircase whose steps are ramps
// as wide as mu: Newton from the last evaluation's lambda lands at once where the ramps are the
// same, elsewhere it would climb ramp by ramp and takes turns with the bracket's secant.
template <class T, Isa isa>
DASHPOT_INLINE void smoothed(Tile<T>& tile) {
  using V = Vec<T, isa>;
  constexpr int kWidth = kLanes<T, isa>;
  const V zero = {}, one = zero + T(1), k = zero + T(tile.k);
  const T half = T(0.5) / tile.gamma, inverse = 1 / tile.smoothing;
  const T near = 8 * std::numeric_limits<T>::epsilon();
  V level = load<T, isa>(tile.level), low = zero, high = zero, highest = zero;
  V of_low = zero + T(tile.m), of_high = zero;
  for (int round = 0; round < 200; ++round) {
    V count = zero, positive = zero, full = zero;
    for (int64_t i = 0; i < tile.m; ++i) {
      const V score = load<T, isa>(tile.scores + i * kWidth);
      const V open = score > zero ? score : zero;
      highest = open > highest ? open : highest;
      const V share = (open * open * half - level) * inverse;
      const V some = share > zero ? share : zero;
      const V over = some > one ? some - one : zero;
      count += some - over;
      full += some > one ? one : zero;
      positive += some > zero ? one : zero;
    }
    const V partial = positive - full;
    if (round == 0) high = highest * highest * half;
    const V excess = count - k;
    low = excess > zero ? level : low;
    of_low = excess > zero ? count : of_low;
    high = excess > zero ? high : level;
    of_high = excess > zero ? of_high : count;
    V part = (of_low - k) / (of_low - of_high);
    part = part > T(0.1) ? part : zero + T(0.1);
    part = part < T(0.9) ? part : zero + T(0.9);
    const V secant = low + (high - low) * (round % 4 == 3 ? zero + T(0.5) : part);
    V newton = level + tile.smoothing * excess / (partial > zero ? partial : one);
    newton = newton < zero ? zero : newton;
    const auto use =
        (newton >= low) & (newton <= high) & (partial > zero) & (zero + T(round % 2) < one);
    // A sum below k at level 0 is the end; the first time below, 0 itself is asked.
    const auto floor = (excess <= zero) & (low == zero) & (of_low >= zero + T(tile.m));
    V trial = use ? newton : floor ? zero : secant;
    trial = excess == zero ? level : trial;
    const V reach = near * (level + tile.smoothing);
    const V gap = trial > level ? trial - level : level - trial;
    const V left = newton > level ? newton - level : level - newton;
    // Newton's step says how far the root is; a bracket that has closed leaves nothing to do.
    const auto there = (partial > zero) & (left <= reach);
    const auto moving = ~there & (gap > reach) & ((high - low > reach) | floor);
    level = moving ? trial : level;
    if (!any<T, isa>(moving)) break;
  }
  V sums = zero, values = zero;
  for (int64_t i = 0; i < tile.m; ++i) {
    const V score = load<T, isa>(tile.scores + i * kWidth);
    const V energy = score > zero ? score * score * half : zero;
    V theta = (energy - level) * inverse;
    theta = theta < zero ? zero : theta > one ? one : theta;
    const V t = score > zero ? theta * score * (1 / tile.gamma) : zero;
    give<T, isa>(tile, i, t);
    sums += t;
    values += theta * (energy - tile.smoothing * T(0.5) * theta);
  }
  store<T, isa>(tile.sum, sums);
  store<T, isa>(tile.level, level);
  // theta_i > 0 where h > lambda
  for (int lane = 0; lane < kWidth; ++lane) {
    tile.bound[lane] = std::sqrt(2 * tile.gamma * tile.level[lane]);
  }
  for (int lane = 0; lane < kWidth; ++lane) tile.value[lane] = values[lane];
}

// tied of the columns: the lowest chosen and the highest score left out, this one above theta too.
template <class T, Isa isa>
DASHPOT_INLINE void find_ties(Tile<T>& tile, const Choice<T, isa>& found) {
  using V = Vec<T, isa>;
  const V infinity = fill<T, isa>(std::numeric_limits<T>::infinity()), zero = {}, one = zero + T(1);
  V lowest = infinity, next = -infinity;
  for (int64_t i = 0; i < tile.m; ++i) {
    const V score = load<T, isa>(tile.scores + i * kLanes<T, isa>);
    const auto chosen = score >= found.bound;
    const V low = chosen ? score : infinity, high = chosen ? -infinity : score;
    lowest = low < lowest ? low : lowest;
    next = high > next ? high : next;
  }
  const V size = lowest > zero ? lowest : -lowest;
  const V reach = tile.tie * (size > one ? size : one);
  const V tied = (next > found.theta) & (lowest - next <= reach) ? one : zero;
  store<T, isa>(tile.tied, found.tied > zero ? one : tied);
}

// choose_listed<k> for k <= K known at run time.
template <int K, class T, Isa isa>
DASHPOT_INLINE Choice<T, isa> choose_up_to(const Tile<T>& tile) {
  if constexpr (K > 1) {
    if (tile.k < K) return choose_up_to<K - 1, T, isa>(tile);
  }
  return choose_listed<K, T, isa>(tile);
}

inline bool takes_lists(Reg reg, int64_t k) { return reg == Reg::kSparse && k <= kListed; }

template <class T>
struct SolveTile {
  template <Isa isa>
  static DASHPOT_INLINE void run(Tile<T>* tile) {
    if (tile->reg == Reg::kNegentropy) return entropic<T, isa>(*tile);
    if (tile->smoothing > 0) return smoothed<T, isa>(*tile);
    const bool listed = takes_lists(tile->reg, tile->k);
    const Choice<T, isa> found =
        listed ? choose_up_to<kListed, T, isa>(*tile) : choose_by_threshold<T, isa>(*tile);
    if (tile->tie >= 0 && tile->k < tile->m) find_ties<T, isa>(*tile, found);
    apply<T, isa>(*tile, found);
  }
};

// A column of costs, entry i at first[i * stride].
template <class C>
struct CostColumn {
  const C* first;
  int64_t stride;
  C operator[](int64_t i) const { return first[i * stride]; }
};

// One problem's cost: entry (i, j) at data[i * row + j * column]; one of the strides is 1. Of
// points: points.h.
template <class C>
struct Cost {
  using Element = C;
  const C* data;
  int64_t row, column;
  Cost at(int64_t problem, int64_t entries) const {
    return {data + problem * entries, row, column};
  }
  CostColumn<C> column_of(int64_t j) const { return {data + j * column, row}; }
  // The rows from the given one on.
  Cost from_row(int64_t i) const { return {data + i * row, row, column}; }
  // Rows, or where the columns lie one after another columns, `length` numbers each.
  using Entry = C;
  bool lines_are_rows() const { return column == 1; }
  const C* line(int64_t l, int64_t length) const { return data + l * length; }
  bool admits(int64_t i, int64_t j) const {
    return std::isfinite(convert<double>(data[i * row + j * column]));
  }
};

// Tiles whose scores are formed together: neighbours in memory, so that a row's cache lines and its
// page serve all of them.
inline constexpr int kGroup = 4;
inline constexpr int64_t kAhead = 16;  // rows fetched ahead: each lies in a page of its own

// Costs of the last columns of each of m rows, fewer than a vector or all of one; inf in the lanes
// without a column. A vector is read where it ends within the rows.
template <class T, class C, Isa isa>
class RestOfRow {
 public:
  DASHPOT_INLINE RestOfRow(const C* cost, int64_t stride, int64_t m, int64_t columns)
      : cost_(cost), stride_(stride), columns_(columns) {
    const int64_t beyond = kLanes<T, isa> - columns;
    safe_ = m - (beyond + stride - 1) / stride;
    T open[kLanes<T, isa>];
    for (int lane = 0; lane < kLanes<T, isa>; ++lane) open[lane] = lane < columns ? 1 : 0;
    open_ = load<T, isa>(open);
  }
  DASHPOT_INLINE Vec<T, isa> operator()(int64_t i) const {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const C* const from = cost_ + i * stride_;
    if (i < safe_) {
      const Vec<T, isa> costs = load_as<T, isa>(from), closed = Vec<T, isa>{} + kInfinity;
      return open_ > Vec<T, isa>{} ? costs : closed;
    }
    T costs[kLanes<T, isa>];
    for (int64_t c = 0; c < kLanes<T, isa>; ++c) {
      costs[c] = c < columns_ ? convert<T>(from[c]) : kInfinity;
    }
    return load<T, isa>(costs);
  }

 private:
  const C* cost_;
  int64_t stride_, columns_, safe_;
  Vec<T, isa> open_;
};

// Scores of the columns [first, first + live) as kGroup tiles (kGroup, m, lanes):
// s_i = alpha_i + shift - C; -inf in the lanes without a column.
template <class T, class C>
struct FillTiles {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* scores, const T* alpha, const T* shift, const Cost<C>* cost,
                                 int64_t m, int64_t first, int64_t live) {
    if (cost->column == 1) {
      by_rows<isa>(scores, alpha, shift, cost->data + first, cost->row, m, live);
    } else {
      by_columns<isa>(scores, alpha, shift, cost->data + first * cost->column, cost->column, m,
                      live);
    }
  }

  template <Isa isa>
  static DASHPOT_INLINE void by_rows(T* scores, const T* alpha, const T* shift, const C* cost,
                                     int64_t stride, int64_t m, int64_t live) {
    constexpr int kWidth = kLanes<T, isa>;
    const int64_t whole = live / kWidth, rest = live % kWidth;
    const RestOfRow<T, C, isa> costs_of_rest(cost + whole * kWidth, stride, m, rest);
    Vec<T, isa> base[kGroup];
    for (int g = 0; g < kGroup; ++g) base[g] = load<T, isa>(shift + g * kWidth);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t at = 0; at < live; at += 64 / static_cast<int64_t>(sizeof(C))) {
        __builtin_prefetch(cost + (i + kAhead) * stride + at);
      }
      for (int64_t g = 0; g < whole; ++g) {
        store<T, isa>(scores + (g * m + i) * kWidth,
                      base[g] + alpha[i] - load_as<T, isa>(cost + i * stride + g * kWidth));
      }
      if (rest == 0) continue;
      store<T, isa>(scores + (whole * m + i) * kWidth,
                    load<T, isa>(shift + whole * kWidth) + alpha[i] - costs_of_rest(i));
    }
  }

  // The columns lie one after another: blocks of rows, so that a tile's lines are written once.
  template <Isa isa>
  static DASHPOT_INLINE void by_columns(T* scores, const T* alpha, const T* shift, const C* cost,
                                        int64_t stride, int64_t m, int64_t live) {
    constexpr int kWidth = kLanes<T, isa>, kBlock = 64;
    const int64_t filled = (live + kWidth - 1) / kWidth * kWidth;
    for (int64_t begin = 0; begin < m; begin += kBlock) {
      const int64_t end = std::min<int64_t>(m, begin + kBlock);
      for (int64_t j = 0; j < filled; ++j) {
        T* to = scores + j / kWidth * m * kWidth + j % kWidth;
        for (int64_t i = begin; i < end; ++i) {
          to[i * kWidth] = j < live ? shift[j] + alpha[i] - convert<T>(cost[j * stride + i])
                                    : -std::numeric_limits<T>::infinity();
        }
      }
    }
  }
};

// The same of one tile, of costs whose rows lie in memory; `counts`: what lies above the tile's
// levels is counted on the way. shift: of the columns, or null.
template <class T, class C>
struct FillTile {
  template <Isa isa>
  static DASHPOT_INLINE void run(Tile<T>* tile, const T* alpha, const T* shift, const C* cost,
                                 int64_t stride, int64_t live, bool counts) {
    const RestOfRow<T, C, isa> row(cost, stride, tile->m, live);
    const auto some = [&](int64_t i) __attribute__((always_inline)) { return row(i); };
    const auto all = [&](int64_t i) __attribute__((always_inline)) {
      return load_as<T, isa>(cost + i * stride);
    };
    if (live < kLanes<T, isa>) {
      make<isa>(*tile, alpha, shift, some, counts);
    } else if (shift || !counts) {
      make<isa>(*tile, alpha, shift, all, counts);
    } else {
      make<isa>(*tile, alpha, nullptr, all, true);
    }
  }

  template <Isa isa, class Row>
  static DASHPOT_INLINE void make(Tile<T>& tile, const T* alpha, const T* shift, const Row& row,
                                  bool counts) {
    using V = Vec<T, isa>;
    constexpr int kWidth = kLanes<T, isa>;
    const V base = shift ? load<T, isa>(shift) : V{}, level = load<T, isa>(tile.level);
    Counted<T, isa> counted;
    const auto enter = [&](int64_t i, int u) __attribute__((always_inline)) {
      const V score = shift ? base + alpha[i] - row(i) : alpha[i] - row(i);
      store<T, isa>(tile.scores + i * kWidth, score);
      if (counts) counted.add(score, level, u);
    };
    int64_t i = 0;
    for (; i + 2 <= tile.m; i += 2) {
      enter(i, 0);
      enter(i + 1, 1);
    }
    if (i < tile.m) enter(i, 0);
    tile.counted = counts;
    const Above<T, isa> found = counted.all();
    store<T, isa>(tile.excess, found.excess);
    store<T, isa>(tile.count, found.count);
  }
};

// Row sums of a chunk: to[i] = the sum of m vectors' lanes.
template <class T>
struct SumLanes {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* vectors, int64_t m, double* to) {
    constexpr int64_t kWidth = kLanes<T, isa>;
    for (int64_t i = 0; i < m; i += kWidth) {
      const auto row = [&](int r) __attribute__((always_inline)) {
        return load<T, isa>(vectors + (i + r) * kWidth);
      };
      sum_rows<T, isa>(to + i, std::min(kWidth, m - i), row);
    }
  }
};

// The thread's room for tiles: kept, for a solver comes back hundreds of times.
template <class T>
T* tile_room(int64_t count) {
  static thread_local AlignedVector<T> room;
  if (static_cast<int64_t>(room.size()) < count) room.resize(count);
  return room.data();
}

// What an evaluation leaves per column, beside row sums: theta, or the column sums of T (dual).
template <class T>
struct PerColumn {
  T* column;      // (n,)
  T* level;       // (n,) Tile::level from evaluation to evaluation, or null
  int32_t* tied;  // (n,) or null
};

// One evaluation of one problem's chunk of columns [begin, end). alpha (m,), beta (n,) or null,
// b (n,); out: row_sums (m,), found, the value. visit(tile, first, count) sees every solved tile.
template <class T, class C, class Visit>
double evaluate_columns(const Options& options, const T* alpha, const T* beta, const T* b,
                        const Cost<C>& cost, int64_t begin, int64_t end, double* row_sums,
                        const PerColumn<T>& found, const Visit& visit) {
  const int64_t lanes = vector_bytes(isa()) / sizeof(T), m = options.m;
  T* room = tile_room<T>((kGroup + 1) * m * lanes);
  Tile<T> tile(options, room, room + kGroup * m * lanes);
  constexpr bool kStored = std::is_same_v<typename Cost<C>::Entry, C>;
  const bool chosen = options.reg != Reg::kNegentropy && !(options.smoothing > 0);
  const bool counts = chosen && found.level && !takes_lists(options.reg, options.k);
  tile.totals = chosen && end - begin <= lanes ? row_sums : nullptr;
  const T unknown = options.smoothing > 0 ? T(0) : std::numeric_limits<T>::infinity();
  double value = 0;
  for (int64_t first = begin; first < end; first += kGroup * lanes) {
    const int64_t live = std::min(kGroup * lanes, end - first);
    T shift[kGroup * kMaxLanes] = {};
    if (beta) std::copy_n(beta + first, live, shift);
    const bool alone = live <= lanes && kStored && cost.lines_are_rows();
    if (!alone) {
      run_on_isa<FillTiles<T, C>>(room, alpha, static_cast<const T*>(shift), &cost, m, first, live);
    }
    for (int64_t start = 0; start < live; start += lanes) {
      tile.scores = room + start * m;
      const int64_t count = std::min(lanes, live - start), j = first + start;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        tile.mass[lane] = lane < count ? b[j + lane] : T(0);
        tile.level[lane] = found.level && lane < count ? found.level[j + lane] : unknown;
      }
      tile.fresh = j == begin;
      tile.counted = false;
      if constexpr (kStored) {
        if (alone) {
          run_on_isa<FillTile<T, C>>(&tile, alpha, beta ? static_cast<const T*>(shift) : nullptr,
                                     cost.data + first, cost.row, live, counts);
        }
      }
      run_on_isa<SolveTile<T>>(&tile);
      for (int64_t lane = 0; lane < count; ++lane) {
        found.column[j + lane] = options.dual ? tile.sum[lane] : tile.theta[lane];
        if (found.level) found.level[j + lane] = tile.level[lane];
        if (found.tied) found.tied[j + lane] = tile.tied[lane] > 0;
        value += tile.value[lane];
      }
      visit(tile, j, count);
    }
  }
  if (!tile.totals) {
    run_on_isa<SumLanes<T>>(static_cast<const T*>(tile.row_sums), m, row_sums);
  }
  return value;
}

// Columns per chunk: the same cut for any number of threads and lanes; at most 16 chunks.
inline int64_t columns_per_chunk(int64_t n) {
  const int64_t least = (n + 15) / 16;
  return std::max<int64_t>(64, (least + 63) / 64 * 64);
}

}  // namespace dashpot::transport
