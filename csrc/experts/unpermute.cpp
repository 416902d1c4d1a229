// unpermute: y_t = sum_j w_tj h[rank_tj], h (R, d) -> (T, d).
//
// Backward: dh[r] = w_tj dy_t for the choice tj of slot r, zeros in padding; dw_tj = <h[rank_tj],
// dy_t>, summed in vectors of float32 within a block of the row, float64 between blocks.
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "common/tensor.h"
#include "experts/rows.h"

namespace dashpot::experts {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Calls function(weights), a pointer to T or float32, null without weights.
template <class T, class Function>
void with_weights(const MaybeTensor& weights, Function&& function) {
  if (!weights) {
    function(static_cast<const T*>(nullptr));
  } else if (weights->dtype == Dtype::kFloat32) {
    function(static_cast<const float*>(weights->as<float>()));
  } else {
    function(static_cast<const T*>(weights->as<T>()));
  }
}

Tensor unpermute_forward(const Tensor& h, const Tensor&, const Tensor& rank,
                         const MaybeTensor& weights) {
  const int64_t d = h.size(1), tokens = rank.size(0), k = rank.size(1);
  const Tensor y = h.new_empty({tokens, d}, h.dtype);
  const int threads = num_threads();
  const py::gil_scoped_release release;
  dispatch_floating(h.dtype, [&](auto element) {
    using T = decltype(element);
    with_weights<T>(weights, [&](auto* w) {
      sum_rows<T>(h.as<T>(), rank.as<int32_t>(), w, tokens, k, d, threads, y.as<T>());
    });
  });
  return y;
}

// dh of slots [begin, end), with weights.
template <class T>
struct SpreadRows {
  template <Isa isa, class Weight>
  static DASHPOT_INLINE void run(const T* grad_y, const int32_t* order, const Weight* weights,
                                 int64_t k, int64_t d, int64_t begin, int64_t end, T* grad_h) {
    using W = Wide<T>;
    constexpr int64_t kStep = kLanes<W, isa>;
    for (int64_t r = begin; r < end; ++r) {
      T* to = grad_h + r * d;
      if (order[r] < 0) {
        std::memset(to, 0, d * sizeof(T));
        continue;
      }
      const T* from = grad_y + order[r] / k * d;
      const W w = convert<W>(weights[order[r]]);
      for (int64_t c = 0; c < d; c += kStep) {
        store_part<isa>(to + c, load_part<isa>(from + c, d - c, W(0)) * w, d - c);
      }
    }
  }
};

// dw of tokens [begin, end).
template <class T, class Weight>
struct DotRows {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* h, const T* grad_y, const int32_t* rank, int64_t k,
                                 int64_t d, int64_t begin, int64_t end, Weight* grad_weights) {
    using W = Wide<T>;
    constexpr int64_t kStep = kLanes<W, isa>, kBlock = 1024;
    for (int64_t i = begin * k; i < end * k; ++i) {
      double total = 0;
      if (rank[i] >= 0) {
        const T *a = h + int64_t{rank[i]} * d, *b = grad_y + i / k * d;
        for (int64_t first = 0; first < d; first += kBlock) {
          Vec<W, isa> sum{};
          const int64_t last = first + kBlock < d ? first + kBlock : d;
          for (int64_t c = first; c < last; c += kStep) {
            sum += load_part<isa>(a + c, last - c, W(0)) * load_part<isa>(b + c, last - c, W(0));
          }
          total += sum_lanes<W, isa>(sum);
        }
      }
      grad_weights[i] = convert<Weight>(static_cast<Wide<Weight>>(total));
    }
  }
};

std::tuple<MaybeTensor, MaybeTensor> unpermute_backward(const Tensor& grad_y, const Tensor& h,
                                                        const Tensor& order, const Tensor& rank,
                                                        const MaybeTensor& weights,
                                                        const std::vector<bool>& needs) {
  const int64_t d = h.size(1), tokens = rank.size(0), k = rank.size(1), slots = order.numel;
  std::tuple<MaybeTensor, MaybeTensor> grads;
  auto& [grad_h, grad_weights] = grads;
  if (needs[0]) grad_h = h.new_empty({slots, d}, h.dtype);
  if (needs[3] && weights) grad_weights = weights->new_empty({tokens, k}, weights->dtype);
  const int threads = num_threads();
  const py::gil_scoped_release release;
  dispatch_floating(h.dtype, [&](auto element) {
    using T = decltype(element);
    const T* dy = grad_y.as<T>();
    with_weights<T>(weights, [&](auto* w) {
      using Weight = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
      if (grad_h) {
        const int64_t bytes = d * sizeof(T);
        const bool stream = streams(grad_h->as<char>(), slots, bytes);
        for_row_blocks(slots, bytes, threads, [&](int64_t begin, int64_t end) {
          if (w == nullptr) {
            gather_rows(grad_y.as<char>(), order.as<int32_t>(), k, begin, end, bytes, stream,
                        grad_h->as<char>() + begin * bytes);
            return;
          }
          run_on_isa<SpreadRows<T>>(dy, static_cast<const int32_t*>(order.as<int32_t>()), w, k, d,
                                    begin, end, grad_h->template as<T>());
        });
      }
      if (grad_weights) {
        for_row_blocks(tokens, d * k * sizeof(T), threads, [&](int64_t begin, int64_t end) {
          run_on_isa<DotRows<T, Weight>>(static_cast<const T*>(h.as<T>()), dy,
                                         static_cast<const int32_t*>(rank.as<int32_t>()), k, d,
                                         begin, end, grad_weights->template as<Weight>());
        });
      }
    });
  });
  return grads;
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("unpermute_forward", &unpermute_forward);
  m.def("unpermute_backward", &unpermute_backward);
}

}  // namespace dashpot::experts
