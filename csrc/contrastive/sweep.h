// Sweeps over all pairs of rows and keys: log-sums of the logits, and their gradient.
//
//   lse_i = log sum_j keep_ij exp(c u_i.v_j)                     (and by columns, where asked)
//   du = W v, dv = W^T u,  W_ij = keep_ij (g_i exp(c s_ij - lse_i) + h_j exp(c s_ij - lse_j))
//
// Rows and keys are one or two views (blocks of rows with panels of their own). Where the keys are
// the rows themselves, a tile above the diagonal serves both of its panels; each is formed once.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "common/schedule.h"
#include "contrastive/logits.h"
#include "contrastive/panels.h"

namespace dashpot::contrastive {

// Numbers of each row of some views, (views, rows), padded so that whole vectors can be read.
template <class T, class Work>
class PerRow {
 public:
  PerRow() = default;
  PerRow(const std::vector<const Panels<Work>*>& views, T fill) {
    for (const Panels<Work>* view : views) values_.emplace_back(view->count * view->panel, fill);
  }
  T* of(int64_t view, int64_t i = 0) { return values_[view].data() + i; }
  const T* of(int64_t view, int64_t i = 0) const { return values_[view].data() + i; }
  bool empty() const { return values_.empty(); }

 private:
  std::vector<std::vector<T>> values_;
};

template <class Work>
struct Problem {
  std::vector<const Panels<Work>*> rows, keys;  // views
  bool same = false;                            // keys are the rows
  bool columns = false;                         // log-sums of the keys as well
  // Which pairs of views count, and in which of them equal codes drop the pair.
  bool within = true, mask_within = false, mask_across = false;
  bool look_within = false;  // visit tiles within a view even if their logits do not count
  PerRow<Code<Work>, Work> row_codes, key_codes;
  double c = 1;
  int threads = 1;
  // Room for all tiles of rows with themselves, if a sweep is to leave its cosines to the next one.
  std::unique_ptr<Work[]> tiles;
  bool ready = false;  // the cosines are there

  double bound() const {
    double most = 0;
    for (const Panels<Work>* a : rows) {
      for (const Panels<Work>* b : keys) {
        const double one = std::abs(c) * a->largest * b->largest;
        most = most >= one || std::isnan(most) ? most : one;
      }
    }
    return most;
  }

  // Numbers in the tiles above and on the diagonal.
  int64_t tiles_size() const {
    const int64_t n = panels();
    return n * (n + 1) / 2 * rows[0]->panel * rows[0]->panel;
  }
  int64_t panels() const {
    int64_t n = 0;
    for (const Panels<Work>* view : rows) n += view->count;
    return n;
  }
  Work* tile(int64_t i, int64_t j) const {  // i <= j
    const int64_t before = i * panels() - i * (i - 1) / 2 + (j - i);
    return tiles.get() + before * rows[0]->panel * rows[0]->panel;
  }

