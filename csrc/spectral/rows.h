// Real signals in and out of lanes, and the half-length transform of real data.
//
// A group is as many rows as a vector has lanes. n real samples of each are n vectors, which are
// n/2 complex ones as they lie: z_j = x_2j + i x_2j+1. With Z their transform of length m = n/2,
//   E = (Z_k + conj Z_m-k)/2,  O = -i (Z_k - conj Z_m-k)/2,  P = O exp(-2 pi i k / n)
//   X_k = E + P,  X_m-k = conj(E - P)
// and back, for a real signal sum over the full spectrum of S_k exp(+2 pi i k t / n):
//   E = S_k + conj S_m-k,  O = (S_k - conj S_m-k) exp(+2 pi i k / n)
//   Z_k = E + i O,  Z_m-k = conj E + i conj O.
#pragma once

#include <memory>
#include <new>
#include <utility>

#include "common/fft.h"
#include "common/math.h"
#include "common/simd.h"

namespace dashpot::spectral {

inline constexpr int kMaxLanes = 16;

template <class T>
struct RealPlan {
  int n;
  const FftPlan<T>* half;
  std::vector<T> turns;  // (n/4 + 1, 2): cos, sin of 2 pi k / n

  explicit RealPlan(int length) : n(length), half(&FftPlan<T>::of(length / 2)) {
    for (int k = 0; k <= n / 4; ++k) {
      turns.push_back(static_cast<T>(std::cos(2 * M_PI * k / n)));
      turns.push_back(static_cast<T>(std::sin(2 * M_PI * k / n)));
    }
  }

  static const RealPlan& of(int n) {
    static std::mutex mutex;
    static std::map<int, std::unique_ptr<RealPlan>> plans;
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<RealPlan>& plan = plans[n];
    if (!plan) plan = std::make_unique<RealPlan>(n);
    return *plan;
  }
};

// Even lengths without large primes, up to what a cache holds 16 rows of.
inline constexpr int64_t kLongest = 1 << 14;
inline bool is_real_length(int64_t n) { return n % 2 == 0 && n <= kLongest && is_smooth(n / 2); }

template <class V>
struct Complex {
  V re, im;
};

// (X_k, X_m-k) from the transform of packed data.
template <class T, Isa isa, class V = Vec<T, isa>>
DASHPOT_INLINE std::pair<Complex<V>, Complex<V>> split(const T* data, const RealPlan<T>& plan,
                                                       int64_t k) {
  constexpr int kWidth = kLanes<T, isa>;
  const int64_t m = plan.n / 2;
  const T* a = data + 2 * kWidth * plan.half->place[k];
  const T* b = data + 2 * kWidth * plan.half->place[k == 0 ? 0 : m - k];
  const V ar = load<T, isa>(a), ai = load<T, isa>(a + kWidth);
  const V br = load<T, isa>(b), bi = load<T, isa>(b + kWidth);
  const T c = plan.turns[2 * k], s = plan.turns[2 * k + 1];
  const V er = T(0.5) * (ar + br), ei = T(0.5) * (ai - bi);
  const V or_ = T(0.5) * (ai + bi), oi = T(0.5) * (br - ar);
  const V pr = c * or_ + s * oi, pi = c * oi - s * or_;
  return {{er + pr, ei + pi}, {er - pr, pi - ei}};
}

// The inverse of split, for spectra of which the full sum is wanted.
template <class T, Isa isa, class V = Vec<T, isa>>
DASHPOT_INLINE void merge(T* data, const RealPlan<T>& plan, int64_t k, Complex<V> x, Complex<V> y) {
  constexpr int kWidth = kLanes<T, isa>;
  const int64_t m = plan.n / 2;
  T* a = data + 2 * kWidth * plan.half->place[k];
  T* b = data + 2 * kWidth * plan.half->place[k == 0 ? 0 : m - k];
  const T c = plan.turns[2 * k], s = plan.turns[2 * k + 1];
  const V er = x.re + y.re, ei = x.im - y.im, dr = x.re - y.re, di = x.im + y.im;
  const V or_ = c * dr - s * di, oi = c * di + s * dr;
  store<T, isa>(a, er - oi);
  store<T, isa>(a + kWidth, ei + or_);
  store<T, isa>(b, er + oi);
  store<T, isa>(b + kWidth, or_ - ei);
}

// value[i][l] <-> value[l][i], in log2(lanes) rounds of two-vector shuffles.
template <class T, Isa isa>
struct Transpose {
  using V = Vec<T, isa>;
  static constexpr int kWidth = kLanes<T, isa>;

