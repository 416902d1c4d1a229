// The solvers' vectors on the CPU: one thread, SIMD lanes.
#pragma once

#include <algorithm>
#include <cstdint>

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

// visit(i) of independent i: GCC puts them into lanes.
struct Each {
  template <Isa isa, class Visit>
  static DASHPOT_INLINE void run(int64_t n, const Visit* visit) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) (*visit)(i);
  }
};

struct Alone {
  template <class Visit>
  void each(int64_t n, const Visit& visit) const {
    run_on_isa<Each>(n, &visit);
  }
  template <class Term>
  double sum(int64_t n, const Term& term) const {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += term(i);
    return total;
  }
  template <class Term>
  double max(int64_t n, const Term& term) const {
    double most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max<double>(most, term(i));
    return most;
  }
  double dot(const double* x, const double* y, int64_t n) const {
    double sum;
    run_on_isa<Dot>(x, y, n, &sum);
    return sum;
  }
  void add_scaled(double* to, const double* x, double factor, const double* y, int64_t n) const {
    run_on_isa<AddScaled>(to, x, factor, y, n);
  }
  void scale(double* x, double factor, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) x[i] *= factor;
  }
  void copy(const double* from, int64_t n, double* to) const { std::copy_n(from, n, to); }
  void meet() const {}  // of a block's threads
};

}  // namespace dashpot::transport
