// One evaluation of the dual or semi-dual of a batch of problems: chunks of columns over threads,
// their row sums and values added in the order of the chunks.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"
#include "transport/columns.h"

namespace dashpot::transport {

inline Reg reg_of(const std::string& name) {
  return name == "negentropy" ? Reg::kNegentropy : name == "l2" ? Reg::kL2 : Reg::kSparse;
}

// Why a problem is not taken: counts of rows are kept in float32.
inline std::optional<std::string> too_many_rows(int64_t rows) {
  if (rows <= kMaxRows) return std::nullopt;
  return "takes at most 2^24 rows, got " + std::to_string(rows);
}

// What evaluations of the same problems share: kept by a solver.
template <class T>
struct Scratch {
  std::vector<double> row_sums, values;
  std::vector<T> column;
};

// alpha, a, grad_alpha (B, m); beta (dual, else null), b, column (B, n); cost (B, m, n); obj (B,).
// column: dual b - T^T 1, semi-dual beta. level (B, n) and tied (B, n): see PerColumn, or null.
template <class T, class C, class G>
void evaluate(const Options& options, int64_t batch, const T* alpha, const T* beta,
              const Cost<C>& cost, const T* a, const T* b, G* obj, G* grad_alpha, G* column,
              T* level, int32_t* tied, Scratch<T>& scratch, int threads) {
  const int64_t m = options.m, n = options.n, width = columns_per_chunk(n);
  const int64_t chunks = (n + width - 1) / width;
  scratch.row_sums.resize(batch * chunks * m);
  scratch.values.resize(batch * chunks);
  scratch.column.resize(batch * n);
  parallel_for(batch * chunks, threads, [&](int64_t item) {
    const int64_t problem = item / chunks, begin = item % chunks * width;
    const PerColumn<T> found{scratch.column.data() + problem * n,
                             level ? level + problem * n : nullptr,
                             tied ? tied + problem * n : nullptr};
    scratch.values[item] = evaluate_columns<T, C>(
        options, alpha + problem * m, beta ? beta + problem * n : nullptr, b + problem * n,
        cost.at(problem, m * n), begin, std::min(n, begin + width),
        scratch.row_sums.data() + item * m, found, [](const Tile<T>&, int64_t, int64_t) {});
  });
  for (int64_t problem = 0; problem < batch; ++problem) {
    double value = 0;
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += scratch.row_sums[(problem * chunks + c) * m + i];
      grad_alpha[problem * m + i] = static_cast<G>(a[problem * m + i] - sum);
      value += static_cast<double>(a[problem * m + i]) * alpha[problem * m + i];
    }
    for (int64_t c = 0; c < chunks; ++c) value -= scratch.values[problem * chunks + c];
    for (int64_t j = problem * n; j < (problem + 1) * n; ++j) {
      const T found = scratch.column[j];
      if (options.dual) {
        value += static_cast<double>(b[j]) * beta[j];
        column[j] = static_cast<G>(b[j] - found);
      } else if (options.reg == Reg::kNegentropy) {
        const double gamma = options.gamma;
        column[j] = static_cast<G>(gamma + gamma * std::log(static_cast<double>(b[j])) - found);
      } else {
        column[j] = -found;
      }
    }
    obj[problem] = static_cast<G>(value);
  }
}

}  // namespace dashpot::transport
