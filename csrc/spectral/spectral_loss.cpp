// spectral_loss: input, target (rows, n) -> loss () or (rows,), slopes (rows, n).
//
// Pairs: a group of rows (a lane each) is loaded, transformed, compared, its slopes transformed
// back and stored; nothing but the signals and the slopes leaves the cache. "complex" transforms x
// - y alone. Batch averages: every group's magnitudes are summed over its rows, the spectra kept;
// when all groups are done, bins become coefficients (float64), and the kept spectra slopes.
//
// Group sums are float32, sums of groups float64 in the groups' order: any number of threads gives
// the same bits.
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "spectral/cuda.h"
#include "spectral/options.h"
#include "spectral/rows.h"

namespace dashpot::spectral {
namespace {

// |z| without overflow or underflow on the way.
template <class T, Isa isa, class V = Vec<T, isa>>
DASHPOT_INLINE V modulus(Complex<V> z) {
  const V a = z.re < V{} ? -z.re : z.re, b = z.im < V{} ? -z.im : z.im;
  const V large = a > b ? a : b, small = a > b ? b : a;
  const V ratio = large > V{} ? small / large : V{};
  return large * sqrt_lanes<T, isa>(T(1) + ratio * ratio);
}

// 1 / |z|, 0 where it would not be finite.
template <class T, Isa isa, class V = Vec<T, isa>>
DASHPOT_INLINE V inverse_or_zero(V modulus) {
  constexpr T least = sizeof(T) == 8 ? T(2.3e-308) : T(1.2e-38);
  return modulus >= V{} + least ? T(1) / modulus : V{};
}

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
  struct Bin {
    using V = Vec<T, isa>;
    Complex<V> x, y;

    // Returns w * rho and leaves the slopes' spectra in x and y.
    DASHPOT_INLINE V compare(const SpectralOptions& o, T weight, T slope) {
      V level = o.power() ? x.re * x.re + x.im * x.im : modulus<T, isa>(x);
      if (o.kind == kComplex) {
        const V factor = o.l1 ? slope * inverse_or_zero<T, isa>(level) : V{} + T(2) * slope;
        x.re *= factor, x.im *= factor;
        return weight * (o.l1 ? level : level * level);
      }
      V other = o.power() ? y.re * y.re + y.im * y.im : modulus<T, isa>(y);
      V dx = o.power() ? V{} + T(2) : inverse_or_zero<T, isa>(level);
      V dy = o.power() ? V{} + T(2) : inverse_or_zero<T, isa>(other);
      V gap;
      if (o.log()) {
        level += T(o.eps), other += T(o.eps);
        gap = log_lanes<T, isa>(level) - log_lanes<T, isa>(other);
        dx /= level, dy /= other;
      } else {
        gap = level - other;
      }
      const V sign = gap > V{} ? V{} + T(1) : gap < V{} ? V{} - T(1) : V{};
      const V factor = slope * (o.l1 ? sign : T(2) * gap);
      dx *= factor, dy *= -factor;
      x.re *= dx, x.im *= dx, y.re *= dy, y.im *= dy;
      return weight * (o.l1 ? sign * gap : gap * gap);
    }
  };

