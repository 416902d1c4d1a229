// Systems of a symmetric positive definite matrix of few rows, by U^T D U.
//
// The upper triangle lies in rows (m, stride), stride whole vectors; what lies below the diagonal
// in a vector that starts there is carried along and never used. Place m of a row holds its
// right-hand side, which elimination takes along like any other column. The pivots of a panel wait
// for one another, divisions and all: they are found as soon as their own rows are ready, before
// the last panel is taken from the rows below, which fills the waiting time. Beyond the last row
// lie zeros, so that the last panel is whole.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/aligned.h"
#include "common/simd.h"

namespace dashpot::transport {

inline constexpr int kPanel = 4;  // pivots taken at once

template <class T>
class SolveCholesky {
 public:
  template <Isa isa>
  static constexpr int kRows = isa == Isa::kAvx512 ? 4 : 2;  // that take a panel at once

  // h (m, stride) is factored; x (stride,): the solution; inverse (stride,), sums (stride, kPanel),
  // shares (2, kPanel, stride): room. ok: whether every pivot is positive.
  template <Isa isa>
  static DASHPOT_INLINE void run(T* h, int64_t m, int64_t stride, T* x, T* inverse, T* sums,
                                 T* shares, bool* ok) {
    T* share = shares;
    T* next_share = shares + kPanel * stride;
    *ok = factor<isa>(h, 0, m, stride, inverse, share);
    for (int64_t k = 0; *ok && k + kPanel < m; k += kPanel) {
      const int64_t next = k + kPanel;
      eliminate<isa>(h, next, next + kPanel, k, stride, share);
      *ok = factor<isa>(h, next, m, stride, inverse, next_share);
      eliminate<isa>(h, next + kPanel, m, k, stride, share);
      std::swap(share, next_share);
    }
    if (*ok) substitute(h, m, stride, inverse, sums, x);
  }

