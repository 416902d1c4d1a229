// focal_supcon_loss: z (N, d), groups (N,) -> loss, lse (N,), pull (N,); z's gradient (N, d).
//
// Rows are ordered by group (groups.h): first those that have a positive, then those that are
// alone. The latter have neither a loss nor a pull, so tiles with rows of that kind on both sides
// give nothing and are never formed: of a mixed batch, where two thirds are alone, 5/9 remain.
//
//   forward   sums of exponentials over tiles on and above the diagonal, each for both its panels
//             (logits.h); then, where a group lies on both sides of a tile, the tile again for
//             the terms of the positives (focal.h), which need the finished log-sums
//   backward  W_ij = c (w_i (slope_ij - p_ij h_i) + w_j (slope_ji - p_ji h_j)), symmetric: a tile
//             serves the rows of both its panels, and the two probabilities share an exponential
//
// Where the loss is a number and its gradient is wanted, the forward forms that too, and the
// backward multiplies: rows are laid out once, and the tiles of a batch that is not large (up to
// kKeptTiles) are still there: 6 d operations per pair instead of 8 d and those of the positives.
#include <tuple>

#include "common/bind.h"
#include "common/schedule.h"
#include "contrastive/focal.h"
#include "contrastive/groups.h"
#include "contrastive/logits.h"
#include "contrastive/panels.h"

namespace dashpot::contrastive {
namespace {

constexpr double kEps = 1e-12;

template <class Work>
class Sweep {
 public:
  const Groups groups;
  const Panels<Work> rows;
  const Work c, gamma;
  const double bound;  // of |c s|
  const bool fixed;    // whether it serves as the shift of all rows
  const int threads;

  template <class In>
  Sweep(const In* z, const int64_t* ids, int64_t n, int64_t d, double temperature, double gamma,
        bool normalize, int threads)
      : groups(ids, n),
        rows(z, n, d, normalize ? kEps : 0, threads, panel_for(n), groups.row.data()),
        c(static_cast<Work>(1 / temperature)),
        gamma(static_cast<Work>(gamma)),
        bound(rows.largest * rows.largest / temperature),
        fixed(bound <= widest_bound<Work>()),
        threads(threads),
        focus_(focus_of(gamma)),
        codes_(rows.count * rows.panel, Code<Work>(kNoColumn)) {
    for (int64_t i = 0; i < n; ++i) codes_[i] = static_cast<Code<Work>>(i);
  }

  int64_t padded_rows() const { return rows.count * rows.panel; }
  Work factor() const { return static_cast<Work>(c * kLog2E); }
  Work shift() const { return static_cast<Work>(bound * kLog2E); }

  // Panels with rows that have a positive.
  int64_t paired() const { return (groups.paired + rows.panel - 1) / rows.panel; }

  // From now on the first pass leaves its tiles to the next ones, if they take little room.
  void keep_tiles() {
    const int64_t size = slot(paired(), paired());
    if (size * static_cast<int64_t>(sizeof(Work)) <= kKeptTiles) tiles_.reset(new Work[size]);
  }

  // body(i, j, tile) for the tiles with a positive on one side at least, i <= j.
  template <class Body>
  void for_tiles(const Body& body) const {
    const auto visit = [&](int64_t i, int64_t j) { with_tile(i, j, body); };
    for_pairs(paired(), threads, visit);
    for_grid(paired(), rows.count - paired(), threads,
             [&](int64_t i, int64_t j) { visit(i, paired() + j); });
  }
  template <class Body>
  void with_tile(int64_t i, int64_t j, const Body& body) const {
    if (tiles_) {
      body(i, j, tile_at(i, j, tiles_.get() + slot(i, j)));
    } else {
      alignas(64) Work scratch[kMaxPanel * kMaxPanel];
      body(i, j, tile_at(i, j, scratch));
    }
  }

  // Whether a group has rows in both panels.
  bool meet(int64_t i, int64_t j) const {
    const int64_t from = rows.begin(j);
    return from < groups.paired && groups.last[rows.begin(i) + rows.height(i) - 1] > from;
  }

