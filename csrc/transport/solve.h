// A whole solve of one problem: max of the dual or semi-dual over the potentials.
//
//     adam      the router's recipe: a fixed number of steps (arXiv 2209.15466, its official code)
//     sinkhorn  alpha += gamma (log a - log T 1), the column potentials eliminated: one read of the
//               cost per iteration (negative entropy)
//     lbfgs     on the function itself, or with smoothing on the smoothed dual, mu falling to it
//     auto      sparse: lbfgs where it converges; where entries tie at the optimum, which is then a
//               kink, the smoothed dual with mu falling until the dual itself no longer rises
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
#include "transport/lbfgs.h"

namespace dashpot::transport {

enum class Solver { kAuto, kAdam, kLbfgs, kNewton, kSinkhorn };

inline Solver solver_of(const std::string& name) {
  return name == "adam"       ? Solver::kAdam
         : name == "lbfgs"    ? Solver::kLbfgs
         : name == "newton"   ? Solver::kNewton
         : name == "sinkhorn" ? Solver::kSinkhorn
                              : Solver::kAuto;
}

struct Settings {
  Options options;  // as the result is to be: smoothing 0
  Solver solver;
  int64_t max_iter;
  double tol, smoothing, lr;
};

struct Report {
  double value, row_l1, row_max, col_l1, col_max, gap;
  int32_t iterations, evaluations, tied, status;
};

// The function to be minimised, minus the (semi-)dual, of x = alpha, or (alpha, beta).
template <class T, class C>
class Negated {
 public:
  double noise = sizeof(T) == 8 ? 1e-14 : 1e-7;  // rounding of a value, relative
  double scale;
  int64_t evaluations = 0;

  Negated(const Options& options, const Cost<C>& cost, const T* a, const T* b, int threads)
      : options_(options),
        cost_(cost),
        a_(a),
        b_(b),
        threads_(threads),
        alpha_(options.m),
        beta_(options.n),
        level_(options.n),
        column_(options.n) {
    for (int64_t i = 0; i < options.m; ++i) mass_ += a[i];
    scale =
        options.gamma / std::max(1e-300, options.reg == Reg::kNegentropy ? mass_ / options.m : 1.0);
  }

  int64_t size() const { return options_.m + (options_.dual ? options_.n : 0); }
  const Options& options() const { return options_; }
  void smooth(double mu) {
    options_.smoothing = mu;
    std::fill(level_.begin(), level_.end(), T(0));
  }

  double operator()(const double* x, double* g) {
    const int64_t m = options_.m, n = options_.n;
    std::copy_n(x, m, alpha_.data());
    if (options_.dual) std::copy_n(x + m, n, beta_.data());
    double obj;
    if (listed_.worth(options_)) {
      listed_.evaluate(options_, cost_, alpha_.data(), options_.dual ? beta_.data() : nullptr, a_,
                       b_, &obj, g, options_.dual ? g + m : column_.data(), level_.data(), scratch_,
                       threads_);
    } else {
      evaluate<T, C, double>(options_, 1, alpha_.data(), options_.dual ? beta_.data() : nullptr,
                             cost_, a_, b_, &obj, g, options_.dual ? g + m : column_.data(),
                             options_.smoothing > 0 ? level_.data() : nullptr, nullptr, scratch_,
                             threads_);
    }
    for (int64_t i = 0; i < size(); ++i) g[i] = -g[i];
    ++evaluations;
    return -obj;
  }

  // The larger of the marginals' errors, L1, per unit of mass.
  double error(const double* g) const {
    double rows = 0, columns = 0;
    for (int64_t i = 0; i < options_.m; ++i) rows += std::fabs(g[i]);
    for (int64_t i = options_.m; i < size(); ++i) columns += std::fabs(g[i]);
    return std::max(rows, columns) / std::max(mass_, 1e-300);
  }

  // Semi-dual: beta of the last evaluation.
  const std::vector<double>& beta() const { return column_; }

