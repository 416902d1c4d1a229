// How the duals are climbed, written once for the CPU and for a CUDA block (solve.h, solve.cuh).
//
//     adam      the router's recipe: a fixed number of steps (arXiv 2209.15466, its official code)
//     sinkhorn  alpha += gamma (log a - log T 1), the column potentials eliminated: one read of the
//               cost per iteration (negative entropy)
//     newton    l2, and sparse without a bound (newton.h)
//     lbfgs     on the function itself, or with smoothing on the smoothed dual, mu falling to it
//     auto      l2: newton, then lbfgs should it stand still. sparse: newton without the bound, the
//               start from which lbfgs has the least left to do (nothing, where no column exceeds
//               k); where entries tie at the optimum, which is then a kink, the smoothed dual with
//               mu falling until the dual itself no longer rises
//
// vectors: each(n, visit), sum(n, term), max, dot, add_scaled over doubles. function: minus the
// dual or semi-dual of x (size(),) = alpha, or (alpha, beta); see Negated. All threads of a team
// run the same code and see the same scalars.
#pragma once

#include "transport/lbfgs.h"
#include "transport/newton.h"
#include "transport/problem.h"

namespace dashpot::transport {

enum class Solver { kAuto, kAdam, kLbfgs, kNewton, kSinkhorn };

struct Settings {
  Options options;  // as the result is to be: smoothing 0
  Solver solver;
  int64_t max_iter;
  double tol, smoothing, lr;
};

// What is reported of a solve, of the function itself at the potentials returned.
struct Report {
  double value, row_l1, row_max, col_l1, col_max, gap;
  int32_t iterations, evaluations, tied, status;
};

// float64 numbers of `room` for a problem of m rows and n columns, beside x (m + n,).
DASHPOT_HD inline int64_t solve_room(int64_t m, int64_t n) {
  return 5 * (m + n) + lbfgs_room(m + n);
}

// optax.adam: maximisation by moments of the gradient; room (2 n,).
template <class Vectors, class Function>
DASHPOT_HD_APART Progress adam(Vectors& vectors, Function& function, double* room, double* x,
                               double* g, int64_t n, const Settings& settings) {
  double* first = room;
  double* second = room + n;
  vectors.each(n, [&](int64_t i) { first[i] = second[i] = 0; });
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
    const double length = settings.lr / (1 - decay1), unbiased = 1 / (1 - decay2);
    vectors.each(n, [&](int64_t i) {
      first[i] += 0.1 * (g[i] - first[i]);
      second[i] += 0.001 * (g[i] * g[i] - second[i]);
      x[i] -= length * first[i] / (::sqrt(second[i] * unbiased) + 1e-8);
    });
    ++done.iterations;
  }
  return done;
}

// The potential of a row without mass (negative entropy: the limit; finite, so that 0 times it is
// 0).
inline constexpr double kClosed = -1e30;

// The rows' update needs T 1 only, which the semi-dual's gradient a - T 1 holds. A row sum that
// underflows counts as 1e-37: the step is then too short, and the next one goes on from there.
template <class Vectors, class Function>
DASHPOT_HD Progress sinkhorn(Vectors& vectors, Function& function, double* x, double* g,
                             const Settings& settings) {
  const double gamma = settings.options.gamma;
  Progress done;
  for (int64_t step = 0; step < settings.max_iter; ++step) {
    function(x, g);  // g = T 1 - a
    if (function.error(g) <= settings.tol) {
      done.status = kConverged;
      break;
    }
    vectors.each(settings.options.m, [&](int64_t i) {
      const double mass = function.a(i), sum = fmax(g[i] + mass, 1e-37);
      x[i] = mass > 0 ? x[i] + gamma * (::log(mass) - ::log(sum)) : kClosed;
    });
    ++done.iterations;
  }
  return done;
}

DASHPOT_HD inline Limits limits_of(const Settings& settings, int64_t iterations) {
  return {iterations, 2 * iterations + 20, settings.tol, 1e-3 * settings.tol};
}

