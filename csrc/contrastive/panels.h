// Rows of embeddings as the sweeps over pairs see them.
//
//   u_i = z_i / max(|z_i|, eps)  (or z_i as it is),  z (n, d) in any dtype -> u in Work
//
// Rows are cut into panels of `panel` rows. Each panel lies twice in memory: by rows, (panel,
// width) with width = d padded, and by columns, (d, panel): the two forms in which blocks are
// multiplied. Padding is zero. Beyond these 2 n d numbers a sweep keeps a tile per thread and
// numbers per row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/matmul.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace dashpot::contrastive {

// What sums are formed in: float64 for float64, else float32.
template <class In>
using WorkOf = std::conditional_t<std::is_same_v<In, double>, double, float>;

// Panel height for n rows: low ones give threads more to share, high ones less traffic.
inline int64_t panel_for(int64_t n) { return n <= 4096 ? 64 : 128; }

// x . y over whole vectors: n is padded.
template <class Work>
struct Dot {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Work* x, const Work* y, int64_t n, double* out) {
    Vec<Work, isa> sum{};
    for (int64_t k = 0; k < n; k += kLanes<Work, isa>) {
      sum += load<Work, isa>(x + k) * load<Work, isa>(y + k);
    }
    *out = sum_lanes<Work, isa>(sum);
  }
};

template <class Work>
double dot(const Work* x, const Work* y, int64_t n) {
  double result;
  run_on_isa<Dot<Work>>(x, y, n, &result);
  return result;
}

template <class Work>
struct Divide {
  template <Isa isa>
  static DASHPOT_INLINE void run(Work* x, Work divisor, int64_t n) {
    for (int64_t k = 0; k < n; k += kLanes<Work, isa>) {
      store<Work, isa>(x + k, load<Work, isa>(x + k) / divisor);
    }
  }
};

// out = (g - u * along) * inverse
template <class Work>
struct Project {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Work* g, const Work* u, Work along, Work inverse, Work* out,
                                 int64_t n) {
    for (int64_t k = 0; k < n; k += kLanes<Work, isa>) {
      store<Work, isa>(out + k,
                       (load<Work, isa>(g + k) - load<Work, isa>(u + k) * along) * inverse);
    }
  }
};

// |x|, right also where squares leave the range of Work.
template <class Work>
double norm_of(const Work* x, int64_t n) {
  double square = dot(x, x, n);
  if (square > 1e-30 && square < 1e30) return std::sqrt(square);
  double largest = 0;
  for (int64_t k = 0; k < n; ++k) {
    if (std::isnan(x[k])) return std::nan("");
    largest = std::max(largest, std::abs(static_cast<double>(x[k])));
  }
  if (largest == 0 || std::isinf(largest)) return largest;
  square = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double share = x[k] / largest;
    square += share * share;
  }
  return largest * std::sqrt(square);
}

// x (rows, columns) -> out (columns, rows), leading dimensions x_row and out_row.
template <class Work>
void transpose(const Work* x, int64_t x_row, int64_t rows, int64_t columns, Work* out,
               int64_t out_row) {
  constexpr int64_t kBlock = 16;  // a cache line of either
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t last = std::min(columns, first + kBlock);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = first; k < last; ++k) out[k * out_row + i] = x[i * x_row + k];
    }
  }
}

template <class Work>
class Panels {
 public:
  int64_t rows = 0, dim = 0, width = 0, panel = 0, count = 0;
  double largest = 0;  // norm of the longest row u; NaN if a row is not finite

  // z: (rows, dim); eps: the least norm that is divided by; 0 leaves the rows as they are.
  template <class In>
  Panels(const In* z, int64_t rows, int64_t dim, double eps, int threads, int64_t panel)
      : rows(rows), dim(dim), width(padded(dim)), panel(panel), count((rows + panel - 1) / panel) {
    by_rows_.reset(new Work[count * panel * width]);
    by_columns_.reset(new Work[count * panel * dim]);
    inverse.resize(rows);
    projected.resize(rows);
    std::vector<double> longest(count);
    parallel_for(count, threads, [&](int64_t p) { longest[p] = fill(z, p, eps); });
    for (const double one : longest)
      largest = largest >= one || std::isnan(largest) ? largest : one;
  }

