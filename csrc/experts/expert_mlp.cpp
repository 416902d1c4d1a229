// expert_mlp: y_t = sum_j w_tj (W2_e act(W1_e x_t + b1_e) + b2_e), through a plan.
//
// Forward, kChunk rows of a segment at a time: gather the rows, product, activation in place,
// product; the chunk's hidden rows stay in the cache, and only `pre` (if kept for the backward) and
// the rows before the combination have the length R. Products are torch's (products.h).
// Backward, a segment at a time, with u = W2^T dy: dw = <a, u> + <b2, dy>, so that no output row is
// needed again; dz = w u act'(z); dW2 = (w dy)^T a, dW1 = dz^T x, dx_t = sum_j W1^T dz.
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "experts/activation.h"
#include "experts/products.h"

namespace dashpot::experts {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kChunk = 512;

// The weight of each slot (R,); 1/k without weights, 0 in padding.
template <class W>
std::vector<W> slot_weights(const MaybeTensor& weights, const Tensor& order, int64_t k) {
  std::vector<W> all(order.numel);
  for (int64_t r = 0; r < order.numel; ++r) {
    const int64_t i = order.as<int32_t>()[r];
    if (i < 0) continue;
    if (!weights) {
      all[r] = W(1) / static_cast<W>(k);
    } else {
      dispatch_floating(weights->dtype, [&](auto element) {
        all[r] = static_cast<W>(convert<W>(weights->as<decltype(element)>()[i]));
      });
    }
  }
  return all;
}

// Calls function(weights), weights (T, k) of W or null where all are 1.
template <class W, class Function>
void with_choice_weights(const MaybeTensor& weights, int64_t tokens, int64_t k,
                         Function&& function) {
  std::vector<W> all;
  if (weights) {
    all.resize(tokens * k);
    dispatch_floating(weights->dtype, [&](auto element) {
      for (int64_t i = 0; i < tokens * k; ++i) {
        all[i] = static_cast<W>(convert<W>(weights->as<decltype(element)>()[i]));
      }
    });
  } else if (k > 1) {
    all.assign(tokens * k, W(1) / static_cast<W>(k));
  }
  function(static_cast<const W*>(all.empty() ? nullptr : all.data()));
}

void gather_into(const Tensor& from, const Tensor& order, int64_t k, int64_t begin, int64_t count,
                 const Tensor& to, int threads) {
  const int64_t bytes = from.size(1) * element_size(from.dtype);
  for_row_blocks(count, bytes, threads, [&](int64_t first, int64_t last) {
    gather_rows(from.as<char>(), order.as<int32_t>() + begin, k, first, last, bytes, false,
                to.as<char>() + first * bytes);
  });
}

std::tuple<Tensor, Tensor> expert_mlp_forward(const Tensor& x, const Tensor& order,
                                              const Tensor& rank, const Tensor& offsets,
                                              const Tensor& w1, const MaybeTensor& b1,
                                              const Tensor& w2, const MaybeTensor& b2,
                                              const MaybeTensor& weights, const std::string& name,
                                              bool gated, bool save) {
  const int64_t tokens = rank.size(0), k = rank.size(1), d = x.size(1), slots = order.numel;
  const int64_t width = w1.size(1), h = w2.size(2);
  const Activation activation = activation_of(name);
  const std::vector<Segment> segments = segments_of(offsets, slots);
  const int threads = num_threads();
  const int64_t chunk = std::min(kChunk, longest(segments));
  const std::tuple<Tensor, Tensor> result{x.new_empty({tokens, d}, x.dtype),
                                          x.new_empty({save ? slots : 0, width}, x.dtype)};
  const auto& [y, pre] = result;
  const Tensor out = x.new_empty({slots, d}, x.dtype);  // rows before the combination
  const Tensor rows = x.new_empty({chunk, d}, x.dtype);
  const Tensor scratch = x.new_empty({save ? 0 : chunk, width}, x.dtype);
  const bool in_place = !save && !gated;
  const Tensor hidden = in_place ? scratch : x.new_empty({chunk, h}, x.dtype);
  int64_t stop = 0;
  for (size_t e = 0; e < segments.size(); ++e) {
    const py::object w1_e = expert_of(w1, e), w2_e = expert_of(w2, e);
    const py::object b1_e = b1 ? expert_of(*b1, e) : py::object();
    const py::object b2_e = b2 ? expert_of(*b2, e) : py::object();
    stop = segments[e].begin + segments[e].count;
    for (int64_t begin = segments[e].begin; begin < stop; begin += chunk) {
      const int64_t count = std::min(chunk, stop - begin);
      gather_into(x, order, k, begin, count, rows, threads);
      const Tensor& z = save ? pre : scratch;
      const int64_t at = save ? begin : 0;
      linear(rows_of(rows, 0, count), w1_e, b1_e, rows_of(z, at, count));
      dispatch_floating(x.dtype, [&](auto element) {
        using T = decltype(element);
        for_row_blocks(count, width * sizeof(T), threads, [&](int64_t first, int64_t last) {
          run_on_isa<ActivateRows<T>>(static_cast<const T*>(z.as<T>() + (at + first) * width),
                                      last - first, h, gated, activation,
                                      hidden.as<T>() + first * h);
        });
      });
      linear(rows_of(hidden, 0, count), w2_e, b2_e, rows_of(out, begin, count));
    }
  }
  if (save) zero(pre, stop * width, (slots - stop) * width);
  dispatch_floating(x.dtype, [&](auto element) {
    using T = decltype(element);
    with_choice_weights<Wide<T>>(weights, tokens, k, [&](const Wide<T>* w) {
      sum_rows<T>(out.as<T>(), rank.as<int32_t>(), w, tokens, k, d, threads, y.as<T>());
    });
  });
  return result;
}

// Rows times their weights, in place; dots += <bias, row> before, bias (d,) or null.
template <class T>
struct ScaleRows {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* rows, const Wide<T>* weights, const T* bias, int64_t count,
                                 int64_t d, Wide<T>* dots) {
    using W = Wide<T>;
    constexpr int64_t kStep = kLanes<W, isa>;
    for (int64_t r = 0; r < count; ++r) {
      Vec<W, isa> dot{};
      for (int64_t c = 0; c < d; c += kStep) {
        const Vec<W, isa> value = load_part<isa>(rows + r * d + c, d - c, W(0));
        if (bias) dot += value * load_part<isa>(bias + c, d - c, W(0));
        store_part<isa>(rows + r * d + c, value * weights[r], d - c);
      }
      dots[r] += static_cast<W>(sum_lanes<W, isa>(dot));
    }
  }
};

