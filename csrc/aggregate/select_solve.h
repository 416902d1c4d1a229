// The rules that select rows by their distances, one source for the CPU and for a CUDA block.
//
//   krum   score_i = sum of the `neighbours` least distances to others; c = 1/k on the k least
//   nnm    M_ij = 1/(p - f) for the p - f rows j nearest to row i, itself first
//   mda    the first subset of p - f rows, in lexicographic order, of least diameter
//
// d (p, p) float64. A row whose diagonal entry is not finite is bad: at distance inf from all. Ties
// go to the lower index. No place is found by sorting: the rank of a distance is the number of
// smaller ones, so each entry can be placed by another thread, and sums run in ascending order.
#pragma once

#include "aggregate/team.h"
#ifndef __CUDACC_RTC__
#include <string.h>
#endif

namespace dashpot::aggregate {

// distance (p, p) from d: inf for what cannot be used and on the diagonal.
template <class Team>
DASHPOT_HD void clean_distances(const Team& team, const double* d, int p, double* distance) {
  for (int e = team.rank; e < p * p; e += team.size) {
    const int i = e / p, j = e % p;
    const bool usable =
        i != j && is_finite(d[i * p + i]) && is_finite(d[j * p + j]) && is_finite(d[e]);
    distance[e] = usable ? d[e] : INFINITY;
  }
  team.sync();
}

// How many of n values come before value number `at`: smaller ones, and equal ones to its left.
DASHPOT_HD inline int rank_of(const double* values, int n, int at) {
  const double value = values[at];
  int rank = 0;
  for (int l = 0; l < at; ++l) rank += values[l] <= value;
  for (int l = at + 1; l < n; ++l) rank += values[l] < value;
  return rank;
}

// float64 numbers of `work` for p rows.
DASHPOT_HD inline int64_t krum_work_size(int64_t p) { return 2 * p * p; }
DASHPOT_HD inline int64_t nnm_work_size(int64_t p) { return p * p + p; }

// d (p, p) -> c (p,), scores (p,).
template <class Team>
DASHPOT_HD void krum_solve(const Team& team, const double* d, int p, int k, int neighbours,
                           bool squared, double* work, double* c, double* scores) {
  double* distance = work;      // (p, p)
  double* near = work + p * p;  // (p, p) row i: its distances, ascending
  clean_distances(team, d, p, distance);
  for (int e = team.rank; e < p * p; e += team.size) {
    const double* row = distance + e / p * p;
    const double value = row[e % p];
    near[e / p * p + rank_of(row, p, e % p)] = squared ? value : sqrt(value);
  }
  team.sync();
  for (int i = team.rank; i < p; i += team.size) {
    double sum = 0;
    for (int r = 0; r < neighbours; ++r) sum += near[i * p + r];
    scores[i] = sum;
  }
  team.sync();
  int usable = 0;
  for (int i = 0; i < p; ++i) usable += is_finite(scores[i]);
  for (int i = team.rank; i < p; i += team.size) {
    c[i] = usable < k ? NAN : rank_of(scores, p, i) < k ? 1.0 / k : 0.0;
  }
}

// d (p, p) -> mixing (p, p); rows of NaN for bad rows and those without p - f good ones near.
template <class Team>
DASHPOT_HD void nnm_solve(const Team& team, const double* d, int p, int f, double* work,
                          double* mixing) {
  double* distance = work;      // (p, p)
  double* good = work + p * p;  // (p,) how many rows row i has to choose from, itself too
  clean_distances(team, d, p, distance);
  for (int i = team.rank; i < p; i += team.size) {
    int usable = is_finite(d[i * p + i]);
    for (int j = 0; j < p; ++j) usable += is_finite(distance[i * p + j]);
    good[i] = usable;
    distance[i * p + i] = -1;  // itself first
  }
  team.sync();
  for (int e = team.rank; e < p * p; e += team.size) {
    const int i = e / p;
    const double* row = distance + i * p;
    const bool known = good[i] >= p - f && is_finite(d[i * p + i]);
    mixing[e] = !known ? NAN : rank_of(row, p, e % p) < p - f ? 1.0 / (p - f) : 0.0;
  }
}

// ---- minimum diameter

DASHPOT_HD inline int words_of(int p) { return (p + 63) / 64; }

DASHPOT_HD inline int bits_in(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}

DASHPOT_HD inline bool has(const uint64_t* set, int i) { return set[i / 64] >> (i % 64) & 1; }

// Sets of rows are bits in `words` words. Two rows further apart than the threshold are in
// conflict; a set of at most `budget` rows that meets every conflict is a vertex cover.
struct Conflicts {
  int p, words;
  uint64_t* edges;  // (p, words) whom row i is in conflict with
  uint64_t* live;   // (words,) rows not yet taken away; what `coverable` works on
  uint64_t* stack;  // (p, words + 1) choices left open: rows and budget
  double* degree;   // (p,)
};

DASHPOT_HD inline int64_t mda_work_size(int64_t p) {
  const int64_t words = words_of(static_cast<int>(p));
  return p * p + 2 * p * (words + 1) + 4 * words + 2 * p;
}

template <class Team>
DASHPOT_HD void copy_set(const Team& team, const uint64_t* from, uint64_t* to, int words) {
  for (int w = team.rank; w < words; w += team.size) to[w] = from[w];
  team.sync();
}

// Takes row v away, or its rivals.
template <class Team>
DASHPOT_HD void take(const Team& team, uint64_t* live, const uint64_t* rivals, int v, int words) {
  for (int w = team.rank; w < words; w += team.size) {
    live[w] &= ~(rivals ? rivals[w] : v / 64 == w ? uint64_t{1} << (v % 64) : 0);
  }
  team.sync();
}

// Whether at most `budget` rows of g.live cover all conflicts within it; destroys g.live. Branches
// on the row with most conflicts: it is in the cover, or all its rivals are.
template <class Team>
DASHPOT_HD bool coverable(const Team& team, const Conflicts& g, int budget) {
  int depth = 0;
  while (true) {
    for (int i = team.rank; i < g.p; i += team.size) {
      int count = 0;
      if (has(g.live, i)) {
        for (int w = 0; w < g.words; ++w) count += bits_in(g.edges[i * g.words + w] & g.live[w]);
      }
      g.degree[i] = count;
    }
    team.sync();
    int most = 0, worst = 0, sum = 0;
    for (int i = 0; i < g.p; ++i) {
      const int count = static_cast<int>(g.degree[i]);
      sum += count;
      if (count > most) most = count, worst = i;
    }
    team.sync();
    if (most == 0 || (most == 1 && sum <= 2 * budget)) return true;
    if (sum > 2 * budget * most) {  // each row taken meets at most `most` conflicts
      if (depth == 0) return false;
      --depth;
      const uint64_t* open = g.stack + depth * (g.words + 1);
      budget = static_cast<int>(open[g.words]);
      copy_set(team, open, g.live, g.words);
      continue;
    }
    if (most <= budget) {  // the other choice, for later: its rivals are taken
      uint64_t* open = g.stack + depth * (g.words + 1);
      for (int w = team.rank; w < g.words; w += team.size) {
        open[w] = g.live[w] & ~g.edges[worst * g.words + w];
      }
      if (team.rank == 0) open[g.words] = static_cast<uint64_t>(budget - most);
      ++depth;
      team.sync();
    }
    take(team, g.live, nullptr, worst, g.words);
    --budget;
  }
}

template <class Team>
DASHPOT_HD void find_conflicts(const Team& team, const Conflicts& g, const double* distance,
                               double threshold) {
  for (int e = team.rank; e < g.p * g.words; e += team.size) {
    const int i = e / g.words, first = e % g.words * 64;
    uint64_t word = 0;
    for (int j = first; j < g.p && j < first + 64; ++j) {
      word |= static_cast<uint64_t>(j != i && distance[i * g.p + j] > threshold) << (j - first);
    }
    g.edges[e] = word;
  }
  team.sync();
}

// The largest distance that is at most `most`, or below it if `strict`; -1 if there is none.
template <class Team>
DASHPOT_HD double largest_within(const Team& team, const double* distance, int p, double most,
                                 bool strict) {
  double found = -1;
  for (int e = team.rank; e < p * p; e += team.size) {
    const double value = distance[e];
    if (value > found && (strict ? value < most : value <= most)) found = value;
  }
  return team.max(found);
}

// A float64 >= 0 as an integer of the same order, and back.
DASHPOT_HD inline uint64_t order_of(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
DASHPOT_HD inline double from_order(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// d (p, p) -> c (p,), diameter ().
template <class Team>
DASHPOT_HD void mda_solve(const Team& team, const double* d, int p, int f, double* work, double* c,
                          double* diameter) {
  const int words = words_of(p), k = p - f;
  double* distance = work;  // (p, p)
  uint64_t* bits = reinterpret_cast<uint64_t*>(work + p * p);
  const Conflicts g{p,
                    words,
                    bits,
                    bits + p * words,
                    bits + (p + 1) * words,
                    work + p * p + (p + 1) * words + p * (words + 1)};
  uint64_t* good = reinterpret_cast<uint64_t*>(g.degree + p);  // (words,) rows that are not bad
  uint64_t* rest = good + words;                               // (words,) rows not decided against
  clean_distances(team, d, p, distance);
  int bad = 0;
  for (int i = 0; i < p; ++i) bad += !is_finite(d[i * p + i]);
  for (int w = team.rank; w < words; w += team.size) {
    uint64_t word = 0;
    for (int j = w * 64; j < p && j < w * 64 + 64; ++j) {
      word |= static_cast<uint64_t>(is_finite(d[j * p + j])) << (j - w * 64);
    }
    good[w] = word;
  }
  team.sync();

  // The least t for which at most f rows, the bad ones among them, cover all conflicts. `below` is
  // not enough (in the order of the numbers' bits), `enough` is, and both close in.
  double enough = largest_within(team, distance, p, INFINITY, true);
  if (enough < 0) enough = 0;  // no pair of good rows
  bool known = bad <= f;
  if (known) {  // distances between good rows may have overflowed
    find_conflicts(team, g, distance, enough);
    copy_set(team, good, g.live, words);
    known = coverable(team, g, f - bad);
  }
  if (!known) {
    for (int i = team.rank; i < p; i += team.size) c[i] = NAN;
    if (team.rank == 0) *diameter = NAN;
    return;
  }
  double below = -1;
  while (true) {
    const double next = largest_within(team, distance, p, enough, true);
    if (next < 0 || next <= below) break;  // nothing lies between
    const uint64_t low = below < 0 ? 0 : order_of(below);
    const double half = from_order(low + (order_of(next) - low + 1) / 2);
    const double middle = largest_within(team, distance, p, half, false);
    if (middle <= below && below < half) {
      below = half;  // nothing lies in the lower half
      continue;
    }
    find_conflicts(team, g, distance, middle);
    copy_set(team, good, g.live, words);
    if (coverable(team, g, f - bad)) {
      enough = middle;
    } else {
      below = middle;
    }
  }

  // Row by row: it stays if the others can be covered with what its rivals leave of the budget.
  find_conflicts(team, g, distance, enough);
  copy_set(team, good, rest, words);
  int budget = f - bad, kept = 0;
  for (int i = 0; i < p; ++i) {
    bool stays = has(rest, i) && kept < k;
    if (stays) {
      int rivals = 0;
      for (int w = 0; w < words; ++w) rivals += bits_in(g.edges[i * words + w] & rest[w]);
      if (rivals > 0) {
        stays = rivals <= budget;
        if (stays) {
          copy_set(team, rest, g.live, words);
          take(team, g.live, g.edges + i * words, i, words);
          stays = coverable(team, g, budget - rivals);
        }
        team.sync();
        take(team, rest, stays ? g.edges + i * words : nullptr, i, words);
        budget -= stays ? rivals : 1;
      }
    }
    kept += stays;
    if (team.rank == 0) c[i] = stays ? 1.0 / k : 0.0;
    team.sync();
  }
  if (team.rank == 0) *diameter = sqrt(enough);
}

}  // namespace dashpot::aggregate
