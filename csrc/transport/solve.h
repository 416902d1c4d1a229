// A whole solve of one problem on the CPU: max of the dual or semi-dual over the potentials, as
// solvers.h climbs it; solve.cuh is the device's form.
//
// The potentials are doubles; the tiles of an evaluation are of the state's type T. Whatever the
// path, what is reported is of the function itself, at the potentials returned.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "transport/candidates.h"
#include "transport/evaluate.h"
#include "transport/solvers.h"
#include "transport/support.h"
#include "transport/vectors.h"

namespace dashpot::transport {

inline Solver solver_of(const std::string& name) {
  return name == "adam"       ? Solver::kAdam
         : name == "lbfgs"    ? Solver::kLbfgs
         : name == "newton"   ? Solver::kNewton
         : name == "sinkhorn" ? Solver::kSinkhorn
                              : Solver::kAuto;
}

// sum |x|
struct Magnitudes {
  template <Isa isa>
  static DASHPOT_INLINE void run(const double* x, int64_t n, double* to) {
    constexpr int kWidth = kLanes<double, isa>;
    Vec<double, isa> sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
      for (int u = 0; u < 4; ++u) {
        const Vec<double, isa> y = load<double, isa>(x + i + u * kWidth);
        sums[u] += y > -y ? y : -y;
      }
    }
    double sum = sum_lanes<double, isa>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; ++i) sum += std::fabs(x[i]);
    *to = sum;
  }
};

// [low, high] widened to the numbers of a line, and least (length,) lowered to them where it is not
// null; but for +inf.
template <class T, class E>
struct Widen {
  template <Isa isa>
  static DASHPOT_INLINE void run(const E* line, int64_t length, T* low, T* high, T* least) {
    constexpr int kWidth = kLanes<T, isa>;
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const Vec<T, isa> infinity = Vec<T, isa>{} + kInfinity;
    Vec<T, isa> lowest = infinity, most = -infinity;
    int64_t c = 0;
    for (; c + kWidth <= length; c += kWidth) {
      const Vec<T, isa> cost = load_as<T, isa>(line + c);
      const Vec<T, isa> finite = cost < infinity ? cost : -infinity;
      lowest = cost < lowest ? cost : lowest;
      most = finite > most ? finite : most;
      if (least == nullptr) continue;
      const Vec<T, isa> before = load<T, isa>(least + c);
      store<T, isa>(least + c, cost < before ? cost : before);
    }
    for (int lane = 0; lane < kWidth; ++lane) {
      *low = std::min<T>(*low, lowest[lane]);
      *high = std::max<T>(*high, most[lane]);
    }
    for (; c < length; ++c) {
      const T cost = convert<T>(line[c]);
      *low = std::min(*low, cost);
      if (cost < kInfinity) *high = std::max(*high, cost);
      if (least) least[c] = std::min(least[c], cost);
    }
  }
};

// The function to be minimised, minus the (semi-)dual, of x = alpha, or (alpha, beta).
template <class T, class C>
class Negated {
 public:
  double noise = sizeof(T) == 8 ? 1e-14 : 1e-7;  // rounding of a value, relative
  double scale = 0;
  int64_t evaluations = 0;

  Negated(const Options& options, const Cost<C>& cost, const T* a, const T* b, int threads)
      : options_(options), cost_(cost), a_(a), b_(b), threads_(threads) {}

  int64_t size() const { return options_.m + (options_.dual ? options_.n : 0); }
  void smooth(double mu) {
    make_room();
    options_.smoothing = mu;
    std::fill(level_.begin(), level_.end(), T(0));
  }

  double operator()(const double* x, double* g) {
    const int64_t m = options_.m;
    take(x);
    const double obj =
        run(options_.dual ? beta_.data() : nullptr, g, options_.dual ? g + m : column_.data());
    Alone().each(size(), [&](int64_t i) { g[i] = -g[i]; });
    return -obj;
  }

  // The larger of the marginals' errors, L1, per unit of mass.
  double error(const double* g) const {
    double rows = 0, columns = 0;
    run_on_isa<Magnitudes>(g, options_.m, &rows);
    run_on_isa<Magnitudes>(g + options_.m, size() - options_.m, &columns);
    return std::max(rows, columns) / std::max(mass_, 1e-300);
  }