  Tile<Work> tile_at(int64_t i, int64_t j, Work* room) const {
    if (!ready_) products(rows, i, rows, j, room);
    return {room,
            rows.panel,
            rows.height(i),
            rows.height(j),
            i == j ? codes_.data() + rows.begin(i) : nullptr,
            codes_.data() + rows.begin(j)};
  }

  Positives<Work> positives(int64_t i, int64_t j, const Work* s) const {
    return {s,
            rows.panel,
            rows.height(i),
            rows.height(j),
            groups.first.data() + rows.begin(i),
            groups.last.data() + rows.begin(i),
            rows.begin(i),
            rows.begin(j),
            c,
            gamma};
  }

  // function(constant) with the kind of gamma as a constant.
  template <class Function>
  void with_focus(const Function& function) const {
    switch (focus_) {
      case Focus::kFlat:
        return function(std::integral_constant<Focus, Focus::kFlat>{});
      case Focus::kLinear:
        return function(std::integral_constant<Focus, Focus::kLinear>{});
      case Focus::kSquare:
        return function(std::integral_constant<Focus, Focus::kSquare>{});
      case Focus::kPower:
        return function(std::integral_constant<Focus, Focus::kPower>{});
    }
  }

  // log sum_{k != i} exp(c s_ik) of the rows that have a positive, 0 of the others.
  std::vector<Work> log_sums() {
    const Work start = fixed ? static_cast<Work>(bound) : -std::numeric_limits<Work>::infinity();
    std::vector<double> sum(padded_rows(), 0.0);
    std::vector<Work> shifts(padded_rows(), start);
    for_tiles([&](int64_t i, int64_t j, const Tile<Work>& tile) {
      double* row = sum.data() + rows.begin(i);
      // Rows that are alone need no sum: a panel of theirs is never a row of tiles.
      double* column = i == j || j >= paired() ? nullptr : sum.data() + rows.begin(j);
      const bool all = i != j && tile.columns == tile.stride;
      if (!fixed) {
        run_on_isa<AddExponentialsWide<Work>>(&tile, c, shifts.data() + rows.begin(i), row,
                                              column ? shifts.data() + rows.begin(j) : nullptr,
                                              column);
      } else if (all && column) {
        run_on_isa<AddExponentials<Work, true, true>>(&tile, factor(), shift(), row, column);
      } else if (all) {
        run_on_isa<AddExponentials<Work, true, false>>(&tile, factor(), shift(), row, column);
      } else if (column) {
        run_on_isa<AddExponentials<Work, false, true>>(&tile, factor(), shift(), row, column);
      } else {
        run_on_isa<AddExponentials<Work, false, false>>(&tile, factor(), shift(), row, column);
      }
    });
    ready_ = tiles_ != nullptr;
    std::vector<Work> lse(padded_rows(), 0);
    for (int64_t i = 0; i < groups.paired; ++i) {
      lse[i] = static_cast<Work>(static_cast<double>(shifts[i]) + std::log(sum[i]));
    }
    return lse;
  }

  // sum_j q^gamma log p and sum_j slope over the positives of each row.
  void add_terms(const std::vector<Work>& lse, std::vector<double>& loss,
                 std::vector<double>& pull) const {
    const auto add = [&](int64_t i, int64_t j, const Tile<Work>& tile) {
      const Positives<Work> at = positives(i, j, tile.s);
      const int64_t a = rows.begin(i), b = rows.begin(j);
      with_focus([&](auto focus) {
        run_on_isa<AddFocalTerms<Work, focus()>>(&at, lse.data() + a, loss.data() + a,
                                                 pull.data() + a, i == j ? nullptr : lse.data() + b,
                                                 loss.data() + b, pull.data() + b);
      });
    };
    for_pairs(paired(), threads, [&](int64_t i, int64_t j) {
      if (meet(i, j)) with_tile(i, j, add);
    });
  }

  // out (rows, d), in the order of z: the gradient sum_i w_i l_i; w (a row without positives: 0),
  // lse, pull: (padded rows,). The last pass: kept tiles become weights.
  template <class Out>
  void gradients(const std::vector<Work>& w, const std::vector<Work>& pull,
                 const std::vector<Work>& lse, Out* out) const {
    const std::unique_ptr<Work[]> grad(new Work[rows.count * rows.row_size()]());
    add_gradients(w, pull, lse, grad.get());
    rows.project(grad.get(), Work(1), out, threads);
  }

