// spectral_loss: input, target (rows, n) -> loss () or (rows,), slopes (rows, n).
//
// Pairs: a group of rows (a lane each) is loaded, transformed, compared, its slopes transformed
// back and stored; nothing but the signals and the slopes leaves the cache. "complex" transforms x
// - y alone. Batch averages: every group's magnitudes are summed over its rows, the spectra kept;
// when all groups are done, bins become coefficients (float64), and the kept spectra slopes.
//
// Lengths that no transform here takes, and few long rows, go through PyTorch's FFT: one pass over
// the spectra then compares them and leaves the slopes' spectra (batch averages: a pass for the
// levels, one for the slopes).
//
// Group sums are float32, sums of groups float64 in the groups' order: any number of threads gives
// the same bits.
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "spectral/batch.h"
#include "spectral/cuda.h"
#include "spectral/options.h"
#include "spectral/whole.h"

namespace dashpot::spectral {
namespace {

template <class T>
struct PairTask {
  const RealPlan<T>* plan;
  SpectralOptions options;
  const T *loss_weights, *slope_weights;  // (n/2 + 1,)
  bool want_x, want_y;
};

// Compares two groups' spectra: per lane the loss, and x, y become the slopes' spectra. For
// "complex" x holds the transform of x - y and y is null.
template <class T>
struct ComparePairs {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* x, T* y, const PairTask<T>* task, T* loss) {
    using V = Vec<T, isa>;
    const RealPlan<T>& plan = *task->plan;
    const int64_t m = plan.n / 2;
    const SpectralOptions o = task->options;
    V total{};
    for (int64_t k = 0; 2 * k <= m; ++k) {
      std::pair<Complex<V>, Complex<V>> a = split<T, isa>(x, plan, k), b{};
      if (y != nullptr) b = split<T, isa>(y, plan, k);
      const T* weight = task->loss_weights;
      const T* slope = task->slope_weights;
      total += compare_bins<T, isa>(o, weight[k], slope[k], a.first, b.first);
      const V more = compare_bins<T, isa>(o, weight[m - k], slope[m - k], a.second, b.second);
      if (2 * k != m) total += more;  // else it is the same bin
      if (task->want_x) merge<T, isa>(x, plan, k, a.first, a.second);
      if (y != nullptr && task->want_y) merge<T, isa>(y, plan, k, b.first, b.second);
    }
    store<T, isa>(loss, total);
  }
};

template <class T>
std::vector<T> narrowed(const std::vector<double>& values) {
  return std::vector<T>(values.begin(), values.end());
}

// Bytes of a thread: two groups of rows; or one and its levels.
template <class T>
int64_t scratch_bytes(int64_t n, bool batch_mean) {
  const int64_t width = lanes<T>();
  return room<T>(n * width) + room<T>((batch_mean ? n / 2 + 1 : n) * width);
}

template <class T, class In>
void pairs(const Signals<T, In>& s, const SpectralOptions& options, BinWeights weights, bool mean,
           int threads, const Scratch& scratch, T* loss) {
  const int64_t rows = s.batch_x * s.channels, n = s.n, width = lanes<T>();
  if (mean) {
    for (double& one : weights.slope) one /= static_cast<double>(rows);
  }
  const std::vector<T> of_loss = narrowed<T>(weights.loss), of_slope = narrowed<T>(weights.slope);
  const RealPlan<T>& plan = RealPlan<T>::of(static_cast<int>(n));
  const PairTask<T> task{&plan,
                         options,
                         of_loss.data(),
                         of_slope.data(),
                         s.slope_x != nullptr || (options.kind == kComplex && s.slope_y != nullptr),
                         s.slope_y != nullptr};
  std::vector<T> per_row(rows);
  parallel_for((rows + width - 1) / width, threads, [&](int64_t item) {
    const int64_t first = item * width, count = std::min(width, rows - first);
    const In *x[kMaxLanes], *y[kMaxLanes];
    T *to_x[kMaxLanes], *to_y[kMaxLanes], lane_loss[kMaxLanes];
    for (int64_t l = 0; l < count; ++l) {
      x[l] = s.x + (first + l) * n, y[l] = s.y + (first + l) * n;
      to_x[l] = s.slope_x + (first + l) * n, to_y[l] = s.slope_y + (first + l) * n;
    }
    Share share = scratch.mine();
    T* at_x = share.take<T>(n * width);
    T* at_y = options.kind == kComplex ? nullptr : share.take<T>(n * width);
    const T scale = static_cast<T>(options.scale);
    run_on_isa<LoadRows<T, In>>(x, at_y ? nullptr : y, count, n, scale, nullptr, at_x);
    forward_transform(at_x, plan);
    if (at_y) {
      run_on_isa<LoadRows<T, In>>(y, nullptr, count, n, scale, nullptr, at_y);
      forward_transform(at_y, plan);
    }
    run_on_isa<ComparePairs<T>>(at_x, at_y, &task, lane_loss);
    std::copy_n(lane_loss, count, per_row.begin() + first);
    if (task.want_x) inverse_transform(at_x, plan);
    if (s.slope_x) run_on_isa<StoreRows<T, false>>(at_x, n, T(1), nullptr, to_x, count);
    if (!s.slope_y) return;
    if (at_y) inverse_transform(at_y, plan);
    run_on_isa<StoreRows<T, false>>(at_y ? at_y : at_x, n, at_y ? T(1) : T(-1), nullptr, to_y,
                                    count);
  });
  if (!mean) {
    std::copy(per_row.begin(), per_row.end(), loss);
    return;
  }
  double total = 0;
  for (const T one : per_row) total += static_cast<double>(one);
  *loss = static_cast<T>(total / static_cast<double>(rows));
}

// What both backends allocate and check.
struct Outputs {
  Dtype type;
  Tensor loss, slope_x, slope_y;
  int64_t batch_x, batch_y, channels, n;
  bool mean, wants_x, wants_y;

