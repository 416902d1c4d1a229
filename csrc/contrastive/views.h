// Two views of a batch against themselves, or against the views of a larger one: NT-Xent.
//
//   rows [z1; z2] (2B, d), keys [key1; key2] (2N, d) or the rows;  the positive of row i of a view
//   is key offset + i of the other, none if offset < 0 loss_i = log sum_j keep_ij exp(c u_i.v_j) -
//   c u_i.v_pos(i)
//
// keep_ij: within a view the keys of other subjects, across views all, or (mask_across) those of
// other subjects and the positive. Then tiles drop the positive like all of its subject's keys, and
// its term is added row by row.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "contrastive/sweep.h"

namespace dashpot::contrastive {

// The tensors of a call. Subjects of the rows (B,) and keys (N,), or none: every row its own.
struct ViewsArguments {
  const Tensor &z1, &z2;
  const Maybe &key1, &key2, &ids, &key_ids;
  int64_t offset;
  double temperature;
  bool within, mask_across;
};

// Subjects as small numbers, equal where the subjects are.
template <class C>
std::vector<C> dense(const std::vector<int64_t>& all) {
  std::vector<int64_t> sorted = all;
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  std::vector<C> codes;
  codes.reserve(all.size());
  for (const int64_t id : all) {
    const auto at = std::lower_bound(sorted.begin(), sorted.end(), id);
    codes.push_back(static_cast<C>(at - sorted.begin()));
  }
  return codes;
}

template <class In>
class Views {
 public:
  using Work = WorkOf<In>;
  std::vector<Panels<Work>> rows, keys;  // views; no keys: they are the rows
  Problem<Work> problem;
  int64_t b, n, offset;

  Views(const ViewsArguments& call, int64_t b, int64_t n, int64_t d, int threads)
      : b(b), n(n), offset(call.offset) {
    const int64_t panel = panel_for(2 * std::max(b, n));
    const auto add = [&](std::vector<Panels<Work>>& views, const Tensor& z, int64_t count) {
      views.emplace_back(z.as<const In>(), count, d, 1e-12, threads, panel);
    };
    rows.reserve(2);
    keys.reserve(2);
    add(rows, call.z1, b);
    add(rows, call.z2, b);
    if (call.key1) {
      add(keys, *call.key1, n);
      add(keys, *call.key2, n);
    }
    problem.same = problem.columns = !call.key1.has_value();
    problem.rows = {&rows[0], &rows[1]};
    problem.keys =
        problem.same ? problem.rows : std::vector<const Panels<Work>*>{&keys[0], &keys[1]};
    problem.within = call.within;
    problem.mask_within = true;
    problem.mask_across = call.mask_across;
    problem.c = 1 / call.temperature;
    problem.threads = threads;
    set_codes(call);
  }

  const Panels<Work>& key_view(int64_t view) const { return *problem.keys[view]; }

  double positive_logit(int64_t view, int64_t i) const {
    return problem.c * dot(rows[view].row(i), key_view(1 - view).row(offset + i));
  }

  // The positive's term where tiles drop it.
  void add_positives(LogSums<Work>& sums) const {
    if (!problem.mask_across || offset < 0) return;
    for (int64_t view = 0; view < 2; ++view) {
      for (int64_t i = 0; i < b; ++i) sums.add(view, i, positive_logit(view, i));
    }
  }

  // loss, lse: (2, b)
  void losses(const LogSums<Work>& sums, Work* loss, Work* lse) const {
    for (int64_t i = 0; i < b; ++i) {
      double logit = 0;
      for (int64_t view = 0; view < 2; ++view) {
        // Where the keys are the rows, both views of a row have the same one.
        if (offset >= 0 && (view == 0 || !problem.same)) logit = positive_logit(view, i);
        const double sum = sums.log_sum(view, i);
        lse[view * b + i] = static_cast<Work>(sum);
        loss[view * b + i] = static_cast<Work>(sum - logit);
      }
    }
  }

