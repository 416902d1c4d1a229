// Fourier transforms of many rows at once: lane l of every vector belongs to row l.
//
//   Z_f = sum_j z_j exp(-2 pi i f j / n),   n = 2^a 3^b 5^c
//
// data holds n complex vectors (real part, imaginary part), in place. The forward decimates in
// frequency and leaves Z_f at place[f]; the inverse (without 1/n) runs the same passes backwards and
// takes its input there. What lies between, a comparison of spectra, does not mind the order, so
// nothing is ever permuted. Rows side by side in lanes need no shuffles and one twiddle for all.
//
// A pass of radix r reads r vectors, transforms them and turns them by the twiddles. Passes are
// ordered depth first until a block fits the first-level cache: a transform of 1,024 points times 16
// lanes, 128 KiB, goes through the second-level cache once instead of once per radix.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "common/simd.h"

namespace dashpot {

// Whether n has no prime factor beyond 5.
inline bool is_smooth(int64_t n) {
  if (n < 1) return false;
  for (const int64_t r : {2, 3, 5}) {
    while (n % r == 0) n /= r;
  }
  return n == 1;
}

struct FftPass {
  int begin, blocks, length, radix, twiddle;  // twiddle: where the pass's table begins
};

template <class T>
struct FftPlan {
  int n;
  std::vector<FftPass> passes;
  std::vector<T> twiddles;  // per stage, for j < length / radix, k in 1..radix: cos, -sin of jk
  std::vector<int> place;   // (n,)

  explicit FftPlan(int length) : n(length), place(length) {
    std::vector<int> radices, offsets;
    int rest = n;
    for (const int r : {5, 3}) {
      for (; rest % r == 0; rest /= r) radices.push_back(r);
    }
    for (; rest % 8 == 0 && rest != 16 && rest != 32; rest /= 8) radices.push_back(8);
    for (; rest % 4 == 0 && rest != 8; rest /= 4) radices.push_back(4);
    if (rest > 1) radices.push_back(rest);  // 2 or 8
    int block = n;
    for (const int r : radices) {
      offsets.push_back(static_cast<int>(twiddles.size()));
      for (int j = 0; block > r && j < block / r; ++j) {
        for (int k = 1; k < r; ++k) {
          const double angle = 2 * M_PI * (static_cast<double>(j) * k) / block;
          twiddles.push_back(static_cast<T>(std::cos(angle)));
          twiddles.push_back(static_cast<T>(-std::sin(angle)));
        }
      }
      block /= r;
    }
    order(radices, offsets, 0, n, 0);
    for (int f = 0; f < n; ++f) {
      int at = 0, size = n, left = f;
      for (const int r : radices) {
        size /= r;
        at += left % r * size;
        left /= r;
      }
      place[f] = at;
    }
  }

  // Kept for the life of the process: a training run uses a handful of lengths.
  static const FftPlan& of(int n) {
    static std::mutex mutex;
    static std::map<int, std::unique_ptr<FftPlan>> plans;
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<FftPlan>& plan = plans[n];
    if (!plan) plan = std::make_unique<FftPlan>(n);
    return *plan;
  }

 private:
  static constexpr int kFits = 128;  // complex vectors of 64 bytes in half of 32 KiB

