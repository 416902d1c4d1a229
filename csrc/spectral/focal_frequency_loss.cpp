// focal_frequency_loss: input, target (N, C, H, W) -> loss () or (N, C), slope (N, C, H, W).
//
// The transform is linear, so x - y is transformed once. An item is one patch (h, w): its rows are
// transformed a group at a time (a lane each) into a half spectrum (h, w/2 + 1) in the cache;
// columns need no transposition (a lane each, as they lie), and while a group of them is in the
// first-level cache it is weighted and transformed back. The division by the largest weight is left
// to the end: it is one factor of the plane's loss and slope, or, for batch_matrix, of everything.
//
// Sides that no transform here takes go through PyTorch's FFT: one pass over a patch's spectrum
// weighs it, and divides it by the largest weight while it is in the cache.
//
// With D the spectrum, P = |D|^2: loss = sum w P / (numel top), slope = 2 / (numel top) idft(w D).
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "spectral/cuda.h"
#include "spectral/whole.h"

namespace dashpot::spectral {
namespace {

// Spectra of a group of rows as real and imaginary parts: parts (2, m + 1) vectors.
template <class T>
struct Unpack {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* data, const RealPlan<T>* plan, T* parts) {
    constexpr int kWidth = kLanes<T, isa>;
    const int64_t m = plan->n / 2;
    T* imaginary = parts + (m + 1) * kWidth;
    for (int64_t k = 0; 2 * k <= m; ++k) {
      const auto [low, high] = split<T, isa>(data, *plan, k);
      store<T, isa>(parts + (m - k) * kWidth, high.re);
      store<T, isa>(imaginary + (m - k) * kWidth, high.im);
      store<T, isa>(parts + k * kWidth, low.re);
      store<T, isa>(imaginary + k * kWidth, low.im);
    }
  }
};

template <class T>
struct Pack {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* parts, const RealPlan<T>* plan, T* data) {
    using V = Vec<T, isa>;
    constexpr int kWidth = kLanes<T, isa>;
    const int64_t m = plan->n / 2;
    const T* imaginary = parts + (m + 1) * kWidth;
    for (int64_t k = 0; 2 * k <= m; ++k) {
      // Bins 0 and m of a real signal are real.
      const Complex<V> low{load<T, isa>(parts + k * kWidth),
                           k == 0 ? V{} : load<T, isa>(imaginary + k * kWidth)};
      const Complex<V> high{load<T, isa>(parts + (m - k) * kWidth),
                            k == 0 ? V{} : load<T, isa>(imaginary + (m - k) * kWidth)};
      merge<T, isa>(data, *plan, k, low, high);
    }
  }
};

// w of the powers, before the division by the largest.
template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> weights_of(Vec<T, isa> power, const FocalOptions& options) {
  using V = Vec<T, isa>;
  constexpr int kWidth = kLanes<T, isa>;
  V w = power;
  if (options.alpha == 0) {
    w = V{} + T(1);
  } else if (options.alpha == 1) {
    w = sqrt<T, isa>(power);
  } else if (options.alpha != 2) {
    for (int l = 0; l < kWidth; ++l) w[l] = std::pow(power[l], static_cast<T>(options.alpha / 2));
  }
  return options.log ? log<T, isa>(w + T(1)) : w;
}

// Columns [0, lanes) of a half spectrum: transformed, weighted, transformed back in `data`.
// totals: sum of h w P and largest w, per lane.
template <class T>
struct WeighColumns {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* data, int64_t h, const FocalOptions* options, const T* twice,
                                 T* totals) {
    using V = Vec<T, isa>;
    constexpr int kWidth = kLanes<T, isa>;
    V total{}, top{};
    for (int64_t i = 0; i < h; ++i) {
      T* at = data + 2 * kWidth * i;
      const V re = load<T, isa>(at), im = load<T, isa>(at + kWidth);
      const V power = re * re + im * im, w = weights_of<T, isa>(power, *options);
      total += w * power;
      top = w > top ? w : top;
      store<T, isa>(at, w * re);
      store<T, isa>(at + kWidth, w * im);
    }
    store<T, isa>(totals, total * load<T, isa>(twice));
    store<T, isa>(totals + kWidth, top);
  }
};

