// Products of small blocks that lie in a cache: c (m, n) = a (m, k) b (k, n), or c += a b.
//
// b lies in strips of kStrip columns, each (k, kStrip) without gaps: a strip of a wide matrix would
// use a fraction of the sets of the L1 cache, and fall out of it. a is read number by number from
// anywhere: a row of tiles is as good as a column of it (a_row = 1, a_k = leading dimension: the
// transposed product costs the same). Register tiles of R rows by two vectors reach the peak of
// AVX-512's multiply-add units from k = 64 on; a library call per block of 64 would not. Every
// number is summed over k from the first to the last, wherever it lies: equal rows, equal numbers.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace dashpot {

inline constexpr int64_t kStrip = 32;  // columns: two vectors of any set, or several times that

inline int64_t strips(int64_t n) { return (n + kStrip - 1) / kStrip; }

constexpr int matmul_rows(Isa isa) { return isa == Isa::kAvx512 ? 8 : 4; }

template <Isa isa, class T, bool add, int R>
DASHPOT_INLINE void matmul_tile(const T* a, int64_t a_row, int64_t a_k, const T* b, T* c,
                                int64_t c_row, int64_t k) {
  constexpr int kStep = kLanes<T, isa>;
  Vec<T, isa> sum[R][2] = {};
  for (int64_t q = 0; q < k; ++q) {
    const Vec<T, isa> left = load<T, isa>(b + q * kStrip);
    const Vec<T, isa> right = load<T, isa>(b + q * kStrip + kStep);
    for (int r = 0; r < R; ++r) {
      const T factor = a[r * a_row + q * a_k];
      sum[r][0] += factor * left;
      sum[r][1] += factor * right;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 2; ++v) {
      T* at = c + r * c_row + v * kStep;
      store<T, isa>(at, add ? load<T, isa>(at) + sum[r][v] : sum[r][v]);
    }
  }
}

template <Isa isa, class T, bool add, int R = 1>
DASHPOT_INLINE void matmul_tile_of_height(int64_t height, const T* a, int64_t a_row, int64_t a_k,
                                          const T* b, T* c, int64_t c_row, int64_t k) {
  if constexpr (R < matmul_rows(isa)) {
    if (height > R) {
      return matmul_tile_of_height<isa, T, add, R + 1>(height, a, a_row, a_k, b, c, c_row, k);
    }
  }
  matmul_tile<isa, T, add, R>(a, a_row, a_k, b, c, c_row, k);
}

template <class T, bool add>
struct Matmul {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* a, int64_t a_row, int64_t a_k, const T* b,
                                 int64_t b_strip, T* c, int64_t c_row, int64_t c_strip, int64_t m,
                                 int64_t n, int64_t k) {
    constexpr int64_t kRows = matmul_rows(isa), kColumns = 2 * kLanes<T, isa>;
    for (int64_t strip = 0; strip < n; ++strip) {
      for (int64_t j = 0; j < kStrip; j += kColumns) {
        const T* right = b + strip * b_strip + j;
        T* out = c + strip * c_strip + j;
        int64_t i = 0;
        for (; i + kRows <= m; i += kRows) {
          matmul_tile<isa, T, add, kRows>(a + i * a_row, a_row, a_k, right, out + i * c_row, c_row,
                                          k);
        }
        if (i < m) {
          matmul_tile_of_height<isa, T, add>(m - i, a + i * a_row, a_row, a_k, right,
                                             out + i * c_row, c_row, k);
        }
      }
    }
  }
};

// c = a b over n strips: b's strips lie b_strip apart, c's c_strip apart with rows of kStrip
// numbers c_row apart.
template <class T>
void matmul(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_strip, T* c,
            int64_t c_row, int64_t c_strip, int64_t m, int64_t n, int64_t k) {
  run_on_isa<Matmul<T, false>>(a, a_row, a_k, b, b_strip, c, c_row, c_strip, m, n, k);
}

// c += a b
template <class T>
void matmul_add(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_strip, T* c,
                int64_t c_row, int64_t c_strip, int64_t m, int64_t n, int64_t k) {
  run_on_isa<Matmul<T, true>>(a, a_row, a_k, b, b_strip, c, c_row, c_strip, m, n, k);
}

}  // namespace dashpot