  int64_t begin(int64_t p) const { return p * panel; }
  int64_t height(int64_t p) const { return std::min(panel, rows - p * panel); }
  const Work* by_rows(int64_t p) const {
    return by_rows_.get() + p * panel * width;
  }  // (panel, width)
  const Work* by_columns(int64_t p) const { return by_columns_.get() + p * panel * dim; }
  const Work* row(int64_t i) const { return by_rows_.get() + i * width; }  // (width,)

  std::vector<Work> inverse;    // (rows,) u_i = z_i * inverse_i
  std::vector<char> projected;  // (rows,) whether the norm was divided by, and not eps

  // dz_i = c (g_i - u_i (u_i . g_i)) / |z_i|, or c g_i / eps where the norm is below; g: (rows,
  // width).
  template <class Out>
  void project(const Work* g, Work c, Out* out, int threads) const {
    parallel_for(count, threads, [&](int64_t p) {
      const std::unique_ptr<Work[]> line(new Work[width]);
      for (int64_t i = begin(p); i < begin(p) + height(p); ++i) {
        const Work* u = row(i);
        const Work* gradient = g + i * width;
        const Work along = projected[i] ? static_cast<Work>(dot(u, gradient, width)) : Work(0);
        run_on_isa<Project<Work>>(gradient, u, along, c * inverse[i], line.get(), width);
        run_on_isa<ConvertBlock<Out, Work>>(out + i * dim, line.get(), dim);
      }
    });
  }

 private:
  std::unique_ptr<Work[]> by_rows_, by_columns_;

  template <class In>
  double fill(const In* z, int64_t p, double eps) {
    Work* to = by_rows_.get() + p * panel * width;
    Work* columns = by_columns_.get() + p * panel * dim;
    double longest = 0;
    for (int64_t i = begin(p); i < begin(p) + height(p); ++i, to += width) {
      run_on_isa<ConvertBlock<Work, In>>(to, z + i * dim, dim);
      std::fill(to + dim, to + width, Work(0));
      const double norm = norm_of<Work>(to, width);
      const double divisor = eps > 0 && !(norm >= eps) && !std::isnan(norm) ? eps : norm;
      projected[i] = eps > 0 && norm >= eps;
      inverse[i] = eps > 0 ? static_cast<Work>(1 / divisor) : Work(1);
      if (eps > 0) run_on_isa<Divide<Work>>(to, static_cast<Work>(divisor), width);
      const double length = eps > 0 ? norm / divisor : norm;
      if (std::isnan(length) || std::isnan(longest) || length > longest) longest = length;
    }
    const int64_t live = height(p);
    std::fill(to, by_rows_.get() + (p + 1) * panel * width, Work(0));
    if (live < panel) std::fill(columns, columns + panel * dim, Work(0));
    transpose<Work>(by_rows(p), width, live, dim, columns, panel);
    return longest;
  }
};

// tile (panel of a, panel of b) = a_i . b_j; leading dimension b.panel.
template <class Work>
void products(const Panels<Work>& a, int64_t i, const Panels<Work>& b, int64_t j, Work* tile) {
  matmul<Work>(a.by_rows(i), a.width, 1, b.by_columns(j), b.panel, tile, b.panel, a.height(i),
               padded(b.height(j)), a.dim);
}

// grad (panel of a, width) += weights b_j, weights (panel of a, panel of b).
template <class Work>
void add_rows(const Work* weights, const Panels<Work>& a, int64_t i, const Panels<Work>& b,
              int64_t j, Work* grad) {
  matmul_add<Work>(weights, b.panel, 1, b.by_rows(j), b.width, grad + a.begin(i) * a.width, a.width,
                   a.height(i), a.width, b.height(j));
}

// grad (panel of b, width) += weights^T a_i, weights (panel of a, panel of b).
template <class Work>
void add_columns(const Work* weights, const Panels<Work>& a, int64_t i, const Panels<Work>& b,
                 int64_t j, Work* grad) {
  matmul_add<Work>(weights, 1, b.panel, a.by_rows(i), a.width, grad + b.begin(j) * b.width, b.width,
                   b.height(j), b.width, a.height(i));
}

}  // namespace dashpot::contrastive
