// Eigenvalues and eigenvectors of a small symmetric matrix on one CPU thread.
//
// Householder reduction to a tridiagonal matrix, then implicit QL with Wilkinson's shift. About
// 9 n^3 operations, most of them over contiguous rows: eigenvectors are kept one per row, so that
// a plane rotation works on two rows. For n up to a few hundred; larger problems are LAPACK's.
#pragma once

#include <cfloat>
#include <cmath>
#include <stdexcept>

namespace dashpot {

// a (n, n) symmetric, destroyed -> vectors (n, n) with eigenvector l in row l, values (n,) in no
// particular order; scratch (2 n,).
inline void eigh(double* a, double* vectors, double* values, double* scratch, int n) {
  double* off = scratch;        // (n,) the tridiagonal's off-diagonal
  double* image = scratch + n;  // (n,)
  // Reduction: the reflector of step k lies in row k, right of the diagonal (and beta on it).
  for (int k = 0; k + 2 < n; ++k) {
    double* u = a + k * n;
    double tail = 0;
    for (int i = k + 2; i < n; ++i) tail += u[i] * u[i];
    values[k] = u[k];
    off[k] = u[k + 1];
    u[k] = 0;  // beta = 0: no reflection
    if (tail == 0) continue;
    const double length = std::sqrt(u[k + 1] * u[k + 1] + tail);
    off[k] = u[k + 1] > 0 ? -length : length;
    u[k + 1] -= off[k];
    const double beta = 2 / (u[k + 1] * u[k + 1] + tail);
    if (!std::isfinite(beta)) {  // the row is below float64's squares: take it as 0
      off[k] = 0;
      continue;
    }
    u[k] = beta;
    double product = 0;
    for (int i = k + 1; i < n; ++i) {
      double sum = 0;
      for (int j = k + 1; j < n; ++j) sum += a[i * n + j] * u[j];
      image[i] = beta * sum;
      product += image[i] * u[i];
    }
    for (int i = k + 1; i < n; ++i) image[i] -= 0.5 * beta * product * u[i];
    for (int i = k + 1; i < n; ++i) {
      for (int j = k + 1; j < n; ++j) a[i * n + j] -= u[i] * image[j] + image[i] * u[j];
    }
  }
  if (n > 1) {
    values[n - 2] = a[(n - 2) * n + n - 2];
    off[n - 2] = a[(n - 2) * n + n - 1];
  }
  values[n - 1] = a[n * n - 1];
  off[n - 1] = 0;
  // The product of the reflectors, transposed: eigenvectors of the tridiagonal's basis, by rows.
  for (int i = 0; i < n * n; ++i) vectors[i] = 0;
  for (int i = 0; i < n; ++i) vectors[i * n + i] = 1;
  for (int k = n - 3; k >= 0; --k) {
    const double* u = a + k * n;
    if (u[k] == 0) continue;
    for (int i = k + 1; i < n; ++i) {
      double sum = 0;
      for (int j = k + 1; j < n; ++j) sum += vectors[i * n + j] * u[j];
      sum *= u[k];
      for (int j = k + 1; j < n; ++j) vectors[i * n + j] -= sum * u[j];
    }
  }
  // An entry is negligible beside the whole matrix, not beside its neighbours: where the rank is
  // low, those are rounding errors themselves, and never settle.
  double negligible = 0;
  for (int i = 0; i < n; ++i) {
    negligible = std::fmax(negligible, DBL_EPSILON * (std::fabs(values[i]) + std::fabs(off[i])));
  }
  for (int l = 0; l < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      int end = l;  // the block l..end has no negligible off-diagonal entry
      while (end < n - 1 && std::fabs(off[end]) > negligible) ++end;
      if (end == l) break;
      if (sweep == 60) throw std::runtime_error("eigh: no convergence");
      const double ratio = (values[l + 1] - values[l]) / (2 * off[l]);
      const double root = std::copysign(std::sqrt(ratio * ratio + 1), ratio);
      double g = values[end] - values[l] + off[l] / (ratio + root);
      double sine = 1, cosine = 1, carry = 0;
      int i = end - 1;
      for (; i >= l; --i) {
        const double f = sine * off[i];
        const double b = cosine * off[i];
        const double r = std::sqrt(f * f + g * g);
        off[i + 1] = r;
        if (r == 0) {  // the bulge vanished: the block falls apart here
          values[i + 1] -= carry;
          off[end] = 0;
          break;
        }
        sine = f / r;
        cosine = g / r;
        g = values[i + 1] - carry;
        const double step = (values[i] - g) * sine + 2 * cosine * b;
        carry = sine * step;
        values[i + 1] = g + carry;
        g = cosine * step - b;
        double* upper = vectors + i * n;
        double* lower = upper + n;
        for (int k = 0; k < n; ++k) {
          const double x = lower[k];
          lower[k] = sine * upper[k] + cosine * x;
          upper[k] = cosine * upper[k] - sine * x;
        }
      }
      if (i >= l) continue;
      values[l] -= carry;
      off[l] = g;
      off[end] = 0;
    }
  }
}

}  // namespace dashpot
