// Nearest neighbours by cosine from the tiles of a sweep, and the loss on their distances.
//
//   n_k(i) = the k-th largest u_i.v_j, j != i, the lowest j among equals
//   loss_i = -(1/K) sum_k log(|u_i - v_n_k(i) + eps| + eps)
//
// A tile's rows and columns have one maximum each, found with its place. For K > 1 it only tells
// whether the row holds anything for the K best so far (seldom, after the first tiles): then the
// row is read again for its candidates.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "contrastive/sweep.h"

namespace dashpot::contrastive {

// The best K keys of each row: descending by value, ascending by index among equals.
template <class Work>
class Best {
 public:
  Best(int64_t rows, int64_t k)
      : k_(k), value_(rows * k, -std::numeric_limits<Work>::infinity()), index_(rows * k, -1) {}

  int64_t k() const { return k_; }
  Work least(int64_t i) const { return value_[i * k_ + k_ - 1]; }
  int64_t index(int64_t i, int64_t k) const { return index_[i * k_ + k]; }

  void offer(int64_t i, Work value, int64_t index) {
    Work* values = value_.data() + i * k_;
    int64_t* indices = index_.data() + i * k_;
    const auto before = [&](int64_t at) {  // whether the newcomer goes before entry `at`
      return value > values[at] || (value == values[at] && index < indices[at]);
    };
    if (value == -std::numeric_limits<Work>::infinity() || !before(k_ - 1)) return;
    int64_t at = k_ - 1;
    for (; at > 0 && before(at - 1); --at) {
      values[at] = values[at - 1];
      indices[at] = indices[at - 1];
    }
    values[at] = value;
    indices[at] = index;
  }

 private:
  int64_t k_;
  std::vector<Work> value_;
  std::vector<int64_t> index_;
};

// The largest numbers of a tile's rows or columns and where they stand, the first among equals.
template <class Work>
struct Peaks {
  alignas(64) Work value[kMaxPanel];
  alignas(64) Code<Work> place[kMaxPanel];
};

// The lanes' maximum, minimum, ..: lanes i and i + half, over and over.
template <class T, Isa isa, class Pick, int half = kLanes<T, isa> / 2>
DASHPOT_INLINE T over_lanes(Vec<T, isa> value, const Pick& pick) {
  Vec<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>, isa> other{};
  for (int i = 0; i < kLanes<T, isa>; ++i) other[i] = i ^ half;
  const Vec<T, isa> best = pick(value, __builtin_shuffle(value, other));
  if constexpr (half == 1) {
    return best[0];
  } else {
    return over_lanes<T, isa, Pick, half / 2>(best, pick);
  }
}

// columns are read in whole vectors, also those beyond the last.
template <class Work>
struct FindPeaks {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Tile<Work>* at, Peaks<Work>* rows, Peaks<Work>* columns) {
    constexpr int kStep = kLanes<Work, isa>;
    using Places = IntVec<Work, isa>;
    const Tile<Work> tile = *at;
    const Vec<Work, isa> least = Vec<Work, isa>{} - std::numeric_limits<Work>::infinity();
    Places lanes{};
    for (int i = 0; i < kStep; ++i) lanes[i] = i;
    for (int64_t j = 0; j < tile.stride; j += kStep) store<Work, isa>(columns->value + j, least);
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Work* s = tile.s + i * tile.stride;
      const Places row = Places{} + static_cast<Code<Work>>(i);
      Vec<Work, isa> most = least;
      Places where{};
      for (int64_t j = 0; j < tile.columns; j += kStep) {
        const Vec<Work, isa> x = load<Work, isa>(s + j);
        const Vec<Work, isa> old = load<Work, isa>(columns->value + j);
        const Places old_row = load<Code<Work>, isa>(columns->place + j);
        where = x > most ? lanes + static_cast<Code<Work>>(j) : where;
        most = x > most ? x : most;
        store<Code<Work>, isa>(columns->place + j, x > old ? row : old_row);
        store<Work, isa>(columns->value + j, x > old ? x : old);
      }
      const Work value = over_lanes<Work, isa>(most, [](auto x, auto y) { return x > y ? x : y; });
      const Places none = Places{} + std::numeric_limits<Code<Work>>::max();
      const Code<Work> place = over_lanes<Code<Work>, isa>(
          most == value ? where : none, [](auto x, auto y) { return x < y ? x : y; });
      rows->value[i] = value;
      rows->place[i] = place;
    }
  }
};

// Takes a tile of cosines: rows first_row.., keys first_key..; `self`: the key that row 0 of all
// rows is itself. column_best: where the keys are rows too. The tile's padding and selves are
// overwritten.
template <class Work>
void offer_tile(const Tile<Work>& tile, int64_t first_row, int64_t first_key, int64_t self,
                Best<Work>& row_best, Best<Work>* column_best) {
  constexpr Work kLeast = -std::numeric_limits<Work>::infinity();
  for (int64_t i = 0; i < tile.rows; ++i) {
    Work* s = tile.s + i * tile.stride;
    for (int64_t j = tile.columns; j < tile.stride; ++j) s[j] = kLeast;
    const int64_t own = first_row + i + self - first_key;
    if (own >= 0 && own < tile.columns) s[own] = kLeast;
  }
  Peaks<Work> rows, columns;
  run_on_isa<FindPeaks<Work>>(&tile, &rows, &columns);
  for (int64_t i = 0; i < tile.rows; ++i) {
    if (!(rows.value[i] >= row_best.least(first_row + i))) continue;
    if (row_best.k() == 1) {
      row_best.offer(first_row + i, rows.value[i], first_key + rows.place[i]);
      continue;
    }
    const Work* s = tile.s + i * tile.stride;
    for (int64_t j = 0; j < tile.columns; ++j) {
      if (s[j] >= row_best.least(first_row + i)) row_best.offer(first_row + i, s[j], first_key + j);
    }
  }
  for (int64_t j = 0; column_best && j < tile.columns; ++j) {
    if (!(columns.value[j] >= column_best->least(first_key + j))) continue;
    if (column_best->k() == 1) {
      column_best->offer(first_key + j, columns.value[j], first_row + columns.place[j]);
      continue;
    }
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Work value = tile.s[i * tile.stride + j];
      if (value >= column_best->least(first_key + j)) {
        column_best->offer(first_key + j, value, first_row + i);
      }
    }
  }
}

