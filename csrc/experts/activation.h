// Activations and their slopes on vectors: relu, gelu (exact: erf), silu.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/math.h"
#include "common/simd.h"
#include "experts/lanes.h"

namespace dashpot::experts {

enum class Activation { kRelu, kGelu, kSilu };

inline Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "silu") return Activation::kSilu;
  throw std::invalid_argument("activation: expected relu, gelu, silu, got " + name);
}

template <class W, Isa isa>
struct Activated {
  Vec<W, isa> value, slope;
};

// Phi(z), the normal distribution, and exp(-z^2/2). float32: the rational approximation 7.1.26 of
// Abramowitz and Stegun's handbook, within 1.5e-7; float64: erf of the C library.
template <class W, Isa isa>
DASHPOT_INLINE Activated<W, isa> normal(Vec<W, isa> z) {
  const Vec<W, isa> bell = dashpot::exp<W, isa>(z * z * W(-0.5));
  Vec<W, isa> phi;
  if constexpr (std::is_same_v<W, double>) {
    for (int i = 0; i < kLanes<W, isa>; ++i) phi[i] = 0.5 * std::erfc(-z[i] * M_SQRT1_2);
  } else {
    const Vec<W, isa> x = (z < 0 ? -z : z) * W(M_SQRT1_2);
    const Vec<W, isa> t = W(1) / (W(1) + W(0.3275911) * x);
    Vec<W, isa> tail = t * W(1.061405429) + W(-1.453152027);
    tail = tail * t + W(1.421413741);
    tail = tail * t + W(-0.284496736);
    tail = (tail * t + W(0.254829592)) * t * bell * W(0.5);
    phi = z < 0 ? tail : W(1) - tail;
  }
  return {phi, bell};
}

template <class W, Isa isa>
DASHPOT_INLINE Activated<W, isa> activated(Vec<W, isa> z, Activation activation) {
  const Vec<W, isa> one = Vec<W, isa>{} + W(1);
  if (activation == Activation::kRelu) return {z < 0 ? Vec<W, isa>{} : z, z > 0 ? one : one - one};
  if (activation == Activation::kSilu) {
    const Vec<W, isa> s = one / (one + dashpot::exp<W, isa>(-z));
    return {z * s, s * (one + z * (one - s))};
  }
  const auto [phi, bell] = normal<W, isa>(z);
  return {z * phi, phi + z * bell * W(0.5 * M_2_SQRTPI * M_SQRT1_2)};
}

// hidden (rows, h) = act(pre), or act(first h) * last h of pre (rows, 2h); may be pre itself where
// it is not gated.
template <class T>
struct ActivateRows {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* pre, int64_t rows, int64_t h, bool gated,
                                 Activation activation, T* hidden) {
    using W = Wide<T>;
    constexpr int64_t kStep = kLanes<W, isa>;
    const int64_t width = gated ? 2 * h : h;
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = pre + r * width;
      T* out = hidden + r * h;
      for (int64_t c = 0; c < h; c += kStep) {
        Vec<W, isa> value =
            activated<W, isa>(load_part<isa>(row + c, h - c, W(0)), activation).value;
        if (gated) value *= load_part<isa>(row + h + c, h - c, W(0));
        store_part<isa>(out + c, value, h - c);
      }
    }
  }
};

// From pre and u = W2^T dy (rows, h): hidden, dz (the width of pre) = weight * u * slope, and
// dots (rows,) = <hidden, u>.
template <class T>
struct ActivateRowsBackward {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* pre, const T* u, const Wide<T>* weights, int64_t rows,
                                 int64_t h, bool gated, Activation activation, T* hidden, T* dz,
                                 Wide<T>* dots) {
    using W = Wide<T>;
    constexpr int64_t kStep = kLanes<W, isa>;
    const int64_t width = gated ? 2 * h : h;
    for (int64_t r = 0; r < rows; ++r) {
      Vec<W, isa> dot{};
      for (int64_t c = 0; c < h; c += kStep) {
        const int64_t left = h - c;
        const auto [value, slope] =
            activated<W, isa>(load_part<isa>(pre + r * width + c, left, W(0)), activation);
        const Vec<W, isa> into = load_part<isa>(u + r * h + c, left, W(0));
        const Vec<W, isa> da = into * weights[r];
        Vec<W, isa> a = value;
        if (gated) {
          const Vec<W, isa> up = load_part<isa>(pre + r * width + h + c, left, W(0));
          a *= up;
          store_part<isa>(dz + r * width + c, da * up * slope, left);
          store_part<isa>(dz + r * width + h + c, da * value, left);
        } else {
          store_part<isa>(dz + r * width + c, da * slope, left);
        }
        store_part<isa>(hidden + r * h + c, a, left);
        dot += a * into;
      }
      dots[r] = static_cast<W>(sum_lanes<W, isa>(dot));
    }
  }
};

}  // namespace dashpot::experts
