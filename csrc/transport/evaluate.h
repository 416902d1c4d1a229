// One evaluation of the dual or semi-dual of a batch of problems: chunks of columns over threads,
// their row sums and values added in the order of the chunks.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"
#include "transport/listed.h"
#include "transport/open.h"

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

// Of a problem's rows, its chunks' sums (chunks, m) put together: to (m,) = a - T 1, value +=
// a.alpha.
template <class T, class G>
struct FinishRows {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* a, const T* alpha, const double* row_sums, int64_t m,
                                 int64_t chunks, G* to, double* value) {
    constexpr int kWidth = kLanes<double, isa>, kStep = 4 * kWidth;
    Vec<double, isa> products[4] = {};
    int64_t i = 0;
    for (; i + kStep <= m; i += kStep) {
      for (int u = 0; u < 4; ++u) {
        const int64_t at = i + u * kWidth;
        const Vec<double, isa> mass = load_as<double, isa>(a + at);
        Vec<double, isa> sum = load<double, isa>(row_sums + at);
        for (int64_t c = 1; c < chunks; ++c) sum += load<double, isa>(row_sums + c * m + at);
        store_from_double<G, isa>(to + at, mass - sum);
        products[u] += mass * load_as<double, isa>(alpha + at);
      }
    }
    *value += sum_lanes<double, isa>((products[0] + products[1]) + (products[2] + products[3]));
    for (; i < m; ++i) {
      double sum = row_sums[i];
      for (int64_t c = 1; c < chunks; ++c) sum += row_sums[c * m + i];
      to[i] = static_cast<G>(a[i] - sum);
      *value += static_cast<double>(a[i]) * alpha[i];
    }
  }
};

// One problem's chunks put together, in their order: obj, a - T 1 (m,), and b - T^T 1 or beta (n,).
template <class T, class G>
void finish(const Options& options, const T* alpha, const T* beta, const T* a, const T* b,
            const T* found, const double* row_sums, const double* values, int64_t chunks, G* obj,
            G* grad_alpha, G* column) {
  double value = 0;
  run_on_isa<FinishRows<T, G>>(a, alpha, row_sums, options.m, chunks, grad_alpha, &value);
  for (int64_t c = 0; c < chunks; ++c) value -= values[c];
  for (int64_t j = 0; j < options.n; ++j) {
    if (options.dual) {
      value += static_cast<double>(b[j]) * beta[j];
      column[j] = static_cast<G>(b[j] - found[j]);
    } else if (options.reg == Reg::kNegentropy) {
      const double gamma = options.gamma;
      column[j] = static_cast<G>(gamma + gamma * std::log(static_cast<double>(b[j])) - found[j]);
    } else {
      column[j] = -found[j];
    }
  }
  *obj = static_cast<G>(value);
}

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
  const auto found_of = [&](int64_t problem) {
    return PerColumn<T>{scratch.column.data() + problem * n, level ? level + problem * n : nullptr,
                        tied ? tied + problem * n : nullptr};
  };
  // A thread takes neighbouring chunks at once where that lets it read on: the sums are the same.
  const int64_t together =
      listed_in_one_pass(options) ? (chunks + std::max(threads, 1) - 1) / std::max(threads, 1) : 1;
  const int64_t spans = (chunks + together - 1) / together;
  parallel_for(batch * spans, threads, [&](int64_t item) {
    const int64_t problem = item / spans, chunk = item % spans * together;
    const int64_t begin = chunk * width, end = std::min(n, begin + together * width);
    double* const sums = scratch.row_sums.data() + (problem * chunks + chunk) * m;
    double* const value = scratch.values.data() + problem * chunks + chunk;
    const T* const a_row = alpha + problem * m;
    const T* const shift = beta ? beta + problem * n : nullptr;
    const Cost<C> own = cost.at(problem, m * n);
    if (listed_in_one_pass(options)) {
      evaluate_listed<T, C>(options, a_row, shift, b + problem * n, own, begin, end, width, sums,
                            value, found_of(problem));
    } else if (is_open(options)) {
      *value = evaluate_open<T, C>(options, a_row, shift, own, begin, end, sums, found_of(problem));
    } else {
      *value = evaluate_columns<T, C>(options, a_row, shift, b + problem * n, own, begin, end, sums,
                                      found_of(problem), [](const Tile<T>&, int64_t, int64_t) {});
    }
  });
  for (int64_t p = 0; p < batch; ++p) {
    finish(options, alpha + p * m, beta ? beta + p * n : nullptr, a + p * m, b + p * n,
           scratch.column.data() + p * n, scratch.row_sums.data() + p * chunks * m,
           scratch.values.data() + p * chunks, chunks, obj + p, grad_alpha + p * m, column + p * n);
  }
}

}  // namespace dashpot::transport
