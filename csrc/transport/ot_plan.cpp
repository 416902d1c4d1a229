// ot_plan: cost (B, m, n), or (B, n, m) with by_rows, or x (B, m, d) with y (B, n, d), b, beta
// (B, n), alpha (B, m) -> rows, values (B, k, n): each column's nonzeros, descending, -1 and 0
// beyond them. One read of the cost: the columns' thresholds (columns.h), then the scores above
// them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "common/bind.h"
#include "transport/cuda_binding.h"
#include "transport/evaluate.h"
#include "transport/points.h"

namespace dashpot::transport {
namespace {

// to[i]: how many of v (count,) are higher than v[i]; both with room for whole vectors.
template <class T>
struct CountHigher {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* v, int64_t count, T* to) {
    constexpr int kWidth = kLanes<T, isa>;
    const Vec<T, isa> zero = {}, one = zero + T(1);
    for (int64_t i = 0; i < count; i += kWidth) {
      const Vec<T, isa> own = load<T, isa>(v + i);
      Vec<T, isa> higher = zero;
      for (int64_t j = 0; j < count; ++j) higher += zero + v[j] > own ? one : zero;
      store<T, isa>(to + i, higher);
    }
  }
};

inline constexpr int64_t kRanked = 256;  // entries up to which counting beats sorting

// Room to put a column in order.
template <class T>
struct Order {
  std::vector<int32_t> rows;
  std::vector<T> scores, places;
  explicit Order(int64_t m) : rows(m + 1), scores(m + kMaxLanes), places(m + kMaxLanes) {}
};

// Column `lane` of a solved tile into rows, values (k,), n apart.
template <class T>
void write_column(const Options& options, const Tile<T>& tile, int64_t lane, int64_t lanes,
                  Order<T>& order, int32_t* rows, T* values) {
  const int64_t m = options.m, n = options.n, k = options.k;
  const T theta = tile.theta[lane], bound = tile.bound[lane], gamma = tile.gamma;
  const auto score = [&](int32_t i) { return tile.scores[i * lanes + lane]; };
  if (options.reg == Reg::kNegentropy) {
    const bool open = options.dual || (tile.mass[lane] > 0 && std::isfinite(theta));
    for (int64_t i = 0; i < m; ++i) {
      rows[i * n] = static_cast<int32_t>(i);
      values[i * n] = options.dual ? std::exp(score(i) / gamma - 1)
                      : open       ? tile.mass[lane] * std::exp((score(i) - theta) / gamma)
                                   : T(0);
    }
    return;
  }
  int32_t* const chosen = order.rows.data();
  int64_t count = 0;
  // Chosen are scores above theta, from the bound on.
  const T least = bound > theta ? bound : std::nextafter(theta, std::numeric_limits<T>::infinity());
  const T* const own = tile.scores + lane;
  for (int32_t i = 0; i < m; ++i) {  // without a branch: which are chosen follows no pattern
    chosen[count] = i;
    count += own[i * lanes] >= least;
  }
  const auto before = [&](int32_t i, int32_t j) {
    return score(i) > score(j) || (score(i) == score(j) && i < j);
  };
  if (count > k) {  // tied for the last: the first rows
    std::nth_element(chosen, chosen + k, chosen + count, before);
    std::sort(chosen, chosen + k);
    count = k;
  }
  const auto write = [&](int64_t q, int32_t i) {
    rows[q * n] = i;
    values[q * n] = (score(i) - theta) / gamma;
  };
  for (int64_t q = 0; q < k; ++q) rows[q * n] = -1;
  for (int64_t q = count; q < k; ++q) values[q * n] = 0;
  if (count > kRanked) {
    std::sort(chosen, chosen + count, before);
    for (int64_t q = 0; q < count; ++q) write(q, chosen[q]);
    return;
  }
  T* const scores = order.scores.data();
  for (int64_t q = 0; q < count; ++q) scores[q] = score(chosen[q]);
  run_on_isa<CountHigher<T>>(static_cast<const T*>(scores), count, order.places.data());
  for (int64_t q = 0; q < count; ++q) {
    int64_t place = static_cast<int64_t>(order.places[q]);
    while (rows[place * n] >= 0) ++place;  // of equal scores the first rows first
    write(place, chosen[q]);
  }
}

// Columns [begin, end) of one problem's plan into rows, values (k, n).
template <class T, class C>
void plan_chunk(const Options& options, const T* alpha, const T* beta, const T* b,
                const Cost<C>& cost, int64_t begin, int64_t end, int32_t* rows, T* values) {
  const int64_t lanes = vector_bytes(isa()) / sizeof(T);
  static thread_local std::vector<double> row_sums;
  static thread_local std::vector<T> column;
  row_sums.resize(options.m);
  column.resize(options.n);
  Order<T> order(options.m);
  const auto write = [&](const Tile<T>& tile, int64_t first, int64_t count) {
    for (int64_t lane = 0; lane < count; ++lane) {
      write_column<T>(options, tile, lane, lanes, order, rows + first + lane,
                      values + first + lane);
    }
  };
  evaluate_columns<T, C>(options, alpha, beta, b, cost, begin, end, row_sums.data(),
                         PerColumn<T>{column.data(), nullptr, nullptr}, write);
}

std::tuple<Tensor, Tensor> ot_plan_forward(const Tensor& cost, const Tensor& b, const Tensor& alpha,
                                           const Tensor& beta, bool by_rows, const std::string& reg,
                                           double gamma, int64_t max_nz,
                                           const std::string& formulation,
                                           const std::optional<Tensor>& y,
                                           const std::string& metric) {
  const int64_t batch = cost.size(0), m = alpha.size(1), n = b.size(1);
  const Options options{m, n, max_nz, gamma, reg_of(reg), formulation == "dual"};
  const std::tuple<Tensor, Tensor> out{b.new_empty({batch, max_nz, n}, Dtype::kInt32),
                                       b.new_empty({batch, max_nz, n}, b.dtype)};
  const auto& [rows, values] = out;
  const int threads = num_threads();
  with_cost(cost, y, metric, m, n, by_rows, false, [&](const auto& all) {
    using C = typename std::decay_t<decltype(all)>::Element;
    using T = StateOf<C>;
    const int64_t width = columns_per_chunk(n), chunks = (n + width - 1) / width;
    parallel_for(batch * chunks, threads, [&](int64_t item) {
      const int64_t p = item / chunks, begin = item % chunks * width;
      plan_chunk<T, C>(options, alpha.as<T>() + p * m,
                       options.dual ? beta.as<T>() + p * n : nullptr, b.as<T>() + p * n,
                       all.at(p, m * n), begin, std::min(n, begin + width),
                       rows.as<int32_t>() + p * max_nz * n, values.as<T>() + p * max_nz * n);
    });
  });
  return out;
}

std::optional<std::string> ot_plan_supports(const py::args& args) {
  return cannot_take(py::cast<Tensor>(args[0]), py::cast<std::optional<Tensor>>(args[9]),
                     py::cast<Tensor>(args[2]).size(1));
}

#ifdef DASHPOT_CUDA
std::tuple<Tensor, Tensor> ot_plan_forward_cuda(const Tensor& cost, const Tensor& b,
                                                const Tensor& alpha, const Tensor& beta,
                                                bool by_rows, const std::string& reg, double gamma,
                                                int64_t max_nz, const std::string& formulation,
                                                const std::optional<Tensor>& y,
                                                const std::string& metric) {
  const int64_t batch = alpha.size(0), m = alpha.size(1), n = b.size(1);
  const bool dual = formulation == "dual";
  const Tensor rows = b.new_empty({batch, max_nz, n}, Dtype::kInt32);
  const Tensor values = b.new_empty({batch, max_nz, n}, b.dtype);
  const Place place = place_of(b);
  plan_cuda({{m, n, max_nz, gamma, reg_of(reg), dual},
             batch,
             cost_on_device(cost, by_rows, y, metric_of(metric)),
             alpha.data,
             dual ? beta.data : nullptr,
             b.data,
             rows.as<int32_t>(),
             values.data},
            place.device, place.stream);
  return {rows, values};
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("ot_plan_forward", &ot_plan_forward);
  m.def("ot_plan_supports", &ot_plan_supports);
#ifdef DASHPOT_CUDA
  m.def("ot_plan_forward_cuda", &ot_plan_forward_cuda);
  m.def("ot_plan_supports_cuda", &ot_plan_supports);
#endif
}

}  // namespace dashpot::transport