// `count` bins of a row of a spectrum that PyTorch's FFT made become w D; twice (count,): h.
// totals: sum of h w P and largest w, added to.
template <class T>
struct WeighWhole {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* x, int64_t rows, int64_t count, const FocalOptions* options,
                                 const T* twice, double* totals) {
    using V = Vec<T, isa>;
    using At = Interleaved<T, isa>;
    V top{};
    for (int64_t row = 0; row < rows; ++row, x += 2 * count) {
      V total{};
      for (int64_t k = 0; k < count; k += At::kWidth) {
        const V h = At::numbers(twice + k, count - k);
        Complex<V> z = At::load(x + 2 * k, count - k);
        const V power = z.re * z.re + z.im * z.im;
        const V w = h > V{} ? weights_of<T, isa>(power, *options) : V{};  // 0 beyond the row
        total += h * w * power;
        top = w > top ? w : top;
        z.re *= w, z.im *= w;
        At::store(x + 2 * k, z, count - k);
      }
      totals[0] += sum_lanes<T, isa>(total);
    }
    for (int i = 0; i < At::kWidth; ++i) {
      totals[1] = static_cast<double>(top[i]) > totals[1] ? static_cast<double>(top[i]) : totals[1];
    }
  }
};

template <class T>
struct Multiply {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* x, int64_t count, T factor) {
    for (int64_t i = 0; i < count; ++i) x[i] *= factor;
  }
};

// A group of columns between the plane (two parts, h rows of `stride`) and interleaved vectors.
template <class T, bool back>
struct MoveColumns {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* re, T* im, int64_t stride, int64_t h, T* data) {
    constexpr int kWidth = kLanes<T, isa>;
    for (int64_t i = 0; i < h; ++i) {
      T* at = data + 2 * kWidth * i;
      if (back) {
        store<T, isa>(re + i * stride, load<T, isa>(at));
        store<T, isa>(im + i * stride, load<T, isa>(at + kWidth));
      } else {
        store<T, isa>(at, load<T, isa>(re + i * stride));
        store<T, isa>(at + kWidth, load<T, isa>(im + i * stride));
      }
    }
  }
};

template <class T, class In>
struct Focal {
  const In *x, *y;
  T* slope;                             // null where not wanted
  int64_t factor, height, width, h, w;  // of the image, of a patch
  FocalOptions options;
  double share;  // 1 / elements of a loss

  int64_t patches() const { return factor * factor; }
  int64_t offset(int64_t item) const {
    const int64_t image = item / patches(), patch = item % patches();
    return (image * height + patch / factor * h) * width + patch % factor * w;
  }

  // Bytes of a thread: a half spectrum, a group of rows or columns, and the rows' spectra.
  static int64_t scratch_bytes(int64_t h, int64_t w) {
    const int64_t lane = lanes<T>(), bins = w / 2 + 1, stride = (bins + lane - 1) / lane * lane;
    return room<T>(2 * h * stride) + room<T>(std::max(w, 2 * h) * lane) + room<T>(2 * bins * lane);
  }