  // What Newton's method asks of the l2 dual, see newton.h.
  void soften(double gamma) { options_.gamma = gamma; }
  double spread(double* least) const {
    using Entry = typename Cost<C>::Entry;
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const int64_t m = options_.m, n = options_.n;
    T low = kInfinity, high = -kInfinity;
    AlignedVector<T> rows(m, kInfinity);
    if (cost_.lines_are_rows()) {
      for (int64_t i = 0; i < m; ++i) {
        run_on_isa<Widen<T, Entry>>(cost_.line(i, n), n, rows.data() + i, &high,
                                    static_cast<T*>(nullptr));
        low = std::min(low, rows[i]);
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        run_on_isa<Widen<T, Entry>>(cost_.line(j, m), m, &low, &high, rows.data());
      }
    }
    for (int64_t i = 0; i < m; ++i) least[i] = rows[i] < kInfinity ? rows[i] : T(0);
    return high >= low ? high - low : 0;
  }
  void eliminate(double* x) {
    const int64_t m = options_.m, n = options_.n;
    take(x);
    options_.dual = false;
    run(nullptr, rows_.data(), column_.data());
    options_.dual = true;
    for (int64_t j = 0; j < n; ++j) x[m + j] = std::isfinite(column_[j]) ? column_[j] : 0.0;
  }
  void hold() {
    support_.list(options_, cost_, alpha_.data(), beta_.data(), threads_);
    ++evaluations;
  }
  double row(int64_t i) const { return support_.row(i); }
  double column(int64_t j) const { return support_.column(j); }
  void to_rows(const double* v, double* to) const { support_.to_rows(v, to); }
  void to_columns(const double* u, double* to) const { support_.to_columns(u, to); }
  bool solve(double delta, bool rough, double* d) { return support_.solve(delta, rough, d); }

  // Masses of the rows and of the columns.
  double a(int64_t i) const { return a_[i]; }
  double b(int64_t j) const { return b_[j]; }
  // Semi-dual: beta of a column, of the last evaluation.
  double beta(int64_t j) const { return column_[j]; }

  // value, errors, gap and ties at x; beta (n,) of the semi-dual. The last evaluation of a solve.
  Report report(const double* x, double tol, double* beta) {
    const int64_t m = options_.m, n = options_.n;
    Options options = options_;
    options.tie = tol;
    std::vector<double> g(m), h(n);
    std::vector<int32_t> tied(n);
    take(x);
    Report found{};
    evaluate<T, C, double>(options, 1, alpha_.data(), options_.dual ? beta_.data() : nullptr, cost_,
                           a_, b_, &found.value, g.data(), h.data(), nullptr, tied.data(), scratch_,
                           threads_);
    ++evaluations;
    // primal(T) - dual = alpha . (T 1 - a) + beta . (T^T 1 - b); semi-dual: the last is 0
    for (int64_t i = 0; i < m; ++i) {
      found.row_l1 += std::fabs(g[i]);
      found.row_max = std::max(found.row_max, std::fabs(g[i]));
      found.gap -= alpha_[i] * g[i];
    }
    for (int64_t j = 0; j < n; ++j) {
      if (options_.dual) {
        beta[j] = x[m + j];
      } else {
        beta[j] = h[j];
        // theta = -inf: no row can be chosen; the mass stays away
        h[j] = std::isfinite(h[j]) || !(b_[j] > 0) ? 0 : b_[j];
        if (h[j] > 0) found.status = kInfeasible;
      }
      found.col_l1 += std::fabs(h[j]);
      found.col_max = std::max(found.col_max, std::fabs(h[j]));
      if (options_.dual) found.gap -= beta_[j] * h[j];
      found.tied += tied[j];
    }
    return found;
  }

