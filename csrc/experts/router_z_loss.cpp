// router_z_loss: mean_t lse(z_t)^2 of logits (T, E); backward: dz_te = (2/T) lse_t p_te.
#include <vector>

#include "common/bind.h"
#include "common/tensor.h"
#include "experts/router.h"

namespace dashpot::experts {
namespace {

// Without grad: *sum += lse^2 of rows [begin, end). With it: grad = scale lse p.
template <class T>
struct ZRows {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* logits, int64_t n, int64_t begin, int64_t end,
                                 double scale, Wide<T>* e, double* sum, T* grad) {
    using W = Wide<T>;
    constexpr int64_t kStep = kLanes<W, isa>;
    for (int64_t t = begin; t < end; ++t) {
      const auto [most, total] = row_exp<isa>(logits + t * n, n, e);
      const double lse = static_cast<double>(most) + std::log(static_cast<double>(total));
      if (grad == nullptr) {
        *sum += lse * lse;
        continue;
      }
      const W factor = static_cast<W>(scale * lse / static_cast<double>(total));
      for (int64_t c = 0; c < n; c += kStep) {
        store_part<isa>(grad + t * n + c, load<W, isa>(e + c) * factor, n - c);
      }
    }
  }
};

Tensor router_z_loss_forward(const Tensor& logits) {
  const int64_t rows = logits.size(0), n = logits.size(1);
  const bool wide = logits.dtype == Dtype::kFloat64;
  const Tensor loss = logits.new_empty({}, wide ? Dtype::kFloat64 : Dtype::kFloat32);
  const int threads = num_threads();
  const py::gil_scoped_release release;
  std::vector<double> sums(router_blocks(rows));
  dispatch_floating(logits.dtype, [&](auto element) {
    using T = decltype(element);
    for_router_blocks(rows, threads, [&](int64_t block, int64_t begin, int64_t end) {
      std::vector<Wide<T>> e(padded<Wide<T>>(n));
      run_on_isa<ZRows<T>>(static_cast<const T*>(logits.as<T>()), n, begin, end, 0.0, e.data(),
                           &sums[block], static_cast<T*>(nullptr));
    });
  });
  double sum = 0;
  for (const double one : sums) sum += one;
  const double mean = sum / static_cast<double>(std::max<int64_t>(1, rows));
  if (wide) {
    *loss.as<double>() = mean;
  } else {
    *loss.as<float>() = static_cast<float>(mean);
  }
  return loss;
}

Tensor router_z_loss_backward(const Tensor& grad_loss, const Tensor& logits) {
  const int64_t rows = logits.size(0), n = logits.size(1);
  const Tensor grad = logits.new_empty({rows, n}, logits.dtype);
  const double incoming = grad_loss.dtype == Dtype::kFloat64
                              ? *grad_loss.as<double>()
                              : static_cast<double>(*grad_loss.as<float>());
  const double scale = 2 * incoming / static_cast<double>(std::max<int64_t>(1, rows));
  const int threads = num_threads();
  const py::gil_scoped_release release;
  dispatch_floating(logits.dtype, [&](auto element) {
    using T = decltype(element);
    for_router_blocks(rows, threads, [&](int64_t, int64_t begin, int64_t end) {
      std::vector<Wide<T>> e(padded<Wide<T>>(n));
      run_on_isa<ZRows<T>>(static_cast<const T*>(logits.as<T>()), n, begin, end, scale, e.data(),
                           static_cast<double*>(nullptr), grad.as<T>());
    });
  });
  return grad;
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("router_z_loss_forward", &router_z_loss_forward);
  m.def("router_z_loss_backward", &router_z_loss_backward);
}

}  // namespace dashpot::experts
