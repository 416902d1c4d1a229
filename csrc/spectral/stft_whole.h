// Frames of lengths that no transform here takes, by PyTorch's FFT: some segments' windowed frames
// are laid out in memory, transformed, compared in one pass that leaves each channel's spectra,
// transformed back and overlap-added. A block of them is a few MiB, whatever the signals are.
//
// Before and after PyTorch's calls items go to threads, in a division by sizes alone.
#pragma once

#include <vector>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "spectral/stft.h"
#include "spectral/whole.h"

namespace dashpot::spectral {

inline constexpr int64_t kWholeSegment = 1 << 18, kWholeBlock = 1 << 20;  // samples of frames

// Frames of a segment.
inline int64_t segment_of(int64_t n_fft) {
  if (is_real_length(n_fft)) return kSegment;
  return std::clamp<int64_t>(kWholeSegment / n_fft, 1, kSegment);
}

// y[i] = x[i] * window[i], or added to what is there.
template <class T, bool add>
struct TimesWindow {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* x, const T* window, int64_t n, T* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * window[i] + (add ? y[i] : T(0));
  }
};

// One frame's bins of both signals: sums (4,), and in `to`, `stride` apart, each channel's
// spectrum. halves (F,): 1/2 where a bin stands for two.
template <class T>
struct CompareFrame {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* x, const T* y, const FrameTask<T>* task, const T* halves,
                                 const std::vector<Channel>* channels, int64_t bins, int64_t stride,
                                 T* to, double* sums) {
    using V = Vec<T, isa>;
    using At = Interleaved<T, isa>;
    V total[kSums] = {};
    for (int64_t k = 0; k < bins; k += At::kWidth) {
      const int64_t left = bins - k;
      const V half = At::numbers(halves + k, left);
      const V counts = half > V{} ? V{} + T(1) : V{};  // 0 beyond the last bin
      FrameBins<T, isa> bin;
      bin.x = At::load(x + 2 * k, left), bin.y = At::load(y + 2 * k, left);
      bin.compare(*task, total, counts);
      for (size_t c = 0; c < channels->size(); ++c) {
        At::store(to + static_cast<int64_t>(c) * stride + 2 * k, bin.slope((*channels)[c], half),
                  left);
      }
    }
    for (int i = 0; i < kSums; ++i) sums[i] = sum_lanes<T, isa>(total[i]);
  }
};

// All items of one resolution. With the GIL, which is given back between PyTorch's calls.
template <class T, class In>
void run_whole(const StftCall& call, const In* x, const In* y, Part<T>& part, const Tensor& like,
               Dtype type, int threads, const Scratch& scratch) {
  const Resolution& shape = part.shape;
  const int64_t n = shape.n_fft, bins = n / 2 + 1, hop = shape.hop, length = shape.length;
  const int64_t channels = static_cast<int64_t>(part.channels.size());
  const int64_t items = call.rows * shape.segments;
  const int64_t most = std::max<int64_t>(1, kWholeBlock / (shape.segment * n));
  const FrameTask<T> task{nullptr, static_cast<T>(call.power_floor), call.l2, call.weights[1] != 0,
                          call.weights[2] != 0};
  const T* window = part.window.data();
  std::vector<T> halves(bins, T(0.5));
  halves[0] = 1;
  if (n % 2 == 0) halves[bins - 1] = 1;
  for (int64_t first = 0; first < items; first += most) {
    const int64_t count = std::min(most, items - first);
    std::vector<int64_t> at(count + 1, 0);  // frames before an item
    for (int64_t i = 0; i < count; ++i) {
      at[i + 1] = at[i] + part.frames_of((first + i) % shape.segments);
    }
    const int64_t frames = at[count];
    const Tensor memory = like.new_empty({2, frames, n}, type);
    {
      const py::gil_scoped_release release;
      parallel_for(count, threads, [&](int64_t i) {
        const int64_t row = (first + i) / shape.segments, segment = (first + i) % shape.segments;
        const int64_t span = shape.span(at[i + 1] - at[i]);
        T* samples = scratch.mine().take<T>(span);
        for (const bool target : {false, true}) {
          lay_out((target ? y : x) + row * call.t, call.t, shape, segment, span, samples);
          T* to = memory.as<T>() + ((target ? frames : 0) + at[i]) * n;
          for (int64_t f = 0; f < at[i + 1] - at[i]; ++f, to += n) {
            run_on_isa<TimesWindow<T, false>>(static_cast<const T*>(samples + f * hop), window,
                                              length, to);
            std::fill(to + length, to + n, T(0));
          }
        }
      });
    }
    const Tensor spectra = transformed("rfft", memory, nullptr, type, "backward");
    const Tensor slopes = like.new_empty({channels, frames, bins, 2}, type);
    std::vector<double> sums(frames * kSums);
    {
      const py::gil_scoped_release release;
      parallel_for(frames, threads, [&](int64_t f) {
        const T* of = spectra.as<T>() + 2 * f * bins;
        run_on_isa<CompareFrame<T>>(
            of, of + 2 * frames * bins, &task, static_cast<const T*>(halves.data()),
            static_cast<const std::vector<Channel>*>(&part.channels), bins, 2 * frames * bins,
            slopes.as<T>() + 2 * f * bins, sums.data() + f * kSums);
      });
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t f = at[i] * kSums; f < at[i + 1] * kSums; ++f) {
          part.sums[(first + i) * kSums + f % kSums] += sums[f];
        }
      }
    }
    if (channels == 0) continue;
    const Tensor back = transformed_back("irfft", slopes, py::int_(n), "forward");
    const py::gil_scoped_release release;
    parallel_for(count, threads, [&](int64_t i) {
      for (int64_t c = 0; c < channels; ++c) {
        T* to = part.slope((first + i) / shape.segments, (first + i) % shape.segments, c);
        std::fill_n(to, shape.span(at[i + 1] - at[i]), T(0));
        const T* from = back.as<T>() + (c * frames + at[i]) * n;
        for (int64_t f = 0; f < at[i + 1] - at[i]; ++f) {
          run_on_isa<TimesWindow<T, true>>(from + f * n, window, length, to + f * hop);
        }
      }
    });
  }
}

}  // namespace dashpot::spectral