  // Returns {sum of w P, largest w} of a patch.
  std::pair<double, double> run(int64_t item, Share share) const {
    const RealPlan<T>& rows = RealPlan<T>::of(static_cast<int>(w));
    const FftPlan<T>& columns = FftPlan<T>::of(static_cast<int>(h));
    const int64_t lane = lanes<T>(), bins = w / 2 + 1, stride = (bins + lane - 1) / lane * lane;
    T* plane = share.take<T>(2 * h * stride);
    T* data = share.take<T>(std::max(w, 2 * h) * lane);
    T* parts = share.take<T>(2 * bins * lane);
    T *re = plane, *im = plane + h * stride;
    const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(h * w)));
    for (int64_t first = 0; first < h; first += lane) {
      const int64_t count = std::min(lane, h - first);
      const In *from_x[kMaxLanes], *from_y[kMaxLanes];
      T *to_re[kMaxLanes], *to_im[kMaxLanes];
      for (int64_t l = 0; l < count; ++l) {
        from_x[l] = x + offset(item) + (first + l) * width;
        from_y[l] = y + offset(item) + (first + l) * width;
        to_re[l] = re + (first + l) * stride, to_im[l] = im + (first + l) * stride;
      }
      const T* no_window = nullptr;
      run_on_isa<LoadRows<T, In>>(static_cast<const In* const*>(from_x),
                                  static_cast<const In* const*>(from_y), count, w, scale, no_window,
                                  data);
      forward_transform(data, rows);
      run_on_isa<Unpack<T>>(static_cast<const T*>(data), &rows, parts);
      for (const auto& [part, to] :
           {std::pair{parts, to_re}, std::pair{parts + bins * lane, to_im}}) {
        run_on_isa<StoreRows<T, false>>(static_cast<const T*>(part), bins, T(1), no_window,
                                        static_cast<T* const*>(to), count);
      }
    }
    for (int64_t i = 0; i < 2 * h; ++i) {  // lanes beyond the last column
      std::fill(plane + i * stride + bins, plane + (i + 1) * stride, T(0));
    }
    double total = 0, top = 0;
    for (int64_t k = 0; k < stride; k += lane) {
      T twice[kMaxLanes], totals[2 * kMaxLanes];
      for (int64_t l = 0; l < lane; ++l) {
        twice[l] = k + l == 0 || 2 * (k + l) == w ? T(1) : T(2);
      }
      run_on_isa<MoveColumns<T, false>>(re + k, im + k, stride, h, data);
      run_on_isa<Fft<T, false>>(data, &columns);
      run_on_isa<WeighColumns<T>>(data, h, &options, static_cast<const T*>(twice),
                                  static_cast<T*>(totals));
      for (int64_t l = 0; l < lane && k + l < bins; ++l) {
        total += static_cast<double>(totals[l]);
        top = std::max(top, static_cast<double>(totals[lane + l]));
      }
      if (!slope) continue;
      run_on_isa<Fft<T, true>>(data, &columns);
      run_on_isa<MoveColumns<T, true>>(re + k, im + k, stride, h, data);
    }
    if (slope) rows_back(item, rows, plane, stride, data, parts, options.batch ? 1 : top);
    return {total, top};
  }

  void rows_back(int64_t item, const RealPlan<T>& rows, const T* plane, int64_t stride, T* data,
                 T* parts, double top) const {
    const int64_t lane = lanes<T>(), bins = w / 2 + 1;
    const double scale = top > 0 ? 2 * share / (std::sqrt(static_cast<double>(h * w)) * top) : 0;
    const T *no_window = nullptr, *const *no_rows = nullptr;
    for (int64_t first = 0; first < h; first += lane) {
      const int64_t count = std::min(lane, h - first);
      for (int part = 0; part < 2; ++part) {
        const T* from[kMaxLanes];
        for (int64_t l = 0; l < count; ++l) from[l] = plane + (part * h + first + l) * stride;
        run_on_isa<LoadRows<T, T>>(static_cast<const T* const*>(from), no_rows, count, bins, T(1),
                                   no_window, parts + part * bins * lane);
      }
      run_on_isa<Pack<T>>(static_cast<const T*>(parts), &rows, data);
      inverse_transform(data, rows);
      T* to[kMaxLanes];
      for (int64_t l = 0; l < count; ++l) to[l] = slope + offset(item) + (first + l) * width;
      run_on_isa<StoreRows<T, false>>(static_cast<const T*>(data), w, static_cast<T>(scale),
                                      no_window, static_cast<T* const*>(to), count);
    }
  }
};

// Sums and largest weights of the patches, (items,), to losses. Returns what slopes, divided by no
// largest weight yet, are to be multiplied with for batch_matrix.
template <class T>
double finish(const std::vector<std::pair<double, double>>& found, const FocalOptions& options,
              int64_t patches, bool mean, double share, T* loss) {
  const int64_t items = static_cast<int64_t>(found.size());
  double top = 0;
  for (const auto& one : found) top = std::max(top, one.second);
  std::vector<double> losses(mean ? 1 : items / patches, 0.0);
  for (int64_t item = 0; item < items; ++item) {
    const double by = options.batch ? top : found[item].second;
    losses[mean ? 0 : item / patches] += by > 0 ? found[item].first / by : 0.0;
  }
  for (size_t i = 0; i < losses.size(); ++i) loss[i] = static_cast<T>(losses[i] * share);
  return top > 0 ? 1 / top : 0.0;
}

