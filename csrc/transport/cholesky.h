// Systems of a symmetric positive definite matrix of few rows, by U^T D U.
//
// The upper triangle lies in rows (m, stride), stride whole vectors; four pivots are taken at once
// from some rows at once, so that each is loaded for several products. What lies below the diagonal
// in a vector that starts there is carried along and never used.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/aligned.h"
#include "common/simd.h"

namespace dashpot::transport {

template <class T>
struct SolveCholesky {
  static constexpr int kTogether = 4;  // pivots
  template <Isa isa>
  static constexpr int kRows = isa == Isa::kAvx512 ? 4 : 2;  // that take them at once

  // h (m, stride) is factored; y (stride,): the right-hand side, used up; x (stride,): 0, then the
  // solution; z, inverse (stride,), share (kTogether, stride): room. ok: whether every pivot is
  // positive.
  template <Isa isa>
  static DASHPOT_INLINE void run(T* h, int64_t m, int64_t stride, T* y, T* x, T* z, T* inverse,
                                 T* share, bool* ok) {
    constexpr int kWidth = kLanes<T, isa>;
    using V = Vec<T, isa>;
    *ok = false;
    for (int64_t k = 0; k < m; k += kTogether) {
      const int64_t last = std::min<int64_t>(m, k + kTogether);
      for (int64_t p = k; p < last; ++p) {
        const T* const pivots = h + p * stride;
        if (!(pivots[p] > 0)) return;
        inverse[p] = 1 / pivots[p];
        for (int64_t i = p + 1; i < last; ++i) {
          subtract<isa>(h + i * stride, pivots[i] * inverse[p], pivots, i, stride);
        }
      }
      if (last - k < kTogether) break;
      for (int p = 0; p < kTogether; ++p) {
        for (int64_t l = last / kWidth * kWidth; l < stride; l += kWidth) {
          store<T, isa>(share + p * stride + l,
                        load<T, isa>(h + (k + p) * stride + l) * inverse[k + p]);
        }
      }
      int64_t i = last;
      for (; i + kRows<isa> <= m; i += kRows<isa>) {
        eliminate<isa, kRows<isa>>(h, i, k, stride, share);
      }
      for (; i < m; ++i) eliminate<isa, 1>(h, i, k, stride, share);
    }
    for (int64_t k = 0; k < m; k += kTogether) {  // U^T D z = y
      const int64_t last = std::min<int64_t>(m, k + kTogether);
      for (int64_t p = k; p < last; ++p) {
        T value = y[p];
        for (int64_t q = k; q < p; ++q) value -= h[q * stride + p] * z[q];
        z[p] = value * inverse[p];
      }
      for (int64_t l = last / kWidth * kWidth; l < stride; l += kWidth) {
        V value = load<T, isa>(y + l);
        for (int64_t p = k; p < last; ++p) value -= z[p] * load<T, isa>(h + p * stride + l);
        store<T, isa>(y + l, value);
      }
    }
    for (int64_t k = (m - 1) / kTogether * kTogether; k >= 0; k -= kTogether) {
      const int64_t last = std::min<int64_t>(m, k + kTogether);
      V sums[kTogether] = {};  // over places from `last` on: x is 0 before
      for (int64_t l = last / kWidth * kWidth; l < stride; l += kWidth) {
        const V known = load<T, isa>(x + l);
        for (int64_t p = k; p < last; ++p) {
          sums[p - k] += known * load<T, isa>(h + p * stride + l);
        }
      }
      for (int64_t p = last - 1; p >= k; --p) {
        T sum = static_cast<T>(sum_lanes<T, isa>(sums[p - k]));
        for (int64_t q = p + 1; q < last; ++q) sum += h[p * stride + q] * x[q];
        x[p] = z[p] - inverse[p] * sum;
      }
    }
    *ok = true;
  }

  // Rows [i, i + R) less their multiples of the pivots' rows [k, k + kTogether); share (kTogether,
  // stride): those rows over their pivots.
  template <Isa isa, int R>
  static DASHPOT_INLINE void eliminate(T* h, int64_t i, int64_t k, int64_t stride, const T* share) {
    constexpr int kWidth = kLanes<T, isa>;
    using V = Vec<T, isa>;
    const T* const pivots = h + k * stride;
    T* const rows = h + i * stride;
    T factor[R][kTogether];
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < kTogether; ++p) {
        factor[r][p] = share[p * stride + i + r];
      }
    }
    for (int64_t l = i / kWidth * kWidth; l < stride; l += kWidth) {
      V value[R];
      for (int r = 0; r < R; ++r) value[r] = load<T, isa>(rows + r * stride + l);
      for (int p = 0; p < kTogether; ++p) {
        const V pivot = load<T, isa>(pivots + p * stride + l);
        for (int r = 0; r < R; ++r) value[r] -= factor[r][p] * pivot;
      }
      for (int r = 0; r < R; ++r) store<T, isa>(rows + r * stride + l, value[r]);
    }
  }

  // to -= factor * row from place `first` on (its vector's beginning).
  template <Isa isa>
  static DASHPOT_INLINE void subtract(T* to, T factor, const T* row, int64_t first,
                                      int64_t stride) {
    constexpr int kWidth = kLanes<T, isa>;
    for (int64_t l = first / kWidth * kWidth; l < stride; l += kWidth) {
      store<T, isa>(to + l, load<T, isa>(to + l) - factor * load<T, isa>(row + l));
    }
  }
};

template <class T>
class Cholesky {
 public:
  // A matrix (m, m) of zeros, whose upper triangle is to be filled in: entry (i, l) at
  // i * stride() + l.
  T* empty(int64_t m) {
    m_ = m;
    stride_ = (m + kMost - 1) / kMost * kMost;
    h_.resize((m + kRoom) * stride_);
    std::fill_n(h_.data(), (m + kZeros) * stride_, T(0));
    return h_.data();
  }
  int64_t stride() const { return stride_; }
  T* rhs() { return h_.data() + m_ * stride_; }  // (stride,) zeros, to be filled in
  T* room() { return rhs() + 2 * stride_; }      // (stride,) zeros, to be left so

  // The solution (m,), or null where the matrix is not positive definite.
  const T* solve() {
    T* const y = rhs();
    T* const x = y + stride_;
    T* const rest = y + kZeros * stride_;
    bool ok;
    run_on_isa<SolveCholesky<T>>(h_.data(), m_, stride_, y, x, rest, rest + stride_,
                                 rest + 2 * stride_, &ok);
    return ok ? x : nullptr;
  }

 private:
  static constexpr int64_t kMost = 64 / sizeof(T);  // lanes of any instruction set
  static constexpr int64_t kZeros = 3;              // rows beyond the matrix, in all kRoom
  static constexpr int64_t kRoom = kZeros + 2 + SolveCholesky<T>::kTogether;
  int64_t m_ = 0, stride_ = 0;
  AlignedVector<T> h_;
};

}  // namespace dashpot::transport
