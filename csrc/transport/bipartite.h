// The equations of a Newton step, unknowns x (m + n,): those of the rows, then of the columns,
//
//     (W 1 + delta)_i x_i + sum_j W_ij x_j = d_i      (W^T 1)_j x_j + sum_i W_ij x_i = d_j
//
// on the bipartite graph of the plan's support W. At a small gamma it is nearly a forest (an
// optimum of the unregularised problem is one), so nodes of one edge are eliminated first, with
// whatever that leaves of one edge, in O(1) each: the xor of a node's neighbours is the neighbour
// once it has no other. What remains has its columns eliminated, which leaves a dense system of its
// rows (cholesky.h): from each row's pivot the row takes its columns' lines, a column's line being
// its neighbours over its pivot.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "common/simd.h"
#include "transport/cholesky.h"

namespace dashpot::transport {

inline constexpr int64_t kDirect = 128;  // rows up to which the dense system is solved

// h (m, stride), from the own vector of each row i on: minus the sum of the lines (.., stride) of
// the numbers columns [starts_i, starts_i+1).
template <class T>
struct SubtractLines {
  static constexpr int kTogether = 4;  // vectors in registers
  template <Isa isa>
  static DASHPOT_INLINE void run(T* h, int64_t m, int64_t stride, const T* lines,
                                 const int32_t* columns, const int64_t* starts) {
    constexpr int kWidth = kLanes<T, isa>;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t l = i / kWidth * kWidth; l < stride; l += kTogether * kWidth) {
        some<isa, kTogether>(h + i * stride + l, (stride - l) / kWidth, lines + l, stride,
                             columns + starts[i], columns + starts[i + 1]);
      }
    }
  }
  template <Isa isa, int K>
  static DASHPOT_INLINE void some(T* to, int64_t vectors, const T* lines, int64_t stride,
                                  const int32_t* column, const int32_t* end) {
    constexpr int kWidth = kLanes<T, isa>;
    if constexpr (K > 1) {
      if (vectors < K) return some<isa, K - 1>(to, vectors, lines, stride, column, end);
    }
    Vec<T, isa> sums[K] = {};
    for (; column < end; ++column) {
      const T* const line = lines + *column * stride;
      for (int v = 0; v < K; ++v) sums[v] -= load<T, isa>(line + v * kWidth);
    }
    for (int v = 0; v < K; ++v) store<T, isa>(to + v * kWidth, sums[v]);
  }
};

// Of a node: how many edges it has, and the xor of the nodes at their other ends.
struct Edges {
  int32_t count, link;
};

class Bipartite {
 public:
  // d (m + n,): the right-hand side, then x; false where too many rows remain, or the system is not
  // positive definite: d is then spoiled. edges (m + n,): W's; each_line(visit): visit(l, its first
  // place, its end) of W's rows, or of its columns, ascending. T: of the dense system.
  template <class T, class EachLine>
  bool solve(int64_t m, int64_t n, const std::vector<Edges>& edges, bool by_rows,
             const EachLine& each_line, double delta, double* d) {
    nodes_.resize(m + n);
    for (int64_t v = 0; v < m + n; ++v) {
      nodes_[v] = {edges[v].count + (v < m ? delta : 0.0), edges[v].count, edges[v].link};
    }
    strip(d);
    if (!solve_core(m, n, edges, by_rows, each_line, std::get<Core<T>>(cores_), d)) return false;
    for (int64_t v = 0; v < m + n; ++v) {  // the last of a tree; its exact pivot is above delta's
      if (nodes_[v].degree == 0 && nodes_[v].pivot > 0) {
        d[v] /= std::max(nodes_[v].pivot, delta);
      } else if (nodes_[v].degree == 0) {
        d[v] = 0;
      }
    }
    for (int64_t q = gone_ - 1; q >= 0; --q) {
      const int32_t v = order_[q];
      d[v] = (d[v] - d[nodes_[v].link]) * nodes_[v].pivot;
    }
    return true;
  }

 private:
  static constexpr int32_t kGone = -1;
  struct Node {
    double pivot;    // of one that is gone, 1 over it
    int32_t degree;  // edges left, or kGone
    int32_t link;    // the xor of its neighbours; of one that is gone, the last
  };

  template <class T>
  struct Core {
    Cholesky<T> system;
    AlignedVector<T> lines;  // (columns that remain + 1, stride), the first one zeros
    std::vector<T> shares;   // (columns that remain + 1,), 1 over the pivot; first 0
  };

  void strip(double* d) {
    order_.resize(nodes_.size());
    gone_ = 0;
    for (int32_t start = 0; start < static_cast<int32_t>(nodes_.size()); ++start) {
      int32_t v = start;
      while (nodes_[v].degree == 1) {
        const int32_t u = nodes_[v].link;
        const double share = 1 / nodes_[v].pivot;
        nodes_[u].pivot -= share;
        d[u] -= share * d[v];
        nodes_[u].link ^= v;
        --nodes_[u].degree;
        nodes_[v].pivot = share;
        nodes_[v].degree = kGone;
        order_[gone_++] = v;
        v = u;
      }
    }
  }