template <class T, class In>
void run_focal(const Focal<T, In>& focal, int64_t images, bool mean, int threads,
               const Scratch& scratch, T* loss) {
  const int64_t items = images * focal.patches();
  std::vector<std::pair<double, double>> found(items);
  parallel_for(items, threads,
               [&](int64_t item) { found[item] = focal.run(item, scratch.mine()); });
  const double scale = finish(found, focal.options, focal.patches(), mean, focal.share, loss);
  if (!focal.slope || !focal.options.batch) return;
  const int64_t plane = focal.height * focal.width;
  parallel_for(images, threads, [&](int64_t image) {
    run_on_isa<Multiply<T>>(focal.slope + image * plane, plane, static_cast<T>(scale));
  });
}

// What both backends allocate and check.
struct Outputs {
  Dtype type;
  bool mean, wanted;
  int64_t images, height, width, factor;  // images: N C
  Tensor loss, slope;
  double share;  // 1 / elements of a loss

  Outputs(const Tensor& input, const Tensor& target, int64_t patch_factor,
          const std::string& reduction, const std::vector<bool>& wants)
      : type(input.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32),
        mean(reduction == "mean"),
        wanted(wants[0] || wants[1]),
        images(input.size(0) * input.size(1)),
        height(input.size(2)),
        width(input.size(3)),
        factor(patch_factor),
        share(1.0 / static_cast<double>(mean ? input.numel : height * width)) {
    if (target.dtype != input.dtype || target.numel != input.numel || height % factor ||
        width % factor) {
      throw std::invalid_argument("target: expected the input's dtype and shape, in whole patches");
    }
    loss = mean ? input.new_empty({}, type) : input.new_empty({input.size(0), input.size(1)}, type);
    slope = input.new_empty({0}, type);
  }

  int64_t patches() const { return factor * factor; }
  int64_t h() const { return height / factor; }
  int64_t w() const { return width / factor; }
  bool smooth() const { return is_smooth(h()) && is_real_length(w()); }
};

// PyTorch's transforms of all patches, (items, h, F, 2), and of what became of them.
Tensor patch_spectra(const Outputs& out, const Tensor& input, const Tensor& target) {
  const auto patches = [&](const Tensor& image) {
    Tensor cut = image;
    cut.object = image.object.attr("view")(out.images, out.factor, out.h(), out.factor, out.w())
                     .attr("permute")(0, 1, 3, 2, 4);
    return cut;
  };
  const Tensor other = patches(target);
  return transformed("rfft2", patches(input), &other, out.type, "ortho");
}

Tensor patches_back(const Outputs& out, const Tensor& input, const Tensor& spectra) {
  const py::object size = py::make_tuple(out.h(), out.w());
  const Tensor cut = transformed_back("irfft2", spectra, size, "ortho");
  return Tensor::from(
      cut.object.attr("permute")(0, 1, 3, 2, 4).attr("reshape")(input.object.attr("shape")));
}

template <class T>
void weigh_whole(const Outputs& out, T* spectra, const FocalOptions& options, int threads,
                 T* loss) {
  const int64_t items = out.images * out.patches(), bins = out.w() / 2 + 1;
  const int64_t size = out.h() * bins;
  std::vector<T> twice(bins, T(2));
  twice[0] = 1;
  if (out.w() % 2 == 0) twice[bins - 1] = 1;
  std::vector<std::pair<double, double>> found(items);
  parallel_for(items, threads, [&](int64_t item) {
    double totals[2] = {0, 0};
    T* own = spectra + 2 * item * size;
    run_on_isa<WeighWhole<T>>(own, out.h(), bins, &options, static_cast<const T*>(twice.data()),
                              static_cast<double*>(totals));
    found[item] = {totals[0], totals[1]};
    const double by = options.batch ? 1 : totals[1];
    const T factor = static_cast<T>(by > 0 ? 2 * out.share / by : 0.0);
    if (out.wanted) run_on_isa<Multiply<T>>(own, 2 * size, factor);
  });
  const double scale = finish(found, options, out.patches(), out.mean, out.share, loss);
  if (!out.wanted || !options.batch) return;
  parallel_for(items, threads, [&](int64_t item) {
    run_on_isa<Multiply<T>>(spectra + 2 * item * size, 2 * size, static_cast<T>(scale));
  });
}