  Outputs(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
          bool batch_mean, const std::string& reduction, const std::vector<bool>& wants)
      : type(input.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32),
        n(input.size(-1)),
        mean(reduction == "mean"),
        wants_x(wants[0]),
        wants_y(wants[1]) {
    const int64_t rows = input.numel / n;
    loss = mean ? input.new_empty({}, type) : input.new_empty({rows}, type);
    if (!mean) {
      loss.object = loss.object.attr("view")(
          input.object.attr("shape")[py::slice(py::none(), py::int_(-1), py::none())]);
    }
    batch_x = batch_mean ? input.size(0) : rows;
    batch_y = batch_mean ? target.size(0) : rows;
    channels = batch_mean && batch_x ? rows / batch_x : 1;
    if (target.numel != batch_y * channels * n || target.dtype != input.dtype) {
      throw std::invalid_argument("target: expected the input's dtype and shape");
    }
    if (weight && (weight->numel != n / 2 + 1 || weight->dtype != type)) {
      throw std::invalid_argument("weight: expected (n/2 + 1,) in the dtype of the computation");
    }
  }

  void make_slopes(const Tensor& input, const Tensor& target) {
    slope_x = wants_x ? empty_like(input, type) : input.new_empty({0}, type);
    slope_y = wants_y ? empty_like(target, type) : input.new_empty({0}, type);
  }

  std::tuple<Tensor, Tensor, Tensor> all() const { return {loss, slope_x, slope_y}; }
};

// The kernel has this length, and rows enough for its lanes.
bool in_lanes(int64_t rows, int64_t n) { return is_real_length(n) && (n <= 512 || rows >= 4); }

// Spectra of pairs by PyTorch, (rows, F) complex: y is null for "complex".
template <class T>
void compare_whole(T* x, T* y, int64_t rows, const SpectralOptions& options, BinWeights weights,
                   bool mean, int threads, T* loss) {
  if (mean) {
    for (double& one : weights.slope) one /= static_cast<double>(rows);
  }
  const std::vector<T> of_loss = narrowed<T>(weights.loss), of_slope = narrowed<T>(weights.slope);
  const int64_t bins = static_cast<int64_t>(of_loss.size());
  const int64_t chunks = (bins + kChunk - 1) / kChunk;
  std::vector<double> found(rows * chunks);
  parallel_for(rows * chunks, threads, [&](int64_t item) {
    const int64_t k = item % chunks * kChunk, at = 2 * (item / chunks * bins + k);
    run_on_isa<CompareWhole<T>>(x + at, y ? y + at : y, &options, of_loss.data() + k,
                                of_slope.data() + k, std::min(kChunk, bins - k), &found[item]);
  });
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    double own = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) own += found[row * chunks + chunk];
    total += own;
    if (!mean) loss[row] = static_cast<T>(own);
  }
  if (mean) *loss = static_cast<T>(total / static_cast<double>(rows));
}

