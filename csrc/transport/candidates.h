// Evaluations that do not read the whole cost: a list of candidates per column, with a certificate.
//
// A column keeps the K rows of its largest scores v_i = alpha_i - C_ij at some alpha0, their costs,
// and a bound v_i <= rest of all other rows. At any later alpha, an outsider's score is at most
//     rest + max_i (alpha_i - alpha0_i)   (+ beta_j)
// and where that lies below the lowest score that the solved list chooses, the outsiders change
// nothing: the evaluation is exact. Columns that fail read their column of the cost again, at the
// present alpha. The alpha0 of the last kEpochs refreshes are kept.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "transport/evaluate.h"

namespace dashpot::transport {

inline constexpr int kEpochs = 16;

// max over i of x_i - y_i
template <class T>
struct LargestRise {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* x, const T* y, int64_t n, T* to) {
    constexpr int kWidth = kLanes<T, isa>;
    T most = -std::numeric_limits<T>::infinity();
    int64_t i = 0;
    if (n >= kWidth) {
      Vec<T, isa> rise = load<T, isa>(x) - load<T, isa>(y);
      for (i = kWidth; i + kWidth <= n; i += kWidth) {
        const Vec<T, isa> next = load<T, isa>(x + i) - load<T, isa>(y + i);
        rise = next > rise ? next : rise;
      }
      for (int lane = 0; lane < kWidth; ++lane) most = std::max<T>(most, rise[lane]);
    }
    for (; i < n; ++i) most = std::max(most, x[i] - y[i]);
    *to = most;
  }
};

// How many of v (m,) lie above level.
template <class T>
struct CountAbove {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* v, int64_t m, T level, int64_t* to) {
    constexpr int kWidth = kLanes<T, isa>;
    const Vec<T, isa> zero = {}, one = zero + T(1);
    Vec<T, isa> counts = zero;
    int64_t i = 0;
    for (; i + kWidth <= m; i += kWidth) counts += load<T, isa>(v + i) > level ? one : zero;
    int64_t count = static_cast<int64_t>(sum_lanes<T, isa>(counts));
    for (; i < m; ++i) count += v[i] > level;
    *to = count;
  }
};

// Scores of a tile's candidates: to[q] = alpha[rows[q]] + shift - cost[q], lanes beside each other.
template <class T>
struct FillCandidates {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* to, const T* alpha, const T* shift, const int32_t* rows,
                                 const T* costs, int64_t places) {
    constexpr int kWidth = kLanes<T, isa>;
    const Vec<T, isa> base = load<T, isa>(shift);
    for (int64_t q = 0; q < places; ++q) {
      Vec<T, isa> picked;
      for (int lane = 0; lane < kWidth; ++lane) picked[lane] = alpha[rows[q * kWidth + lane]];
      store<T, isa>(to + q * kWidth, base + picked - load<T, isa>(costs + q * kWidth));
    }
  }
};

template <class T, class C>
class Candidates {
 public:
  // Lists pay where a column is some times longer than they are.
  static int64_t places(const Options& options) {
    const int64_t more = options.smoothing > 0 ? 96 : 32;  // shares fade out beyond the k-th
    return std::max<int64_t>(64, (2 * options.k + more + 7) / 8 * 8);
  }
  static bool worth(const Options& options) {
    return options.reg == Reg::kSparse && 4 * places(options) <= options.m;
  }

  // As evaluate() of one problem. level (n,): see PerColumn.
  void evaluate(const Options& options, const Cost<C>& cost, const T* alpha, const T* beta,
                const T* a, const T* b, double* obj, double* grad_alpha, double* column, T* level,
                Scratch<T>& scratch, int threads) {
    const int64_t m = options.m, n = options.n, lanes = vector_bytes(isa()) / sizeof(T);
    const int64_t width = columns_per_chunk(n), chunks = (n + width - 1) / width;
    prepare(options, alpha);
    scratch.row_sums.assign(chunks * m, 0.0);
    scratch.values.assign(chunks, 0.0);
    scratch.column.resize(n);
    parallel_for(chunks, threads, [&](int64_t chunk) {
      const int64_t end = std::min(n, (chunk + 1) * width);
      for (int64_t j = chunk * width; j < end; j += lanes) {
        scratch.values[chunk] +=
            tile(options, cost, alpha, beta, b, j, std::min(lanes, end - j), level,
                 scratch.column.data(), scratch.row_sums.data() + chunk * m);
      }
    });
    taken_ = std::find(epoch_.begin(), epoch_.end(), now_) != epoch_.end();
    finish<T, double>(options, alpha, beta, a, b, scratch.column.data(), scratch.row_sums.data(),
                      scratch.values.data(), chunks, obj, grad_alpha, column);
  }

 private:
  // Makes room, keeps alpha as the newest epoch, and sees how far it has risen above the others.
  void prepare(const Options& options, const T* alpha) {
    const int64_t n = options.n, lanes = vector_bytes(isa()) / sizeof(T);
    if (epochs_.empty()) {
      places_ = places(options);
      const int64_t tiles = n + lanes;  // chunks end in tiles that are not full
      rows_.assign(tiles * places_, 0);
      costs_.assign(tiles * places_, std::numeric_limits<T>::infinity());
      rest_.assign(n, std::numeric_limits<T>::infinity());  // nothing known: every column is read
      epoch_.assign(n, -1);
      epochs_.emplace_back();
    }
    // The newest epoch is this alpha; it stays one only if a column is read at it.
    if (!taken_) {
      epochs_[now_].assign(alpha, alpha + options.m);
    } else if (epochs_.size() < kEpochs) {
      now_ = static_cast<int>(epochs_.size());
      epochs_.emplace_back(alpha, alpha + options.m);
    } else {
      now_ = (now_ + 1) % kEpochs;  // the oldest: its columns start again
      for (int64_t j = 0; j < n; ++j) {
        if (epoch_[j] == now_) rest_[j] = std::numeric_limits<T>::infinity();
      }
      epochs_[now_].assign(alpha, alpha + options.m);
    }
    rise_.resize(kEpochs);
    for (size_t e = 0; e < epochs_.size(); ++e) {
      run_on_isa<LargestRise<T>>(alpha, static_cast<const T*>(epochs_[e].data()), options.m,
                                 &rise_[e]);
    }
  }