  template <Isa isa>
  static DASHPOT_INLINE void run(T* x, T* y, const PairTask<T>* task, T* loss) {
    using V = Vec<T, isa>;
    const RealPlan<T>& plan = *task->plan;
    const int64_t m = plan.n / 2;
    const SpectralOptions o = task->options;
    V total{};
    for (int64_t k = 0; 2 * k <= m; ++k) {
      Bin<isa> low{}, high{};
      std::tie(low.x, high.x) = split<T, isa>(x, plan, k);
      if (y != nullptr) std::tie(low.y, high.y) = split<T, isa>(y, plan, k);
      const T* weight = task->loss_weights;
      const T* slope = task->slope_weights;
      total += low.compare(o, weight[k], slope[k]);
      const V more = high.compare(o, weight[m - k], slope[m - k]);
      if (2 * k != m) total += more;  // else it is the same bin
      if (task->want_x) merge<T, isa>(x, plan, k, low.x, high.x);
      if (y != nullptr && task->want_y) merge<T, isa>(y, plan, k, low.y, high.y);
    }
    store<T, isa>(loss, total);
  }
};

// Sums over a group's rows of |X_k| or |X_k|^2: sums[k], k <= m. levels: (m + 1) vectors of
// scratch.
template <class T>
struct SumLevels {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* x, const RealPlan<T>* plan, bool power, T* levels,
                                 T* sums) {
    using V = Vec<T, isa>;
    constexpr int kWidth = kLanes<T, isa>;
    const int64_t m = plan->n / 2;
    const auto level = [&](Complex<V> z) __attribute__((always_inline)) {
      return power ? z.re * z.re + z.im * z.im : modulus<T, isa>(z);
    };
    for (int64_t k = 0; 2 * k <= m; ++k) {
      const auto [low, high] = split<T, isa>(x, *plan, k);
      store<T, isa>(levels + k * kWidth, level(low));
      store<T, isa>(levels + (m - k) * kWidth, level(high));
    }
    for (int64_t k = 0; k <= m; k += kWidth) {
      V value[kWidth];
      const int64_t end = m + 1 - k < kWidth ? m + 1 - k : kWidth;
      for (int i = 0; i < kWidth; ++i) {
        value[i] = load<T, isa>(levels + (i < end ? k + i : m) * kWidth);
      }
      Transpose<T, isa>::run(value);
      for (int half = kWidth / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) value[i] += value[i + half];
      }
      for (int64_t i = 0; i < end; ++i) sums[k + i] = value[0][i];
    }
  }
};

// x, a group's spectra, becomes its slopes' spectra: factor_k X_k / |X_k|, or 2 factor_k X_k.
template <class T>
struct ScaleSpectra {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* x, const RealPlan<T>* plan, bool power, const T* factors) {
    using V = Vec<T, isa>;
    const int64_t m = plan->n / 2;
    const auto scale = [&](Complex<V>& z, T factor) __attribute__((always_inline)) {
      const V by =
          power ? V{} + T(2) * factor : factor * inverse_or_zero<T, isa>(modulus<T, isa>(z));
      z.re *= by, z.im *= by;
    };
    for (int64_t k = 0; 2 * k <= m; ++k) {
      auto [low, high] = split<T, isa>(x, *plan, k);
      scale(low, factors[k]);
      scale(high, factors[m - k]);
      merge<T, isa>(x, *plan, k, low, high);
    }
  }
};

template <class T>
std::vector<T> narrowed(const std::vector<double>& values) {
  return std::vector<T>(values.begin(), values.end());
}

template <class T, class In>
struct Signals {
  const In *x, *y;       // (batch, channels, n)
  T *slope_x, *slope_y;  // null where not wanted
  int64_t batch_x, batch_y, channels, n;
};

