// The rules that move a point among the rows, one source for the CPU and for a CUDA block.
//
//   geometric median    c_i <- a_i / max(nu, dist_i), normalised
//   centered clipping   v <- v + mean_i (g_i - v) min(1, tau / dist_i)
//
// The point is z = sum_i c_i g_i with sum c = 1, so its distances come from those between the rows,
// d (q, q) float64:  dist_j^2 = (D c)_j - c^T D c / 2.  A row whose diagonal entry is not finite is
// dropped. Sums over q are formed by all threads alike.
#pragma once

#include "aggregate/team.h"

namespace dashpot::aggregate {

// float64 numbers of `work` for q points.
DASHPOT_HD inline int64_t center_work_size(int64_t q) { return q * q + 3 * q; }

// clean (q, q): d with 0 for dropped rows and on the diagonal.
template <class Team>
DASHPOT_HD void usable_distances(const Team& team, const double* d, int q, double* clean) {
  for (int e = team.rank; e < q * q; e += team.size) {
    const int i = e / q, j = e % q;
    clean[e] = i != j && is_finite(d[i * q + i]) && is_finite(d[j * q + j]) ? d[e] : 0;
  }
}

// distance (q,) from z to each point; image (q,) is overwritten.
template <class Team>
DASHPOT_HD void distances_to(const Team& team, const double* clean, const double* c, int q,
                             double* image, double* distance) {
  for (int j = team.rank; j < q; j += team.size) {
    double sum = 0;
    for (int i = 0; i < q; ++i) sum += clean[j * q + i] * c[i];
    image[j] = sum;
  }
  team.sync();
  double square = 0;
  for (int j = 0; j < q; ++j) square += c[j] * image[j];
  for (int j = team.rank; j < q; j += team.size) {
    const double rest = image[j] - square / 2;
    distance[j] = rest > 0 ? sqrt(rest) : rest <= 0 ? 0 : NAN;
  }
}

struct MedianOptions {
  double nu;
  int n_iter;
  double tol;
  bool from_last;  // start at the last point, which is none of those whose median is sought
};

// d (q, q), a (q,) or (q - 1,) weights or null -> c (q,), iters ().
template <class Team>
DASHPOT_HD void geometric_median_solve(const Team& team, const double* d, int q, const double* a,
                                       const MedianOptions& o, double* work, double* c,
                                       int64_t* iters) {
  double* clean = work;           // (q, q)
  double* weight = work + q * q;  // (q,) a, 0 for dropped rows
  double* image = weight + q;     // (q,)
  double* w = image + q;          // (q,) distances, then what c becomes
  const int n = o.from_last ? q - 1 : q;
  usable_distances(team, d, q, clean);
  bool valid = !o.from_last || is_finite(d[q * q - 1]);
  double total = 0;
  for (int i = 0; i < n; ++i) {
    if (!is_finite(d[i * q + i])) continue;
    const double value = a ? a[i] : 1;
    valid = valid && value >= 0 && is_finite(value);
    total += value;
  }
  valid = valid && total > 0;
  for (int i = team.rank; i < q; i += team.size) {
    weight[i] = i < n && is_finite(d[i * q + i]) ? (a ? a[i] : 1) : 0;
    c[i] = o.from_last ? i == q - 1 : weight[i] / total;
  }
  team.sync();
  int step = 0;
  for (bool active = true; active && step < o.n_iter; ++step) {
    distances_to(team, clean, c, q, image, w);
    for (int i = team.rank; i < q; i += team.size) {
      w[i] = weight[i] / (w[i] < o.nu ? o.nu : w[i]);
    }
    team.sync();
    double sum = 0;
    for (int i = 0; i < q; ++i) sum += w[i];
    active = false;
    for (int i = 0; i < q; ++i) active = active || fabs(w[i] / sum - c[i]) > o.tol * (w[i] / sum);
    team.sync();
    for (int i = team.rank; i < q; i += team.size) c[i] = w[i] / sum;
    team.sync();
  }
  if (!valid) {
    for (int i = team.rank; i < q; i += team.size) c[i] = NAN;
  }
  if (team.rank == 0) *iters = step;
}

// d (q, q), the centre last -> c (q,).
template <class Team>
DASHPOT_HD void centered_clipping_solve(const Team& team, const double* d, int q, double tau,
                                        int n_iter, double* work, double* c) {
  double* clean = work;          // (q, q)
  double* image = work + q * q;  // (q,)
  double* distance = image + q;  // (q,)
  double* step = distance + q;   // (q,) what each row adds
  usable_distances(team, d, q, clean);
  int count = 0;  // rows kept
  for (int i = 0; i < q - 1; ++i) count += is_finite(d[i * q + i]);
  for (int i = team.rank; i < q; i += team.size) c[i] = i == q - 1;
  team.sync();
  for (int t = 0; t < n_iter; ++t) {
    distances_to(team, clean, c, q, image, distance);
    for (int i = team.rank; i < q; i += team.size) {
      const double factor = distance[i] > tau ? tau / distance[i] : 1;
      step[i] = i < q - 1 && is_finite(d[i * q + i]) ? factor / count : 0;
    }
    team.sync();
    double sum = 0;
    for (int i = 0; i < q; ++i) sum += step[i];
    for (int i = team.rank; i < q; i += team.size) c[i] = (1 - sum) * c[i] + step[i];
    team.sync();
  }
  if (count == 0 || !is_finite(d[q * q - 1])) {
    for (int i = team.rank; i < q; i += team.size) c[i] = NAN;
  }
}

}  // namespace dashpot::aggregate
