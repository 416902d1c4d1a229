// The positives of a tile of cosines s: their focal terms, and what they add to its weights.
//
//   x = c s_ij - lse_i = log p_ij,  q = 1 - p_ij
//   forward   loss_i += q^gamma x,  pull_i += slope(x)
//   backward  weight_ij += c (w_i slope(c s_ij - lse_i) + w_j slope(c s_ij - lse_j))
//   slope(x) = gamma p q^(gamma - 1) x - q^gamma
//
// Rows are ordered by group, so the positives of a row are a stretch of columns.
#pragma once

#include <cstdint>
#include <limits>

#include "common/math.h"
#include "common/simd.h"
#include "contrastive/logits.h"

namespace dashpot::contrastive {

// Where the positives of a tile lie; columns and rows count from the tile's own.
template <class Work>
struct Positives {
  const Work* s;  // (rows, stride)
  int64_t stride, rows, columns;
  const int64_t *first, *last;      // (rows,) places of the row's group
  int64_t row_begin, column_begin;  // places of the tile
  Work c, gamma;
};

enum class Focus { kFlat, kLinear, kSquare, kPower };  // gamma = 0, 1, 2, else

inline Focus focus_of(double gamma) {
  return gamma == 0   ? Focus::kFlat
         : gamma == 1 ? Focus::kLinear
         : gamma == 2 ? Focus::kSquare
                      : Focus::kPower;
}

template <class Work, Isa isa>
struct Focused {
  Vec<Work, isa> value, slope;  // q^gamma x; its derivative's negative: slope(x) above
};

// 1 - e^x, right also near x = 0.
template <class Work, Isa isa>
DASHPOT_INLINE Vec<Work, isa> one_minus_exp(Vec<Work, isa> x, Vec<Work, isa> p) {
  constexpr int kTerms = sizeof(Work) == 4 ? 9 : 16;  // of the series, for |x| <= 1/2
  Vec<Work, isa> series = Vec<Work, isa>{} + Work(1);
  for (int k = kTerms; k > 1; --k) series = series * x * Work(1.0 / k) + Work(1);
  return x > Work(-0.5) ? -x * series : Work(1) - p;
}

template <class Work, Isa isa, Focus focus>
DASHPOT_INLINE Focused<Work, isa> focused(Vec<Work, isa> x, Work gamma) {
  const Vec<Work, isa> one = Vec<Work, isa>{} + Work(1);
  if constexpr (focus == Focus::kFlat) return {x, -one};
  const Vec<Work, isa> p = exp<Work, isa>(x);
  Vec<Work, isa> q = one_minus_exp<Work, isa>(x, p);
  constexpr Work kTiny = std::numeric_limits<Work>::min();
  q = q < kTiny ? kTiny - Vec<Work, isa>{} : q;  // NaN stays
  Vec<Work, isa> power, rise;                    // q^gamma, gamma q^(gamma - 1)
  if constexpr (focus == Focus::kLinear) {
    power = q;
    rise = one;
  } else if constexpr (focus == Focus::kSquare) {
    power = q * q;
    rise = Work(2) * q;
  } else {
    const Vec<Work, isa> log_q = log<Work, isa>(q);
    power = exp<Work, isa>(log_q * gamma);
    rise = exp<Work, isa>(log_q * (gamma - Work(1))) * gamma;
  }
  return {power * x, p * rise * x - power};
}

// Which columns of a vector are positives of a row.
template <class Work, Isa isa>
struct Live {
  IntVec<Work, isa> column;
  Code<Work> low, high, self;

  // value at the positives, else 0
  DASHPOT_INLINE Vec<Work, isa> of(Vec<Work, isa> value) const {
    using Int = IntVec<Work, isa>;
    const Int out = ones<Int>(column < low) + ones<Int>(column >= high) + ones<Int>(column == self);
    return out == 0 ? value : Vec<Work, isa>{};
  }
};

// Calls step(row, column, live) for vectors of columns that hold a positive of a row.
template <class Work, Isa isa, class Step>
DASHPOT_INLINE void for_positives(const Positives<Work>& at, const Step& step) {
  constexpr int64_t kStep = kLanes<Work, isa>;
  IntVec<Work, isa> lanes{};
  for (int i = 0; i < kStep; ++i) lanes[i] = i;
  for (int64_t i = 0; i < at.rows; ++i) {
    const int64_t low = std::max<int64_t>(at.first[i] - at.column_begin, 0);
    const int64_t high = std::min(at.last[i] - at.column_begin, at.columns);
    const auto self = static_cast<Code<Work>>(at.row_begin + i - at.column_begin);
    for (int64_t j = low / kStep * kStep; j < high; j += kStep) {
      step(i, j,
           Live<Work, isa>{lanes + static_cast<Code<Work>>(j), static_cast<Code<Work>>(low),
                           static_cast<Code<Work>>(high), self});
    }
  }
}

// loss, pull: (rows,) and, where the tile also stands for its mirror image, (columns,).
template <class Work, Focus focus>
struct AddFocalTerms {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Positives<Work>* positives, const Work* row_lse,
                                 double* row_loss, double* row_pull, const Work* column_lse,
                                 double* column_loss, double* column_pull) {
    const Positives<Work> at = *positives;
    alignas(64) Work losses[kMaxPanel] = {}, pulls[kMaxPanel] = {};
    for_positives<Work, isa>(
        at, [&](int64_t i, int64_t j, const Live<Work, isa>& live) __attribute__((always_inline)) {
          const Vec<Work, isa> s = load<Work, isa>(at.s + i * at.stride + j) * at.c;
          const Focused<Work, isa> own = focused<Work, isa, focus>(s - row_lse[i], at.gamma);
          row_loss[i] += sum_lanes<Work, isa>(live.of(own.value));
          row_pull[i] += sum_lanes<Work, isa>(live.of(own.slope));
          if (column_lse == nullptr) return;
          const Focused<Work, isa> other =
              focused<Work, isa, focus>(s - load<Work, isa>(column_lse + j), at.gamma);
          store<Work, isa>(losses + j, load<Work, isa>(losses + j) + live.of(other.value));
          store<Work, isa>(pulls + j, load<Work, isa>(pulls + j) + live.of(other.slope));
        });
    if (column_lse == nullptr) return;
    for (int64_t j = 0; j < at.columns; ++j) {
      column_loss[j] += static_cast<double>(losses[j]);
      column_pull[j] += static_cast<double>(pulls[j]);
    }
  }
};

// weights (rows, stride) += c (w_i slope_i + w_j slope_j) at the positives.
template <class Work, Focus focus>
struct AddFocalWeights {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Positives<Work>* positives, const Work* row_lse,
                                 const Work* row_weight, const Work* column_lse,
                                 const Work* column_weight, Work* weights) {
    const Positives<Work> at = *positives;
    for_positives<Work, isa>(
        at, [&](int64_t i, int64_t j, const Live<Work, isa>& live) __attribute__((always_inline)) {
          const Vec<Work, isa> s = load<Work, isa>(at.s + i * at.stride + j) * at.c;
          const Vec<Work, isa> own = focused<Work, isa, focus>(s - row_lse[i], at.gamma).slope;
          const Vec<Work, isa> other =
              focused<Work, isa, focus>(s - load<Work, isa>(column_lse + j), at.gamma).slope;
          const Vec<Work, isa> sum =
              at.c * (row_weight[i] * own + load<Work, isa>(column_weight + j) * other);
          Work* to = weights + i * at.stride + j;
          store<Work, isa>(to, load<Work, isa>(to) + live.of(sum));
        });
  }
};

}  // namespace dashpot::contrastive