using Gradients =
    std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;

Gradients expert_mlp_backward(const Tensor& grad_y, const Tensor& x, const Tensor& order,
                              const Tensor& rank, const Tensor& offsets, const Tensor& w1,
                              const MaybeTensor& b1, const Tensor& w2, const MaybeTensor& b2,
                              const MaybeTensor& weights, const Tensor& pre,
                              const std::string& name, bool gated, const std::vector<bool>& needs) {
  const int64_t tokens = rank.size(0), k = rank.size(1), d = x.size(1), slots = order.numel;
  const int64_t experts = w1.size(0), width = w1.size(1), h = w2.size(2);
  const Activation activation = activation_of(name);
  const std::vector<Segment> segments = segments_of(offsets, slots);
  const int threads = num_threads();
  const int64_t most = longest(segments);
  Gradients grads;
  auto& [dx, dw1, db1, dw2, db2, dweights] = grads;
  if (needs[0]) dx = x.new_empty({tokens, d}, x.dtype);
  if (needs[4]) dw1 = x.new_empty({experts, width, d}, x.dtype);
  if (needs[5] && b1) db1 = x.new_empty({experts, width}, x.dtype);
  if (needs[6]) dw2 = x.new_empty({experts, d, h}, x.dtype);
  if (needs[7] && b2) db2 = x.new_empty({experts, d}, x.dtype);
  if (needs[8] && weights) {
    dweights = weights->new_empty({tokens, k}, weights->dtype);
    zero(*dweights, 0, tokens * k);
  }
  const Tensor dxp = x.new_empty({dx ? slots : 0, d}, x.dtype);
  const Tensor rows = x.new_empty({most, d}, x.dtype), u = x.new_empty({most, h}, x.dtype);
  const Tensor hidden = x.new_empty({most, h}, x.dtype), dz = x.new_empty({most, width}, x.dtype);
  dispatch_floating(x.dtype, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const std::vector<W> slot = slot_weights<W>(weights, order, k);
    std::vector<W> dots(most);
    for (int64_t e = 0; e < experts; ++e) {
      const auto [begin, count] = segments[e];
      if (count == 0) {
        if (dw1) zero(*dw1, e * width * d, width * d);
        if (db1) zero(*db1, e * width, width);
        if (dw2) zero(*dw2, e * d * h, d * h);
        if (db2) zero(*db2, e * d, d);
        continue;
      }
      gather_into(grad_y, order, k, begin, count, rows, threads);
      multiply(rows_of(rows, 0, count), expert_of(w2, e), rows_of(u, 0, count));
      const T* bias = dweights && b2 ? b2->as<T>() + e * d : nullptr;
      for_row_blocks(count, (width + d) * sizeof(T), threads, [&](int64_t first, int64_t last) {
        run_on_isa<ActivateRowsBackward<T>>(
            static_cast<const T*>(pre.as<T>() + (begin + first) * width),
            static_cast<const T*>(u.as<T>() + first * h), slot.data() + begin + first, last - first,
            h, gated, activation, hidden.as<T>() + first * h, dz.as<T>() + first * width,
            dots.data() + first);
        run_on_isa<ScaleRows<T>>(rows.as<T>() + first * d, slot.data() + begin + first, bias,
                                 last - first, d, dots.data() + first);
      });
      if (dweights) {
        dispatch_floating(weights->dtype, [&](auto kind) {
          using Weight = decltype(kind);
          for (int64_t r = 0; r < count; ++r) {
            const int64_t i = order.as<int32_t>()[begin + r];
            if (i >= 0) {
              dweights->as<Weight>()[i] = convert<Weight>(static_cast<Wide<Weight>>(dots[r]));
            }
          }
        });
      }
      if (dw2) {
        multiply(rows_of(rows, 0, count).attr("t")(), rows_of(hidden, 0, count),
                 expert_of(*dw2, e));
      }
      if (db2) column_sums(rows, 0, count, d, *db2, e);
      if (db1) column_sums(dz, 0, count, width, *db1, e);
      if (dx) multiply(rows_of(dz, 0, count), expert_of(w1, e), rows_of(dxp, begin, count));
      if (dw1) {
        gather_into(x, order, k, begin, count, rows, threads);
        multiply(rows_of(dz, 0, count).attr("t")(), rows_of(rows, 0, count), expert_of(*dw1, e));
      }
    }
    if (dx) {
      sum_rows<T, W>(dxp.as<T>(), rank.as<int32_t>(), nullptr, tokens, k, d, threads,
                     dx->template as<T>());
    }
  });
  return grads;
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("expert_mlp_forward", &expert_mlp_forward);
  m.def("expert_mlp_backward", &expert_mlp_backward);
}

}  // namespace dashpot::experts