  double tile(const Options& options, const Cost<C>& cost, const T* alpha, const T* beta,
              const T* b, int64_t first, int64_t count, T* level, T* column, double* row_sums) {
    const int64_t lanes = vector_bytes(isa()) / sizeof(T);
    Options listed = options;
    listed.m = places_;
    int32_t* const rows = rows_.data() + first * places_;
    T* const costs = costs_.data() + first * places_;
    T* const room = tile_room<T>(2 * places_ * lanes + options.m);
    Tile<T> solved(listed, room, room + places_ * lanes);
    T shift[kMaxLanes] = {};
    for (int64_t lane = 0; lane < count; ++lane) {
      solved.mass[lane] = b[first + lane];
      if (beta) shift[lane] = beta[first + lane];
    }
    bool refreshed = false;
    for (;;) {
      for (int64_t lane = 0; lane < count; ++lane) solved.level[lane] = level[first + lane];
      std::fill_n(solved.row_sums, places_ * lanes, T(0));
      run_on_isa<FillCandidates<T>>(room, alpha, static_cast<const T*>(shift),
                                    static_cast<const int32_t*>(rows), static_cast<const T*>(costs),
                                    places_);
      run_on_isa<SolveTile<T>>(&solved);
      bool exact = true;
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t j = first + lane;
        const T outside = epoch_[j] < 0 ? rest_[j] : rest_[j] + rise_[epoch_[j]] + shift[lane];
        if (outside < solved.bound[lane] || (outside <= 0 && options.dual)) continue;
        if (refreshed)
          return whole_tile(options, cost, alpha, beta, b, first, count, level, column, row_sums);
        refresh(options, cost, alpha, j, rows + lane, costs + lane, lanes,
                room + 2 * places_ * lanes);
        exact = false;
      }
      if (exact) break;
      refreshed = true;
    }
    double value = 0;
    for (int64_t q = 0; q < places_ * lanes; ++q) {
      if (solved.row_sums[q] != 0) row_sums[rows[q]] += solved.row_sums[q];
    }
    for (int64_t lane = 0; lane < count; ++lane) {
      column[first + lane] = options.dual ? solved.sum[lane] : solved.theta[lane];
      level[first + lane] = solved.level[lane];
      value += solved.value[lane];
    }
    return value;
  }

  // A list that cannot hold what its column chooses.
  double whole_tile(const Options& options, const Cost<C>& cost, const T* alpha, const T* beta,
                    const T* b, int64_t first, int64_t count, T* level, T* column,
                    double* row_sums) {
    std::vector<double> sums(options.m);
    const double value = evaluate_columns<T, C>(options, alpha, beta, b, cost, first, first + count,
                                                sums.data(), PerColumn<T>{column, level, nullptr},
                                                [](const Tile<T>&, int64_t, int64_t) {});
    for (int64_t i = 0; i < options.m; ++i) row_sums[i] += sums[i];
    return value;
  }

  // Column j at the present alpha: its largest scores, between 3/4 and all of the places, above a
  // level found by halving. rows, costs: lanes apart; v: room for m scores.
  void refresh(const Options& options, const Cost<C>& cost, const T* alpha, int64_t j,
               int32_t* rows, T* costs, int64_t lanes, T* v) {
    const int64_t m = options.m;
    const auto entries = cost.column_of(j);
    T low = std::numeric_limits<T>::infinity(), high = -low;
    for (int64_t i = 0; i < m; ++i) {
      v[i] = alpha[i] - convert<T>(entries[i]);
      high = std::max(high, v[i]);
      if (std::isfinite(v[i])) low = std::min(low, v[i]);
    }
    // Above low - 1 lie all finite scores, above high none.
    T level = high;
    int64_t kept = 0;
    T below = std::isfinite(low) ? low - 1 : high, above = high;
    for (int round = 0; round < 60; ++round) {
      const T middle = below + (above - below) / 2;
      int64_t number = 0;
      run_on_isa<CountAbove<T>>(static_cast<const T*>(v), m, middle, &number);
      (number > places_ ? below : above) = middle;
      if (number <= places_ && number > kept) level = middle, kept = number;
      if (4 * kept >= 3 * places_ || !(below < above)) break;
    }
    int64_t q = 0;
    for (int64_t i = 0; i < m; ++i) {
      if (!(v[i] > level)) continue;
      rows[q * lanes] = static_cast<int32_t>(i);
      costs[q++ * lanes] = convert<T>(entries[i]);
    }
    for (; q < places_; ++q) {
      rows[q * lanes] = 0;
      costs[q * lanes] = std::numeric_limits<T>::infinity();
    }
    rest_[j] = level;
    epoch_[j] = now_;
  }

  int64_t places_ = 0;
  std::vector<int32_t> rows_;  // (tiles, places, lanes)
  std::vector<T> costs_;       // (tiles, places, lanes)
  std::vector<T> rest_;        // (n,)
  std::vector<int> epoch_;     // (n,)
  std::vector<std::vector<T>> epochs_;
  std::vector<T> rise_;
  int now_ = 0;
  bool taken_ = false;  // a column refers to epoch now_
};

}  // namespace dashpot::transport
