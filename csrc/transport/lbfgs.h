// L-BFGS on vectors of doubles, for the duals: concave, with kinks where entries tie.
//
//     x <- x + t d,  d = -H g from the last kPairs pairs (x' - x, g' - g)
//
// The line search is bisection for the weak Wolfe conditions (Lewis and Overton), which, unlike
// interpolation, makes progress at kinks. Values that differ by less than their rounding are judged
// by the slopes alone (Hager and Zhang's approximate conditions).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device.h"

namespace dashpot::transport {

enum Status : int32_t { kConverged = 0, kMaxIter = 1, kStalled = 2, kInfeasible = 3 };

struct Limits {
  int64_t iterations, evaluations;
  double error;  // function.error(g) at which to stop
  double stall;  // relative decrease over kWindow steps below which to stop
};

struct Progress {
  int64_t iterations = 0, evaluations = 0;
  Status status = kMaxIter;
};

inline constexpr int kPairs = 10;          // as SciPy's L-BFGS-B
inline constexpr int kSlots = kPairs + 1;  // one more: a new pair may turn out to be of no use
inline constexpr int kWindow = 20;         // steps over which progress is judged
inline constexpr int kTrials = 25;         // evaluations of one line search

// function(x, g) -> f, to be minimised; function.error(g); function.noise: relative rounding of f;
// function.scale: length of the first step along -g. x (n,) is moved, g (n,) left at its gradient.
// vectors: who does the sums and loops; room (lbfgs_room(n),).
DASHPOT_HD inline int64_t lbfgs_room(int64_t n) { return (2 * kSlots + 3) * n; }

template <class Vectors, class Function>
DASHPOT_HD_APART Progress lbfgs(Vectors& vectors, Function& function, double* room, double* x,
                                double* g, int64_t n, const Limits& limits) {
  double* direction = room;
  double* x_next = direction + n;
  double* g_next = x_next + n;
  const auto steps = [&](int64_t pair) { return g_next + n + 2 * (pair % kSlots) * n; };
  const auto turns = [&](int64_t pair) { return steps(pair) + n; };
  double curvature[kSlots], share[kSlots], history[kWindow];
  int64_t first = 0, last = 0;  // pairs [first, last) are kept

  Progress done;
  double f = function(x, g);
  done.evaluations = 1;
  for (double& value : history) value = INFINITY;
  for (;;) {
    if (function.error(g) <= limits.error) return done.status = kConverged, done;
    if (done.iterations >= limits.iterations || done.evaluations >= limits.evaluations) return done;

    vectors.copy(g, n, direction);
    for (int64_t pair = last - 1; pair >= first; --pair) {
      const int slot = pair % kSlots;
      share[slot] = vectors.dot(steps(pair), direction, n) / curvature[slot];
      vectors.add_scaled(direction, direction, -share[slot], turns(pair), n);
    }
    double scale = function.scale;
    if (last > first) {
      const double* turn = turns(last - 1);
      scale = curvature[(last - 1) % kSlots] / vectors.dot(turn, turn, n);
    }
    vectors.scale(direction, -scale, n);
    for (int64_t pair = first; pair < last; ++pair) {
      const int slot = pair % kSlots;
      const double back = vectors.dot(turns(pair), direction, n) / curvature[slot];
      vectors.add_scaled(direction, direction, -share[slot] - back, steps(pair), n);
    }

    const double slope = vectors.dot(g, direction, n), noise = function.noise * fabs(f);
    double low = 0, high = INFINITY, t = 1, f_next = f;
    bool accepted = false;
    for (int trial = 0; slope < 0 && trial < kTrials && !accepted; ++trial) {
      vectors.add_scaled(x_next, x, t, direction, n);
      f_next = function(x_next, g_next);
      ++done.evaluations;
      const double slope_next = vectors.dot(g_next, direction, n);
      const bool lower =
          f_next <= f + 1e-4 * t * slope || (f_next <= f + noise && slope_next <= -0.9998 * slope);
      if (!lower) {
        high = t;
      } else if (slope_next < 0.9 * slope) {
        low = t;
      } else {
        accepted = true;
        break;
      }
      t = high == INFINITY ? 2 * t : (low + high) / 2;
    }
    if (!accepted && !(slope < 0 && low > 0 && f_next < f)) {
      if (last == first) return done.status = kStalled, done;
      first = last;  // forget the curvature and try the gradient itself
      continue;
    }
    double* step = steps(last);
    double* turn = turns(last);
    vectors.add_scaled(step, x_next, -1, x, n);
    vectors.add_scaled(turn, g_next, -1, g, n);
    const double bend = vectors.dot(step, turn, n);
    if (bend > 1e-14 * ::sqrt(vectors.dot(step, step, n) * vectors.dot(turn, turn, n))) {
      curvature[last % kSlots] = bend;
      if (++last - first > kPairs) ++first;
    }
    vectors.copy(x_next, n, x);
    vectors.copy(g_next, n, g);
    f = f_next;
    double& before = history[done.iterations++ % kWindow];
    if (before - f <= limits.stall * fmax(1.0, fabs(f))) {
      return done.status = kStalled, done;
    }
    before = f;
  }
}

}  // namespace dashpot::transport