  // What divides the row's sum over its positives.
  double share(int64_t place, bool by_count) const {
    return by_count ? static_cast<double>(std::max<int64_t>(groups.positives(place), 1))
                    : static_cast<double>(rows.rows);
  }
  // What divides the sum of the rows.
  double anchors(bool all_anchors) const {
    return static_cast<double>(std::max<int64_t>(all_anchors ? rows.rows : groups.paired, 1));
  }

 private:
  const Focus focus_;
  std::vector<Code<Work>> codes_;  // (padded rows,) a row's place
  std::unique_ptr<Work[]> tiles_;  // those of for_tiles
  bool ready_ = false;             // the cosines are there

  // Where tile (i, j) is kept.
  int64_t slot(int64_t i, int64_t j) const {
    return (i * rows.count - i * (i - 1) / 2 + j - i) * rows.panel * rows.panel;
  }

  // grad (rows, in panels) = W u
  void add_gradients(const std::vector<Work>& w, const std::vector<Work>& pull,
                     const std::vector<Work>& lse, Work* grad) const {
    std::vector<Work> push(padded_rows(), 0), scaled(padded_rows(), 0);
    for (int64_t i = 0; i < groups.paired; ++i) {
      push[i] = -c * w[i] * pull[i];
      scaled[i] = static_cast<Work>(push[i] * std::exp(bound - lse[i]));
    }
    for_tiles([&](int64_t i, int64_t j, const Tile<Work>& tile) {
      const int64_t a = rows.begin(i), b = rows.begin(j);
      const bool positive = meet(i, j);
      alignas(64) Work kept[kMaxPanel * kMaxPanel];
      if (positive) std::copy_n(tile.s, tile.rows * tile.stride, kept);
      if (!fixed) {
        run_on_isa<WeighWide<Work>>(&tile, c, push.data() + a, lse.data() + a, push.data() + b,
                                    lse.data() + b);
      } else if (i != j && tile.columns == tile.stride) {
        run_on_isa<Weigh<Work, true, true>>(&tile, factor(), shift(), scaled.data() + a,
                                            scaled.data() + b);
      } else {
        run_on_isa<Weigh<Work, false, true>>(&tile, factor(), shift(), scaled.data() + a,
                                             scaled.data() + b);
      }
      if (positive) {
        const Positives<Work> at = positives(i, j, kept);
        with_focus([&](auto focus) {
          run_on_isa<AddFocalWeights<Work, focus()>>(&at, lse.data() + a, w.data() + a,
                                                     lse.data() + b, w.data() + b, tile.s);
        });
      }
      add_rows<Work>(tile.s, rows, i, rows, j, grad);
      if (i != j) add_columns<Work>(tile.s, rows, i, rows, j, grad);
    });
  }
};

template <class Function>
void on_rows(const Tensor& z, const Tensor& groups, const Function& function) {
  const int64_t n = z.size(0), d = z.size(1);
  if (groups.numel != n || groups.dtype != Dtype::kInt64) {
    throw std::invalid_argument("groups: expected (N,) int64");
  }
  dispatch_floating(z.dtype, [&](auto element) {
    using In = decltype(element);
    function(z.as<const In>(), groups.as<const int64_t>(), n, d);
  });
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs focal_supcon_loss_forward(const Tensor& z, const Tensor& groups, double temperature,
                                  double gamma, bool by_count, bool all_anchors, bool normalize,
                                  const std::string& reduction, bool with_gradient) {
  const int threads = num_threads();
  const int64_t count = z.size(0);
  const Dtype sums = work_dtype(z);
  const bool rows = reduction == "none";
  if (rows && with_gradient) throw std::invalid_argument("only a number's gradient is formed");
  const Tensor out = rows ? z.new_empty({count}, sums) : z.new_empty({}, sums);
  const Tensor lse_out = z.new_empty({count}, sums), pull_out = z.new_empty({count}, sums);
  const Tensor unit_grad = z.new_empty({with_gradient ? count : 0, z.size(1)}, sums);
  on_rows(z, groups, [&](auto* from, const int64_t* ids, int64_t n, int64_t d) {
    using Work = WorkOf<std::remove_const_t<std::remove_pointer_t<decltype(from)>>>;
    const py::gil_scoped_release release;
    Sweep<Work> sweep(from, ids, n, d, temperature, gamma, normalize, threads);
    if (with_gradient) sweep.keep_tiles();
    const std::vector<Work> lse = sweep.log_sums();
    std::vector<double> loss(sweep.padded_rows(), 0.0), pull(sweep.padded_rows(), 0.0);
    sweep.add_terms(lse, loss, pull);
    const double anchors = reduction == "mean" ? sweep.anchors(all_anchors) : 1;
    std::vector<Work> w(sweep.padded_rows(), 0), pulls(pull.begin(), pull.end());
    double total = 0;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t row = sweep.groups.row[k];
      const double share = sweep.share(k, by_count);
      const double one = k < sweep.groups.paired ? -loss[k] / share : 0.0;
      if (k < sweep.groups.paired) w[k] = static_cast<Work>(1 / share / anchors);
      total += one;
      if (rows) out.as<Work>()[row] = static_cast<Work>(one);
      lse_out.as<Work>()[row] = lse[k];
      pull_out.as<Work>()[row] = pulls[k];
    }
    if (!rows) out.as<Work>()[0] = static_cast<Work>(total / anchors);
    if (with_gradient) sweep.gradients(w, pulls, lse, unit_grad.as<Work>());
  });
  return {out, lse_out, pull_out, unit_grad};
}

// to = factor x
template <class Out, class Work>
struct Scale {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Work* x, Work factor, Out* to, int64_t n) {
    constexpr int64_t kBlock = 256;
    Work scaled[kBlock];
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t count = std::min(kBlock, n - first);
      for (int64_t k = 0; k < count; ++k) scaled[k] = factor * x[first + k];
      ConvertBlock<Out, Work>::template run<isa>(to + first, scaled, count);
    }
  }
};