  // The nodes of two edges and more.
  template <class T, class EachLine>
  bool solve_core(int64_t m, int64_t n, const std::vector<Edges>& edges, bool by_rows,
                  const EachLine& each_line, Core<T>& core, double* d) {
    const int64_t count = number(m, n, edges);
    if (count == 0) return true;
    if (count > kDirect) return false;
    T* const h = core.system.room(count);
    const int64_t stride = core.system.stride();
    write_lines(m, n, d, stride, count, core);
    if (by_rows) {
      each_line([&](int64_t i, const int32_t* place, const int32_t* end) {
        if (index_[i] < 0) return;
        int32_t* to = columns_.data() + starts_[index_[i]];
        for (; place < end; ++place) *to++ = enter(core, stride, index_[i], line_[*place]);
      });
    } else {
      next_.assign(starts_.begin(), starts_.begin() + count);
      each_line([&](int64_t j, const int32_t* place, const int32_t* end) {
        for (; place < end; ++place) {
          const int64_t r = index_[*place];
          if (r >= 0) columns_[next_[r]++] = enter(core, stride, r, line_[j]);
        }
      });
    }
    run_on_isa<SubtractLines<T>>(h, count, stride, static_cast<const T*>(core.lines.data()),
                                 static_cast<const int32_t*>(columns_.data()),
                                 static_cast<const int64_t*>(starts_.data()));
    for (int64_t r = 0; r < count; ++r) {
      h[r * stride + r] += static_cast<T>(nodes_[rows_[r]].pivot);
      h[r * stride + count] += static_cast<T>(d[rows_[r]]);
    }
    const T* const x = core.system.solve();
    if (x == nullptr) return false;
    give_back(m, n, count, x, d);
    return true;
  }

  // How many rows remain; they and the columns' lines are numbered. Columns that are gone have line
  // 0: rows take it in vain, and no branch is needed.
  int64_t number(int64_t m, int64_t n, const std::vector<Edges>& edges) {
    rows_.resize(m + 1);
    index_.resize(m);
    starts_.resize(m + 1);
    int64_t count = 0, entries = 0;
    for (int64_t i = 0; i < m; ++i) {
      const bool remains = nodes_[i].degree > 0;
      rows_[count] = static_cast<int32_t>(i);
      starts_[count] = entries;
      index_[i] = remains ? static_cast<int32_t>(count) : -1;
      count += remains;
      entries += remains ? edges[i].count : 0;
    }
    starts_[count] = entries;
    columns_.resize(entries + 1);
    line_.resize(n);
    count_of_lines_ = 1;
    for (int64_t j = 0; j < n; ++j) {
      line_[j] = nodes_[m + j].degree > 0 ? count_of_lines_++ : 0;
    }
    return count;
  }

  // Lines of zeros, but for what the right-hand side in place rhs takes of each; their shares.
  template <class T>
  void write_lines(int64_t m, int64_t n, const double* d, int64_t stride, int64_t rhs,
                   Core<T>& core) {
    core.lines.resize(count_of_lines_ * stride);
    std::fill_n(core.lines.data(), count_of_lines_ * stride, T(0));
    core.shares.resize(count_of_lines_);
    core.shares[0] = 0;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t own = line_[j];
      if (own == 0) continue;
      core.shares[own] = static_cast<T>(1 / nodes_[m + j].pivot);
      core.lines[own * stride + rhs] = core.shares[own] * static_cast<T>(d[m + j]);
    }
  }

  // An entry of W into its column's line.
  template <class T>
  static DASHPOT_INLINE int32_t enter(Core<T>& core, int64_t stride, int64_t row, int32_t line) {
    core.lines[line * stride + row] = core.shares[line];
    return line;
  }

  // x (count,) of the rows into d, and what it leaves of the columns.
  template <class T>
  void give_back(int64_t m, int64_t n, int64_t count, const T* x, double* d) {
    sums_.assign(count_of_lines_, 0);
    for (int64_t r = 0; r < count; ++r) {
      d[rows_[r]] = x[r];
      for (int64_t e = starts_[r]; e < starts_[r + 1]; ++e) sums_[columns_[e]] += x[r];
    }
    for (int64_t j = 0; j < n; ++j) {
      if (line_[j] > 0) d[m + j] = (d[m + j] - sums_[line_[j]]) / nodes_[m + j].pivot;
    }
  }

  std::vector<Node> nodes_;            // (m + n,)
  std::vector<int32_t> order_;         // the nodes that are gone,
  int64_t gone_ = 0;                   // and how many
  std::vector<int32_t> rows_, index_;  // the rows that remain; (m,) the place of each, or -1
  std::vector<int32_t> line_;          // (n,) the number of its line
  int32_t count_of_lines_ = 1;
  std::vector<int32_t> columns_;  // of each row that remains: the lines of its columns
  std::vector<int64_t> starts_, next_;
  std::vector<double> sums_;
  std::tuple<Core<float>, Core<double>> cores_;
};

}  // namespace dashpot::transport