  // Whether one constant shift serves all rows; false where a norm is not finite.
  bool fixed() const { return bound() <= widest_bound<Work>(); }
};

// Where a tile lies.
struct Site {
  int64_t row_view, row_panel, key_view, key_panel;
  bool diagonal;  // the panel with itself
};

// body(place, scratch) for every tile that counts; scratch: (panel, panel) of the running thread,
// or the tile's own.
template <class Work, class Body>
void for_tiles(const Problem<Work>& problem, const Body& body) {
  const auto panels = [](const std::vector<const Panels<Work>*>& views) {
    std::vector<std::pair<int64_t, int64_t>> all;
    for (size_t view = 0; view < views.size(); ++view) {
      for (int64_t p = 0; p < views[view]->count; ++p) all.emplace_back(view, p);
    }
    return all;
  };
  const auto rows = panels(problem.rows), keys = panels(problem.keys);
  const auto visit = [&](int64_t i, int64_t j) {
    const Site place{rows[i].first, rows[i].second, keys[j].first, keys[j].second,
                     problem.same && i == j};
    if (!problem.within && !problem.look_within && place.row_view == place.key_view) return;
    if (problem.tiles) {
      body(place, problem.tile(i, j));
      return;
    }
    alignas(64) Work scratch[kMaxPanel * kMaxPanel];
    body(place, static_cast<Work*>(scratch));
  };
  if (problem.same) {
    for_pairs(static_cast<int64_t>(rows.size()), problem.threads, visit);
  } else {
    for_grid(static_cast<int64_t>(rows.size()), static_cast<int64_t>(keys.size()), problem.threads,
             visit);
  }
}

// The tile at a place: cosines, and the codes that apply.
template <class Work>
Tile<Work> tile_at(const Problem<Work>& problem, const Site& at, Work* scratch) {
  const Panels<Work>& a = *problem.rows[at.row_view];
  const Panels<Work>& b = *problem.keys[at.key_view];
  if (!problem.ready) products(a, at.row_panel, b, at.key_panel, scratch);
  const bool across = at.row_view != at.key_view;
  const bool masked = across ? problem.mask_across : problem.mask_within;
  return {scratch,
          b.panel,
          a.height(at.row_panel),
          b.height(at.key_panel),
          masked ? problem.row_codes.of(at.row_view, a.begin(at.row_panel)) : nullptr,
          problem.key_codes.of(at.key_view, b.begin(at.key_panel))};
}

// Sums of exponentials of rows (and keys), each relative to its shift.
template <class Work>
struct LogSums {
  PerRow<double, Work> sum;
  PerRow<Work, Work> shift;

  LogSums(const std::vector<const Panels<Work>*>& views, Work start)
      : sum(views, 0.0), shift(views, start) {}

  // Another term exp(x) of a row.
  void add(int64_t view, int64_t i, double x) {
    raise(static_cast<Work>(x), shift.of(view, i), sum.of(view, i));
    *sum.of(view, i) += std::exp(x - *shift.of(view, i));
  }
  double log_sum(int64_t view, int64_t i) const {
    return *shift.of(view, i) + std::log(*sum.of(view, i));
  }
};

// after(place, tile): may use the tile of cosines once its exponentials have been added.
template <class Work, class After>
void add_log_sums(const Problem<Work>& problem, LogSums<Work>& rows, LogSums<Work>& keys,
                  const After& after) {
  const bool fixed = problem.fixed();
  const Work factor = static_cast<Work>(problem.c * kLog2E);
  const Work shift = static_cast<Work>(problem.bound() * kLog2E);
  for_tiles(problem, [&](const Site& at, Work* scratch) {
    const Tile<Work> tile = tile_at(problem, at, scratch);
    const int64_t i = problem.rows[at.row_view]->begin(at.row_panel);
    const int64_t j = problem.keys[at.key_view]->begin(at.key_panel);
    const bool columns = problem.columns && !at.diagonal;
    double* row_sum = rows.sum.of(at.row_view, i);
    double* key_sum = columns ? keys.sum.of(at.key_view, j) : nullptr;
    const bool all = !tile.row_codes && tile.columns == tile.stride;
    if (!problem.within && at.row_view == at.key_view) {
      // only looked at
    } else if (!fixed) {
      run_on_isa<AddExponentialsWide<Work>>(
          &tile, static_cast<Work>(problem.c), rows.shift.of(at.row_view, i), row_sum,
          columns ? keys.shift.of(at.key_view, j) : nullptr, key_sum);
    } else if (all && columns) {
      run_on_isa<AddExponentials<Work, true, true>>(&tile, factor, shift, row_sum, key_sum);
    } else if (all) {
      run_on_isa<AddExponentials<Work, true, false>>(&tile, factor, shift, row_sum, key_sum);
    } else if (columns) {
      run_on_isa<AddExponentials<Work, false, true>>(&tile, factor, shift, row_sum, key_sum);
    } else {
      run_on_isa<AddExponentials<Work, false, false>>(&tile, factor, shift, row_sum, key_sum);
    }
    after(at, tile);
  });
}

// What the log-sums start from: the constant shift, or nothing yet.
template <class Work>
Work start_of(const Problem<Work>& problem) {
  return problem.fixed() ? static_cast<Work>(problem.bound())
                         : -std::numeric_limits<Work>::infinity();
}

// Gradient sums of some views, laid out as their panels by rows; a view that needs none has null.
template <class Work>
class Grads {
 public:
  Grads(const std::vector<const Panels<Work>*>& views, const std::vector<bool>& wanted) {
    for (size_t view = 0; view < views.size(); ++view) {
      const int64_t n = views[view]->count * views[view]->row_size();
      values_.emplace_back(wanted[view] ? new Work[n]() : nullptr);
    }
  }
  Work* of(int64_t view) const { return values_[view].get(); }

