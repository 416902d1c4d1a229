// Rows of embeddings as the sweeps over pairs see them.
//
//   u_i = z_i / max(|z_i|, eps)  (or z_i as it is),  z (n, d) in any dtype -> u in Work
//
// Rows may be taken in another order: then row i is z's row order[i], and gradients go back there.
// Rows are cut into panels of `panel` rows. Each panel lies twice in memory, in strips of kStrip
// numbers as matmul.h wants them: by rows, (strips of d, panel, kStrip), and by columns, (strips of
// the panel, d, kStrip). Padding is zero. Beyond these 2 n d numbers a sweep keeps a tile per
// thread and numbers per row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/matmul.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace dashpot::contrastive {

using Maybe = std::optional<Tensor>;

inline Dtype work_dtype(const Tensor& rows) {
  return rows.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

// Room for the gradient of z (n, d), if it is wanted.
inline Maybe like(const Tensor& z, bool wanted) {
  if (!wanted) return {};
  return z.new_empty({z.size(0), z.size(1)}, z.dtype);
}

// What sums are formed in: float64 for float64, else float32.
template <class In>
using WorkOf = std::conditional_t<std::is_same_v<In, double>, double, float>;

// Bytes of tiles that one pass may leave to the next.
inline constexpr int64_t kKeptTiles = int64_t{48} << 20;

// Panel height for n rows: low ones give threads more to share, high ones less traffic.
inline int64_t panel_for(int64_t n) { return n < 2048 ? 64 : 128; }

// A row in strips: `count` times kStrip numbers, `step` apart; padded with zeros.
template <class Work>
struct Row {
  Work* at;
  int64_t step, count;

  operator Row<const Work>() const { return {at, step, count}; }
};

template <class Work>
struct Dot {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Row<const Work>* x, const Row<const Work>* y, double* out) {
    Vec<Work, isa> sum{};
    for (int64_t strip = 0; strip < x->count; ++strip) {
      for (int64_t k = 0; k < kStrip; k += kLanes<Work, isa>) {
        sum += load<Work, isa>(x->at + strip * x->step + k) *
               load<Work, isa>(y->at + strip * y->step + k);
      }
    }
    *out = sum_lanes<Work, isa>(sum);
  }
};

template <class Work>
double dot(Row<const Work> x, Row<const Work> y) {
  double result;
  run_on_isa<Dot<Work>>(static_cast<const Row<const Work>*>(&x),
                        static_cast<const Row<const Work>*>(&y), &result);
  return result;
}

// y += factor * x
template <class Work>
struct AddScaled {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Row<Work>* y, const Row<const Work>* x, Work factor) {
    for (int64_t strip = 0; strip < x->count; ++strip) {
      for (int64_t k = 0; k < kStrip; k += kLanes<Work, isa>) {
        Work* at = y->at + strip * y->step + k;
        store<Work, isa>(
            at, load<Work, isa>(at) + factor * load<Work, isa>(x->at + strip * x->step + k));
      }
    }
  }
};

template <class Work>
void add_scaled(Row<Work> y, Row<const Work> x, double factor) {
  run_on_isa<AddScaled<Work>>(static_cast<const Row<Work>*>(&y),
                              static_cast<const Row<const Work>*>(&x), static_cast<Work>(factor));
}

