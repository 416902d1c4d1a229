// Long columns of at most k <= kListed entries: one pass in which nothing is stored.
//
// The tiles' k + 1 largest scores and their rows stay in the cache while the rows pass by, kRows at
// a time. Once the lists have settled almost no score enters (about k log(m / k) of m do): of most
// blocks of rows only the largest is compared with the end of the list, so that a score costs its
// making and a maximum, and an evaluation a read of the cost. The plan is then the lists
// themselves: row sums take k numbers per column, not m.
#pragma once

#include "transport/columns.h"

namespace dashpot::transport {

inline constexpr int64_t kLongColumn = 256;  // rows from which the lists settle soon enough
// Rows compared at once, and read together: few, so that the cache's prefetcher follows them all;
// more are made together where a column's rows are neighbours in memory.
inline constexpr int64_t kRows = 8, kRowsOfColumns = 64;

inline bool listed_in_one_pass(const Options& options) {
  return options.reg == Reg::kSparse && options.k <= kListed && options.m >= kLongColumn &&
         !(options.smoothing > 0);
}

// A tile's lists, descending; of equal scores the first rows. Rows are exact in float32.
template <class T>
struct TopLists {
  T score[kListed + 1][kMaxLanes];
  T row[kListed + 1][kMaxLanes];
};

// Scores of `rows` <= kRows rows from `first` on, score(0), score(1), ..., into the K + 1 largest.
template <int K, class T, Isa isa, class Score>
DASHPOT_INLINE void enter(TopLists<T>& lists, const Score& score, int64_t rows, int64_t first) {
  using V = Vec<T, isa>;
  if (rows == kRows) {
    V most = score(0);
    for (int u = 1; u < kRows; ++u) {
      const V one = score(u);
      most = one > most ? one : most;
    }
    if (!any<T, isa>(most > load<T, isa>(lists.score[K]))) return;
  }
  V top[K + 1], row[K + 1];
  for (int q = 0; q <= K; ++q) {
    top[q] = load<T, isa>(lists.score[q]);
    row[q] = load<T, isa>(lists.row[q]);
  }
  for (int64_t u = 0; u < rows; ++u) {
    const V one = score(u);
    if (!any<T, isa>(one > top[K])) continue;
    const V place = V{} + static_cast<T>(first + u);
    for (int q = K; q > 0; --q) {  // from the end: what stands before is still the old list
      const auto here = one > top[q], before = one > top[q - 1];
      const V next = top[q - 1] < one ? top[q - 1] : one, next_row = before ? row[q - 1] : place;
      top[q] = next > top[q] ? next : top[q];
      row[q] = here ? next_row : row[q];
    }
    row[0] = one > top[0] ? place : row[0];
    top[0] = one > top[0] ? one : top[0];
  }
  for (int q = 0; q <= K; ++q) {
    store<T, isa>(lists.score[q], top[q]);
    store<T, isa>(lists.row[q], row[q]);
  }
}

// Rows [first, first + rows) of whole tiles whose rows lie in memory, `tiles` of them side by side;
// alpha from the first row on, shift of the columns or null.
template <class T, class C>
struct EnterRows {
  template <Isa isa, int K = kListed>
  static DASHPOT_INLINE void run(TopLists<T>* lists, const C* cost, int64_t stride, const T* alpha,
                                 const T* shift, int64_t tiles, int64_t rows, int64_t first,
                                 int64_t k) {
    using V = Vec<T, isa>;
    if constexpr (K > 1) {
      if (k < K) {
        return run<isa, K - 1>(lists, cost, stride, alpha, shift, tiles, rows, first, k);
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t at = tile * kLanes<T, isa>;
      const V base = shift ? load<T, isa>(shift + at) : V{};
      const auto score = [&](int64_t u) __attribute__((always_inline)) {
        return base + alpha[u] - load_as<T, isa>(cost + u * stride + at);
      };
      enter<K, T, isa>(lists[tile], score, rows, first);
    }
  }
};

// The same of one tile whose scores (rows, lanes) were made before.
template <class T>
struct EnterScores {
  template <Isa isa, int K = kListed>
  static DASHPOT_INLINE void run(TopLists<T>* lists, const T* scores, int64_t rows, int64_t first,
                                 int64_t k) {
    if constexpr (K > 1) {
      if (k < K) return run<isa, K - 1>(lists, scores, rows, first, k);
    }
    for (int64_t i = 0; i < rows; i += kRows) {
      const auto score = [&](int64_t u) __attribute__((always_inline)) {
        return load<T, isa>(scores + (i + u) * kLanes<T, isa>);
      };
      enter<K, T, isa>(*lists, score, std::min(kRows, rows - i), first + i);
    }
  }
};

// theta, column sums and values of a tile from its lists; t (k, lanes) to `plan`.
template <class T>
struct SolveLists {
  template <Isa isa, int K = kListed>
  static DASHPOT_INLINE void run(Tile<T>* tile, const TopLists<T>* lists, T* plan) {
    using V = Vec<T, isa>;
    if constexpr (K > 1) {
      if (tile->k < K) return run<isa, K - 1>(tile, lists, plan);
    }
    const V zero = {}, one = zero + T(1);
    V top[K + 1];
    for (int q = 0; q <= K; ++q) top[q] = load<T, isa>(lists->score[q]);
    const V mass = load<T, isa>(tile->mass);
    const Choice<T, isa> found = choose_of<K, T, isa>(top, tile->gamma * mass, tile->dual);
    V sums = zero, squares = zero;
    for (int q = 0; q < K; ++q) {
      const V gap = top[q] > found.theta ? top[q] - found.theta : zero;
      const V t = gap * (zero + 1 / tile->gamma);
      store<T, isa>(plan + q * kLanes<T, isa>, t);
      sums += t;
      squares += gap * t;
    }
    store<T, isa>(tile->sum, sums);
    store<T, isa>(tile->theta, found.theta);
    // The k-th and the next tie where both lie above theta: then the bound is the k-th.
    const V size = top[K - 1] > zero ? top[K - 1] : -top[K - 1];
    const V reach = tile->tie * (size > one ? size : one);
    const V near = top[K - 1] - top[K] <= reach ? one : zero;
    store<T, isa>(tile->tied, top[K] > found.theta ? near : zero);
    for (int lane = 0; lane < kLanes<T, isa>; ++lane) {
      const T theta = found.theta[lane];
      const bool counts = !tile->dual && tile->mass[lane] > 0 && std::isfinite(theta);
      tile->value[lane] = static_cast<double>(squares[lane]) / 2;
      if (counts) tile->value[lane] += static_cast<double>(theta) * tile->mass[lane];
    }
  }
};

// Columns [begin, end) as evaluate_columns, whose tiles nobody sees, in chunks of `width` columns:
// row_sums (chunks, m), values (chunks,). The cost is read from its first row to its last.
template <class T, class C>
void evaluate_listed(const Options& options, const T* alpha, const T* beta, const T* b,
                     const Cost<C>& cost, int64_t begin, int64_t end, int64_t width,
                     double* row_sums, double* values, const PerColumn<T>& found) {
  const int64_t lanes = vector_bytes(isa()) / sizeof(T), m = options.m;
  const int64_t step = cost.lines_are_rows() ? kRows : kRowsOfColumns;
  static thread_local std::vector<TopLists<T>> lists;
  lists.resize((end - begin + lanes - 1) / lanes + kGroup);
  for (TopLists<T>& one : lists) {
    std::fill_n(one.score[0], (options.k + 1) * kMaxLanes, -std::numeric_limits<T>::infinity());
    std::fill_n(one.row[0], (options.k + 1) * kMaxLanes, T(0));
  }
  T* const room = tile_room<T>(kGroup * step * lanes);
  for (int64_t i = 0; i < m; i += step) {
    const int64_t rows = std::min(step, m - i);
    const Cost<C> block = cost.from_row(i);
    int64_t first = begin;
    if constexpr (std::is_same_v<typename Cost<C>::Entry, C>) {
      if (cost.lines_are_rows()) {
        const int64_t tiles = (end - begin) / lanes;
        run_on_isa<EnterRows<T, C>>(lists.data(), block.data + begin, block.row, alpha + i,
                                    beta ? beta + begin : nullptr, tiles, rows, i, options.k);
        first += tiles * lanes;
      }
    }
    for (; first < end; first += kGroup * lanes) {
      const int64_t live = std::min(kGroup * lanes, end - first);
      T shift[kGroup * kMaxLanes] = {};
      if (beta) std::copy_n(beta + first, live, shift);
      run_on_isa<FillTiles<T, C>>(room, alpha + i, static_cast<const T*>(shift), &block, rows,
                                  first, live);
      for (int64_t at = 0; at < live; at += lanes) {
        run_on_isa<EnterScores<T>>(&lists[(first + at - begin) / lanes],
                                   static_cast<const T*>(room + at * rows), rows, i, options.k);
      }
    }
  }
  Tile<T> tile(options, nullptr, nullptr);
  T plan[kListed * kMaxLanes];
  for (int64_t first = begin; first < end; first += width) {
    double* const sums = row_sums + (first - begin) / width * m;
    double& value = values[(first - begin) / width];
    std::fill_n(sums, m, 0.0);
    value = 0;
    for (int64_t j = first; j < std::min(end, first + width); j += lanes) {
      const int64_t count = std::min(lanes, end - j);
      const TopLists<T>& top = lists[(j - begin) / lanes];
      for (int64_t lane = 0; lane < lanes; ++lane) tile.mass[lane] = lane < count ? b[j + lane] : 0;
      run_on_isa<SolveLists<T>>(&tile, &top, plan);
      for (int64_t lane = 0; lane < count; ++lane) {
        found.column[j + lane] = options.dual ? tile.sum[lane] : tile.theta[lane];
        if (found.tied) found.tied[j + lane] = tile.tied[lane] > 0;
        value += tile.value[lane];
        for (int64_t q = 0; q < options.k; ++q) {
          const T t = plan[q * lanes + lane];
          if (t > 0) sums[static_cast<int64_t>(top.row[q][lane])] += t;
        }
      }
    }
  }
}

}  // namespace dashpot::transport