// Smoothed dual, mu from a tenth of the energy of an even column, gamma (b / k)^2 / 2, by tenths. x
// moves to the best potentials of the function itself.
template <class Vectors, class Function, class Smoothed>
DASHPOT_HD_APART Progress continuation(Vectors& vectors, Function& function, Smoothed& smoothed,
                                       double* room, double* x, int64_t iterations,
                                       const Settings& settings) {
  const Options& options = settings.options;
  const int64_t m = options.m, n = options.n, size = function.size();
  double* y = room;             // (m + n,)
  double* g = y + (m + n);      // (m + n,)
  double* here = g + (m + n);   // (size,)
  double* slope = here + size;  // (size,)
  double* rest = slope + size;
  double found = function(x, slope);
  vectors.copy(x, m, y);
  vectors.each(n, [&](int64_t j) {
    const double eliminated = options.dual ? x[m + j] : function.beta(j);
    y[m + j] = fabs(eliminated) < INFINITY ? eliminated : 0.0;
  });
  const double total = vectors.sum(n, [&](int64_t j) { return function.b(j); });
  const double share = total / static_cast<double>(n * options.k);
  const double energy = options.gamma / 2 * share * share;
  const double end = settings.smoothing > 0 ? settings.smoothing : 2e-5 * energy;
  Progress done;
  done.status = kMaxIter;
  for (double mu = fmax(0.1 * energy, end); done.iterations < iterations; mu = fmax(mu / 10, end)) {
    smoothed.smooth(mu);
    Limits limits = limits_of(settings, iterations - done.iterations);
    limits.error = fmax(settings.tol, 1e-2 * mu / energy);
    done.iterations += lbfgs(vectors, smoothed, rest, y, g, m + n, limits).iterations;
    vectors.copy(y, size, here);
    const double value = function(here, slope);
    const bool better = value < found, last = mu <= end;
    const bool settled = found - value <= 1e-2 * settings.tol * fmax(1.0, fabs(found));
    if (better || settings.smoothing > 0) {
      found = value;
      vectors.copy(here, size, x);
    }
    if (function.error(slope) <= settings.tol) {
      done.status = kConverged;
      break;
    }
    if (last || (better && settled)) {
      done.status = kStalled;  // the kink: the dual rises no more, the marginals stay apart
      break;
    }
  }
  return done;
}

DASHPOT_HD inline Progress operator+(const Progress& first, const Progress& then) {
  return {first.iterations + then.iterations, first.evaluations + then.evaluations, then.status};
}

// Whether x is a solution for the function itself: where rounding has stopped the relaxed one.
template <class Function>
DASHPOT_HD_APART bool meets(Function& function, const double* x, double* g, double tol) {
  function(x, g);
  return function.error(g) <= tol;
}

// x (m + n,) from where to start to the solution; room (solve_room(m, n),). relaxed: the l2
// dual, without a bound; smoothed: the dual with a `smooth(mu)`.
template <class Vectors, class Function, class Relaxed, class Smoothed>
DASHPOT_HD Progress climb(Vectors& vectors, Function& function, Relaxed& relaxed,
                          Smoothed& smoothed, double* room, double* x, const Settings& settings) {
  const Options& options = settings.options;
  const int64_t size = function.size(), steps = settings.max_iter;
  double* g = room;  // (m + n,)
  double* rest = g + options.m + options.n;
  if (settings.solver == Solver::kAdam) return adam(vectors, function, rest, x, g, size, settings);
  if (settings.solver == Solver::kSinkhorn) return sinkhorn(vectors, function, x, g, settings);
  if (settings.smoothing > 0) {
    return continuation(vectors, function, smoothed, room, x, steps, settings);
  }
  const bool bounded = options.reg == Reg::kSparse && options.k < options.m;
  const bool quadratic = options.reg != Reg::kNegentropy && !options.dual;
  const bool automatic = settings.solver == Solver::kAuto;
  const bool few_columns = 4 * options.n <= options.m;  // a router: kinks from the first steps on
  Progress done;
  if (settings.solver == Solver::kNewton || (automatic && quadratic && !(bounded && few_columns))) {
    done = newton(vectors, relaxed, rest, x, g, options, steps, settings.tol);
    if (done.status == kStalled && !bounded && meets(function, x, g, settings.tol)) {
      done.status = kConverged;
    }
    const bool over = done.status == kConverged && !bounded;
    if (over || done.iterations >= steps || settings.solver == Solver::kNewton) return done;
  }
  const auto climb_itself = [&] {
    const Limits limits = limits_of(settings, steps - done.iterations);
    done = done + lbfgs(vectors, function, rest, x, g, size, limits);
  };
  if (!(automatic && bounded && few_columns)) {
    climb_itself();
    if (!(automatic && bounded) || done.status != kStalled || done.iterations >= steps) return done;
  }
  done =
      done + continuation(vectors, function, smoothed, room, x, steps - done.iterations, settings);
  // what a kink leaves to climb
  if (done.status != kConverged && done.iterations < steps) climb_itself();
  return done;
}

}  // namespace dashpot::transport
