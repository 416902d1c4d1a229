// Semismooth Newton for the l2 dual along gamma, which falls to its value by halves.
//
//     grad = (T 1 - a, T^T 1 - b),   T = [alpha + beta - C]+ / gamma,   W (m, n): where T > 0
//
// A step solves W's equations for the marginals at the next gamma',
//
//     W (da + db) W^T: rows p = gamma' a - gamma T 1, columns q = gamma' b - gamma T^T 1
//     (H + delta) da = p - W (q / r),   H = diag(W 1) - W diag(1 / r) W^T,   r = W^T 1
//     db = q / r - (W^T da) / r
//
// which is Newton's step at gamma' = gamma, and a predictor where gamma' is smaller: the solution
// is piecewise linear in gamma, so that while the error is small (kNear) one solve and one read of
// the cost halve gamma. H is the Laplacian of a bipartite graph, singular along the constant of
// each of its components, hence delta: as much damping as there is error, less after a full step,
// more after a short one. The dual and not the semi-dual, because its evaluation is a read of the
// cost without a search for thresholds; columns that are exact would save no step.
#pragma once

#include "transport/lbfgs.h"
#include "transport/problem.h"

namespace dashpot::transport {

inline constexpr int kTrialsOfNewton = 12;    // step lengths of a line search, by quarters
inline constexpr double kNear = 0.3;          // marginal error from which gamma goes on falling
inline constexpr double kPredictor = 5e-3;    // its damping, of the largest row of W
inline constexpr double kFirstDamping = 0.1;  // of the corrector, per error: at the start,
inline constexpr double kThenDamping = 3e-2;  // and after a predictor
inline constexpr double kLeastDamping = 1e-2;
// Its floor, of the largest row: parts of the graph whose masses differ by rounding stay in place.
inline constexpr double kFloor = 1e-8;
inline constexpr int kPatience = 30;  // steps at the last gamma in which the error falls by a tenth

// d (m,) of (H + delta) d = rhs to `reach` of |rhs|, by conjugate gradients; room (4 m + n,).
template <class Vectors, class Function>
DASHPOT_HD_APART void conjugate_gradients(Vectors& vectors, Function& function, double delta,
                                          double reach, const double* rhs, int64_t m, int64_t n,
                                          double* room, double* d) {
  double* residual = room;
  double* along = residual + m;
  double* product = along + m;
  double* inverse = product + m;
  double* mean = inverse + m;  // (n,)
  vectors.each(m, [&](int64_t i) {
    inverse[i] = 1 / (function.row(i) + delta);
    d[i] = 0;
    residual[i] = rhs[i];
    along[i] = inverse[i] * rhs[i];
  });
  double norm = vectors.dot(residual, along, m);
  const double end = reach * reach * vectors.dot(rhs, rhs, m);
  for (int64_t step = 0; step < 2 * m + 20 && norm > 0; ++step) {
    function.to_columns(along, mean);
    vectors.each(n, [&](int64_t j) { mean[j] /= fmax(function.column(j), 1.0); });
    function.to_rows(mean, product);
    vectors.each(
        m, [&](int64_t i) { product[i] = (function.row(i) + delta) * along[i] - product[i]; });
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

// d (m + n,) from the function's last evaluation, whose gradient is g (m + n,), at `gamma` towards
// `next`; damping: delta per largest row of W; rough: a few digits will do; room (5 m + n,).
template <class Vectors, class Function>
DASHPOT_HD_APART void newton_direction(Vectors& vectors, Function& function, double gamma,
                                       double next, double damping, double reach, bool rough,
                                       const double* g, int64_t m, int64_t n, double* room,
                                       double* d) {
  double* rhs = room;  // (m,)
  double* rest = rhs + m;
  double* to = d + m;  // (n,)
  function.hold();
  const double delta = damping * vectors.max(m, [&](int64_t i) { return function.row(i); });
  const auto form = [&] {
    vectors.each(m, [&](int64_t i) { d[i] = (next - gamma) * function.a(i) - gamma * g[i]; });
    vectors.each(n, [&](int64_t j) { to[j] = (next - gamma) * function.b(j) - gamma * g[m + j]; });
  };
  form();
  if (function.solve(delta, rough, d)) return;
  form();
  vectors.each(n, [&](int64_t j) {
    const double count = function.column(j);
    to[j] = count > 0 ? to[j] / count : 0.0;
  });
  function.to_rows(to, rhs);
  vectors.each(m, [&](int64_t i) { rhs[i] = d[i] - rhs[i]; });
  conjugate_gradients(vectors, function, delta, reach, rhs, m, n, rest, d);
  function.to_columns(d, rest);
  vectors.each(n, [&](int64_t j) { to[j] -= rest[j] / fmax(function.column(j), 1.0); });
  vectors.meet();  // d is one vector from here on
}

// function: minus the l2 dual (see lbfgs.h), and
//   soften(gamma)            the regulariser's strength from here on
//   spread(least)            largest less smallest admissible cost; least (m,): of each row the
//                            smallest, 0 where it has none
//   eliminate(x)             beta of x = (alpha, beta): the semi-dual's at alpha
//   hold()                   W from here on that of the last evaluation
//   row(i), column(j)        W 1, W^T 1
//   to_rows(v, to)           to (m,) = W v
//   to_columns(u, to)        to (n,) = W^T u
//   solve(delta, rough, d)   d (m + n,) = (p, q) becomes (da, db), or false: then by conjugate
//                            gradients, d spoiled; rough: to a few digits
// x (m + n,) is moved; of its start alpha is taken. g (m + n,) is left at the gradient there.
template <class Vectors, class Function>
DASHPOT_HD_APART Progress newton(Vectors& vectors, Function& function, double* room, double* x,
                                 double* g, const Options& options, int64_t max_iter, double tol) {
  const int64_t m = options.m, n = options.n, size = m + n;
  double* d = room;
  double* x_next = d + size;
  double* g_next = x_next + size;
  double* rest = g_next + size;
  Progress done;
  double f = 0, gamma = options.gamma;
  bool far = true;
  const auto begin = [&] {
    function.soften(gamma);
    function.eliminate(x);
    f = function(x, g);
    far = function.error(g) > 0.1;
  };
  const bool cold = !(vectors.max(m, [&](int64_t i) { return fabs(x[i]); }) > 0);
  if (!cold) begin();
  const double total = vectors.sum(m, [&](int64_t i) { return function.a(i); });
  if (far) {  // not a start to go on from: begin where W holds a few entries per row
    const double wide = function.spread(rest) / 2048 * static_cast<double>(m * n);
    if (cold) vectors.copy(rest, m, x);  // every row has a pair that costs it nothing more
    if (total > 0) gamma = fmax(gamma, wide / total);
    begin();
  }
  double damping = kFirstDamping, least = INFINITY;
  int idle = 0;
  bool stuck = false;
  for (;;) {
    const double error = function.error(g);
    const bool last = gamma <= options.gamma;
    // Half of tol: once its columns are made exact, a row's error holds theirs too.
    if (last && error <= tol / 2) return done.status = kConverged, done;
    if (done.iterations >= max_iter) return done.status = kMaxIter, done;
    idle = !last || error < 0.9 * least ? 0 : idle + 1;
    if (idle == 0) least = error;
    if (idle == kPatience) return done.status = kStalled, done;  // rounding
    ++done.iterations;
    if (!last && (error <= kNear || stuck)) {
      const double next = fmax(gamma / 2, options.gamma);
      newton_direction(vectors, function, gamma, next, kPredictor, 1e-2, true, g, m, n, rest, d);
      vectors.add_scaled(x, x, 1, d, size);
      function.soften(gamma = next);
      f = function(x, g);
      damping = kThenDamping;
      stuck = false;
      continue;
    }
    newton_direction(vectors, function, gamma, gamma, damping * fmin(error, 1.0) + kFloor,
                     fmin(1e-3, error), !last, g, m, n, rest, d);
    const double slope = vectors.dot(g, d, size), noise = function.noise * fabs(f);
    double t = 1, f_next = f;
    int trial = 0;
    for (; trial < kTrialsOfNewton; ++trial, t /= 4) {
      vectors.add_scaled(x_next, x, t, d, size);
      f_next = function(x_next, g_next);
      if (f_next <= f + 1e-4 * t * slope) break;
      const double error_next = function.error(g_next);
      if (error_next < 0.9 * error || (f_next <= f + noise && error_next < error)) break;
    }
    if (trial == kTrialsOfNewton) {
      if (last) return done.status = kStalled, done;
      f = function(x, g);  // what the direction is made from
      stuck = true;
      continue;
    }
    vectors.copy(x_next, size, x);
    vectors.copy(g_next, size, g);
    f = f_next;
    damping *= trial == 0 ? 0.25 : trial < 3 ? static_cast<double>(1 << (2 * trial)) : 64.0;
    damping = fmin(fmax(damping, kLeastDamping), 1e3);
  }
}

}  // namespace dashpot::transport