 private:
  std::vector<std::unique_ptr<Work[]>> values_;
};

// Weights g_i and log-sums of the rows of some views.
template <class Work>
struct Weights {
  PerRow<Work, Work> weight, lse, scaled;  // scaled: g exp(shift - lse)

  Weights() = default;
  explicit Weights(const std::vector<const Panels<Work>*>& views)
      : weight(views, 0), lse(views, 0), scaled(views, 0) {}

  void set(int64_t view, int64_t i, double g, double log_sum, double shift) {
    *weight.of(view, i) = static_cast<Work>(g);
    *lse.of(view, i) = static_cast<Work>(log_sum);
    *scaled.of(view, i) = static_cast<Work>(g == 0 ? 0 : g * std::exp(shift - log_sum));
  }
};

// Adds W v to the rows' gradients and W^T u to the keys'; with keys that are the rows, both to the
// rows'. key_weights: used if problem.columns. weighed(place, tile): may change the tile of W.
template <class Work, class Weighed>
void add_gradients(const Problem<Work>& problem, const Weights<Work>& row_weights,
                   const Weights<Work>& key_weights, const Grads<Work>& row_grads,
                   const Grads<Work>& key_grads, const Weighed& weighed) {
  const bool fixed = problem.fixed();
  const Work factor = static_cast<Work>(problem.c * kLog2E);
  const Work shift = static_cast<Work>(problem.bound() * kLog2E);
  for_tiles(problem, [&](const Site& at, Work* scratch) {
    Work* row_grad = row_grads.of(at.row_view);
    Work* key_grad = at.diagonal ? nullptr : key_grads.of(at.key_view);
    if (!row_grad && !key_grad) return;
    const Tile<Work> tile = tile_at(problem, at, scratch);
    const Panels<Work>& a = *problem.rows[at.row_view];
    const Panels<Work>& b = *problem.keys[at.key_view];
    const int64_t i = a.begin(at.row_panel), j = b.begin(at.key_panel);
    const bool all = !tile.row_codes && tile.columns == tile.stride;
    const Work* row = row_weights.scaled.of(at.row_view, i);
    const Work* key = problem.columns ? key_weights.scaled.of(at.key_view, j) : nullptr;
    if (!fixed) {
      run_on_isa<WeighWide<Work>>(&tile, static_cast<Work>(problem.c),
                                  row_weights.weight.of(at.row_view, i),
                                  row_weights.lse.of(at.row_view, i),
                                  problem.columns ? key_weights.weight.of(at.key_view, j) : nullptr,
                                  problem.columns ? key_weights.lse.of(at.key_view, j) : nullptr);
    } else if (all && key) {
      run_on_isa<Weigh<Work, true, true>>(&tile, factor, shift, row, key);
    } else if (all) {
      run_on_isa<Weigh<Work, true, false>>(&tile, factor, shift, row, key);
    } else if (key) {
      run_on_isa<Weigh<Work, false, true>>(&tile, factor, shift, row, key);
    } else {
      run_on_isa<Weigh<Work, false, false>>(&tile, factor, shift, row, key);
    }
    weighed(at, tile);
    if (row_grad) add_rows<Work>(tile.s, a, at.row_panel, b, at.key_panel, row_grad);
    if (key_grad) add_columns<Work>(tile.s, a, at.row_panel, b, at.key_panel, key_grad);
  });
}

}  // namespace dashpot::contrastive
