// Bulyan's choice of rows, one source for the CPU and for a CUDA block.
//
//   p - 2 f times: of the r rows that remain take the first whose max(1, r - f - 2) nearest others
//   have the smallest sum of squared distances; a distance that is not finite is infinite
//
// Each row's others are put in order of their distance once; a score then walks along that order
// over the rows that remain, so sums are formed from the smallest distance upwards on every
// backend. `Team` is one thread or a block of them; every thread runs this function.
#pragma once

#include "aggregate/team.h"

namespace dashpot::aggregate {

inline constexpr double kLargest = 1.7976931348623157e308;

// float64 numbers of `work`: a score per row, and (p, p) int32.
DASHPOT_HD inline int64_t bulyan_work_size(int64_t p) { return p + (p * p + 1) / 2; }

DASHPOT_HD inline double finite_or_largest(double value) {
  return fabs(value) <= kLargest ? value : HUGE_VAL;
}

// sqdist (p, p) -> chosen (p,).
template <class Team>
DASHPOT_HD void bulyan_select(const Team& team, const double* sqdist, int p, int f, double* work,
                              bool* chosen) {
  double* score = work;  // (p,)
  int32_t* order =
      reinterpret_cast<int32_t*>(work + p);  // (p, p): the others, nearest first; then
                                             // whether no distance of the row is finite
  for (int e = team.rank; e < p * p; e += team.size) {
    const int i = e / p, j = e % p;
    if (i == j) continue;
    const double* row = sqdist + i * p;
    const double own = finite_or_largest(row[j]);
    int place = 0;
    for (int other = 0; other < p; ++other) {
      const double distance = finite_or_largest(row[other]);
      place += other != i && (distance < own || (distance == own && other < j));
    }
    order[i * p + place] = j;
  }
  for (int i = team.rank; i < p; i += team.size) chosen[i] = false;
  team.sync();
  for (int i = team.rank; i < p; i += team.size) {
    order[i * p + p - 1] = p < 2 || !(fabs(sqdist[i * p + order[i * p]]) <= kLargest);
  }
  team.sync();
  for (int remaining = p; remaining > 2 * f; --remaining) {
    const int neighbours = remaining - f - 2 > 1 ? remaining - f - 2 : 1;
    for (int i = team.rank; i < p; i += team.size) {
      double sum = 0;
      int found = 0;
      for (int n = 0; n < p - 1 && found < neighbours; ++n) {
        const int j = order[i * p + n];
        if (chosen[j]) continue;
        sum += finite_or_largest(sqdist[i * p + j]);
        ++found;
      }
      score[i] = found == neighbours && sum < kLargest ? sum : kLargest;
    }
    team.sync();
    if (team.rank == 0) {
      int best = -1;
      for (int i = 0; i < p; ++i) {
        if (chosen[i]) continue;
        const int lost = order[i * p + p - 1];
        const int best_lost = best < 0 ? 2 : order[best * p + p - 1];
        if (lost < best_lost || (lost == best_lost && score[i] < score[best])) best = i;
      }
      chosen[best] = true;
    }
    team.sync();
  }
}

}  // namespace dashpot::aggregate
