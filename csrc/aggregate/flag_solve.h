// The Flag Aggregator's solve in Gram space, one source for the CPU and for a CUDA block.
//
//   x_i = g_i / max(|g_i|, 1e-12)          Kh = X X^T = Q L Q^T, eigenvalues <= 1e-12 max dropped
//   F = L^{1/2} Q^T                        column f_i is x_i in an orthonormal basis of the span
//   repeat: S = F M F^T, M = diag(w) + Laplacian(w_ij)
//           Y = the m leading eigenvectors of S, Z = Y^T F, v_i = |Z_i|^2
//           w_i = (1 - v_i + eps)^-power, w_ij from |Z_i - Z_j|^2
//   c = N^-1 Q L^{-1/2} Y Z t
//
// Everything is (p, p) or (p,) in float64. Matrices lie in `work`. A Team here has an eigensolver.
#pragma once

#include "aggregate/team.h"

namespace dashpot::aggregate {

enum FlagOutput { kOfficial, kPaper, kRescaled };

struct FlagOptions {
  int m;  // 0: half of the workers kept, rounded up
  int n_iter;
  double lam, eps, power;
  bool objective_pairs;
  FlagOutput output;
  double tol;
};

inline constexpr int kFlagMatrices = 7;
inline constexpr int kFlagVectors = 12;

// float64 numbers of `work`.
DASHPOT_HD inline int64_t flag_work_size(int64_t p) {
  return kFlagMatrices * p * p + kFlagVectors * p;
}

DASHPOT_HD inline double negative_power(double base, double power) {
  return power == 0.5 ? 1 / sqrt(base) : pow(base, -power);
}

DASHPOT_HD inline double clamp01(double value) { return value < 0 ? 0 : value > 1 ? 1 : value; }

// |column i - column j|^2 of columns scaled by size; matrix (p, p).
DASHPOT_HD inline double column_gap(const double* matrix, const double* size, int p, int i, int j) {
  double sum = 0;
  for (int r = 0; r < p; ++r) {
    const double difference = matrix[r * p + i] * size[i] - matrix[r * p + j] * size[j];
    sum += difference * difference;
  }
  return sum;
}

// Weight of a pair: q its share in the subspace so far, gap its squared length, squares the sum of
// its rows' squared lengths. A gap that small beside them is one row twice, rounded.
DASHPOT_HD inline double pair_weight(const FlagOptions& o, double q, double gap, double squares,
                                     double scale) {
  if (!o.objective_pairs) return 2 * scale * scale / sqrt(fabs(1 - q) + o.eps);
  if (!(gap > 1e-12 * squares)) return 0;
  return 2 * scale * negative_power(1 - clamp01(q / gap) + o.eps, o.power) / gap;
}

// k (p, p) -> c (p,), v (p,), objective (), iters ().
template <class Team>
DASHPOT_HD void flag_solve(const Team& team, const double* k, int p, const FlagOptions& o,
                           double* work, double* c, double* v, double* objective, int64_t* iters) {
  const int pp = p * p;
  double* q = work;                   // (p, p) eigenvectors of Kh, one per row
  double* f = q + pp;                 // (p, p) F
  double* s = f + pp;                 // (p, p) what is decomposed; destroyed
  double* y = s + pp;                 // (p, p) eigenvectors of S, one per row
  double* z = y + pp;                 // (p, p) Z; first F M
  double* weight = z + pp;            // (p, p) M
  double* fit = weight + pp;          // (p, p) |Y^T (x_i - x_j)|^2 of the last accepted step
  double* norm = fit + pp;            // (p,) |g_i|, 0 for dropped workers
  double* inverse = norm + p;         // (p,) 1 / max(|g_i|, 1e-12), 0 for dropped workers
  double* size = inverse + p;         // (p,) what x_i is scaled by in a pair
  double* t = size + p;               // (p,) weights of the final sum
  double* values = t + p;             // (p,) eigenvalues
  double* inverse_root = values + p;  // (p,) L^{-1/2}, 0 where dropped
  double* w = inverse_root + p;       // (p,)
  double* new_v = w + p;              // (p,)
  double* g = new_v + p;              // (p,) Y Z t of the last accepted step
  double* h = g + p;                  // (p,) Z t
  double* scratch = h + p;            // (2 p,) for the eigensolver and the median

  int count = 0;  // workers kept
  for (int i = 0; i < p; ++i) count += is_finite(k[i * p + i]);
  const int m = o.m > 0 ? o.m : (count + 1) / 2;
  for (int i = team.rank; i < p; i += team.size) {
    const double square = k[i * p + i];
    const bool alive = is_finite(square);
    norm[i] = alive && square > 0 ? sqrt(square) : 0;
    inverse[i] = alive ? 1 / (norm[i] > 1e-12 ? norm[i] : 1e-12) : 0;
    size[i] = o.objective_pairs ? norm[i] : 1;
    v[i] = g[i] = 0;
  }
  team.sync();
  for (int e = team.rank; e < pp; e += team.size) {
    const int i = e / p, j = e % p;
    s[e] = inverse[i] > 0 && inverse[j] > 0 ? inverse[i] * k[e] * inverse[j] : 0;
    fit[e] = 0;
  }
  // The median length of the workers kept: each finds its own rank.
  for (int i = team.rank; i < p; i += team.size) {
    if (inverse[i] == 0) continue;
    int rank = 0;
    for (int j = 0; j < p; ++j) {
      rank += inverse[j] > 0 && (norm[j] < norm[i] || (norm[j] == norm[i] && j < i));
    }
    if (rank == (count - 1) / 2) scratch[0] = norm[i];
    if (rank == count / 2) scratch[1] = norm[i];
  }
  team.sync();
  for (int i = team.rank; i < p; i += team.size) {
    t[i] = o.output == kOfficial ? 1.0 / m
           : o.output == kPaper  ? norm[i] / count
                                 : (scratch[0] + scratch[1]) / (2 * count);
  }
  team.sync();
  team.eigh(s, q, values, scratch, p);

  double largest = 0;
  for (int r = 0; r < p; ++r) largest = values[r] > largest ? values[r] : largest;
  for (int e = team.rank; e < pp; e += team.size) {
    const double value = values[e / p];
    f[e] = value > 1e-12 * largest ? sqrt(value) * q[e] : 0;
  }
  for (int r = team.rank; r < p; r += team.size) {
    inverse_root[r] = values[r] > 1e-12 * largest ? 1 / sqrt(values[r]) : 0;
  }
  team.sync();

  const double pairs = static_cast<double>(count) * (count - 1);
  const double scale = o.lam / (pairs > 1 ? pairs : 1);
  double best = count;
  int step = 0;
  for (bool active = true; active && step < o.n_iter; ++step) {
    for (int i = team.rank; i < p; i += team.size) {
      w[i] = inverse[i] > 0 ? negative_power(1 - v[i] + o.eps, o.power) : 0;
    }
    team.sync();
    if (o.lam > 0) {
      for (int e = team.rank; e < pp; e += team.size) {
        const int i = e / p, j = e % p;
        const bool pair = i != j && inverse[i] > 0 && inverse[j] > 0;
        const double gap = o.objective_pairs && pair ? column_gap(f, size, p, i, j) : 1;
        const double squares = size[i] * size[i] + size[j] * size[j];
        weight[e] = pair ? pair_weight(o, fit[e], gap, squares, scale) : 0;
      }
      team.sync();
      for (int i = team.rank; i < p; i += team.size) {  // the Laplacian's diagonal
        double sum = 0;
        for (int j = 0; j < p; ++j) sum += weight[i * p + j];
        w[i] += size[i] * size[i] * sum;
      }
      team.sync();
      for (int e = team.rank; e < pp; e += team.size) {
        const int i = e / p, j = e % p;
        weight[e] = i == j ? w[i] : -size[i] * weight[e] * size[j];
      }
      team.sync();
      for (int e = team.rank; e < pp; e += team.size) {  // Z = F M; M is symmetric
        double sum = 0;
        for (int i = 0; i < p; ++i) sum += f[e / p * p + i] * weight[e % p * p + i];
        z[e] = sum;
      }
    } else {
      for (int e = team.rank; e < pp; e += team.size) z[e] = f[e] * w[e % p];
    }
    team.sync();
    for (int e = team.rank; e < pp; e += team.size) {  // S = (F M) F^T
      const double* left = z + e / p * p;
      const double* right = f + e % p * p;
      double sum = 0;
      for (int i = 0; i < p; ++i) sum += left[i] * right[i];
      s[e] = sum;
    }
    team.sync();
    team.eigh(s, y, values, scratch, p);

    for (int e = team.rank; e < pp; e += team.size) {  // Z = Y^T F, rows beyond the m leading 0
      const int l = e / p, i = e % p;
      int rank = 0;
      for (int r = 0; r < p; ++r) {
        rank += values[r] > values[l] || (values[r] == values[l] && r < l);
      }
      double sum = 0;
      if (rank < m) {
        for (int r = 0; r < p; ++r) sum += y[l * p + r] * f[r * p + i];
      }
      z[e] = sum;
    }
    team.sync();
    for (int i = team.rank; i < p; i += team.size) {
      double share = 0, total = 0;
      for (int l = 0; l < p; ++l) share += z[l * p + i] * z[l * p + i];
      for (int j = 0; j < p; ++j) total += z[i * p + j] * t[j];
      // A dropped worker has no share but rounding; 1 - v below 1e-14 is rounding too.
      new_v[i] = inverse[i] == 0 ? 0 : share > 1 - 1e-14 ? 1 : share;
      h[i] = total;
    }
    team.sync();
    double now = 0;
    for (int i = 0; i < p; ++i) now += inverse[i] > 0 ? sqrt(1 - new_v[i]) : 0;
    if (now <= best) {
      for (int i = team.rank; i < p; i += team.size) {
        double sum = 0;
        for (int l = 0; l < p; ++l) sum += y[l * p + i] * h[l];
        g[i] = sum;
        v[i] = new_v[i];
      }
      active = best - now > o.tol && now > o.tol;
      if (o.lam > 0 && active && step + 1 < o.n_iter) {  // the next step's pairs
        for (int e = team.rank; e < pp; e += team.size) {
          const int i = e / p, j = e % p;
          if (i < j) fit[e] = fit[j * p + i] = column_gap(z, size, p, i, j);
        }
      }
      best = now;
    } else {
      active = false;  // a step that raises the objective is taken back
    }
    team.sync();
  }
  for (int i = team.rank; i < p; i += team.size) {
    double sum = 0;
    for (int r = 0; r < p; ++r) sum += q[r * p + i] * inverse_root[r] * g[r];
    c[i] = count > 0 ? inverse[i] * sum : NAN;
  }
  if (team.rank == 0) {
    *objective = best;
    *iters = step;
  }
}

}  // namespace dashpot::aggregate