  // The panel of rows [k, k + kPanel) among itself; share (kPanel, stride): its rows over their
  // pivots.
  template <Isa isa>
  static DASHPOT_INLINE bool factor(T* h, int64_t k, int64_t m, int64_t stride, T* inverse,
                                    T* share) {
    constexpr int kWidth = kLanes<T, isa>;
    using V = Vec<T, isa>;
    T* const rows = h + k * stride;
    T block[kPanel][kPanel], factors[kPanel][kPanel], over[kPanel];
    bool positive = true;
#pragma GCC unroll 4
    for (int p = 0; p < kPanel; ++p) {
#pragma GCC unroll 4
      for (int q = p; q < kPanel; ++q) {
        block[p][q] = k + q < m ? rows[p * stride + k + q] : p == q ? T(1) : T(0);
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPanel; ++p) {
      positive &= block[p][p] > 0;
      over[p] = 1 / block[p][p];
#pragma GCC unroll 4
      for (int i = p + 1; i < kPanel; ++i) {
        factors[i][p] = block[p][i] * over[p];
#pragma GCC unroll 4
        for (int q = i; q < kPanel; ++q) block[i][q] -= factors[i][p] * block[p][q];
      }
    }
    if (!positive) return false;
    for (int p = 0; p < kPanel; ++p) inverse[k + p] = over[p];
    for (int64_t l = k / kWidth * kWidth; l < stride; l += kWidth) {
      V row[kPanel];
#pragma GCC unroll 4
      for (int p = 0; p < kPanel; ++p) {
        row[p] = load<T, isa>(rows + p * stride + l);
#pragma GCC unroll 4
        for (int q = 0; q < p; ++q) row[p] -= factors[p][q] * row[q];
        if (p > 0) store<T, isa>(rows + p * stride + l, row[p]);
        store<T, isa>(share + p * stride + l, row[p] * over[p]);
      }
    }
    return true;
  }

  // Rows [first, last) less their multiples of the panel of rows [k, k + kPanel).
  template <Isa isa>
  static DASHPOT_INLINE void eliminate(T* h, int64_t first, int64_t last, int64_t k, int64_t stride,
                                       const T* share) {
    constexpr int kWidth = kLanes<T, isa>, R = kRows<isa>;
    using V = Vec<T, isa>;
    const T* const pivots = h + k * stride;
    for (int64_t i = first; i < last; i += R) {
      T* const rows = h + i * stride;
      T factor[R][kPanel];
      for (int r = 0; r < R; ++r) {
        for (int p = 0; p < kPanel; ++p) factor[r][p] = share[p * stride + i + r];
      }
      for (int64_t l = i / kWidth * kWidth; l < stride; l += kWidth) {
        V value[R];
        for (int r = 0; r < R; ++r) value[r] = load<T, isa>(rows + r * stride + l);
        for (int p = 0; p < kPanel; ++p) {
          const V pivot = load<T, isa>(pivots + p * stride + l);
          for (int r = 0; r < R; ++r) value[r] -= factor[r][p] * pivot;
        }
        for (int r = 0; r < R; ++r) store<T, isa>(rows + r * stride + l, value[r]);
      }
    }
  }

  // x of U x = D^-1 y, from the last panel to the first. What a panel's solution takes from the
  // rows above is added up in kPanel lanes each, sums (m, kPanel), those of the next panel first:
  // dot products with all of x would read what has only just been written.
  static DASHPOT_INLINE void substitute(const T* h, int64_t m, int64_t stride, const T* inverse,
                                        T* sums, T* x) {
    const int64_t last = (m - 1) / kPanel * kPanel;
    for (int64_t i = 0; i < last + kPanel; ++i) {
      put(sums + i * kPanel, i < m ? Panel{-h[i * stride + m]} : Panel{});
    }
    for (int64_t k = last; k >= 0; k -= kPanel) {
      const T* const rows = h + k * stride;
      Panel own = {};
#pragma GCC unroll 4
      for (int p = kPanel - 1; p >= 0; --p) {
        const Panel lanes = get(sums + (k + p) * kPanel);
        T sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
#pragma GCC unroll 4
        for (int q = kPanel - 1; q > p; --q) sum += rows[p * stride + k + q] * own[q];
        own[p] = k + p < m ? -inverse[k + p] * sum : T(0);
      }
      put(x + k, own);
      for (int64_t i = k - 1; i >= 0; --i) {
        T* const to = sums + i * kPanel;
        put(to, get(to) + own * get(h + i * stride + k));
      }
    }
  }

 private:
  typedef T Panel __attribute__((vector_size(kPanel * sizeof(T))));
  static DASHPOT_INLINE Panel get(const T* from) {
    Panel panel;
    __builtin_memcpy(&panel, from, sizeof panel);
    return panel;
  }
  static DASHPOT_INLINE void put(T* to, Panel panel) { __builtin_memcpy(to, &panel, sizeof panel); }
};

template <class T>
class Cholesky {
 public:
  // Room for a matrix (m, m) and its right-hand side in place m of each row, to be written from the
  // row's own vector to the stride.
  T* room(int64_t m) {
    m_ = m;
    stride_ = (m + kMost) / kMost * kMost;
    h_.resize((m + kRoom) * stride_);
    std::fill_n(h_.data() + m * stride_, kPanel * stride_, T(0));
    return h_.data();
  }
  int64_t stride() const { return stride_; }

  // The solution, or null where the matrix is not positive definite.
  const T* solve() {
    T* const x = h_.data() + (m_ + kPanel) * stride_;
    bool ok;
    run_on_isa<SolveCholesky<T>>(h_.data(), m_, stride_, x, x + stride_, x + 2 * stride_,
                                 x + (2 + kPanel) * stride_, &ok);
    return ok ? x : nullptr;
  }

 private:
  static constexpr int64_t kMost = 64 / sizeof(T);  // lanes of any instruction set
  static constexpr int64_t kRoom = 2 + 4 * kPanel;  // rows beyond the matrix
  int64_t m_ = 0, stride_ = 0;
  AlignedVector<T> h_;
};

}  // namespace dashpot::transport
