// The equations of a Newton step, unknowns x (m + n,): those of the rows, then of the columns,
//
//     (W 1 + delta)_i x_i + sum_j W_ij x_j = d_i      (W^T 1)_j x_j + sum_i W_ij x_i = d_j
//
// on the bipartite graph of the plan's support W. At a small gamma it is nearly a forest (an
// optimum of the unregularised problem is one), so nodes of one edge are eliminated first, with
// whatever that leaves of one edge, in O(1) each: the xor of a node's neighbours is the neighbour
// once it has no other. What remains has its columns eliminated, which leaves a dense system of its
// rows (cholesky.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "common/simd.h"
#include "transport/cholesky.h"

namespace dashpot::transport {

inline constexpr int64_t kDirect = 128;  // rows up to which the dense system is solved

// h (m, stride), upper triangle, less share_j of every pair of rows [starts_j, starts_j + 1) of
// each column, ascending; line (stride,): zeros, and left so.
template <class T>
struct SubtractCliques {
  static constexpr int64_t kLong = 8;  // rows from which whole vectors are subtracted
  template <Isa isa>
  static DASHPOT_INLINE void run(T* h, int64_t stride, const int32_t* rows, const int64_t* starts,
                                 const T* shares, int64_t columns, T* line) {
    constexpr int kWidth = kLanes<T, isa>;
    for (int64_t j = 0; j < columns; ++j) {
      const int32_t* const first = rows + starts[j];
      const int32_t* const end = rows + starts[j + 1];
      const T share = shares[j];
      if (end - first < kLong) {
        for (const int32_t* row = first; row < end; ++row) {
          T* const to = h + *row * stride;
          for (const int32_t* other = row; other < end; ++other) to[*other] -= share;
        }
        continue;
      }
      for (const int32_t* row = first; row < end; ++row) line[*row] = share;
      for (const int32_t* row = first; row < end; ++row) {
        T* const to = h + *row * stride;
        for (int64_t l = *row / kWidth * kWidth; l < stride; l += kWidth) {
          store<T, isa>(to + l, load<T, isa>(to + l) - load<T, isa>(line + l));
        }
      }
      for (const int32_t* row = first; row < end; ++row) line[*row] = 0;
    }
  }
};

// Of a node: how many edges it has, and the xor of the nodes at their other ends.
struct Edges {
  int32_t count, link;
};

class Bipartite {
 public:
  // d (m + n,): the right-hand side, then x; false where too many rows remain, or the system is not
  // positive definite: d is then spoiled. edges (m + n,): W's; each(visit): visit(i, j) of every
  // entry of W, ascending in i for each j. T: of the dense system.
  template <class T, class Each>
  bool solve(int64_t m, int64_t n, const std::vector<Edges>& edges, const Each& each, double delta,
             double* d) {
    nodes_.resize(m + n);
    for (int64_t v = 0; v < m + n; ++v) {
      nodes_[v] = {edges[v].count + (v < m ? delta : 0.0), edges[v].count, edges[v].link};
    }
    strip(d);
    if (!solve_core(m, n, each, std::get<Core<T>>(cores_), d)) return false;
    for (int64_t v = 0; v < m + n; ++v) {  // the last of a tree; its exact pivot is above delta's
      if (nodes_[v].degree == 0 && nodes_[v].pivot > 0) {
        d[v] /= std::max(nodes_[v].pivot, delta);
      } else if (nodes_[v].degree == 0) {
        d[v] = 0;
      }
    }
    for (auto v = order_.rbegin(); v != order_.rend(); ++v) {
      d[*v] = (d[*v] - d[nodes_[*v].link]) / nodes_[*v].pivot;
    }
    return true;
  }

 private:
  static constexpr int32_t kGone = -1;
  struct Node {
    double pivot;
    int32_t degree;  // edges left, or kGone
    int32_t link;    // the xor of its neighbours; of one that is gone, the last
  };

  template <class T>
  struct Core {
    Cholesky<T> system;
    std::vector<T> shares;  // (n,) 1 over a column's pivot
  };

  void strip(double* d) {
    order_.clear();
    for (int32_t start = 0; start < static_cast<int32_t>(nodes_.size()); ++start) {
      int32_t v = start;
      while (nodes_[v].degree == 1) {
        const int32_t u = nodes_[v].link;
        const double share = 1 / nodes_[v].pivot;
        nodes_[u].pivot -= share;
        d[u] -= share * d[v];
        nodes_[u].link ^= v;
        --nodes_[u].degree;
        nodes_[v].degree = kGone;
        order_.push_back(v);
        v = u;
      }
    }
  }

  // The nodes of two edges and more.
  template <class T, class Each>
  bool solve_core(int64_t m, int64_t n, const Each& each, Core<T>& core, double* d) {
    auto& [system, shares] = core;
    index_.resize(m);
    int32_t count = 0;
    for (int64_t i = 0; i < m; ++i) index_[i] = nodes_[i].degree > 0 ? count++ : -1;
    if (count == 0) return true;
    if (count > kDirect) return false;
    starts_.resize(n + 1);
    shares.resize(n);
    starts_[0] = 0;
    for (int64_t j = 0; j < n; ++j) {
      const Node& node = nodes_[m + j];
      starts_[j + 1] = starts_[j] + std::max(node.degree, 0);
      shares[j] = node.degree > 0 ? static_cast<T>(1 / node.pivot) : T(0);
    }
    next_.assign(starts_.begin(), starts_.end());
    rows_.resize(starts_[n] + 1);
    each([&](int64_t i, int64_t j) {
      if (index_[i] >= 0 && nodes_[m + j].degree > 0) rows_[next_[j]++] = index_[i];
    });
    T* const h = system.empty(count);
    T* const y = system.rhs();
    for (int64_t i = 0; i < m; ++i) {
      if (index_[i] < 0) continue;
      h[index_[i] * system.stride() + index_[i]] = static_cast<T>(nodes_[i].pivot);
      y[index_[i]] = static_cast<T>(d[i]);
    }
    run_on_isa<SubtractCliques<T>>(h, system.stride(), static_cast<const int32_t*>(rows_.data()),
                                   static_cast<const int64_t*>(starts_.data()),
                                   static_cast<const T*>(shares.data()), n, system.room());
    for (int64_t j = 0; j < n; ++j) {
      const T share = shares[j] * static_cast<T>(d[m + j]);
      for (int64_t e = starts_[j]; e < starts_[j + 1]; ++e) y[rows_[e]] -= share;
    }
    const T* const x = system.solve();
    if (x == nullptr) return false;
    for (int64_t i = 0; i < m; ++i) {
      if (index_[i] >= 0) d[i] = x[index_[i]];
    }
    for (int64_t j = 0; j < n; ++j) {
      if (!(nodes_[m + j].degree > 0)) continue;
      double sum = d[m + j];
      for (int64_t e = starts_[j]; e < starts_[j + 1]; ++e) sum -= x[rows_[e]];
      d[m + j] = sum / nodes_[m + j].pivot;
    }
    return true;
  }

  std::vector<Node> nodes_;     // (m + n,)
  std::vector<int32_t> order_;  // the nodes that are gone
  std::vector<int32_t> index_;  // (m,) a row's place in the dense system, or -1
  std::vector<int32_t> rows_;   // of each column that remains
  std::vector<int64_t> starts_, next_;
  std::tuple<Core<float>, Core<double>> cores_;
};

}  // namespace dashpot::transport