  template <int half, size_t... l>
  static DASHPOT_INLINE void exchange(V& a, V& b, std::index_sequence<l...>) {
    const V low = __builtin_shufflevector(a, b, (l & half ? kWidth + l - half : l)...);
    b = __builtin_shufflevector(a, b, (l & half ? kWidth + l : l + half)...);
    a = low;
  }

  template <int half>
  static DASHPOT_INLINE void rounds(V* value) {
    if constexpr (half < kWidth) {
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (!(i & half)) {
          exchange<half>(value[i], value[i + half], std::make_index_sequence<kWidth>());
        }
      }
      rounds<2 * half>(value);
    }
  }

  static DASHPOT_INLINE void run(V* value) { rounds<1>(value); }

  template <int half>
  static DASHPOT_INLINE void fold(V* value) {
    if constexpr (half < kWidth) {
#pragma GCC unroll 8
      for (int i = 0; i < kWidth / (2 * half); ++i) {
        exchange<half>(value[2 * i], value[2 * i + 1], std::make_index_sequence<kWidth>());
        value[i] = value[2 * i] + value[2 * i + 1];
      }
      fold<2 * half>(value);
    }
  }

  // Lane l of the result is the sum of value[l]'s lanes; value is used up.
  static DASHPOT_INLINE V sums(V* value) {
    fold<1>(value);
    return value[0];
  }
};

// Vectors data[t] = scale * window[t] * (x_l[t] - y_l[t]) from rows; y, window may be null; rows
// from `count` on are 0.
template <class T, class In>
struct LoadRows {
  template <Isa isa>
  static DASHPOT_INLINE void run(const In* const* x, const In* const* y, int64_t count, int64_t n,
                                 T scale, const T* window, T* data) {
    using V = Vec<T, isa>;
    constexpr int kWidth = kLanes<T, isa>;
    for (int64_t first = 0; first < n; first += kWidth) {
      // The last vectors reach back over what is there already.
      const int64_t t = first + kWidth <= n || n < kWidth ? first : n - kWidth;
      V value[kWidth];
      if (t + kWidth <= n) {
#pragma GCC unroll 16
        for (int l = 0; l < kWidth; ++l) {
          value[l] = l < count ? load_as<T, isa>(x[l] + t) : V{};
        }
        if (y != nullptr) {
          for (int64_t l = 0; l < count; ++l) value[l] -= load_as<T, isa>(y[l] + t);
        }
      } else {
        T tail[kWidth][kWidth] = {};
        for (int64_t l = 0; l < count; ++l) {
          for (int64_t i = t; i < n; ++i) {
            tail[l][i - t] = convert<T>(x[l][i]) - (y != nullptr ? convert<T>(y[l][i]) : T(0));
          }
        }
        for (int l = 0; l < kWidth; ++l) value[l] = load<T, isa>(tail[l]);
      }
      Transpose<T, isa>::run(value);
      const int64_t end = n - t < kWidth ? n - t : kWidth;
      for (int64_t i = 0; i < end; ++i) {
        const T factor = window != nullptr ? scale * window[t + i] : scale;
        store<T, isa>(data + (t + i) * kWidth, value[i] * factor);
      }
    }
  }
};

// Rows from vectors: y_l[t] = scale * window[t] * data[t], or added to what is there.
template <class T, bool add>
struct StoreRows {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* data, int64_t n, T scale, const T* window, T* const* y,
                                 int64_t count) {
    using V = Vec<T, isa>;
    constexpr int kWidth = kLanes<T, isa>;
    for (int64_t first = 0; first < n; first += kWidth) {
      // The last vectors reach back over what is written already, unless they would add it twice.
      const int64_t t = add || first + kWidth <= n || n < kWidth ? first : n - kWidth;
      V value[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const int64_t at = t + i < n ? t + i : n - 1;
        const T factor = window != nullptr ? scale * window[at] : scale;
        value[i] = load<T, isa>(data + at * kWidth) * factor;
      }
      Transpose<T, isa>::run(value);
      const int64_t end = n - t < kWidth ? n - t : kWidth;
      for (int64_t l = 0; l < count; ++l) {
        T* to = y[l] + t;
        if (end == kWidth) {
          store<T, isa>(to, add ? load<T, isa>(to) + value[l] : value[l]);
        } else {
          for (int64_t i = 0; i < end; ++i) to[i] = add ? to[i] + value[l][i] : value[l][i];
        }
      }
    }
  }
};

template <class T>
void forward_transform(T* data, const RealPlan<T>& plan) {
  run_on_isa<Fft<T, false>>(data, plan.half);
}

template <class T>
void inverse_transform(T* data, const RealPlan<T>& plan) {
  run_on_isa<Fft<T, true>>(data, plan.half);
}

}  // namespace dashpot::spectral
