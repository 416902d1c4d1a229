// A whole solve of one problem by one block; solve.h is the CPU's form.
//
// The potentials and the solver's vectors are doubles in global memory, where an element belongs to
// one thread of the block, so that loops over vectors need no barrier; sums over them are the same
// bits in every thread, so that control flow is uniform. The cost lies in shared memory where it
// fits and is read from global memory (the L2 cache) where not; alpha, beta, the masses and the row
// sums of an evaluation are in shared memory in the state's type.
#pragma once

#include "transport/evaluate.cuh"
#include "transport/solvers.h"

namespace dashpot::transport {
namespace {

// The solver's vectors: loops and sums by the threads of a block.
struct BlockVectors {
  Team<double, 1>& team;

  template <class Visit>
  __device__ void each(int64_t n, Visit visit) const {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) visit(i);
  }
  template <class Term>
  __device__ double sum(int64_t n, Term term) const {
    double mine = 0;
    each(n, [&](int64_t i) { mine += term(i); });
    return team.all({mine, 0}, Sum{}).first;
  }
  template <class Term>
  __device__ double max(int64_t n, Term term) const {
    double mine = 0;
    each(n, [&](int64_t i) { mine = Max{}(mine, static_cast<double>(term(i))); });
    return team.all({mine, 0}, Max{}).first;
  }
  __device__ double dot(const double* x, const double* y, int64_t n) const {
    return sum(n, [&](int64_t i) { return x[i] * y[i]; });
  }
  __device__ void add_scaled(double* to, const double* x, double factor, const double* y,
                             int64_t n) const {
    each(n, [&](int64_t i) { to[i] = x[i] + factor * y[i]; });
  }
  __device__ void scale(double* x, double factor, int64_t n) const {
    each(n, [&](int64_t i) { x[i] *= factor; });
  }
  __device__ void copy(const double* from, int64_t n, double* to) const {
    each(n, [&](int64_t i) { to[i] = from[i]; });
  }
  // After it every thread may read what another one's loop has written.
  __device__ void meet() const { __syncthreads(); }
};

// Where a block keeps a problem; cost may be in global memory, the rest is in shared memory.
template <class T, class C>
struct BlockProblem {
  const C* cost;
  int64_t row, column;        // strides of cost
  T *alpha, *a, *row_sums;    // (m,)
  T *beta, *b, *level, *out;  // (n,); out: theta, or the column sums of T (dual)
  int* tied;                  // (n,)
  T* scores;  // (m, kColumns) of a tile, where cost is not in shared memory; or null

  __device__ bool open(int64_t i, int64_t j) const {
    return device_cast<T>(cost[i * row + j * column]) < -lowest<T>();
  }
};

// Minus the dual or semi-dual of alpha, or (alpha, beta), and its gradient; see solvers.h.
template <class T, class C, int L>
class BlockFunction {
 public:
  static constexpr int kColumns = kColumnsOf<C>;
  using TileLists = Lists<T, kColumns, L ? L : 1>;

  double noise = sizeof(T) == 8 ? 1e-14 : 1e-7;  // rounding of a value, relative
  double scale = 0;
  int64_t evaluations = 0;

  __device__ BlockFunction(const Options& options, const BlockProblem<T, C>& problem,
                           Team<T, kColumns>& columns, BlockVectors& vectors, TileLists* lists)
      : options_(options), problem_(problem), columns_(columns), vectors_(vectors), lists_(lists) {
    mass_ = vectors.sum(options.m, [&](int64_t i) { return problem.a[i]; });
    scale = options.gamma / fmax(1e-300, options.reg == Reg::kNegentropy ? mass_ / options.m : 1.0);
  }

  __device__ int64_t size() const { return options_.m + (options_.dual ? options_.n : 0); }
  __device__ double a(int64_t i) const { return problem_.a[i]; }
  __device__ double b(int64_t j) const { return problem_.b[j]; }

  __device__ void smooth(double mu) {
    options_.smoothing = mu;
    vectors_.each(options_.n, [&](int64_t j) { problem_.level[j] = 0; });
  }

  __device__ __noinline__ double operator()(const double* x, double* g) {
    const double value = evaluate(x);
    const int64_t m = options_.m;
    vectors_.each(m, [&](int64_t i) { g[i] = problem_.row_sums[i] - problem_.a[i]; });
    if (options_.dual) {
      vectors_.each(options_.n, [&](int64_t j) { g[m + j] = problem_.out[j] - problem_.b[j]; });
      vectors_.meet();  // element m + j of a vector belongs to another thread than element j
    }
    return -value;
  }

  // The larger of the marginals' errors, L1, per unit of mass.
  __device__ double error(const double* g) const {
    const double rows = vectors_.sum(options_.m, [&](int64_t i) { return fabs(g[i]); });
    const double columns = vectors_.sum(options_.dual ? options_.n : 0,
                                        [&](int64_t j) { return fabs(g[options_.m + j]); });
    return fmax(rows, columns) / fmax(mass_, 1e-300);
  }