std::tuple<Tensor, Tensor> focal_frequency_loss_forward(const Tensor& input, const Tensor& target,
                                                        const std::optional<Tensor>&, double alpha,
                                                        bool log_matrix, bool batch_matrix,
                                                        int64_t patch_factor,
                                                        const std::string& reduction,
                                                        const std::vector<bool>& wants) {
  Outputs out(input, target, patch_factor, reduction, wants);
  const FocalOptions options{alpha, log_matrix, batch_matrix};
  const int threads = num_threads();
  if (!out.smooth() || out.h() > kLongest) {
    const Tensor spectra = patch_spectra(out, input, target);
    if (out.type == Dtype::kFloat64) {
      weigh_whole(out, spectra.as<double>(), options, threads, out.loss.as<double>());
    } else {
      weigh_whole(out, spectra.as<float>(), options, threads, out.loss.as<float>());
    }
    if (out.wanted) out.slope = patches_back(out, input, spectra);
    return {out.loss, out.slope};
  }
  if (out.wanted) out.slope = empty_like(input, out.type);
  dispatch_floating(input.dtype, [&](auto element) {
    using In = decltype(element);
    using T = std::conditional_t<std::is_same_v<In, double>, double, float>;
    const Scratch scratch(input, threads, Focal<T, In>::scratch_bytes(out.h(), out.w()));
    const py::gil_scoped_release release;
    const Focal<T, In> focal{
        input.as<In>(), target.as<In>(), out.wanted ? out.slope.as<T>() : nullptr,
        patch_factor,   out.height,      out.width,
        out.h(),        out.w(),         options,
        out.share};
    run_focal(focal, out.images, out.mean, threads, scratch, out.loss.as<T>());
  });
  return {out.loss, out.slope};
}

std::optional<std::string> focal_frequency_loss_supports(const py::args& args) {
  if (!args[2].is_none()) return "takes no weight";
  if (py::cast<int64_t>(args[0].attr("shape")[py::int_(0)]) == 0) return "takes no empty batch";
  return std::nullopt;
}

#ifdef DASHPOT_CUDA
std::tuple<Tensor, Tensor> focal_frequency_loss_forward_cuda(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>&, double alpha,
    bool log_matrix, bool batch_matrix, int64_t patch_factor, const std::string& reduction,
    const std::vector<bool>& wants) {
  Outputs out(input, target, patch_factor, reduction, wants);
  FocalCall call{input.data, target.data, nullptr,  nullptr, input.dtype,
                 out.images, out.factor,  out.h(),  out.w(), {alpha, log_matrix, batch_matrix},
                 out.mean,   out.wanted,  out.share};
  Tensor spectra;
  if (out.smooth() && focal_in_block(out.h(), out.w())) {
    if (out.wanted) out.slope = empty_like(input, out.type);
    call.slope = out.wanted ? out.slope.as<float>() : nullptr;
  } else {
    spectra = patch_spectra(out, input, target);
    call.spectra = spectra.as<float>();
  }
  const Tensor scratch = input.new_empty({focal_scratch(call)}, Dtype::kFloat32);
  const Place place = place_of(input);
  focal_cuda(call, scratch.as<float>(), out.loss.as<float>(), place.device, place.stream);
  if (call.spectra && out.wanted) out.slope = patches_back(out, input, spectra);
  return {out.loss, out.slope};
}

std::optional<std::string> focal_frequency_loss_supports_cuda(const py::args& args) {
  if (py::str(args[0].attr("dtype")).equal(py::str("torch.float64"))) return "has no float64";
  return focal_frequency_loss_supports(args);
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("focal_frequency_loss_forward", &focal_frequency_loss_forward);
  m.def("focal_frequency_loss_supports", &focal_frequency_loss_supports);
#ifdef DASHPOT_CUDA
  m.def("focal_frequency_loss_forward_cuda", &focal_frequency_loss_forward_cuda);
  m.def("focal_frequency_loss_supports_cuda", &focal_frequency_loss_supports_cuda);
#endif
}

}  // namespace dashpot::spectral