// Sums of the levels over the batch, (channels, F), of spectra (batch, channels, F).
template <class T>
std::vector<double> sum_whole(const T* x, int64_t batch, int64_t channels, int64_t bins, bool power,
                              int threads) {
  const int64_t chunks = (bins + kChunk - 1) / kChunk;
  std::vector<double> sums(channels * bins);
  parallel_for(channels * chunks, threads, [&](int64_t item) {
    const int64_t k = item % chunks * kChunk, at = item / chunks * bins + k;
    run_on_isa<SumWhole<T>>(x + 2 * at, batch, 2 * channels * bins, std::min(kChunk, bins - k),
                            power, sums.data() + at);
  });
  return sums;
}

template <class T>
void scale_whole(T* x, int64_t batch, int64_t channels, int64_t bins, bool power,
                 const std::vector<T>& factors, int threads) {
  parallel_for(batch * channels, threads, [&](int64_t row) {
    run_on_isa<ScaleWhole<T>>(x + 2 * row * bins, power, factors.data() + row % channels * bins,
                              bins);
  });
}

// The transforms by PyTorch; one pass over the spectra lies between `Spectra` and `back`.
struct Spectra {
  bool one;     // X - Y alone, by linearity
  Tensor x, y;  // (rows, F, 2)

  Spectra(const Outputs& out, const Tensor& input, const Tensor& target, Kind kind,
          const std::string& norm)
      : one(kind == kComplex),
        x(transformed("rfft", input, one ? &target : nullptr, out.type, norm)) {
    if (!one) y = transformed("rfft", target, nullptr, out.type, norm);
  }

  std::tuple<Tensor, Tensor, Tensor> back(Outputs& out) const {
    const py::object n = py::int_(out.n);
    Tensor slope;
    if (!out.wants_x) out.slope_x = x.new_empty({0}, out.type);
    if (!out.wants_y) out.slope_y = x.new_empty({0}, out.type);
    if (out.wants_x || one) slope = transformed_back("irfft", x, n, "forward");
    if (out.wants_x) out.slope_x = slope;
    if (out.wants_y) {
      out.slope_y = one ? Tensor::from(slope.object.attr("neg")())
                        : transformed_back("irfft", y, n, "forward");
    }
    return out.all();
  }
};

std::tuple<Tensor, Tensor, Tensor> whole_forward(Outputs out, const Spectra& spectra,
                                                 const SpectralOptions& options,
                                                 const BinWeights& weights, bool batch_mean) {
  const int threads = num_threads();
  const int64_t bins = out.n / 2 + 1;
  const auto run = [&](auto number) {
    using T = decltype(number);
    const py::gil_scoped_release release;
    T *x = spectra.x.as<T>(), *y = spectra.one ? nullptr : spectra.y.as<T>();
    if (!batch_mean) {
      return compare_whole(x, y, out.batch_x, options, weights, out.mean, threads,
                           out.loss.as<T>());
    }
    const bool power = options.power();
    const Coefficients<T> found(sum_whole(x, out.batch_x, out.channels, bins, power, threads),
                                sum_whole(y, out.batch_y, out.channels, bins, power, threads),
                                out.batch_x, out.batch_y, out.channels, options, weights);
    *out.loss.as<T>() = static_cast<T>(found.loss);
    if (out.wants_x) scale_whole(x, out.batch_x, out.channels, bins, power, found.x, threads);
    if (out.wants_y) scale_whole(y, out.batch_y, out.channels, bins, power, found.y, threads);
  };
  out.type == Dtype::kFloat64 ? run(double{}) : run(float{});
  return spectra.back(out);
}

