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
#include <limits>
#include <vector>

#include "common/simd.h"

namespace dashpot::transport {

struct Dot {
  template <Isa isa>
  static DASHPOT_INLINE void run(const double* x, const double* y, int64_t n, double* to) {
    constexpr int kWidth = kLanes<double, isa>;
    Vec<double, isa> sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
      for (int u = 0; u < 4; ++u) {
        sums[u] += load<double, isa>(x + i + u * kWidth) * load<double, isa>(y + i + u * kWidth);
      }
    }
    double sum = sum_lanes<double, isa>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; ++i) sum += x[i] * y[i];
    *to = sum;
  }
};

// to = x + factor * y
struct AddScaled {
  template <Isa isa>
  static DASHPOT_INLINE void run(double* to, const double* x, double factor, const double* y,
                                 int64_t n) {
    constexpr int kWidth = kLanes<double, isa>;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      store<double, isa>(to + i, load<double, isa>(x + i) + factor * load<double, isa>(y + i));
    }
    for (; i < n; ++i) to[i] = x[i] + factor * y[i];
  }
};

inline double dot(const double* x, const double* y, int64_t n) {
  double sum;
  run_on_isa<Dot>(x, y, n, &sum);
  return sum;
}

inline void add_scaled(double* to, const double* x, double factor, const double* y, int64_t n) {
  run_on_isa<AddScaled>(to, x, factor, y, n);
}

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
template <class Function>
Progress lbfgs(Function& function, double* x, double* g, int64_t n, const Limits& limits) {
  std::vector<double> room((2 * kSlots + 3) * n);
  double* direction = room.data();
  double* x_next = direction + n;
  double* g_next = x_next + n;
  const auto steps = [&](int64_t pair) { return g_next + n + 2 * (pair % kSlots) * n; };
  const auto turns = [&](int64_t pair) { return steps(pair) + n; };
  double curvature[kSlots], share[kSlots], history[kWindow];
  int64_t first = 0, last = 0;  // pairs [first, last) are kept

  Progress done;
  double f = function(x, g);
  done.evaluations = 1;
  std::fill_n(history, kWindow, std::numeric_limits<double>::infinity());
  for (;;) {
    if (function.error(g) <= limits.error) return done.status = kConverged, done;
    if (done.iterations >= limits.iterations || done.evaluations >= limits.evaluations) return done;

    std::copy_n(g, n, direction);
    for (int64_t pair = last - 1; pair >= first; --pair) {
      const int slot = pair % kSlots;
      share[slot] = dot(steps(pair), direction, n) / curvature[slot];
      add_scaled(direction, direction, -share[slot], turns(pair), n);
    }
    double scale = function.scale;
    if (last > first) {
      const double* turn = turns(last - 1);
      scale = curvature[(last - 1) % kSlots] / dot(turn, turn, n);
    }
    for (int64_t i = 0; i < n; ++i) direction[i] *= -scale;
    for (int64_t pair = first; pair < last; ++pair) {
      const int slot = pair % kSlots;
      const double back = dot(turns(pair), direction, n) / curvature[slot];
      add_scaled(direction, direction, -share[slot] - back, steps(pair), n);
    }

    const double slope = dot(g, direction, n), noise = function.noise * std::fabs(f);
    double low = 0, high = std::numeric_limits<double>::infinity(), t = 1, f_next = f;
    bool accepted = false;
    for (int trial = 0; slope < 0 && trial < kTrials && !accepted; ++trial) {
      add_scaled(x_next, x, t, direction, n);
      f_next = function(x_next, g_next);
      ++done.evaluations;
      const double slope_next = dot(g_next, direction, n);
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
      t = std::isinf(high) ? 2 * t : (low + high) / 2;
    }
    if (!accepted && !(slope < 0 && low > 0 && f_next < f)) {
      if (last == first) return done.status = kStalled, done;
      first = last;  // forget the curvature and try the gradient itself
      continue;
    }
    double* step = steps(last);
    double* turn = turns(last);
    add_scaled(step, x_next, -1, x, n);
    add_scaled(turn, g_next, -1, g, n);
    const double bend = dot(step, turn, n);
    if (bend > 1e-14 * std::sqrt(dot(step, step, n) * dot(turn, turn, n))) {
      curvature[last % kSlots] = bend;
      if (++last - first > kPairs) ++first;
    }
    std::copy_n(x_next, n, x);
    std::copy_n(g_next, n, g);
    f = f_next;
    double& before = history[done.iterations++ % kWindow];
    if (before - f <= limits.stall * std::fmax(1, std::fabs(f))) {
      return done.status = kStalled, done;
    }
    before = f;
  }
}

}  // namespace dashpot::transport