  // value, errors, gap and ties at x; beta (n,) of the semi-dual. The last evaluation of a solve.
  Report report(const double* x, double tol, double* beta) {
    const int64_t m = options_.m, n = options_.n;
    Options options = options_;
    options.tie = tol;
    std::vector<double> g(m), h(n);
    std::vector<int32_t> tied(n);
    std::copy_n(x, m, alpha_.data());
    if (options_.dual) std::copy_n(x + m, n, beta_.data());
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
  Options options_;
  Cost<C> cost_;
  const T* a_;
  const T* b_;
  int threads_;
  double mass_ = 0;
  std::vector<T> alpha_, beta_, level_;
  std::vector<double> column_;
  Scratch<T> scratch_;
  Candidates<T, C> listed_;
};

// optax.adam: maximisation by moments of the gradient, no test for an end.
template <class Function>
Progress adam(Function& function, double* x, double* g, int64_t n, const Settings& settings) {
  std::vector<double> first(n), second(n);
  double decay1 = 1, decay2 = 1;
  Progress done;
  for (int64_t step = 0; step < settings.max_iter; ++step) {
    function(x, g);
    if (function.error(g) <= settings.tol) {
      done.status = kConverged;
      break;
    }
    decay1 *= 0.9;
    decay2 *= 0.999;
    for (int64_t i = 0; i < n; ++i) {
      first[i] += 0.1 * (g[i] - first[i]);
      second[i] += 0.001 * (g[i] * g[i] - second[i]);
      x[i] -=
          settings.lr * (first[i] / (1 - decay1)) / (std::sqrt(second[i] / (1 - decay2)) + 1e-8);
    }
    ++done.iterations;
  }
  return done;
}

// The potential of a row without mass (negative entropy: the limit; finite, so that 0 times it is
// 0).
inline constexpr double kClosed = -1e30;

// The rows' update needs T 1 only, which the semi-dual's gradient a - T 1 holds. A row sum that
// underflows counts as 1e-37: the step is then too short, and the next one goes on from there.
template <class T, class Function>
Progress sinkhorn(Function& function, double* x, double* g, const T* a, int64_t m,
                  const Settings& settings) {
  Progress done;
  for (int64_t step = 0; step < settings.max_iter; ++step) {
    function(x, g);  // g = T 1 - a
    if (function.error(g) <= settings.tol) {
      done.status = kConverged;
      break;
    }
    for (int64_t i = 0; i < m; ++i) {
      if (!(a[i] > 0)) {
        x[i] = kClosed;
        continue;
      }
      const double sum = std::max(g[i] + a[i], 1e-37);
      x[i] += settings.options.gamma * (std::log(static_cast<double>(a[i])) - std::log(sum));
    }
    ++done.iterations;
  }
  return done;
}

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
    std::vector<double> x(function.size()), g(function.size());
    std::copy_n(alpha, m, x.data());
    if (options.dual) std::copy_n(beta, n, x.data() + m);
    Progress done;
    if (settings_.solver == Solver::kAdam) {
      done = adam(function, x.data(), g.data(), function.size(), settings_);
    } else if (settings_.solver == Solver::kSinkhorn) {
      done = sinkhorn(function, x.data(), g.data(), a_, m, settings_);
    } else if (settings_.smoothing > 0) {
      done = continuation(function, x, settings_.max_iter);
    } else if (settings_.solver == Solver::kAuto && options.reg == Reg::kSparse && options.k < m) {
      done = automatic(function, x, g);
    } else {
      done = lbfgs(function, x.data(), g.data(), function.size(), limits(settings_.max_iter));
    }
    Report found = function.report(x.data(), settings_.tol, beta);
    std::copy_n(x.data(), m, alpha);
    found.iterations = static_cast<int32_t>(done.iterations);
    found.evaluations = static_cast<int32_t>(function.evaluations + others_);
    if (found.status != kInfeasible) found.status = blocked() ? kInfeasible : done.status;
    return found;
  }

 private:
  Limits limits(int64_t iterations) const {
    return {iterations, 2 * iterations + 20, settings_.tol, 1e-3 * settings_.tol};
  }