// |x|, x (n,) with n a multiple of kStrip; right also where squares leave the range of Work.
template <class Work, Isa isa>
DASHPOT_INLINE double norm_of(const Work* x, int64_t n) {
  const Row<const Work> whole{x, kStrip, n / kStrip};
  double square;
  Dot<Work>::template run<isa>(&whole, &whole, &square);
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

// What kStrip rows of a panel become, at most `live` of them rows and the rest zero.
template <class Work, class In>
struct RowsOfStrip {
  const In* from[kStrip];
  int64_t live, dim, width, step;  // width: dim in whole strips; step: between strips of a row
  double eps;
  Work *lines, *by_rows, *inverse;  // lines: (kStrip, width)
  char* projected;
  double longest;  // of the rows that come out
};

template <class Work, class In>
struct NormaliseRows {
  template <Isa isa>
  static DASHPOT_INLINE void run(RowsOfStrip<Work, In>* rows) {
    const double eps = rows->eps;
    const int64_t live = rows->live, dim = rows->dim, width = rows->width, step = rows->step;
    double longest = rows->longest;
    for (int64_t r = 0; r < kStrip; ++r) {
      Work *line = rows->lines + r * width, *out = rows->by_rows + r * kStrip, divisor = 1;
      if (r >= live) {
        std::fill(line, line + width, Work(0));
      } else {
        ConvertBlock<Work, In>::template run<isa>(line, rows->from[r], dim);
        const double norm = norm_of<Work, isa>(line, width);
        const double least = eps == 0 ? 1 : norm < eps ? eps : norm;
        const double length = norm / least;
        if (std::isnan(length) || length > longest) longest = length;  // a NaN stays
        divisor = static_cast<Work>(least);
        rows->projected[r] = eps != 0 && norm >= eps;
        rows->inverse[r] = static_cast<Work>(1 / least);
      }
      for (int64_t strip = 0; strip * kStrip < width; ++strip) {
        for (int64_t k = 0; k < kStrip; k += kLanes<Work, isa>) {
          const Vec<Work, isa> u = load<Work, isa>(line + strip * kStrip + k) / divisor;
          store<Work, isa>(line + strip * kStrip + k, u);
          store<Work, isa>(out + strip * step + k, u);
        }
      }
    }
    rows->longest = longest;
  }
};

// columns (dim, kStrip) = lines^T, lines (kStrip, dim), rows `width` and `step` apart: small
// squares in 16-byte vectors, which every instruction set turns with its unpack instructions.
template <class Work>
void turn(const Work* lines, int64_t width, int64_t dim, Work* columns, int64_t step) {
  constexpr int kSide = 16 / sizeof(Work);
  using Line = Vec<Work, Isa::kBaseline>;
  int64_t k = 0;
  for (; k + kSide <= dim; k += kSide) {
    for (int64_t r = 0; r < kStrip; r += kSide) {
      Line in[kSide], out[kSide];
      for (int i = 0; i < kSide; ++i) {
        in[i] = load<Work, Isa::kBaseline>(lines + (r + i) * width + k);
      }
      if constexpr (kSide == 4) {
        const Line a = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
        const Line b = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
        const Line c = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
        const Line d = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
        out[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
        out[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
        out[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
        out[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
      } else {
        out[0] = __builtin_shufflevector(in[0], in[1], 0, 2);
        out[1] = __builtin_shufflevector(in[0], in[1], 1, 3);
      }
      for (int i = 0; i < kSide; ++i) {
        store<Work, Isa::kBaseline>(columns + (k + i) * step + r, out[i]);
      }
    }
  }
  for (; k < dim; ++k) {
    for (int64_t r = 0; r < kStrip; ++r) columns[k * step + r] = lines[r * width + k];
  }
}

// out = (g - u (u . g)) factor, or g factor; gathered from strips, `line` being room for a row
template <class Out, class Work>
struct ProjectRow {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Row<const Work>* g, const Row<const Work>* u, bool project,
                                 Work factor, Work* line, Out* out, int64_t dim) {
    double product = 0;
    if (project) Dot<Work>::template run<isa>(u, g, &product);
    const Work along = static_cast<Work>(product);
    for (int64_t strip = 0; strip < g->count; ++strip) {
      for (int64_t k = 0; k < kStrip; k += kLanes<Work, isa>) {
        store<Work, isa>(line + strip * kStrip + k,
                         (load<Work, isa>(g->at + strip * g->step + k) -
                          load<Work, isa>(u->at + strip * u->step + k) * along) *
                             factor);
      }
    }
    ConvertBlock<Out, Work>::template run<isa>(out, line, dim);
  }
};

template <class Work>
class Panels {
 public:
  int64_t rows = 0, dim = 0, panel = 0, count = 0;
  double largest = 0;  // norm of the longest row u; NaN if a row is not finite

  // z: (rows, dim); eps: the least norm that is divided by; 0 leaves the rows as they are. order:
  // (rows,) of z's rows, which outlives the panels, or none: as they lie.
  template <class In>
  Panels(const In* z, int64_t rows, int64_t dim, double eps, int threads, int64_t panel,
         const int64_t* order = nullptr)
      : rows(rows), dim(dim), panel(panel), count((rows + panel - 1) / panel), order_(order) {
    // One block: blocks of a few megabytes are what the C library keeps for the next call.
    values_.reset(new Work[count * (row_size() + panel * dim)]);
    inverse.resize(rows);
    projected.resize(rows);
    std::vector<double> longest(count);
    parallel_for(count, threads, [&](int64_t p) { longest[p] = fill(z, p, eps); });
    for (const double one : longest)
      largest = largest >= one || std::isnan(largest) ? largest : one;
  }

  int64_t begin(int64_t p) const { return p * panel; }
  int64_t height(int64_t p) const { return std::min(panel, rows - p * panel); }
  int64_t row_size() const { return strips(dim) * panel * kStrip; }  // numbers of a panel by rows
  const Work* by_rows(int64_t p) const { return values_.get() + p * row_size(); }
  const Work* by_columns(int64_t p) const {
    return values_.get() + count * row_size() + p * panel * dim;
  }

  // Row i of numbers that lie as the panels by rows do: of these, or of gradients.
  template <class T>
  Row<T> row_of(T* panels, int64_t i) const {
    return {panels + i / panel * row_size() + i % panel * kStrip, panel * kStrip, strips(dim)};
  }
  Row<const Work> row(int64_t i) const { return row_of(by_rows(0), i); }

  std::vector<Work> inverse;    // (rows,) u_i = z_i * inverse_i
  std::vector<char> projected;  // (rows,) whether the norm was divided by, and not eps

  // dz_i = c (g_i - u_i (u_i . g_i)) / |z_i|, or c g_i / eps where the norm is below; out (rows,
  // dim), as z.
  template <class Out>
  void project(const Work* g, Work c, Out* out, int threads) const {
    parallel_for(count, threads, [&](int64_t p) {
      const std::unique_ptr<Work[]> line(new Work[strips(dim) * kStrip]);
      for (int64_t i = begin(p); i < begin(p) + height(p); ++i) {
        const Row<const Work> u = row(i), gradient = row_of(g, i);
        run_on_isa<ProjectRow<Out, Work>>(&gradient, &u, projected[i] != 0,
                                          static_cast<Work>(c * inverse[i]), line.get(),
                                          out + place(i) * dim, dim);
      }
    });
  }

 private:
  const int64_t* order_;
  std::unique_ptr<Work[]> values_;  // by rows, then by columns

  int64_t place(int64_t i) const { return order_ ? order_[i] : i; }  // of row i in z

  template <class In>
  double fill(const In* z, int64_t p, double eps) {
    Work* const by_rows = values_.get() + p * row_size();
    Work* const by_columns = values_.get() + count * row_size() + p * panel * dim;
    const int64_t width = strips(dim) * kStrip;
    const std::unique_ptr<Work[]> lines(new Work[kStrip * width]());  // (kStrip, width)
    RowsOfStrip<Work, In> some;
    some.dim = dim;
    some.width = width;
    some.step = panel * kStrip;
    some.eps = eps;
    some.lines = lines.get();
    some.longest = 0;
    for (int64_t first = 0; first < panel; first += kStrip) {
      const int64_t from = begin(p) + first;
      some.live = std::max<int64_t>(0, std::min(kStrip, rows - from));
      for (int64_t r = 0; r < some.live; ++r) some.from[r] = z + place(from + r) * dim;
      some.by_rows = by_rows + first * kStrip;
      some.inverse = inverse.data() + from;
      some.projected = projected.data() + from;
      run_on_isa<NormaliseRows<Work, In>>(&some);
      turn(lines.get(), width, dim, by_columns + first * dim, kStrip);
    }
    return some.longest;
  }
};

// tile (panel of a, panel of b) = a_i . b_j, by rows of b.panel numbers. A panel with itself:
// strips on the diagonal and to the right of it are formed, the rest is their mirror image.
template <class Work>
void products(const Panels<Work>& a, int64_t i, const Panels<Work>& b, int64_t j, Work* tile) {
  const bool itself = &a == &b && i == j;
  for (int64_t first = 0; first < a.height(i); first += kStrip) {
    const int64_t done = itself ? first : 0;  // columns
    matmul<Work>(a.by_columns(i) + first * a.dim, 1, kStrip, b.by_columns(j) + done * b.dim,
                 b.dim * kStrip, tile + first * b.panel + done, b.panel, kStrip,
                 std::min(kStrip, a.height(i) - first), strips(b.height(j) - done), a.dim);
    for (int64_t to = first + kStrip; itself && to < a.height(i); to += kStrip) {
      turn(tile + first * b.panel + to, b.panel, kStrip, tile + to * b.panel + first, b.panel);
    }
  }
}

// grad (rows of a, in panels) += weights b_j, weights (panel of a, panel of b).
template <class Work>
void add_rows(const Work* weights, const Panels<Work>& a, int64_t i, const Panels<Work>& b,
              int64_t j, Work* grad) {
  matmul_add<Work>(weights, b.panel, 1, b.by_rows(j), b.panel * kStrip, grad + i * a.row_size(),
                   kStrip, a.panel * kStrip, a.height(i), strips(a.dim), b.height(j));
}

// grad (rows of b, in panels) += weights^T a_i, weights (panel of a, panel of b).
template <class Work>
void add_columns(const Work* weights, const Panels<Work>& a, int64_t i, const Panels<Work>& b,
                 int64_t j, Work* grad) {
  matmul_add<Work>(weights, 1, b.panel, a.by_rows(i), a.panel * kStrip, grad + j * b.row_size(),
                   kStrip, b.panel * kStrip, b.height(j), strips(b.dim), a.height(i));
}

}  // namespace dashpot::contrastive