 private:
  // At the first use: of a solver's functions some are never asked.
  void make_room() {
    if (!alpha_.empty()) return;
    const int64_t m = options_.m, n = options_.n;
    alpha_.resize(m), beta_.resize(n), column_.resize(n), rows_.resize(m);
    level_.assign(n, std::numeric_limits<T>::infinity());
    for (int64_t i = 0; i < m; ++i) mass_ += a_[i];
    const double even = options_.reg == Reg::kNegentropy ? mass_ / static_cast<double>(m) : 1.0;
    scale = options_.gamma / std::max(1e-300, even);
  }

  // x (size(),) from here on in the state's type.
  void take(const double* x) {
    make_room();
    const int64_t m = options_.m;
    T *const alpha = alpha_.data(), *const beta = beta_.data();
    Alone().each(m, [&](int64_t i) { alpha[i] = static_cast<T>(x[i]); });
    if (!options_.dual) return;
    Alone().each(options_.n, [&](int64_t j) { beta[j] = static_cast<T>(x[m + j]); });
  }

  // One evaluation at alpha_ and beta (n,), or null: the objective, a - T 1 (m,), and b - T^T 1 or
  // beta (n,).
  double run(const T* beta, double* rows, double* column) {
    double obj;
    if (listed_.worth(options_)) {
      listed_.evaluate(options_, cost_, alpha_.data(), beta, a_, b_, &obj, rows, column,
                       level_.data(), scratch_, threads_);
    } else {
      evaluate<T, C, double>(options_, 1, alpha_.data(), beta, cost_, a_, b_, &obj, rows, column,
                             level_.data(), nullptr, scratch_, threads_);
    }
    ++evaluations;
    return obj;
  }

  Options options_;
  Cost<C> cost_;
  const T* a_;
  const T* b_;
  int threads_;
  double mass_ = 0;
  AlignedVector<T> alpha_, beta_, level_;
  AlignedVector<double> column_, rows_;  // (n,), (m,)
  Scratch<T> scratch_;
  Candidates<T, C> listed_;
  Support<T, C> support_;
};

template <class T, class C>
class Solve {
 public:
  Solve(const Settings& settings, const Cost<C>& cost, const T* a, const T* b, int threads)
      : settings_(settings), cost_(cost), a_(a), b_(b), threads_(threads) {}

  // alpha (m,), beta (n,): where to start (beta is taken by the dual), then the solution.
  Report operator()(double* alpha, double* beta) {
    const Options& options = settings_.options;
    const int64_t m = options.m, n = options.n;
    Negated<T, C> function(options, cost_, a_, b_, threads_);
    // In double: shares (h - lambda) / mu magnify the rounding of h by h / mu.
    const std::vector<double> a(a_, a_ + m), b(b_, b_ + n);
    Options dual = options;
    dual.dual = true;
    Options bare = dual;
    bare.reg = Reg::kL2;
    bare.k = m;
    Negated<T, C> relaxed(bare, cost_, a_, b_, threads_);
    Negated<double, C> smoothed(dual, cost_, a.data(), b.data(), threads_);
    AlignedVector<double> x(m + n), room(solve_room(m, n));
    std::copy_n(alpha, m, x.data());
    std::copy_n(beta, n, x.data() + m);
    Alone alone;
    const Progress done =
        climb(alone, function, relaxed, smoothed, room.data(), x.data(), settings_);
    Report found = function.report(x.data(), settings_.tol, beta);
    std::copy_n(x.data(), m, alpha);
    found.iterations = static_cast<int32_t>(done.iterations);
    found.evaluations =
        static_cast<int32_t>(function.evaluations + relaxed.evaluations + smoothed.evaluations);
    if (found.status != kInfeasible) found.status = blocked() ? kInfeasible : done.status;
    return found;
  }

 private:
  // Rows with mass and no admissible pair, or more rows with mass than places: no plan exists.
  bool blocked() const {
    const Options& options = settings_.options;
    int64_t rows = 0;
    for (int64_t i = 0; i < options.m; ++i) {
      if (!(a_[i] > 0)) continue;
      ++rows;
      bool open = false;
      for (int64_t j = 0; j < options.n && !open; ++j) open = cost_.admits(i, j);
      if (!open) return true;
    }
    return options.n * options.k < rows;
  }

  Settings settings_;
  Cost<C> cost_;
  const T* a_;
  const T* b_;
  int threads_;
};

}  // namespace dashpot::transport
