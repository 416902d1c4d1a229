// Fourier transforms of many rows at once: lane l of every vector belongs to row l.
//
//   Z_f = sum_j z_j exp(-2 pi i f j / n),   n = 2^a 3^b 5^c
//
// data holds n complex vectors (real part, imaginary part), in place. The forward decimates in
// frequency and leaves Z_f at place[f]; the inverse (without 1/n) runs the same passes backwards
// and takes its input there. What lies between, a comparison of spectra, does not mind the order,
// so nothing is ever permuted. Rows side by side in lanes need no shuffles and one twiddle for all.
//
// A pass of radix r reads r vectors, transforms them and turns them by the twiddles. Passes are
// ordered depth first until a block fits the first-level cache: a transform of 1,024 points times
// 16 lanes, 128 KiB, goes through the second-level cache once instead of once per radix.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "common/butterfly.h"
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
