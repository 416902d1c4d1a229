// ema_update_: averages x (n_s,) and new values y (n_s,) of S tensors, w () -> x + w (y - x), in
// one pass: y is read once, x read and written once, 16-bit values are widened in registers.
//
// From the end that is nearer: x + w (y - x) for w < 1/2, else y - (1 - w)(y - x), so that w = 1
// copies. Chunks of all tensors go to the threads together.
#include <optional>
#include <vector>

#include "common/bind.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace dashpot::contrastive {
namespace {

constexpr int64_t kChunk = int64_t{1} << 16;

template <class Work, class In>
struct Average {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Work* x, const In* y, Work w, Work* to, int64_t n) {
    constexpr int64_t kStep = kLanes<Work, isa>;
    const bool near_x = w < Work(0.5);
    const Work factor = near_x ? w : w - Work(1);
    const auto step = [&](const Work* from, const In* news,
                          Work* out) __attribute__((always_inline)) {
      const Vec<Work, isa> old = load<Work, isa>(from), value = load_as<Work, isa>(news);
      store<Work, isa>(out, (near_x ? old : value) + factor * (value - old));
    };
    int64_t k = 0;
    for (; k + kStep <= n; k += kStep) step(x + k, y + k, to + k);
    if (k == n) return;
    // The rest as a vector too: the same operations, so the same bits wherever a number lies.
    Work old[kStep] = {}, out[kStep];
    In value[kStep] = {};
    std::copy(x + k, x + n, old);
    std::copy(y + k, y + n, value);
    step(old, value, out);
    std::copy(out, out + (n - k), to + k);
  }
};

std::vector<Tensor> ema_update__forward(const std::vector<Tensor>& targets,
                                        const std::vector<Tensor>& onlines, const Tensor& weight,
                                        std::optional<std::vector<Tensor>> out) {
  if (weight.dtype != Dtype::kFloat64 || weight.numel != 1 || onlines.size() != targets.size()) {
    throw std::invalid_argument("expected as many onlines as targets, and one float64 weight");
  }
  if (!out) {
    out.emplace();
    for (const Tensor& x : targets) out->push_back(empty_like(x, x.dtype));
  }
  struct Chunk {
    size_t tensor;
    int64_t begin, length;
  };
  std::vector<Chunk> chunks;
  for (size_t s = 0; s < targets.size(); ++s) {
    const int64_t n = targets[s].numel;
    const Tensor& to = (*out)[s];
    if (onlines[s].numel != n || to.numel != n || to.dtype != targets[s].dtype) {
      throw std::invalid_argument("expected onlines and outputs of the targets' sizes");
    }
    for (int64_t k = 0; k < n; k += kChunk) chunks.push_back({s, k, std::min(kChunk, n - k)});
  }
  const int threads = num_threads();
  const double w = *weight.as<const double>();
  const py::gil_scoped_release release;
  parallel_for(static_cast<int64_t>(chunks.size()), threads, [&](int64_t item) {
    const auto [s, begin, length] = chunks[item];
    const Tensor &x = targets[s], &y = onlines[s], &to = (*out)[s];
    dispatch_floating(y.dtype, [&, begin = begin, length = length](auto element) {
      using In = decltype(element);
      if (x.dtype == Dtype::kFloat64) {
        run_on_isa<Average<double, In>>(x.as<const double>() + begin, y.as<const In>() + begin, w,
                                        to.as<double>() + begin, length);
      } else {
        run_on_isa<Average<float, In>>(x.as<const float>() + begin, y.as<const In>() + begin,
                                       static_cast<float>(w), to.as<float>() + begin, length);
      }
    });
  });
  return *std::move(out);
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("ema_update__forward", &ema_update__forward, py::arg("targets"), py::arg("onlines"),
        py::arg("weight"), py::arg("out") = py::none());
}

}  // namespace dashpot::contrastive
