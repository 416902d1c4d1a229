// multi_resolution_stft_loss: input, target (rows, T) -> loss (or terms (R, 3)), slopes.
//
// Frames are never in memory (but for lengths that no kernel here has, see stft_whole.h). Of an
// item (see stft.h) the samples (edges reflected) are laid out once, frames are taken from there a
// group at a time (a lane each), transformed, compared, and their slopes transformed back and
// overlap-added into the segment's part of the slope. Zeros around the window are appended instead:
// a shift changes no magnitude.
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "spectral/cuda.h"
#include "spectral/stft.h"
#include "spectral/stft_whole.h"

namespace dashpot::spectral {
namespace {

// Compares two groups of frames: sums (4, lanes), and the slopes' spectra of up to two channels.
template <class T>
struct CompareFrames {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* x, const T* y, const FrameTask<T>* task,
                                 const Channel* channels, int64_t count, T* first, T* second,
                                 T* sums) {
    using V = Vec<T, isa>;
    constexpr int kWidth = kLanes<T, isa>;
    const RealPlan<T>& plan = *task->plan;
    const int64_t m = plan.n / 2;
    V total[kSums] = {};
    for (int64_t k = 0; 2 * k <= m; ++k) {
      FrameBins<T, isa> low, high;
      std::tie(low.x, high.x) = split<T, isa>(x, plan, k);
      std::tie(low.y, high.y) = split<T, isa>(y, plan, k);
      low.compare(*task, total, T(1));
      high.compare(*task, total, T(2 * k == m ? 0 : 1));
      const T half = k == 0 ? T(1) : T(0.5);  // a term of the full sum, see merge
      if (count > 0) {
        merge<T, isa>(first, plan, k, low.slope(channels[0], half), high.slope(channels[0], half));
      }
      if (count > 1) {
        merge<T, isa>(second, plan, k, low.slope(channels[1], half), high.slope(channels[1], half));
      }
    }
    for (int i = 0; i < kSums; ++i) store<T, isa>(sums + i * kWidth, total[i]);
  }
};

template <class T, class In>
struct Frames {
  const StftCall& call;
  const In *x, *y;  // (rows, T)

  void run(Part<T>& part, int64_t row, int64_t segment, Share share) const {
    const Resolution& shape = part.shape;
    const int64_t width = lanes<T>(), n = shape.n_fft, count = part.frames_of(segment);
    const int64_t span = shape.span(count), wanted = static_cast<int64_t>(part.channels.size());
    T *samples_x = share.take<T>(span), *samples_y = share.take<T>(span);
    T *at_x = share.take<T>(n * width), *at_y = share.take<T>(n * width);
    T* to[2] = {share.take<T>(n * width), share.take<T>(n * width)};
    lay_out(x + row * call.t, call.t, shape, segment, span, samples_x);
    lay_out(y + row * call.t, call.t, shape, segment, span, samples_y);
    for (int64_t c = 0; c < wanted; ++c) std::fill_n(part.slope(row, segment, c), span, T(0));
    const FrameTask<T> task{part.plan, static_cast<T>(call.power_floor), call.l2,
                            call.weights[1] != 0, call.weights[2] != 0};
    double* sums = part.sums.data() + (row * shape.segments + segment) * kSums;
    const T* const* no_rows = nullptr;
    for (int64_t f = 0; f < count; f += width) {
      const int64_t group = std::min(width, count - f);
      const T* frames[kMaxLanes];
      for (const auto& [samples, data] : {std::pair{samples_x, at_x}, std::pair{samples_y, at_y}}) {
        for (int64_t l = 0; l < group; ++l) frames[l] = samples + (f + l) * shape.hop;
        run_on_isa<LoadRows<T, T>>(static_cast<const T* const*>(frames), no_rows, group,
                                   shape.length, T(1), static_cast<const T*>(part.window.data()),
                                   data);
        std::fill(data + shape.length * width, data + n * width, T(0));
        forward_transform(data, *part.plan);
      }
      for (int64_t c = 0; c == 0 || c < wanted; c += 2) {
        const int64_t two = std::min<int64_t>(2, wanted - c);
        T found[kSums * kMaxLanes];
        run_on_isa<CompareFrames<T>>(static_cast<const T*>(at_x), static_cast<const T*>(at_y),
                                     &task, static_cast<const Channel*>(part.channels.data() + c),
                                     two, to[0], to[1], static_cast<T*>(found));
        for (int64_t i = 0; i < kSums && c == 0; ++i) {
          for (int64_t l = 0; l < group; ++l) sums[i] += static_cast<double>(found[i * width + l]);
        }
        for (int64_t i = 0; i < two; ++i) {
          inverse_transform(to[i], *part.plan);
          T* added[kMaxLanes];
          for (int64_t l = 0; l < group; ++l) {
            added[l] = part.slope(row, segment, c + i) + (f + l) * shape.hop;
          }
          run_on_isa<StoreRows<T, true>>(static_cast<const T*>(to[i]), shape.length, T(1),
                                         static_cast<const T*>(part.window.data()),
                                         static_cast<T* const*>(added), group);
        }
      }
    }
  }
};

// Everything a call needs beside its outputs; made with the GIL held.
template <class T>
struct Work {
  std::vector<Part<T>> parts;
  std::vector<std::tuple<int64_t, int64_t, int64_t>> items;  // part, row, segment: in lanes
  std::vector<Tensor> memory;                                // the parts' slopes
  int64_t bytes = 0;                                         // of a thread's scratch