  // Rows with mass and no admissible pair, or more rows with mass than places: no plan exists.
  bool blocked() const {
    const Options& options = settings_.options;
    int64_t rows = 0;
    for (int64_t i = 0; i < options.m; ++i) {
      if (!(a_[i] > 0)) continue;
      ++rows;
      bool open = false;
      for (int64_t j = 0; j < options.n && !open; ++j) {
        open = std::isfinite(convert<T>(cost_.data[i * cost_.row + j * cost_.column]));
      }
      if (!open) return true;
    }
    return options.n * options.k < rows;
  }

  Progress automatic(Negated<T, C>& function, std::vector<double>& x, std::vector<double>& g) {
    Progress first;
    const Options& options = settings_.options;
    const bool few_columns = 4 * options.n <= options.m;  // a router: kinks from the first steps on
    if (!few_columns) {
      first = lbfgs(function, x.data(), g.data(), function.size(), limits(settings_.max_iter / 2));
      if (first.status == kConverged) return first;
      std::vector<double> beta(options.n);
      if (function.report(x.data(), settings_.tol, beta.data()).tied == 0) {  // no kink: go on
        const int64_t left = settings_.max_iter - first.iterations;
        Progress rest = lbfgs(function, x.data(), g.data(), function.size(), limits(left));
        rest.iterations += first.iterations;
        return rest;
      }
    }
    Progress second = continuation(function, x, settings_.max_iter - first.iterations);
    second.iterations += first.iterations;
    return second;
  }

  // Smoothed dual, mu from a tenth of the energy of an even column, gamma (b / k)^2 / 2, by tenths.
  Progress continuation(Negated<T, C>& function, std::vector<double>& x, int64_t iterations) {
    Options options = settings_.options;
    const int64_t m = options.m, n = options.n;
    options.dual = true;
    // In double: shares (h - lambda) / mu magnify the rounding of h by h / mu.
    const std::vector<double> a(a_, a_ + m), b(b_, b_ + n);
    Negated<double, C> smooth(options, cost_, a.data(), b.data(), threads_);
    std::vector<double> y(m + n), g(m + n), best = x, here(function.size()), slope(function.size());
    std::copy_n(x.data(), m, y.data());
    double found = function(x.data(), slope.data()), mean = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double eliminated = function.options().dual ? x[m + j] : function.beta()[j];
      y[m + j] = std::isfinite(eliminated) ? eliminated : 0;
      mean += b_[j] / static_cast<double>(n);
    }
    const double share = mean / static_cast<double>(options.k);
    const double energy = options.gamma / 2 * share * share;
    const double end = settings_.smoothing > 0 ? settings_.smoothing : 2e-5 * energy;
    Progress done;
    done.status = kMaxIter;
    for (double mu = std::max(0.1 * energy, end); done.iterations < iterations;
         mu = std::max(mu / 10, end)) {
      smooth.smooth(mu);
      Limits limit = limits(iterations - done.iterations);
      limit.error = std::max(settings_.tol, 1e-2 * mu / energy);
      const Progress stage = lbfgs(smooth, y.data(), g.data(), m + n, limit);
      done.iterations += stage.iterations;
      std::copy_n(y.data(), function.size(), here.data());
      const double value = function(here.data(), slope.data());
      const bool better = value < found, last = mu <= end;
      const bool settled = found - value <= settings_.tol * std::fmax(1, std::fabs(found));
      if (better || settings_.smoothing > 0) {
        found = value;
        best = here;
      }
      if (function.error(slope.data()) <= settings_.tol) {
        done.status = kConverged;
        break;
      }
      if (last || (better && settled)) {
        done.status = kStalled;  // the kink: the dual rises no more, the marginals stay apart
        break;
      }
    }
    others_ += smooth.evaluations;
    x = best;
    return done;
  }

  Settings settings_;
  Cost<C> cost_;
  const T* a_;
  const T* b_;
  int threads_;
  int64_t others_ = 0;  // evaluations of the smoothed dual
};

}  // namespace dashpot::transport