  // The eliminated potential of a column, of the last evaluation of the semi-dual.
  __device__ double beta(int64_t j) const {
    const double found = problem_.out[j], gamma = options_.gamma;
    if (options_.reg != Reg::kNegentropy) return -found;
    return gamma + gamma * log(static_cast<double>(problem_.b[j])) - found;
  }

  // What Newton's method asks of the l2 dual, see newton.h.
  __device__ void soften(double gamma) { options_.gamma = gamma; }
  __device__ double spread(double* least) const {
    Pair<double> ends{-INFINITY, -INFINITY};  // minus the smallest, the largest
    vectors_.each(options_.m, [&](int64_t i) {
      double lowest = INFINITY;
      for (int64_t j = 0; j < options_.n; ++j) {
        const double cost = device_cast<T>(problem_.cost[i * problem_.row + j * problem_.column]);
        lowest = fmin(lowest, cost);
        ends.second = Max{}(ends.second, cost < INFINITY ? cost : -INFINITY);
      }
      ends.first = Max{}(ends.first, -lowest);
      least[i] = lowest < INFINITY ? lowest : 0.0;
    });
    ends = vectors_.team.all(ends, Max{});
    return ends.first + ends.second > 0 ? ends.first + ends.second : 0.0;
  }
  __device__ __noinline__ void eliminate(double* x) {
    options_.dual = false;
    evaluate(x);
    vectors_.each(options_.n, [&](int64_t j) {
      const double found = beta(j);
      x[options_.m + j] = fabs(found) < INFINITY ? found : 0.0;
    });
    options_.dual = true;
  }
  // Counts take the places of the evaluation's sums, which the gradient has taken up.
  __device__ __noinline__ void hold() {
    const int64_t m = options_.m, n = options_.n;
    __syncthreads();
    vectors_.each(m, [&](int64_t i) {
      T count = 0;
      for (int64_t j = 0; j < n; ++j) count += holds(i, j) ? T(1) : T(0);
      problem_.row_sums[i] = count;
    });
    over_columns([](int64_t) { return T(1); }, problem_.out);
  }
  __device__ double row(int64_t i) const { return problem_.row_sums[i]; }
  __device__ double column(int64_t j) const { return problem_.out[j]; }
  __device__ __noinline__ void to_rows(const double* v, double* to) const {
    __syncthreads();
    vectors_.each(options_.m, [&](int64_t i) {
      double sum = 0;
      for (int64_t j = 0; j < options_.n; ++j) sum += holds(i, j) ? v[j] : 0.0;
      to[i] = sum;
    });
  }
  __device__ __noinline__ void to_columns(const double* u, double* to) const {
    __syncthreads();
    over_columns([&](int64_t i) { return static_cast<T>(u[i]); }, to);
  }
  __device__ bool solve(double, bool, double*) const { return false; }  // conjugate gradients

  // Value, errors, gap and ties at x; beta (n,) too. The last evaluation of a solve.
  __device__ __noinline__ Report report(const double* x, double tol, double* to_beta) {
    const int64_t m = options_.m, n = options_.n;
    Report found{};
    options_.tie = tol;
    found.value = evaluate(x);
    options_.tie = -1;
    const auto row_gap = [&](int64_t i) {
      return static_cast<double>(problem_.a[i]) - problem_.row_sums[i];
    };
    const auto column_gap = [&](int64_t j) -> double {
      const double b = problem_.b[j];
      if (options_.dual) return b - problem_.out[j];
      // theta = -inf: no row can be chosen; the mass stays away
      return fabs(static_cast<double>(problem_.out[j])) < INFINITY || !(b > 0) ? 0.0 : b;
    };
    vectors_.each(n, [&](int64_t j) { to_beta[j] = options_.dual ? x[m + j] : beta(j); });
    found.row_l1 = vectors_.sum(m, [&](int64_t i) { return fabs(row_gap(i)); });
    found.row_max = vectors_.max(m, [&](int64_t i) { return fabs(row_gap(i)); });
    found.col_l1 = vectors_.sum(n, [&](int64_t j) { return fabs(column_gap(j)); });
    found.col_max = vectors_.max(n, [&](int64_t j) { return fabs(column_gap(j)); });
    found.gap = -vectors_.sum(m, [&](int64_t i) { return problem_.alpha[i] * row_gap(i); });
    if (options_.dual) {
      found.gap -= vectors_.sum(n, [&](int64_t j) { return problem_.beta[j] * column_gap(j); });
    } else if (found.col_l1 > 0) {
      found.status = kInfeasible;
    }
    found.tied = static_cast<int>(
        vectors_.sum(n, [&](int64_t j) { return static_cast<double>(problem_.tied[j]); }));
    // Rows with mass and no admissible pair, or more rows with mass than places: no plan exists.
    const double rows = vectors_.sum(m, [&](int64_t i) { return problem_.a[i] > 0 ? 1.0 : 0.0; });
    const double shut = vectors_.sum(m, [&](int64_t i) {
      bool open = !(problem_.a[i] > 0);
      for (int64_t j = 0; j < n && !open; ++j) open = problem_.open(i, j);
      return open ? 0.0 : 1.0;
    });
    if (shut > 0 || static_cast<double>(n) * options_.k < rows) found.status = kInfeasible;
    return found;
  }