// unit_grad: what the forward formed for an incoming gradient of 1, or (0, d).
Tensor focal_supcon_loss_backward(const Tensor& grad_loss, const Tensor& z, const Tensor& groups,
                                  const Tensor& lse_in, const Tensor& pull_in,
                                  const Tensor& unit_grad, double temperature, double gamma,
                                  bool by_count, bool all_anchors, bool normalize,
                                  const std::string& reduction, bool with_gradient) {
  const int threads = num_threads();
  const Tensor out = z.new_empty({z.size(0), z.size(1)}, z.dtype);
  on_rows(z, groups, [&](auto* from, const int64_t* ids, int64_t n, int64_t d) {
    using In = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
    using Work = WorkOf<In>;
    const py::gil_scoped_release release;
    const Work* g = grad_loss.as<const Work>();
    if (with_gradient) {
      if (unit_grad.numel != n * d) throw std::invalid_argument("no gradient was formed");
      run_on_isa<Scale<In, Work>>(unit_grad.as<const Work>(), *g, out.as<In>(), n * d);
      return;
    }
    const Sweep<Work> sweep(from, ids, n, d, temperature, gamma, normalize, threads);
    const int64_t places = sweep.padded_rows();
    const double anchors = reduction == "mean" ? sweep.anchors(all_anchors) : 1;
    std::vector<Work> w(places, 0), pull(places, 0), lse(places, 0);
    for (int64_t k = 0; k < sweep.groups.paired; ++k) {
      const int64_t row = sweep.groups.row[k];
      const double incoming = g[reduction == "none" ? row : 0];
      w[k] = static_cast<Work>(incoming / sweep.share(k, by_count) / anchors);
      lse[k] = lse_in.as<const Work>()[row];
      pull[k] = pull_in.as<const Work>()[row];
    }
    sweep.gradients(w, pull, lse, out.as<In>());
  });
  return out;
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("focal_supcon_loss_forward", &focal_supcon_loss_forward);
  m.def("focal_supcon_loss_backward", &focal_supcon_loss_backward);
}

}  // namespace dashpot::contrastive
