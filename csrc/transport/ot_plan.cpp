// ot_plan: cost (B, m, n), or (B, n, m) with by_rows, or x (B, m, d) with y (B, n, d), b, beta
// (B, n), alpha (B, m) -> rows, values (B, k, n): each column's nonzeros, descending, -1 and 0
// beyond them. One read of the cost: the columns' thresholds (columns.h), then the scores above
// them.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "common/bind.h"
#include "transport/cuda_binding.h"
#include "transport/evaluate.h"
#include "transport/points.h"

namespace dashpot::transport {
namespace {

// Column `lane` of a solved tile into rows, values (k,), n apart.
template <class T>
void write_column(const Options& options, const Tile<T>& tile, int64_t lane, int64_t lanes,
                  std::vector<int32_t>& order, int32_t* rows, T* values) {
  const int64_t m = options.m, n = options.n, k = options.k;
  const T theta = tile.theta[lane], gamma = tile.gamma;
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
  order.clear();
  for (int64_t i = 0; i < m; ++i) {
    if (score(i) > theta) order.push_back(static_cast<int32_t>(i));
  }
  const auto before = [&](int32_t i, int32_t j) {
    return score(i) > score(j) || (score(i) == score(j) && i < j);
  };
  if (static_cast<int64_t>(order.size()) > k) {
    std::nth_element(order.begin(), order.begin() + k, order.end(), before);
    order.resize(k);
  }
  std::sort(order.begin(), order.end(), before);
  for (int64_t q = 0; q < k; ++q) {
    const bool filled = q < static_cast<int64_t>(order.size());
    rows[q * n] = filled ? order[q] : -1;
    values[q * n] = filled ? (score(order[q]) - theta) / gamma : T(0);
  }
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
    const int64_t lanes = vector_bytes(isa()) / sizeof(T);
    parallel_for(batch * chunks, threads, [&](int64_t item) {
      const int64_t p = item / chunks, begin = item % chunks * width;
      std::vector<double> row_sums(m);
      std::vector<T> column(n);
      std::vector<int32_t> order;
      evaluate_columns<T, C>(options, alpha.as<T>() + p * m,
                             options.dual ? beta.as<T>() + p * n : nullptr, b.as<T>() + p * n,
                             all.at(p, m * n), begin, std::min(n, begin + width), row_sums.data(),
                             PerColumn<T>{column.data(), nullptr, nullptr},
                             [&](const Tile<T>& tile, int64_t first, int64_t count) {
                               for (int64_t lane = 0; lane < count; ++lane) {
                                 const int64_t at = p * max_nz * n + first + lane;
                                 write_column<T>(options, tile, lane, lanes, order,
                                                 rows.as<int32_t>() + at, values.as<T>() + at);
                               }
                             });
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
