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
inline std::optional<std::string> too_many_rows(const Tensor& cost) {
  if (cost.size(1) <= kMaxRows) return std::nullopt;
  return "takes at most 2^24 rows, got " + std::to_string(cost.size(1));
}

// alpha, a, grad_alpha (B, m); beta (dual, else null), b, column (B, n); cost (B, m, n); obj (B,).
// column: dual b - T^T 1, semi-dual beta.
template <class T, class C>
void evaluate(const Options& options, int64_t batch, const T* alpha, const T* beta, const C* cost,
              const T* a, const T* b, T* obj, T* grad_alpha, T* column, int threads) {
  const int64_t m = options.m, n = options.n, width = columns_per_chunk(n);
  const int64_t chunks = (n + width - 1) / width;
  std::vector<double> row_sums(batch * chunks * m), values(batch * chunks);
  parallel_for(batch * chunks, threads, [&](int64_t item) {
    const int64_t problem = item / chunks, begin = item % chunks * width;
    values[item] = evaluate_columns<T, C>(options, alpha + problem * m,
                                          beta ? beta + problem * n : nullptr, b + problem * n,
                                          cost + problem * m * n, begin, std::min(n, begin + width),
                                          row_sums.data() + item * m, column + problem * n);
  });
  for (int64_t problem = 0; problem < batch; ++problem) {
    double value = 0;
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += row_sums[(problem * chunks + c) * m + i];
      grad_alpha[problem * m + i] = static_cast<T>(a[problem * m + i] - sum);
      value += static_cast<double>(a[problem * m + i]) * alpha[problem * m + i];
    }
    for (int64_t c = 0; c < chunks; ++c) value -= values[problem * chunks + c];
    for (int64_t j = problem * n; j < (problem + 1) * n; ++j) {
      if (options.dual) {
        value += static_cast<double>(b[j]) * beta[j];
        column[j] = b[j] - column[j];
      } else if (options.reg == Reg::kNegentropy) {
        const double gamma = options.gamma;
        column[j] = static_cast<T>(gamma + gamma * std::log(static_cast<double>(b[j])) - column[j]);
      } else {
        column[j] = -column[j];
      }
    }
    obj[problem] = static_cast<T>(value);
  }
}

}  // namespace dashpot::transport