  void order(const std::vector<int>& radices, const std::vector<int>& offsets, int begin,
             int length, size_t stage) {
    if (stage == radices.size()) return;
    const int r = radices[stage];
    if (length > kFits) {
      passes.push_back({begin, 1, length, r, offsets[stage]});
      for (int k = 0; k < r; ++k) {
        order(radices, offsets, begin + k * (length / r), length / r, stage + 1);
      }
      return;
    }
    int blocks = 1, size = length;
    for (; stage < radices.size(); ++stage) {
      passes.push_back({begin, blocks, size, radices[stage], offsets[stage]});
      blocks *= radices[stage];
      size /= radices[stage];
    }
  }
};

// A complex transform of radix points in registers; V is a vector.
template <int radix, class T, class V>
struct Butterfly;

template <class T, class V>
struct Butterfly<2, T, V> {
  static DASHPOT_INLINE void run(V* re, V* im) {
    const V a = re[0], b = im[0];
    re[0] = a + re[1], im[0] = b + im[1];
    re[1] = a - re[1], im[1] = b - im[1];
  }
};

template <class T, class V>
struct Butterfly<3, T, V> {
  static DASHPOT_INLINE void run(V* re, V* im) {
    constexpr T sine = T(0.86602540378443864676);
    const V sr = re[1] + re[2], si = im[1] + im[2];
    const V dr = sine * (re[1] - re[2]), di = sine * (im[1] - im[2]);
    const V mr = re[0] - T(0.5) * sr, mi = im[0] - T(0.5) * si;
    re[0] += sr, im[0] += si;
    re[1] = mr + di, im[1] = mi - dr;
    re[2] = mr - di, im[2] = mi + dr;
  }
};

template <class T, class V>
struct Butterfly<4, T, V> {
  static DASHPOT_INLINE void run(V* re, V* im) {
    const V ar = re[0] + re[2], ai = im[0] + im[2], br = re[0] - re[2], bi = im[0] - im[2];
    const V cr = re[1] + re[3], ci = im[1] + im[3], dr = re[1] - re[3], di = im[1] - im[3];
    re[0] = ar + cr, im[0] = ai + ci;
    re[1] = br + di, im[1] = bi - dr;
    re[2] = ar - cr, im[2] = ai - ci;
    re[3] = br - di, im[3] = bi + dr;
  }
};

template <class T, class V>
struct Butterfly<5, T, V> {
  static DASHPOT_INLINE void run(V* re, V* im) {
    constexpr T c1 = T(0.30901699437494742410), c2 = T(-0.80901699437494742410);
    constexpr T s1 = T(0.95105651629515357212), s2 = T(0.58778525229247312917);
    const V ar = re[1] + re[4], ai = im[1] + im[4], br = re[1] - re[4], bi = im[1] - im[4];
    const V cr = re[2] + re[3], ci = im[2] + im[3], dr = re[2] - re[3], di = im[2] - im[3];
    const V pr = re[0] + c1 * ar + c2 * cr, pi = im[0] + c1 * ai + c2 * ci;
    const V qr = re[0] + c2 * ar + c1 * cr, qi = im[0] + c2 * ai + c1 * ci;
    const V ur = s1 * br + s2 * dr, ui = s1 * bi + s2 * di;
    const V vr = s2 * br - s1 * dr, vi = s2 * bi - s1 * di;
    re[0] += ar + cr, im[0] += ai + ci;
    re[1] = pr + ui, im[1] = pi - ur;
    re[4] = pr - ui, im[4] = pi + ur;
    re[2] = qr + vi, im[2] = qi - vr;
    re[3] = qr - vi, im[3] = qi + vr;
  }
};

template <class T, class V>
struct Butterfly<8, T, V> {
  static DASHPOT_INLINE void run(V* re, V* im) {
    constexpr T half = T(0.70710678118654752440);
    V er[4] = {re[0], re[2], re[4], re[6]}, ei[4] = {im[0], im[2], im[4], im[6]};
    V fr[4] = {re[1], re[3], re[5], re[7]}, fi[4] = {im[1], im[3], im[5], im[7]};
    Butterfly<4, T, V>::run(er, ei);
    Butterfly<4, T, V>::run(fr, fi);
    const V ar = half * (fr[1] + fi[1]), ai = half * (fi[1] - fr[1]);
    const V br = half * (fi[3] - fr[3]), bi = -half * (fr[3] + fi[3]);
    re[0] = er[0] + fr[0], im[0] = ei[0] + fi[0];
    re[4] = er[0] - fr[0], im[4] = ei[0] - fi[0];
    re[1] = er[1] + ar, im[1] = ei[1] + ai;
    re[5] = er[1] - ar, im[5] = ei[1] - ai;
    re[2] = er[2] + fi[2], im[2] = ei[2] - fr[2];
    re[6] = er[2] - fi[2], im[6] = ei[2] + fr[2];
    re[3] = er[3] + br, im[3] = ei[3] + bi;
    re[7] = er[3] - br, im[7] = ei[3] - bi;
  }
};

// data: (n, 2) vectors. The inverse is the forward with real and imaginary parts exchanged.
template <class T, bool inverse>
struct Fft {
  template <Isa isa, int radix, bool turned>
  static DASHPOT_INLINE void pass(T* data, const FftPass& pass, const T* twiddles) {
    using V = Vec<T, isa>;
    constexpr int kWidth = kLanes<T, isa>;
    const int64_t stride = pass.length / radix;
    for (int64_t b = 0; b < pass.blocks; ++b) {
      T* block = data + 2 * kWidth * (pass.begin + b * pass.length);
      const T* turn = twiddles + pass.twiddle;
      for (int64_t j = 0; j < stride; ++j, turn += 2 * (radix - 1)) {
        V re[radix], im[radix];
#pragma GCC unroll 8
        for (int q = 0; q < radix; ++q) {
          const T* from = block + 2 * kWidth * (j + q * stride);
          re[q] = load<T, isa>(from + (inverse ? kWidth : 0));
          im[q] = load<T, isa>(from + (inverse ? 0 : kWidth));
        }
        if constexpr (inverse && turned) rotate<radix, V>(re, im, turn);
        Butterfly<radix, T, V>::run(re, im);
        if constexpr (!inverse && turned) rotate<radix, V>(re, im, turn);
#pragma GCC unroll 8
        for (int q = 0; q < radix; ++q) {
          T* to = block + 2 * kWidth * (j + q * stride);
          store<T, isa>(to + (inverse ? kWidth : 0), re[q]);
          store<T, isa>(to + (inverse ? 0 : kWidth), im[q]);
        }
      }
    }
  }

  template <int radix, class V>
  static DASHPOT_INLINE void rotate(V* re, V* im, const T* turn) {
#pragma GCC unroll 8
    for (int k = 1; k < radix; ++k) {
      const T c = turn[2 * k - 2], s = turn[2 * k - 1];
      const V a = re[k];
      re[k] = a * c - im[k] * s;
      im[k] = a * s + im[k] * c;
    }
  }

  template <Isa isa, int radix>
  static DASHPOT_INLINE void either(T* data, const FftPass& one, const T* twiddles) {
    if (one.length == radix) {
      pass<isa, radix, false>(data, one, twiddles);
    } else {
      pass<isa, radix, true>(data, one, twiddles);
    }
  }

  template <Isa isa>
  static DASHPOT_INLINE void run(T* data, const FftPlan<T>* plan) {
    const int64_t count = static_cast<int64_t>(plan->passes.size());
    const T* twiddles = plan->twiddles.data();
    for (int64_t i = 0; i < count; ++i) {
      const FftPass& one = plan->passes[inverse ? count - 1 - i : i];
      switch (one.radix) {
        case 2:
          either<isa, 2>(data, one, twiddles);
          break;
        case 3:
          either<isa, 3>(data, one, twiddles);
          break;
        case 4:
          either<isa, 4>(data, one, twiddles);
          break;
        case 5:
          either<isa, 5>(data, one, twiddles);
          break;
        default:
          either<isa, 8>(data, one, twiddles);
      }
    }
  }
};

// Lanes of T in the instruction set that is in use.
template <class T>
int lanes() {
  return vector_bytes(isa()) / static_cast<int>(sizeof(T));
}

}  // namespace dashpot