std::tuple<Tensor, Tensor, Tensor> spectral_loss_forward(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    const std::string& kind, const std::string& distance, bool batch_mean, double eps,
    const std::string& norm, bool onesided, const std::string& reduction,
    const std::vector<bool>& wants) {
  Outputs out(input, target, weight, batch_mean, reduction, wants);
  const SpectralOptions options{kind_of(kind), distance == "l1", eps, norm_scale(norm, out.n)};
  BinWeights weights(out.n, onesided, options.scale);
  if (weight) {
    out.type == Dtype::kFloat64 ? weights.times(weight->as<double>())
                                : weights.times(weight->as<float>());
  }
  if (!in_lanes(out.batch_x * out.channels, out.n)) {
    return whole_forward(out, Spectra(out, input, target, options.kind, norm), options, weights,
                         batch_mean);
  }
  out.make_slopes(input, target);
  const int threads = num_threads();
  dispatch_floating(input.dtype, [&](auto element) {
    using In = decltype(element);
    using T = std::conditional_t<std::is_same_v<In, double>, double, float>;
    using Of = Side<T, In>;
    const int64_t sides = Of::memory(wants[0], out.batch_x, out.channels, out.n) +
                          Of::memory(wants[1], out.batch_y, out.channels, out.n);
    const Scratch scratch(input, threads, scratch_bytes<T>(out.n, batch_mean),
                          batch_mean ? sides : 0);
    const py::gil_scoped_release release;
    const Signals<T, In> signals{input.as<In>(),
                                 target.as<In>(),
                                 wants[0] ? out.slope_x.as<T>() : nullptr,
                                 wants[1] ? out.slope_y.as<T>() : nullptr,
                                 out.batch_x,
                                 out.batch_y,
                                 out.channels,
                                 out.n};
    if (batch_mean) {
      batch_means(signals, options, weights, threads, scratch, out.loss.as<T>());
    } else {
      pairs(signals, options, weights, out.mean, threads, scratch, out.loss.as<T>());
    }
  });
  return out.all();
}

// What neither backend takes.
std::optional<std::string> unsupported(const py::args& args) {
  if (py::cast<int64_t>(args[0].attr("numel")()) == 0 ||
      py::cast<int64_t>(args[1].attr("numel")()) == 0) {
    return "takes no empty batch";
  }
  return std::nullopt;
}

#ifdef DASHPOT_CUDA
std::tuple<Tensor, Tensor, Tensor> spectral_loss_forward_cuda(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    const std::string& kind, const std::string& distance, bool batch_mean, double eps,
    const std::string& norm, bool onesided, const std::string& reduction,
    const std::vector<bool>& wants) {
  Outputs out(input, target, weight, batch_mean, reduction, wants);
  SpectralCall call{{input.data, nullptr, out.batch_x},
                    {target.data, nullptr, out.batch_y},
                    out.channels,
                    out.n,
                    input.dtype,
                    {kind_of(kind), distance == "l1", eps, norm_scale(norm, out.n)},
                    onesided,
                    out.mean,
                    weight ? weight->as<float>() : nullptr};
  const Place place = place_of(input);
  if (!is_real_length(out.n) || out.n > kLongestInBlock) {
    const Spectra spectra(out, input, target, call.options.kind, norm);
    const int64_t size = spectral_whole_scratch(call, batch_mean);
    const Tensor scratch = input.new_empty({size}, Dtype::kFloat32);
    spectral_whole_cuda(call, batch_mean, spectra.x.as<float>(),
                        spectra.one ? nullptr : spectra.y.as<float>(), wants[0], wants[1],
                        scratch.as<float>(), out.loss.as<float>(), place.device, place.stream);
    return spectra.back(out);
  }
  out.make_slopes(input, target);
  if (wants[0]) call.x.slope = out.slope_x.as<float>();
  if (wants[1]) call.y.slope = out.slope_y.as<float>();
  const int64_t size = batch_mean ? spectral_batch_scratch(call) : spectral_pairs_scratch(call);
  const Tensor scratch = input.new_empty({size}, Dtype::kFloat32);
  (batch_mean ? spectral_batch_cuda : spectral_pairs_cuda)(
      call, scratch.as<float>(), out.loss.as<float>(), place.device, place.stream);
  return out.all();
}

std::optional<std::string> spectral_loss_supports_cuda(const py::args& args) {
  if (py::str(args[0].attr("dtype")).equal(py::str("torch.float64"))) return "has no float64";
  return unsupported(args);
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("spectral_loss_forward", &spectral_loss_forward);
  m.def("spectral_loss_supports", &unsupported);
#ifdef DASHPOT_CUDA
  m.def("spectral_loss_forward_cuda", &spectral_loss_forward_cuda);
  m.def("spectral_loss_supports_cuda", &spectral_loss_supports_cuda);
#endif
}

}  // namespace dashpot::spectral