template <class T, class In>
void pairs(const Signals<T, In>& s, const SpectralOptions& options, BinWeights weights, bool mean,
           int threads, T* loss) {
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
    T* at_x = scratch<T>(0, n * width);
    T* at_y = options.kind == kComplex ? nullptr : scratch<T>(1, n * width);
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

// One side of the batch average: groups of rows of one channel, their sums and kept spectra.
template <class T, class In>
struct Side {
  const In* from;
  T* slope;
  int64_t batch, channels, n, width, groups;
  std::vector<T> sums;  // (channels, groups, F)
  // (channels, groups, n, width), in the slope's own memory where the rows fill it group by group.
  T* kept = nullptr;
  std::unique_ptr<T, void (*)(void*)> own{nullptr, std::free};

  Side(const In* x, T* to, int64_t b, int64_t c, int64_t length)
      : from(x),
        slope(to),
        batch(b),
        channels(c),
        n(length),
        width(lanes<T>()),
        groups((b + width - 1) / width),
        sums(c * groups * (length / 2 + 1)) {
    if (slope == nullptr) return;
    kept = slope;
    if (channels == 1 && batch % width == 0) return;
    own.reset(static_cast<T*>(std::malloc(items() * n * width * sizeof(T))));
    if (!own) throw std::bad_alloc();
    kept = own.get();
  }

  int64_t items() const { return channels * groups; }
  int64_t row(int64_t item, int64_t lane) const {
    return ((item % groups * width + lane) * channels + item / groups) * n;
  }
  int64_t count(int64_t item) const { return std::min(width, batch - item % groups * width); }

  void transform(int64_t item, const SpectralOptions& options, const RealPlan<T>& plan) {
    const In* rows[kMaxLanes];
    for (int64_t l = 0; l < count(item); ++l) rows[l] = from + row(item, l);
    T* data = kept ? kept + item * n * width : scratch<T>(0, n * width);
    const In* const* none = nullptr;
    run_on_isa<LoadRows<T, In>>(rows, none, count(item), n, static_cast<T>(options.scale), nullptr,
                                data);
    forward_transform(data, plan);
    run_on_isa<SumLevels<T>>(data, &plan, options.power(), scratch<T>(1, (n / 2 + 1) * width),
                             sums.data() + item * (n / 2 + 1));
  }

  void transform_back(int64_t item, const SpectralOptions& options, const RealPlan<T>& plan,
                      const std::vector<T>& factors) {
    T* rows[kMaxLanes];
    for (int64_t l = 0; l < count(item); ++l) rows[l] = slope + row(item, l);
    T* data = scratch<T>(0, n * width);
    std::copy_n(kept + item * n * width, n * width, data);
    run_on_isa<ScaleSpectra<T>>(data, &plan, options.power(),
                                factors.data() + item / groups * (n / 2 + 1));
    inverse_transform(data, plan);
    run_on_isa<StoreRows<T, false>>(data, n, T(1), nullptr, rows, count(item));
  }

  double mean(int64_t channel, int64_t k) const {
    double total = 0;
    for (int64_t g = 0; g < groups; ++g) {
      total += static_cast<double>(sums[(channel * groups + g) * (n / 2 + 1) + k]);
    }
    return total / static_cast<double>(batch);
  }
};

template <class T, class In>
void batch_means(const Signals<T, In>& s, const SpectralOptions& options, const BinWeights& weights,
                 int threads, T* loss) {
  const RealPlan<T>& plan = RealPlan<T>::of(static_cast<int>(s.n));
  Side<T, In> x(s.x, s.slope_x, s.batch_x, s.channels, s.n);
  Side<T, In> y(s.y, s.slope_y, s.batch_y, s.channels, s.n);
  parallel_for(x.items() + y.items(), threads, [&](int64_t item) {
    item < x.items() ? x.transform(item, options, plan)
                     : y.transform(item - x.items(), options, plan);
  });
  const int64_t bins = s.n / 2 + 1;
  const Distance distance{options.l1};
  std::vector<T> factors_x(s.channels * bins), factors_y(s.channels * bins);
  double total = 0;
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t k = 0; k < bins; ++k) {
      double u = x.mean(c, k), v = y.mean(c, k), du = 1, dv = 1;
      if (options.log()) {
        du = 1 / (u + options.eps), dv = 1 / (v + options.eps);
        u = std::log(u + options.eps), v = std::log(v + options.eps);
      }
      total += weights.loss[k] * distance.value(u - v);
      const double factor = weights.slope[k] * distance.slope(u - v) / s.channels;
      factors_x[c * bins + k] = static_cast<T>(factor * du / static_cast<double>(s.batch_x));
      factors_y[c * bins + k] = static_cast<T>(-factor * dv / static_cast<double>(s.batch_y));
    }
  }
  *loss = static_cast<T>(total / static_cast<double>(s.channels));
  const int64_t of_x = s.slope_x ? x.items() : 0, of_y = s.slope_y ? y.items() : 0;
  parallel_for(of_x + of_y, threads, [&](int64_t item) {
    item < of_x ? x.transform_back(item, options, plan, factors_x)
                : y.transform_back(item - of_x, options, plan, factors_y);
  });
}

// What both backends allocate and check.
struct Outputs {
  Dtype type;
  Tensor loss, slope_x, slope_y;
  int64_t batch_x, batch_y, channels, n;
  bool mean;

