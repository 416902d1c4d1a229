// Spectra that PyTorch's FFT made, for lengths no kernel here has: rows of complex numbers as they
// lie in memory. All that follows the transform is one pass over them, in place: what goes back to
// the inverse transform is the slope's spectrum.
#pragma once

#include <utility>

#include "common/tensor.h"
#include "spectral/bins.h"

namespace dashpot::spectral {

inline constexpr int64_t kChunk = 2048;  // bins of an item

// Real signals (..., n) -> (..., n/2 + 1, 2) by torch.fft, in float32 or float64, times the norm's
// factor; minus another's where it is given. name: rfft, or rfft2 of the last two axes.
inline Tensor transformed(const char* name, const Tensor& x, const Tensor* minus, Dtype type,
                          const std::string& norm) {
  const py::module_ torch = py::module_::import("torch");
  const py::handle dtype = names().dtypes[static_cast<int>(type)];
  py::object signal = x.object.attr("detach")().attr("to")(dtype);
  if (minus) signal = signal - minus->object.attr("detach")().attr("to")(dtype);
  const py::object spectrum = torch.attr("fft").attr(name)(signal, py::arg("norm") = norm);
  return Tensor::from(torch.attr("view_as_real")(spectrum.attr("contiguous")()));
}

// Back to signals of the given last axes: the sum over the full spectrum, or "ortho".
inline Tensor transformed_back(const char* name, const Tensor& spectrum, const py::object& size,
                               const char* norm) {
  const py::module_ torch = py::module_::import("torch");
  const py::object complex = torch.attr("view_as_complex")(spectrum.object);
  return Tensor::from(
      torch.attr("fft").attr(name)(complex, size, py::arg("norm") = norm).attr("contiguous")());
}

// A vector of bins from interleaved memory, and back; beyond `count` they are 1.
template <class T, Isa isa>
struct Interleaved {
  using V = Vec<T, isa>;
  static constexpr int kWidth = kLanes<T, isa>;

  template <size_t... l>
  static DASHPOT_INLINE Complex<V> parts(V a, V b, std::index_sequence<l...>) {
    return {__builtin_shufflevector(a, b, (2 * l)...),
            __builtin_shufflevector(a, b, (2 * l + 1)...)};
  }
  template <size_t... l>
  static DASHPOT_INLINE std::pair<V, V> whole(Complex<V> z, std::index_sequence<l...>) {
    return {__builtin_shufflevector(z.re, z.im, (l / 2 + l % 2 * kWidth)...),
            __builtin_shufflevector(z.re, z.im, (kWidth / 2 + l / 2 + l % 2 * kWidth)...)};
  }

  static DASHPOT_INLINE Complex<V> load(const T* from, int64_t count) {
    if (count >= kWidth) {
      return parts(dashpot::load<T, isa>(from), dashpot::load<T, isa>(from + kWidth),
                   std::make_index_sequence<kWidth>());
    }
    Complex<V> z{V{} + T(1), V{}};
    for (int64_t i = 0; i < count; ++i) z.re[i] = from[2 * i], z.im[i] = from[2 * i + 1];
    return z;
  }
  static DASHPOT_INLINE void store(T* to, Complex<V> z, int64_t count) {
    if (count >= kWidth) {
      const auto [a, b] = whole(z, std::make_index_sequence<kWidth>());
      dashpot::store<T, isa>(to, a);
      dashpot::store<T, isa>(to + kWidth, b);
      return;
    }
    for (int64_t i = 0; i < count; ++i) to[2 * i] = z.re[i], to[2 * i + 1] = z.im[i];
  }
  // Numbers, 0 beyond `count`.
  static DASHPOT_INLINE V numbers(const T* from, int64_t count) {
    if (count >= kWidth) return dashpot::load<T, isa>(from);
    V value{};
    for (int64_t i = 0; i < count; ++i) value[i] = from[i];
    return value;
  }
};

// Compares `count` bins of a pair and turns them into the slopes' spectra; y null for "complex".
template <class T>
struct CompareWhole {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* x, T* y, const SpectralOptions* options, const T* weights,
                                 const T* slopes, int64_t count, double* loss) {
    using V = Vec<T, isa>;
    using At = Interleaved<T, isa>;
    const SpectralOptions o = *options;
    V total{};
    for (int64_t k = 0; k < count; k += At::kWidth) {
      const int64_t left = count - k;
      Complex<V> a = At::load(x + 2 * k, left), b{};
      if (y != nullptr) b = At::load(y + 2 * k, left);
      total += compare_bins<T, isa>(o, At::numbers(weights + k, left),
                                    At::numbers(slopes + k, left), a, b);
      At::store(x + 2 * k, a, left);
      if (y != nullptr) At::store(y + 2 * k, b, left);
    }
    *loss = sum_lanes<T, isa>(total);
  }
};

// sums[k] of the levels of `rows` rows, `stride` numbers apart: float32 over 16 rows, then float64.
template <class T>
struct SumWhole {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* x, int64_t rows, int64_t stride, int64_t count,
                                 bool power, double* sums) {
    using V = Vec<T, isa>;
    using At = Interleaved<T, isa>;
    for (int64_t k = 0; k < count; ++k) sums[k] = 0;
    for (int64_t first = 0; first < rows; first += 16) {
      const int64_t end = rows < first + 16 ? rows : first + 16;
      for (int64_t k = 0; k < count; k += At::kWidth) {
        const int64_t left = count - k, some = left < At::kWidth ? left : At::kWidth;
        V total{};
        for (int64_t row = first; row < end; ++row) {
          total += level_of<T, isa>(At::load(x + row * stride + 2 * k, left), power);
        }
        for (int64_t i = 0; i < some; ++i) sums[k + i] += static_cast<double>(total[i]);
      }
    }
  }
};

template <class T>
struct ScaleWhole {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* x, bool power, const T* factors, int64_t count) {
    using At = Interleaved<T, isa>;
    for (int64_t k = 0; k < count; k += At::kWidth) {
      auto z = At::load(x + 2 * k, count - k);
      scale_bins<T, isa>(z, power, At::numbers(factors + k, count - k));
      At::store(x + 2 * k, z, count - k);
    }
  }
};

}  // namespace dashpot::spectral