// |x - y + eps| over the dim true coordinates, from differences.
template <class Work>
struct Distance {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Row<const Work>* x, const Row<const Work>* y, int64_t dim,
                                 Work eps, double* result) {
    Vec<Work, isa> sum{};
    for (int64_t strip = 0; strip < x->count; ++strip) {
      for (int64_t k = 0; k < kStrip; k += kLanes<Work, isa>) {
        const Vec<Work, isa> difference = load<Work, isa>(x->at + strip * x->step + k) -
                                          load<Work, isa>(y->at + strip * y->step + k) + eps;
        sum += difference * difference;
      }
    }
    // The padding's zeros have a distance of eps as well.
    const double padding = static_cast<double>(x->count * kStrip - dim) * eps * eps;
    *result = std::sqrt(std::max(sum_lanes<Work, isa>(sum) - padding, 0.0));
  }
};

template <class Work>
double distance(Row<const Work> x, Row<const Work> y, int64_t dim, double eps) {
  double result;
  run_on_isa<Distance<Work>>(static_cast<const Row<const Work>*>(&x),
                             static_cast<const Row<const Work>*>(&y), dim, static_cast<Work>(eps),
                             &result);
  return result;
}

// -weight (x - y + eps) / (d (d + eps)), d = |x - y + eps|: added to row x's gradient, subtracted
// from row y's; nothing where d = 0. A weight that is no number stays one.
template <class Work>
struct Pull {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Row<const Work>* x, const Row<const Work>* y, int64_t dim,
                                 double eps, double weight, const Row<Work>* to_x,
                                 const Row<Work>* to_y) {
    const Work shift = static_cast<Work>(eps);
    double d;
    Distance<Work>::template run<isa>(x, y, dim, shift, &d);
    const Work scale =
        static_cast<Work>(d == 0 && !std::isnan(weight) ? 0 : -weight / (d * (d + eps)));
    for (int64_t strip = 0; strip < x->count; ++strip) {
      for (int64_t k = 0; k < kStrip; k += kLanes<Work, isa>) {
        const Vec<Work, isa> pull = (load<Work, isa>(x->at + strip * x->step + k) -
                                     load<Work, isa>(y->at + strip * y->step + k) + shift) *
                                    scale;
        Work* own = to_x->at + strip * to_x->step + k;
        store<Work, isa>(own, load<Work, isa>(own) + pull);
        Work* other = to_y->at + strip * to_y->step + k;
        store<Work, isa>(other, load<Work, isa>(other) - pull);
      }
    }
  }
};

// Losses of all rows of `rows` with neighbours among `keys`; nearest (rows, k), -1 where there is
// none: without any other row the loss is 0; a row that is not a number is its own neighbour.
template <class Work>
void koleo_losses(const Panels<Work>& rows, const Panels<Work>& keys, const int64_t* nearest,
                  int64_t k, double eps, int threads, Work* loss) {
  parallel_for(rows.count, threads, [&](int64_t p) {
    for (int64_t i = rows.begin(p); i < rows.begin(p) + rows.height(p); ++i) {
      double sum = 0;
      for (int64_t a = 0; a < k && keys.rows > 1; ++a) {
        const int64_t n = nearest[i * k + a];
        if (n < 0) {
          sum = std::nan("");
          break;
        }
        sum += std::log(distance(rows.row(i), keys.row(n), rows.dim, eps) + eps);
      }
      loss[i] = static_cast<Work>(keys.rows > 1 ? -sum / static_cast<double>(k) : 0);
    }
  });
}

// Adds weight_i dloss_i/du to the gradients (in panels) of rows and keys; row by row, in their
// order.
template <class Work>
void add_koleo_gradients(const Panels<Work>& rows, const Panels<Work>& keys, const int64_t* nearest,
                         int64_t k, double eps, const Work* weight, Work* row_grad,
                         Work* key_grad) {
  for (int64_t i = 0; i < rows.rows; ++i) {
    for (int64_t a = 0; a < k && keys.rows > 1; ++a) {
      const int64_t n = nearest[i * k + a];
      const Row<const Work> u = rows.row(i), v = n < 0 ? u : keys.row(n);
      const Row<Work> to_u = rows.row_of(row_grad, i),
                      to_v = n < 0 ? to_u : keys.row_of(key_grad, n);
      const double share = n < 0 ? std::nan("") : weight[i] / static_cast<double>(k);
      run_on_isa<Pull<Work>>(&u, &v, rows.dim, eps, share, &to_u, &to_v);
    }
  }
}

}  // namespace dashpot::contrastive
