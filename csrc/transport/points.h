// The cost of two clouds of points, made where it is needed and never stored: x (m, d), y (n, d),
//
//     sqeuclidean |x_i - y_j|^2     euclidean |x_i - y_j|     inner -x_i . y_j
//
// Distances are sums of (x - y)^2 and not |x|^2 + |y|^2 - 2 x.y: nothing cancels at any d, for one
// subtraction more per number.
// Sums over d run from the first to the last, whichever way an entry is made.
//
// A tile of columns is made as a small matrix product is (common/matmul.h): columns lie in strips,
// (d, kStrip) without gaps, rows are read number by number. A single column, which candidate lists
// ask for, is the same with the roles exchanged.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/matmul.h"
#include "common/tensor.h"
#include "transport/columns.h"

namespace dashpot::transport {

inline Metric metric_of(const std::string& name) {
  return name == "euclidean" ? Metric::kEuclidean
         : name == "inner"   ? Metric::kInner
                             : Metric::kSqeuclidean;
}

// In the place of the cost's element type: points of S.
template <class S>
struct Points {};

template <class C>
using StateOf = std::conditional_t<std::is_same_v<C, double> || std::is_same_v<C, Points<double>>,
                                   double, float>;

// Costs of R points `rows` (R, d) with those of V vectors of a strip.
template <Isa isa, class S, bool distance, int R, int V>
DASHPOT_INLINE void pair_costs(const S* rows, const S* strip, int64_t d, Metric metric,
                               Vec<S, isa> (&cost)[R][V]) {
  constexpr int kWide = kLanes<S, isa>;
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) cost[r][v] = Vec<S, isa>{};
  }
  for (int64_t q = 0; q < d; ++q) {
    Vec<S, isa> points[V];
    for (int v = 0; v < V; ++v) points[v] = load<S, isa>(strip + q * kStrip + v * kWide);
    for (int r = 0; r < R; ++r) {
      const S number = rows[r * d + q];
      for (int v = 0; v < V; ++v) {
        if constexpr (distance) {
          const Vec<S, isa> gap = points[v] - number;
          cost[r][v] += gap * gap;
        } else {
          cost[r][v] -= number * points[v];
        }
      }
    }
  }
  if (metric != Metric::kEuclidean) return;
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) cost[r][v] = sqrt<S, isa>(cost[r][v]);
  }
}

// Costs of one point (d,) with all of a cloud in strips, to (strips * kStrip,).
template <class S>
struct FillColumn {
  template <Isa isa>
  static DASHPOT_INLINE void run(S* to, const S* point, const S* cloud, int64_t strips, int64_t d,
                                 Metric metric) {
    constexpr int V = 2, kWide = kLanes<S, isa>;
    for (int64_t at = 0; at < strips * kStrip; at += V * kWide) {
      const S* strip = cloud + at / kStrip * kStrip * d + at % kStrip;
      Vec<S, isa> cost[1][V];
      if (metric == Metric::kInner) {
        pair_costs<isa, S, false>(point, strip, d, metric, cost);
      } else {
        pair_costs<isa, S, true>(point, strip, d, metric, cost);
      }
      for (int v = 0; v < V; ++v) store<S, isa>(to + at + v * kWide, cost[0][v]);
    }
  }
};

template <class S>
struct Cost<Points<S>> {
  using Element = Points<S>;
  const S *x, *y;                // (B, m, d), (B, n, d)
  const S *x_strips, *y_strips;  // (B, strips, d, kStrip); those of x for column_of alone
  int64_t m, n, d;
  Metric metric;

  Cost at(int64_t problem, int64_t) const {
    Cost one = *this;
    one.x += problem * m * d;
    one.y += problem * n * d;
    if (x_strips) one.x_strips += problem * strips(m) * kStrip * d;
    one.y_strips += problem * strips(n) * kStrip * d;
    return one;
  }
  // Valid until this thread asks again.
  CostColumn<S> column_of(int64_t j) const {
    static thread_local std::vector<S> room;
    room.resize(strips(m) * kStrip);
    run_on_isa<FillColumn<S>>(room.data(), y + j * d, x_strips, strips(m), d, metric);
    return {room.data(), 1};
  }
  using Entry = S;
  bool lines_are_rows() const { return false; }
  const S* line(int64_t j, int64_t) const { return column_of(j).first; }
  bool admits(int64_t, int64_t) const { return true; }
  Cost from_row(int64_t i) const {
    Cost rest = *this;
    rest.x += i * d;
    rest.x_strips = nullptr;  // has all rows
    return rest;
  }
};