  // Adds the gradients of sum_i g_i loss_i to those of rows and keys (the same, if the keys are the
  // rows), without the factor c; g, lse: (2, b).
  void add_gradients_of(const Work* g, const Work* lse, const Grads<Work>& row_grads,
                        const Grads<Work>& key_grads) const {
    Weights<Work> weights(problem.rows);
    const double shift = problem.bound();
    for (int64_t view = 0; view < 2; ++view) {
      for (int64_t i = 0; i < b; ++i) {
        weights.set(view, i, g[view * b + i], lse[view * b + i], shift);
      }
    }
    // What row i of a view gives to its positive.
    const auto share = [&](int64_t view, int64_t i) {
      const double kept =
          problem.mask_across ? std::exp(positive_logit(view, i) - lse[view * b + i]) : 0;
      return (kept - 1) * g[view * b + i];
    };
    // Where the keys are the rows, positives lie on the diagonals of the tiles of a panel with the
    // same panel of the other view.
    add_gradients(problem, weights, weights, row_grads, key_grads,
                  [&](const Site& at, const Tile<Work>& tile) {
                    if (!problem.same || offset < 0 || at.row_view == at.key_view ||
                        at.row_panel != at.key_panel)
                      return;
                    const int64_t first = rows[0].begin(at.row_panel);
                    for (int64_t i = 0; i < tile.rows; ++i) {
                      tile.s[i * tile.stride + i] +=
                          static_cast<Work>(share(0, first + i) + share(1, first + i));
                    }
                  });
    if (problem.same || offset < 0) return;
    for (int64_t view = 0; view < 2; ++view) {
      for (int64_t i = 0; i < b; ++i) {
        const double weight = share(view, i);
        const Panels<Work>& others = key_view(1 - view);
        if (Work* grad = row_grads.of(view)) {
          add_scaled(rows[view].row_of(grad, i), others.row(offset + i), weight);
        }
        if (Work* grad = key_grads.of(1 - view)) {
          add_scaled(others.row_of(grad, offset + i), rows[view].row(i), weight);
        }
      }
    }
  }

 private:
  void set_codes(const ViewsArguments& call) {
    std::vector<int64_t> ids(problem.same ? b : b + n);
    for (int64_t i = 0; i < static_cast<int64_t>(ids.size()); ++i) ids[i] = i;
    if (call.ids) {
      std::copy_n(call.ids->as<const int64_t>(), b, ids.begin());
      if (!problem.same) std::copy_n(call.key_ids->as<const int64_t>(), n, ids.begin() + b);
    }
    const std::vector<Code<Work>> codes = dense<Code<Work>>(ids);
    problem.row_codes = PerRow<Code<Work>, Work>(problem.rows, Code<Work>(kNoColumn));
    problem.key_codes = PerRow<Code<Work>, Work>(problem.keys, Code<Work>(kNoColumn));
    for (int64_t view = 0; view < 2; ++view) {
      std::copy_n(codes.begin(), b, problem.row_codes.of(view));
      std::copy_n(codes.begin() + (problem.same ? 0 : b), n, problem.key_codes.of(view));
    }
  }
};

// function(views) with the call's panels; checks what would make a kernel read wrong memory.
template <class Function>
void on_views(const ViewsArguments& call, const Function& function) {
  const int64_t b = call.z1.size(0), d = call.z1.size(1);
  const int64_t n = call.key1 ? call.key1->size(0) : b;
  const auto fits = [&](const Tensor& z, int64_t count) {
    return z.numel == count * d && z.dtype == call.z1.dtype;
  };
  const auto labels = [](const Maybe& ids, int64_t count) {
    return !ids || (ids->numel == count && ids->dtype == Dtype::kInt64);
  };
  if (!fits(call.z2, b) || call.key1.has_value() != call.key2.has_value() ||
      (call.key1 && (!fits(*call.key1, n) || !fits(*call.key2, n))) || !labels(call.ids, b) ||
      !labels(call.key_ids, n) || (call.key1 && call.ids.has_value() != call.key_ids.has_value()) ||
      (call.key1 && !call.ids) || (call.offset >= 0 && call.offset + b > n)) {
    throw std::invalid_argument("expected views of one width and dtype, and int64 ids of each row");
  }
  const int threads = num_threads();
  dispatch_floating(call.z1.dtype, [&](auto element) {
    const py::gil_scoped_release release;
    Views<decltype(element)> views(call, b, n, d, threads);
    function(views, element);
  });
}

}  // namespace dashpot::contrastive