 private:
  // Whether the plan of the last evaluation (l2, dual) holds the pair.
  __device__ bool holds(int64_t i, int64_t j) const {
    const T cost = device_cast<T>(problem_.cost[i * problem_.row + j * problem_.column]);
    return (problem_.alpha[i] + problem_.beta[j]) - cost > 0;
  }

  // to (n,): sums of number(i) over the rows that the plan holds of each column.
  template <class Number, class To>
  __device__ void over_columns(Number number, To* to) const {
    for (int64_t first = 0; first < options_.n; first += kColumns) {
      const int64_t j = first + columns_.column();
      Pair<T> mine{0, 0};
      for (int64_t i = columns_.lane(); i < options_.m && j < options_.n; i += columns_.lanes()) {
        mine.first += holds(i, j) ? number(i) : T(0);
      }
      const T sum = columns_.all(mine, Sum{}).first;
      if (columns_.lane() == 0 && j < options_.n) to[j] = sum;
    }
    __syncthreads();
  }

  // The objective; leaves row sums and what is found of the columns in the problem.
  __device__ __noinline__ double evaluate(const double* x) {
    using Form = Gain<T, StoredColumn<T, C>>;
    const int64_t m = options_.m, n = options_.n;
    const bool dual = options_.dual;
    __syncthreads();  // the last evaluation's readers are done
    vectors_.each(m, [&](int64_t i) { problem_.alpha[i] = static_cast<T>(x[i]); });
    if (dual) vectors_.each(n, [&](int64_t j) { problem_.beta[j] = static_cast<T>(x[m + j]); });
    __syncthreads();
    double value = 0;
    for (int64_t first = 0; first < n; first += kColumns) {
      const int64_t j = first + columns_.column();
      const bool live = j < n;
      const Scores<T, kColumns, Form> scores{
          {problem_.alpha,
           live && dual ? problem_.beta[j] : T(0),
           {problem_.cost + j * problem_.column, problem_.row},
           live},
          problem_.scores ? problem_.scores + columns_.column() : nullptr};
      const T mass = live ? problem_.b[j] : T(0);
      T level = live ? problem_.level[j] : T(0);
      const ColumnSums<T> found =
          options_.smoothing > 0
              ? solve_smoothed(columns_, scores, options_, level, problem_.row_sums, first > 0)
              : solve_column<L>(columns_, scores, lists_, options_, mass, problem_.row_sums,
                                first > 0);
      const bool tied = options_.tie >= 0 && is_tied(scores, found);
      if (columns_.lane() > 0 || !live) continue;
      problem_.out[j] = dual ? found.sum : found.theta;
      problem_.level[j] = level;
      problem_.tied[j] = tied;
      value -= found.value;
    }
    __syncthreads();
    vectors_.each(
        m, [&](int64_t i) { value += static_cast<double>(problem_.a[i]) * problem_.alpha[i]; });
    if (dual) {
      vectors_.each(
          n, [&](int64_t j) { value += static_cast<double>(problem_.b[j]) * problem_.beta[j]; });
    }
    ++evaluations;
    return vectors_.team.all({value, 0}, Sum{}).first;
  }

  // Whether the lowest chosen and the highest score left out tie, this one above theta too.
  template <class Form>
  __device__ bool is_tied(const Scores<T, kColumns, Form>& scores, const ColumnSums<T>& column) {
    if (options_.reg != Reg::kSparse || options_.k >= options_.m) return false;
    Pair<T> mine{lowest<T>(), lowest<T>()};  // minus the lowest chosen, the highest left out
    for (int64_t i = columns_.lane(); i < options_.m; i += columns_.lanes()) {
      const T score = scores.at(i);
      T& most = column.found.has(i, score) ? mine.first : mine.second;
      const T value = column.found.has(i, score) ? -score : score;
      most = value > most ? value : most;
    }
    const Pair<T> ends = columns_.all(mine, Max{});
    const T last = -ends.first, size = last > 0 ? last : -last;
    const T reach = static_cast<T>(options_.tie) * (size > 1 ? size : T(1));
    return ends.second > column.found.theta && last - ends.second <= reach;
  }

  Options options_;
  BlockProblem<T, C> problem_;
  Team<T, kColumns>& columns_;
  BlockVectors& vectors_;
  TileLists* lists_;
  double mass_ = 0;
};

}  // namespace
}  // namespace dashpot::transport
