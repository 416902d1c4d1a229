// The dual without a bound: T = [alpha_i + beta_j - C_ij]+ / gamma, one read of the cost.
//
// Nothing is chosen, so nothing is kept but sums: those of up to kGroup vectors of columns stay in
// registers while the rows pass by, a row's sum over them is one vector in the cache. Scores are
// made where they are added up; of columns that do not lie side by side they are formed first, as
// for every other evaluation, and the sums are the same.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "transport/columns.h"

namespace dashpot::transport {

inline bool is_open(const Options& options) {
  return options.dual && options.reg != Reg::kNegentropy && options.k >= options.m &&
         !(options.smoothing > 0);
}

template <class T>
struct Sums {
  T* rows;     // (m, lanes), set or added to
  T* columns;  // (kGroup lanes,)
  T* squares;  // (lanes,), added to
  bool add;
};

// Positive scores of K vectors of columns, score(i, v), over all rows: their sums and those of
// their squares.
template <int K, class T, Isa isa, class Score>
DASHPOT_INLINE void sum_positive(const Score& score, int64_t m, const Sums<T>& to) {
  using V = Vec<T, isa>;
  constexpr int kWidth = kLanes<T, isa>;
  const V zero = {};
  V columns[K] = {}, squares[2] = {load<T, isa>(to.squares), zero};
  for (int64_t i = 0; i < m; ++i) {
    V sums[2] = {to.add ? load<T, isa>(to.rows + i * kWidth) : zero, zero};
    for (int v = 0; v < K; ++v) {
      const V here = score(i, v), gap = here > zero ? here : zero;
      columns[v] += gap;
      sums[v % 2] += gap;
      squares[v % 2] += gap * gap;
    }
    store<T, isa>(to.rows + i * kWidth, sums[0] + sums[1]);
  }
  for (int v = 0; v < K; ++v) store<T, isa>(to.columns + v * kWidth, columns[v]);
  store<T, isa>(to.squares, squares[0] + squares[1]);
}

// Of `vectors` <= kGroup vectors of columns whose rows lie in memory.
template <class T, class C>
struct SumRows {
  template <Isa isa, int K = kGroup>
  static DASHPOT_INLINE void run(const T* alpha, const T* beta, const C* cost, int64_t stride,
                                 int64_t m, int64_t vectors, Sums<T> to) {
    if constexpr (K > 1) {
      if (vectors < K) return run<isa, K - 1>(alpha, beta, cost, stride, m, vectors, to);
    }
    Vec<T, isa> shift[K];
    for (int v = 0; v < K; ++v) shift[v] = load<T, isa>(beta + v * kLanes<T, isa>);
    const auto score = [&](int64_t i, int v) __attribute__((always_inline)) {
      return shift[v] + alpha[i] - load_as<T, isa>(cost + i * stride + v * kLanes<T, isa>);
    };
    sum_positive<K, T, isa>(score, m, to);
  }
};

// Of tiles (vectors, m, lanes) of scores.
template <class T>
struct SumTiles {
  template <Isa isa, int K = kGroup>
  static DASHPOT_INLINE void run(const T* scores, int64_t m, int64_t vectors, Sums<T> to) {
    if constexpr (K > 1) {
      if (vectors < K) return run<isa, K - 1>(scores, m, vectors, to);
    }
    const auto score = [&](int64_t i, int v) __attribute__((always_inline)) {
      return load<T, isa>(scores + (v * m + i) * kLanes<T, isa>);
    };
    sum_positive<K, T, isa>(score, m, to);
  }
};

// As evaluate_columns, whose tiles nobody sees, of a dual that is open.
template <class T, class C>
double evaluate_open(const Options& options, const T* alpha, const T* beta, const Cost<C>& cost,
                     int64_t begin, int64_t end, double* row_sums, const PerColumn<T>& found) {
  const int64_t lanes = vector_bytes(isa()) / sizeof(T), m = options.m;
  T* const room = tile_room<T>((kGroup + 1) * m * lanes);
  T columns[kGroup * kMaxLanes], squares[kMaxLanes] = {};
  const T inverse = 1 / static_cast<T>(options.gamma);
  for (int64_t j = begin; j < end; j += kGroup * lanes) {
    const int64_t live = std::min(kGroup * lanes, end - j), vectors = (live + lanes - 1) / lanes;
    const Sums<T> to{room, columns, squares, j > begin};
    bool summed = false;
    if constexpr (std::is_same_v<typename Cost<C>::Entry, C>) {
      summed = cost.lines_are_rows() && live % lanes == 0;
      if (summed) {
        run_on_isa<SumRows<T, C>>(alpha, beta + j, cost.data + j, cost.row, m, vectors, to);
      }
    }
    if (!summed) {
      T shift[kGroup * kMaxLanes] = {};
      std::copy_n(beta + j, live, shift);
      T* const scores = room + m * lanes;
      run_on_isa<FillTiles<T, C>>(scores, alpha, static_cast<const T*>(shift), &cost, m, j, live);
      run_on_isa<SumTiles<T>>(static_cast<const T*>(scores), m, vectors, to);
    }
    for (int64_t c = 0; c < live; ++c) {
      found.column[j + c] = columns[c] * inverse;
      if (found.level) found.level[j + c] = 0;
      if (found.tied) found.tied[j + c] = 0;
    }
  }
  run_on_isa<SumLanes<T>>(static_cast<const T*>(room), m, row_sums);
  for (int64_t i = 0; i < m; ++i) row_sums[i] *= inverse;
  double value = 0;
  for (int64_t lane = 0; lane < lanes; ++lane) value += squares[lane];
  return value / (2 * options.gamma);
}

}  // namespace dashpot::transport