  Outputs(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
          bool batch_mean, const std::string& reduction, const std::vector<bool>& wants)
      : type(input.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32),
        n(input.size(-1)),
        mean(reduction == "mean") {
    const int64_t rows = input.numel / n;
    loss = input.new_empty({mean ? 1 : rows}, type);
    const py::object shape = mean ? py::object(py::tuple())
                                  : py::object(input.object.attr(
                                        "shape")[py::slice(py::none(), py::int_(-1), py::none())]);
    loss.object = loss.object.attr("view")(shape);
    slope_x = wants[0] ? empty_like(input, type) : input.new_empty({0}, type);
    slope_y = wants[1] ? empty_like(target, type) : target.new_empty({0}, type);
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

  std::tuple<Tensor, Tensor, Tensor> all() const { return {loss, slope_x, slope_y}; }
};

std::tuple<Tensor, Tensor, Tensor> spectral_loss_forward(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    const std::string& kind, const std::string& distance, bool batch_mean, double eps,
    const std::string& norm, bool onesided, const std::string& reduction,
    const std::vector<bool>& wants) {
  const Outputs out(input, target, weight, batch_mean, reduction, wants);
  const SpectralOptions options{kind_of(kind), distance == "l1", eps, norm_scale(norm, out.n)};
  BinWeights weights(out.n, onesided, options.scale);
  if (weight) {
    out.type == Dtype::kFloat64 ? weights.times(weight->as<double>())
                                : weights.times(weight->as<float>());
  }
  const int threads = num_threads();
  const py::gil_scoped_release release;
  dispatch_floating(input.dtype, [&](auto element) {
    using In = decltype(element);
    using T = std::conditional_t<std::is_same_v<In, double>, double, float>;
    const Signals<T, In> signals{input.as<In>(),
                                 target.as<In>(),
                                 wants[0] ? out.slope_x.as<T>() : nullptr,
                                 wants[1] ? out.slope_y.as<T>() : nullptr,
                                 out.batch_x,
                                 out.batch_y,
                                 out.channels,
                                 out.n};
    if (batch_mean) {
      batch_means(signals, options, weights, threads, out.loss.as<T>());
    } else {
      pairs(signals, options, weights, out.mean, threads, out.loss.as<T>());
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
  if (py::cast<bool>(args[5]) && py::cast<std::string>(args[3]) == "complex") {
    return "has no batch average of complex spectra";
  }
  return std::nullopt;
}

std::optional<std::string> spectral_loss_supports(const py::args& args) {
  const int64_t n = py::cast<int64_t>(args[0].attr("shape")[py::int_(-1)]);
  if (!is_real_length(n)) {
    return "takes even lengths up to " + std::to_string(kLongest) +
           " without prime factors beyond 5, got " + std::to_string(n);
  }
  // One lane per row: below this most of a vector would be empty.
  if (n > 512 && py::cast<int64_t>(args[0].attr("numel")()) < 4 * n) {
    return "takes at least 4 rows longer than 512";
  }
  return unsupported(args);
}

#ifdef DASHPOT_CUDA
std::tuple<Tensor, Tensor, Tensor> spectral_loss_forward_cuda(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    const std::string& kind, const std::string& distance, bool batch_mean, double eps,
    const std::string& norm, bool onesided, const std::string& reduction,
    const std::vector<bool>& wants) {
  const Outputs out(input, target, weight, batch_mean, reduction, wants);
  const SpectralCall call{{input.data, wants[0] ? out.slope_x.as<float>() : nullptr, out.batch_x},
                          {target.data, wants[1] ? out.slope_y.as<float>() : nullptr, out.batch_y},
                          out.channels,
                          out.n,
                          input.dtype,
                          {kind_of(kind), distance == "l1", eps, norm_scale(norm, out.n)},
                          onesided,
                          out.mean,
                          weight ? weight->as<float>() : nullptr};
  const int64_t size = batch_mean ? spectral_batch_scratch(call) : spectral_pairs_scratch(call);
  const Tensor scratch = input.new_empty({size}, Dtype::kFloat32);
  const Place place = place_of(input);
  (batch_mean ? spectral_batch_cuda : spectral_pairs_cuda)(
      call, scratch.as<float>(), out.loss.as<float>(), place.device, place.stream);
  return out.all();
}

std::optional<std::string> spectral_loss_supports_cuda(const py::args& args) {
  if (py::str(args[0].attr("dtype")).equal(py::str("torch.float64"))) return "has no float64";
  const int64_t n = py::cast<int64_t>(args[0].attr("shape")[py::int_(-1)]);
  if (!is_real_length(n) || n > kLongestInBlock) {
    return "takes even lengths up to " + std::to_string(kLongestInBlock) +
           " without prime factors beyond 5, got " + std::to_string(n);
  }
  return unsupported(args);
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("spectral_loss_forward", &spectral_loss_forward);
  m.def("spectral_loss_supports", &spectral_loss_supports);
#ifdef DASHPOT_CUDA
  m.def("spectral_loss_forward_cuda", &spectral_loss_forward_cuda);
  m.def("spectral_loss_supports_cuda", &spectral_loss_supports_cuda);
#endif
}

}  // namespace dashpot::spectral