  Work(const StftCall& call, const Tensor& like, Dtype type, const std::vector<const T*>& windows,
       const std::vector<bool>& wants) {
    for (size_t r = 0; r < call.resolutions.size(); ++r) {
      const Resolution& shape = call.resolutions[r];
      Part<T> part;
      part.shape = shape;
      part.plan =
          is_real_length(shape.n_fft) ? &RealPlan<T>::of(static_cast<int>(shape.n_fft)) : nullptr;
      part.window = window_of<T>(shape.length, windows.empty() ? nullptr : windows[r]);
      for (const bool target : {false, true}) {
        if (!wants[target]) continue;
        for (const Channel& one : call.slopes(r, target)) part.channels.push_back(one);
      }
      part.span = shape.span(std::min(shape.segment, shape.frames));
      const int64_t count = call.rows * shape.segments;
      const int64_t channels = static_cast<int64_t>(part.channels.size());
      memory.push_back(like.new_empty({count * channels * part.span}, type));
      part.slopes = memory.back().as<T>();
      part.sums.assign(count * kSums, 0.0);
      for (int64_t row = 0; row < call.rows && part.plan; ++row) {
        for (int64_t s = 0; s < shape.segments; ++s) items.emplace_back(r, row, s);
      }
      const int64_t group = part.plan ? 4 * room<T>(shape.n_fft * lanes<T>()) : 0;
      bytes = std::max(bytes, 2 * room<T>(part.span) + group);
      parts.push_back(std::move(part));
    }
  }
};

template <class T, class In>
void run_stft(const StftCall& call, const In* x, const In* y, Work<T>& work, int threads,
              const Scratch& scratch, T* out, T* slope_x, T* slope_y) {
  std::vector<Part<T>>& parts = work.parts;
  const Frames<T, In> frames{call, x, y};
  parallel_for(static_cast<int64_t>(work.items.size()), threads, [&](int64_t item) {
    const auto& [r, row, segment] = work.items[item];
    frames.run(parts[r], row, segment, scratch.mine());
  });
  std::vector<double> losses(call.none ? call.examples : 1, 0.0);
  std::vector<std::vector<double>> factors;
  for (size_t r = 0; r < parts.size(); ++r) {
    factors.push_back(finish(call, parts[r], r, call.split ? out : nullptr, losses.data()));
  }
  for (size_t e = 0; !call.split && e < losses.size(); ++e) out[e] = static_cast<T>(losses[e]);
  parallel_for(call.rows, threads, [&](int64_t row) {
    if (slope_x) gather(call, parts, factors, row, false, slope_x);
    if (slope_y) gather(call, parts, factors, row, true, slope_y);
  });
}

using Outputs = std::tuple<Tensor, Tensor, Tensor>;  // loss or terms, slopes

Outputs multi_resolution_stft_loss_forward(
    const Tensor& input, const Tensor& target, const std::vector<Tensor>& windows,
    const std::vector<Tensor>&, int64_t channels, const std::vector<int64_t>& n_ffts,
    const std::vector<int64_t>& hops, const std::vector<int64_t>& win_lengths,
    const std::vector<double>& weights, double power_floor, const std::string& mag_distance,
    const std::string& sc_reduction, const std::string& reduction, bool, bool split,
    const std::vector<bool>& wants) {
  const int64_t rows = input.size(0), t = input.size(1), examples = rows / channels;
  const Dtype type = input.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const int64_t count = static_cast<int64_t>(n_ffts.size());
  if (target.dtype != input.dtype || target.numel != input.numel) {
    throw std::invalid_argument("target: expected the input's dtype and shape");
  }
  StftCall call{{},
                weights,
                power_floor,
                mag_distance == "l2",
                sc_reduction == "batch",
                reduction == "sum",
                reduction == "none",
                split,
                rows,
                t,
                examples,
                channels};
  for (int64_t r = 0; r < count; ++r) {
    const int64_t frames = frames_of(t, n_ffts[r], hops[r]), segment = segment_of(n_ffts[r]);
    call.resolutions.push_back(
        {n_ffts[r], hops[r], win_lengths[r], frames, segment, (frames + segment - 1) / segment});
    if (n_ffts[r] / 2 >= t || win_lengths[r] > n_ffts[r]) {
      throw std::invalid_argument("n_ffts: expected n_fft // 2 < T and windows no longer than it");
    }
  }
  const Tensor out = split       ? call.none ? input.new_empty({count, 3, examples}, type)
                                             : input.new_empty({count, 3}, type)
                     : call.none ? input.new_empty({examples}, type)
                                 : input.new_empty({}, type);
  const auto slope = [&](bool wanted) {
    if (!wanted) return input.new_empty({0}, type);
    return split ? input.new_empty({3 * count, rows, t}, type) : input.new_empty({rows, t}, type);
  };
  const Tensor slope_x = slope(wants[0]), slope_y = slope(wants[1]);
  const int threads = num_threads();
  dispatch_floating(input.dtype, [&](auto element) {
    using In = decltype(element);
    using T = std::conditional_t<std::is_same_v<In, double>, double, float>;
    std::vector<const T*> given;
    for (const Tensor& window : windows) {
      if (window.dtype != type) throw std::invalid_argument("windows: expected the work dtype");
      given.push_back(window.as<T>());
    }
    Work<T> work(call, input, type, given, wants);
    const Scratch scratch(input, threads, work.bytes);
    for (Part<T>& part : work.parts) {
      if (!part.plan) {
        run_whole(call, input.as<In>(), target.as<In>(), part, input, type, threads, scratch);
      }
    }
    const py::gil_scoped_release release;
    run_stft<T, In>(call, input.as<In>(), target.as<In>(), work, threads, scratch, out.as<T>(),
                    wants[0] ? slope_x.as<T>() : nullptr, wants[1] ? slope_y.as<T>() : nullptr);
  });
  return {out, slope_x, slope_y};
}

// What neither backend takes.
std::optional<std::string> unsupported(const py::args& args) {
  if (py::len(args[3]) > 0) return "takes no filters";
  if (py::cast<bool>(args[13])) return "has no scale_invariance";
  return std::nullopt;
}

#ifdef DASHPOT_CUDA
Outputs multi_resolution_stft_loss_forward_cuda(
    const Tensor& input, const Tensor& target, const std::vector<Tensor>& windows,
    const std::vector<Tensor>&, int64_t channels, const std::vector<int64_t>& n_ffts,
    const std::vector<int64_t>& hops, const std::vector<int64_t>& win_lengths,
    const std::vector<double>& weights, double power_floor, const std::string& mag_distance,
    const std::string& sc_reduction, const std::string& reduction, bool, bool,
    const std::vector<bool>& wants) {
  const int64_t rows = input.size(0), t = input.size(1), examples = rows / channels;
  const bool none = reduction == "none";
  StftDeviceCall call{input.data,
                      target.data,
                      input.dtype,
                      rows,
                      t,
                      n_ffts,
                      hops,
                      win_lengths,
                      {},
                      {},
                      static_cast<float>(power_floor),
                      mag_distance == "l2",
                      {}};
  for (size_t r = 0; r < n_ffts.size(); ++r) {
    const double share = 1.0 / static_cast<double>(n_ffts.size());
    const double bins =
        static_cast<double>((n_ffts[r] / 2 + 1) * frames_of(t, n_ffts[r], hops[r])) *
        static_cast<double>(none ? channels : rows);
    const double each = reduction == "sum" ? share : share / bins;
    call.terms.push_back({static_cast<float>(weights[0] * share),
                          static_cast<float>(weights[1] * each),
                          static_cast<float>(weights[2] * each), examples, channels, none,
                          sc_reduction == "batch" && !none});
    call.windows.push_back(windows.empty() ? nullptr : windows[r].as<float>());
    call.whole.push_back(!is_real_length(n_ffts[r]) || n_ffts[r] > kLongestInBlock);
  }
  const Tensor loss =
      none ? input.new_empty({examples}, Dtype::kFloat32) : input.new_empty({}, Dtype::kFloat32);
  const Tensor slope_x =
      wants[0] ? empty_like(input, Dtype::kFloat32) : input.new_empty({0}, Dtype::kFloat32);
  const Tensor slope_y =
      wants[1] ? empty_like(target, Dtype::kFloat32) : input.new_empty({0}, Dtype::kFloat32);
  const Tensor scratch = input.new_empty({stft_scratch(call)}, Dtype::kFloat32);
  const Place place = place_of(input);
  Tensor frames, spectra, slopes, back;  // the latest of each; PyTorch's allocator minds the stream
  const StftTransforms transforms{
      [&](int64_t of, int64_t n) {
        frames = input.new_empty({2, of, n}, Dtype::kFloat32);
        return frames.as<float>();
      },
      [&] {
        spectra = transformed("rfft", frames, nullptr, Dtype::kFloat32, "backward");
        return spectra.as<const float>();
      },
      [&](int64_t of, int64_t bins) {
        slopes = input.new_empty({of, bins, 2}, Dtype::kFloat32);
        return slopes.as<float>();
      },
      [&](int64_t n) {
        back = transformed_back("irfft", slopes, py::int_(n), "forward");
        return back.as<const float>();
      }};
  stft_cuda(call, transforms, scratch.as<float>(), loss.as<float>(),
            wants[0] ? slope_x.as<float>() : nullptr, wants[1] ? slope_y.as<float>() : nullptr,
            place.device, place.stream);
  return {loss, slope_x, slope_y};
}

std::optional<std::string> multi_resolution_stft_loss_supports_cuda(const py::args& args) {
  if (py::str(args[0].attr("dtype")).equal(py::str("torch.float64"))) return "has no float64";
  if (py::cast<bool>(args[14])) return "returns no single terms";
  return unsupported(args);
}
#endif

}  // namespace

DASHPOT_BIND(m) {
#ifdef DASHPOT_CUDA
  m.def("multi_resolution_stft_loss_forward_cuda", &multi_resolution_stft_loss_forward_cuda);
  m.def("multi_resolution_stft_loss_supports_cuda", &multi_resolution_stft_loss_supports_cuda);
#endif
  m.def("multi_resolution_stft_loss_forward", &multi_resolution_stft_loss_forward);
  m.def("multi_resolution_stft_loss_supports", &unsupported);
}

}  // namespace dashpot::spectral
