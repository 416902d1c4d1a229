// Semismooth Newton for the l2 semi-dual, gamma falling to its value by quarters.
//
//     (H + delta) d = -g,   H = (diag(W 1) - W diag(1 / r) W^T) / gamma
//
// W (m, n): the support of the plan, r (n,): its column counts; H is the Laplacian of a bipartite
// graph, singular along the constant of each of its components, hence delta: as much damping as
// there is error, less after a full step, more after a short one. At a large gamma the support is
// wide and the function nearly quadratic; each stage leaves a start from which the next is solved
// in a few steps. The systems are solved by conjugate gradients over W alone: about as much work as
// reading its entries.
#pragma once

#include "transport/lbfgs.h"
#include "transport/problem.h"

namespace dashpot::transport {

inline constexpr int kHalvings = 20;

// float64 numbers of room for m rows.
DASHPOT_HD inline int64_t newton_room(int64_t m) { return 7 * m; }

// d (m,) of (H + delta) d = -g at the function's last evaluation, to `reach` of |g|; room (4 m,).
template <class Vectors, class Function>
DASHPOT_HD void damped_direction(Vectors& vectors, Function& function, double damping, double reach,
                                 const double* g, int64_t m, double* room, double* d) {
  double* residual = room;
  double* along = residual + m;
  double* product = along + m;
  double* inverse = product + m;
  function.diagonal(inverse);
  const double delta = damping * vectors.max(m, [&](int64_t i) { return inverse[i]; });
  vectors.each(m, [&](int64_t i) {
    inverse[i] = 1 / (inverse[i] + delta);
    d[i] = 0;
    residual[i] = -g[i];
    along[i] = inverse[i] * residual[i];
  });
  double norm = vectors.dot(residual, along, m);
  const double end = reach * reach * vectors.dot(g, g, m);
  for (int64_t step = 0; step < 2 * m + 20 && norm > 0; ++step) {
    function.curve(along, product);
    vectors.add_scaled(product, product, delta, along, m);
    const double share = norm / vectors.dot(along, product, m);
    vectors.add_scaled(d, d, share, along, m);
    vectors.add_scaled(residual, residual, -share, product, m);
    if (!(vectors.dot(residual, residual, m) > end)) break;
    vectors.each(m, [&](int64_t i) { product[i] = inverse[i] * residual[i]; });
    const double fresh = vectors.dot(residual, product, m);
    vectors.add_scaled(along, product, fresh / norm, along, m);
    norm = fresh;
  }
}

// function: minus the l2 semi-dual (see lbfgs.h), and
//   soften(gamma)            the regulariser's strength from here on
//   spread()                 largest less smallest admissible cost
//   diagonal(to)             to = W 1 / gamma, W from here on that of the last evaluation
//   curve(d, to)             to = H d
// x (m,) is moved; g (m,) is left at the gradient there.
template <class Vectors, class Function>
DASHPOT_HD Progress newton(Vectors& vectors, Function& function, double* room, double* x, double* g,
                           const Options& options, int64_t max_iter, double tol) {
  const int64_t m = options.m;
  double* d = room;
  double* x_next = d + m;
  double* g_next = x_next + m;
  double* rest = g_next + m;
  Progress done;
  function.soften(options.gamma);
  double f = function(x, g), gamma = options.gamma;
  if (function.error(g) > 0.1) {  // not a start to go on from: begin where W holds about an eighth
    const double total = vectors.sum(m, [&](int64_t i) { return function.a(i); });
    const double wide = function.spread() / 1024 * static_cast<double>(m * options.n) / total;
    while (gamma < wide) gamma *= 4;
  }
  double damping = 1e-2;
  for (;; gamma /= 4) {
    const bool last = gamma <= options.gamma;
    if (last) gamma = options.gamma;
    function.soften(gamma);
    f = function(x, g);
    const double enough = last ? tol : fmax(tol, 1e-2);
    done.status = kConverged;
    for (double error; (error = function.error(g)) > enough;) {
      if (done.iterations >= max_iter) return done.status = kMaxIter, done;
      damped_direction(vectors, function, damping * fmin(error, 1.0) + 1e-12, fmin(1e-3, error), g,
                       m, rest, d);
      const double slope = vectors.dot(g, d, m), noise = function.noise * fabs(f);
      double t = 1, f_next = f;
      int trial = 0;
      for (; trial < kHalvings; ++trial, t /= 2) {
        vectors.add_scaled(x_next, x, t, d, m);
        f_next = function(x_next, g_next);
        if (f_next <= f + 1e-4 * t * slope) break;
        if (f_next <= f + noise && function.error(g_next) < error) break;
      }
      if (trial == kHalvings) {
        done.status = kStalled;
        break;
      }
      vectors.copy(x_next, m, x);
      vectors.copy(g_next, m, g);
      f = f_next;
      ++done.iterations;
      damping *= trial == 0 ? 0.25 : trial < 3 ? static_cast<double>(1 << (2 * trial)) : 64.0;
      damping = fmin(fmax(damping, 1e-4), 1e3);
    }
    if (last) return done;
  }
}

}  // namespace dashpot::transport
