// load_balancing_loss: E sum_e f_e P_e, logits (T, E), ids (T, k) int32; also the shares f (E,).
//
// Blocks of rows sum the probabilities in float64 (E,) each; blocks are added in order. Backward:
// dz_te = (E/T) p_te (f_e - sum_i f_i p_ti), the softmax made again.
#include <tuple>
#include <vector>

#include "common/bind.h"
#include "common/tensor.h"
#include "experts/router.h"

namespace dashpot::experts {
namespace {

// sums (E,) += softmax of rows [begin, end).
template <class T>
struct ProbabilitySums {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* logits, int64_t n, int64_t begin, int64_t end, Wide<T>* e,
                                 double* sums) {
    for (int64_t t = begin; t < end; ++t) {
      const auto [most, total] = row_exp<isa>(logits + t * n, n, e);
      (void)most;
      const double inverse = 1 / static_cast<double>(total);
      for (int64_t c = 0; c < n; ++c) sums[c] += static_cast<double>(e[c]) * inverse;
    }
  }
};

template <class T>
struct BalanceGradient {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* logits, const Wide<T>* share, int64_t n, int64_t begin,
                                 int64_t end, double scale, Wide<T>* e, T* grad) {
    using W = Wide<T>;
    constexpr int64_t kStep = kLanes<W, isa>;
    for (int64_t t = begin; t < end; ++t) {
      const auto [most, total] = row_exp<isa>(logits + t * n, n, e);
      (void)most;
      Vec<W, isa> dot{};
      for (int64_t c = 0; c < n; c += kStep) {
        dot += load<W, isa>(e + c) * load<W, isa>(share + c);
      }
      const double inverse = 1 / static_cast<double>(total);
      const W mean = static_cast<W>(sum_lanes<W, isa>(dot) * inverse);
      const W factor = static_cast<W>(scale * inverse);
      for (int64_t c = 0; c < n; c += kStep) {
        const Vec<W, isa> value = load<W, isa>(e + c) * factor * (load<W, isa>(share + c) - mean);
        store_part<isa>(grad + t * n + c, value, n - c);
      }
    }
  }
};

std::tuple<Tensor, Tensor> load_balancing_loss_forward(const Tensor& logits, const Tensor& ids) {
  const int64_t rows = logits.size(0), n = logits.size(1);
  const Dtype type = logits.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const std::tuple<Tensor, Tensor> out{logits.new_empty({}, type), logits.new_empty({n}, type)};
  const auto& [loss, share] = out;
  if (ids.dtype != Dtype::kInt32) throw std::invalid_argument("expert_idx: expected int32");
  const int threads = num_threads();
  const py::gil_scoped_release release;
  std::vector<int64_t> counts(n);
  for (int64_t i = 0; i < ids.numel; ++i) {
    const uint32_t id = static_cast<uint32_t>(ids.as<int32_t>()[i]);
    if (id < n) ++counts[id];
  }
  std::vector<double> sums(router_blocks(rows) * n);
  const double choices = static_cast<double>(std::max<int64_t>(1, ids.numel));
  dispatch_floating(logits.dtype, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    for_router_blocks(rows, threads, [&](int64_t block, int64_t begin, int64_t end) {
      std::vector<W> e(padded<W>(n));
      run_on_isa<ProbabilitySums<T>>(static_cast<const T*>(logits.as<T>()), n, begin, end, e.data(),
                                     sums.data() + block * n);
    });
    double total = 0;
    for (int64_t c = 0; c < n; ++c) {
      double sum = 0;
      for (int64_t block = 0; block < router_blocks(rows); ++block) sum += sums[block * n + c];
      const double part = static_cast<double>(counts[c]) / choices;
      share.as<W>()[c] = static_cast<W>(part);
      total += part * sum;
    }
    *loss.as<W>() = static_cast<W>(total * n / static_cast<double>(std::max<int64_t>(1, rows)));
  });
  return out;
}

Tensor load_balancing_loss_backward(const Tensor& grad_loss, const Tensor& logits,
                                    const Tensor& share) {
  const int64_t rows = logits.size(0), n = logits.size(1);
  const Tensor grad = logits.new_empty({rows, n}, logits.dtype);
  const int threads = num_threads();
  const py::gil_scoped_release release;
  dispatch_floating(logits.dtype, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const double scale = static_cast<double>(*grad_loss.as<W>()) * n /
                         static_cast<double>(std::max<int64_t>(1, rows));
    std::vector<W> shares(padded<W>(n));
    std::copy(share.as<W>(), share.as<W>() + n, shares.begin());
    for_router_blocks(rows, threads, [&](int64_t, int64_t begin, int64_t end) {
      std::vector<W> e(padded<W>(n));
      run_on_isa<BalanceGradient<T>>(static_cast<const T*>(logits.as<T>()),
                                     static_cast<const W*>(shares.data()), n, begin, end, scale,
                                     e.data(), grad.as<T>());
    });
  });
  return grad;
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("load_balancing_loss_forward", &load_balancing_loss_forward);
  m.def("load_balancing_loss_backward", &load_balancing_loss_backward);
}

}  // namespace dashpot::experts
