// topk_gate: the k largest of each row of logits (T, E), ties to the lower id, NaN the largest, and
// the softmax there, over all E or over the k.
//
// k passes over a row in the L1 cache: the largest after the last chosen in the order (falling
// value, rising id). Backward: dz = p (dp - <p, dp>).
#include <limits>
#include <tuple>
#include <vector>

#include "common/bind.h"
#include "common/tensor.h"
#include "experts/router.h"

namespace dashpot::experts {
namespace {

template <class T>
struct GateRows {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* logits, int64_t n, int64_t k, bool normalize,
                                 int64_t begin, int64_t end, Wide<T>* e, Wide<T>* z, int32_t* idx,
                                 Wide<T>* weights) {
    using W = Wide<T>;
    constexpr W kMost = std::numeric_limits<W>::infinity();
    for (int64_t t = begin; t < end; ++t) {
      const T* row = logits + t * n;
      for (int64_t c = 0; c < n; ++c) {
        const W value = convert<W>(row[c]);
        z[c] = value == value ? value : kMost;
      }
      int32_t* chosen = idx + t * k;
      for (int64_t j = 0; j < k; ++j) {
        int64_t best = -1;
        for (int64_t c = 0; c < n; ++c) {
          const bool after =
              j == 0 || z[c] < z[chosen[j - 1]] || (z[c] == z[chosen[j - 1]] && c > chosen[j - 1]);
          if (after && (best < 0 || z[c] > z[best])) best = c;
        }
        chosen[j] = static_cast<int32_t>(best);
      }
      const auto [most, total] = row_exp<isa>(row, n, e);
      (void)most;
      W sum = total;
      if (normalize) {
        // Against the largest chosen logit, as a softmax of its own: no weight underflows to 0/0.
        sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += e[chosen[j]];
      }
      for (int64_t j = 0; j < k; ++j) weights[t * k + j] = e[chosen[j]] / sum;
    }
  }
};

template <class T>
struct GateGradient {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* logits, const int32_t* idx, const Wide<T>* grad_weights,
                                 int64_t n, int64_t k, bool normalize, int64_t begin, int64_t end,
                                 Wide<T>* e, Wide<T>* dp, T* grad) {
    using W = Wide<T>;
    constexpr int64_t kStep = kLanes<W, isa>;
    for (int64_t t = begin; t < end; ++t) {
      auto [most, total] = row_exp<isa>(logits + t * n, n, e);
      (void)most;
      const int32_t* chosen = idx + t * k;
      const W* incoming = grad_weights + t * k;
      std::fill(dp, dp + padded<W>(n), W(0));
      W chosen_sum = 0, dot = 0;
      for (int64_t j = 0; j < k; ++j) {
        dp[chosen[j]] = incoming[j];
        chosen_sum += e[chosen[j]];
        dot += e[chosen[j]] * incoming[j];
      }
      if (normalize) {
        total = chosen_sum;
        std::fill(grad + t * n, grad + (t + 1) * n, convert<T>(W(0)));
        for (int64_t j = 0; j < k; ++j) {
          const W value = e[chosen[j]] / total * (incoming[j] - dot / total);
          grad[t * n + chosen[j]] = convert<T>(value);
        }
        continue;
      }
      const W mean = dot / total, inverse = 1 / total;
      for (int64_t c = 0; c < n; c += kStep) {
        const Vec<W, isa> value = load<W, isa>(e + c) * inverse * (load<W, isa>(dp + c) - mean);
        store_part<isa>(grad + t * n + c, value, n - c);
      }
    }
  }
};

std::tuple<Tensor, Tensor> topk_gate_forward(const Tensor& logits, int64_t k, bool normalize) {
  const int64_t rows = logits.size(0), n = logits.size(1);
  const Dtype type = logits.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const std::tuple<Tensor, Tensor> out{logits.new_empty({rows, k}, Dtype::kInt32),
                                       logits.new_empty({rows, k}, type)};
  const auto& [idx, weights] = out;
  const int threads = num_threads();
  const py::gil_scoped_release release;
  dispatch_floating(logits.dtype, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    for_router_blocks(rows, threads, [&](int64_t, int64_t begin, int64_t end) {
      std::vector<W> e(padded<W>(n)), z(n);
      run_on_isa<GateRows<T>>(static_cast<const T*>(logits.as<T>()), n, k, normalize, begin, end,
                              e.data(), z.data(), idx.as<int32_t>(), weights.as<W>());
    });
  });
  return out;
}

Tensor topk_gate_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& idx,
                          bool normalize) {
  const int64_t rows = logits.size(0), n = logits.size(1), k = idx.size(1);
  const Tensor grad = logits.new_empty({rows, n}, logits.dtype);
  const int threads = num_threads();
  const py::gil_scoped_release release;
  dispatch_floating(logits.dtype, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    for_router_blocks(rows, threads, [&](int64_t, int64_t begin, int64_t end) {
      std::vector<W> e(padded<W>(n)), dp(padded<W>(n));
      run_on_isa<GateGradient<T>>(static_cast<const T*>(logits.as<T>()),
                                  static_cast<const int32_t*>(idx.as<int32_t>()),
                                  static_cast<const W*>(grad_weights.as<W>()), n, k, normalize,
                                  begin, end, e.data(), dp.data(), grad.as<T>());
    });
  });
  return grad;
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("topk_gate_forward", &topk_gate_forward);
  m.def("topk_gate_backward", &topk_gate_backward);
}

}  // namespace dashpot::experts