template <class T, class S>
struct FillTiles<T, Points<S>> {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* scores, const T* alpha, const T* shift,
                                 const Cost<Points<S>>* cost, int64_t m, int64_t first,
                                 int64_t live) {
    if (cost->metric == Metric::kInner) {
      fill<isa, false>(scores, alpha, shift, *cost, m, first, live);
    } else {
      fill<isa, true>(scores, alpha, shift, *cost, m, first, live);
    }
  }

  // Vectors of S, of which two may be one of T: the float32 costs of a float64 evaluation.
  template <Isa isa, bool distance>
  static DASHPOT_INLINE void fill(T* scores, const T* alpha, const T* shift,
                                  const Cost<Points<S>>& cost, int64_t m, int64_t first,
                                  int64_t live) {
    constexpr int R = isa == Isa::kAvx512 ? 8 : 4, V = 2, kWidth = kLanes<T, isa>;
    constexpr int64_t kBoth = V * kLanes<S, isa>;
    for (int64_t j = first / kBoth * kBoth; j < first + live; j += kBoth) {
      const S* strip = cost.y_strips + j / kStrip * kStrip * cost.d + j % kStrip;
      int64_t i = 0;
      for (; i + R <= m; i += R) {
        block<isa, distance, R, V>(scores, alpha, shift, cost, strip, m, i, j - first, live);
      }
      for (; i < m; ++i) {
        block<isa, distance, 1, V>(scores, alpha, shift, cost, strip, m, i, j - first, live);
      }
    }
    const int64_t rest = live % kWidth;
    if (rest == 0) return;
    T* const last = scores + live / kWidth * m * kWidth;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t lane = rest; lane < kWidth; ++lane) {
        last[i * kWidth + lane] = -std::numeric_limits<T>::infinity();
      }
    }
  }

  // Rows [i, i + R), columns from `at` of the group on; those outside of it are left out.
  template <Isa isa, bool distance, int R, int V>
  static DASHPOT_INLINE void block(T* scores, const T* alpha, const T* shift,
                                   const Cost<Points<S>>& cost, const S* strip, int64_t m,
                                   int64_t i, int64_t at, int64_t live) {
    constexpr int kWidth = kLanes<T, isa>, kParts = kLanes<S, isa> / kWidth;
    typedef S Part __attribute__((vector_size(kWidth * sizeof(S))));
    Vec<S, isa> found[R][V];
    pair_costs<isa, S, distance>(cost.x + i * cost.d, strip, cost.d, cost.metric, found);
    for (int v = 0; v < V; ++v) {
      for (int p = 0; p < kParts; ++p) {
        const int64_t column = at + (v * kParts + p) * kWidth;
        if (column < 0 || column >= live) continue;
        const Vec<T, isa> base = load<T, isa>(shift + column);
        T* to = scores + (column / kWidth * m + i) * kWidth;
        for (int r = 0; r < R; ++r) {
          Part part;
          __builtin_memcpy(&part, reinterpret_cast<const char*>(&found[r][v]) + p * sizeof part,
                           sizeof part);
          const Vec<T, isa> wide = __builtin_convertvector(part, Vec<T, isa>);
          store<T, isa>(to + r * kWidth, base + alpha[i + r] - wide);
        }
      }
    }
  }
};

// (B, count, d) as strips (B, strips, d, kStrip), zeros beyond the last point.
template <class S>
std::vector<S> in_strips(const S* points, int64_t batch, int64_t count, int64_t d) {
  const int64_t length = strips(count) * kStrip * d;
  std::vector<S> packed(batch * length);
  for (int64_t p = 0; p < batch; ++p) {
    for (int64_t i = 0; i < count; ++i) {
      S* to = packed.data() + p * length + i / kStrip * kStrip * d + i % kStrip;
      const S* from = points + (p * count + i) * d;
      for (int64_t q = 0; q < d; ++q) to[q * kStrip] = from[q];
    }
  }
  return packed;
}

// Calls function(all) with the Cost of a batch: stored, (B, m, n) or by_rows (B, n, m), or that of
// points, x (B, m, d) in the place of the cost with y (B, n, d); without Python's lock. `lists`:
// column_of is asked for.
template <class Function>
void with_cost(const Tensor& cost, const std::optional<Tensor>& y, const std::string& metric,
               int64_t m, int64_t n, bool by_rows, bool lists, const Function& function) {
  const int64_t batch = cost.size(0), d = cost.size(2);
  const py::gil_scoped_release release;
  if (!y) {
    return dispatch_floating(cost.dtype, [&](auto element) {
      function(
          Cost<decltype(element)>{cost.as<decltype(element)>(), by_rows ? 1 : n, by_rows ? m : 1});
    });
  }
  const auto of_points = [&](auto element) {
    using S = decltype(element);
    const std::vector<S> x_strips = lists ? in_strips(cost.as<S>(), batch, m, d) : std::vector<S>();
    const std::vector<S> y_strips = in_strips(y->as<S>(), batch, n, d);
    function(Cost<Points<S>>{cost.as<S>(), y->as<S>(), lists ? x_strips.data() : nullptr,
                             y_strips.data(), m, n, d, metric_of(metric)});
  };
  cost.dtype == Dtype::kFloat64 ? of_points(double{}) : of_points(float{});
}

// Why a call is not taken: counts of rows are kept in float32, points are of the state's type.
inline std::optional<std::string> cannot_take(const Tensor& cost, const std::optional<Tensor>& y,
                                              int64_t rows) {
  const bool wide = cost.dtype == Dtype::kFloat64 || cost.dtype == Dtype::kFloat32;
  if (y && (!wide || y->dtype != cost.dtype)) return "takes points of float64 or float32";
  if (rows <= kMaxRows) return std::nullopt;
  return "takes at most 2^24 rows, got " + std::to_string(rows);
}

}  // namespace dashpot::transport
