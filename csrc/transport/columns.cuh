// Columns of a transport problem on the device; columns.h is the CPU's form of the same.
//
// A tile is kColumns neighbouring columns with all their rows: 32 bytes of each row of the cost,
// one sector of memory. A block works on one tile at a time; a thread belongs to one column and
// takes every lanes-th of its rows. The cost is read once: scores are formed while it comes in and
// stay in shared memory (m x kColumns) where they fit; where not, later passes form them again from
// what the L2 cache holds. A thread reads only scores it wrote itself, so no pass needs a barrier
// but for the sums over a column, which shuffles and two alternating slots make.
//
//   k <= 16     the k largest with their rows in registers, lists merged by bitonic steps
//   else        Newton from below for the threshold; if its support exceeds k, the k-th largest by
//               counting (a guess from the counts in turn with halving the numbers between)
//
// What is chosen is {s > bound} and, of those equal to bound, the rows before `limit`: the first
// rows of equal scores, as everywhere in the family.
#pragma once

#include "common/numeric.cuh"
#include "transport/problem.h"

namespace dashpot::transport {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int64_t kReserved = 4096;  // of a block's shared memory, for the teams' slots
constexpr int kLongList = 16;        // longer lists would not stay in registers

template <class T>
__device__ __forceinline__ T lowest() {
  return static_cast<T>(-INFINITY);
}

template <class T>
struct Pair {
  T first, second;
};
struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T x, T y) const {
    return x + y;
  }
};
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T x, T y) const {
    return x > y ? x : y;
  }
};

// The threads of a block as columns x lanes, and what they know of each other.
template <class T, int kColumns>
struct Team {
  using Slots = Pair<T>[2][kWarps][kColumns];
  Slots& slots;  // shared
  int64_t m;
  int turn = 0;

  __device__ static int column() { return threadIdx.x % kColumns; }
  __device__ static int lane() { return threadIdx.x / kColumns; }
  __device__ static int lanes() { return blockDim.x / kColumns; }

  // Both numbers over all threads of the column, the same bits in each; every thread calls it.
  template <class Merge>
  __device__ Pair<T> all(Pair<T> mine, Merge merge) {
#pragma unroll
    for (int far = kColumns; far < 32; far *= 2) {
      mine.first = merge(mine.first, __shfl_xor_sync(kAll, mine.first, far));
      mine.second = merge(mine.second, __shfl_xor_sync(kAll, mine.second, far));
    }
    if (blockDim.x == 32) return mine;
    auto& slot = slots[turn];  // the other one may still be read
    turn ^= 1;
    if (threadIdx.x % 32 < kColumns) slot[threadIdx.x / 32][column()] = mine;
    __syncthreads();
    Pair<T> total = slot[0][column()];
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
      total.first = merge(total.first, slot[warp][column()].first);
      total.second = merge(total.second, slot[warp][column()].second);
    }
    return total;
  }
};

// A column's scores: `form(i)` makes one from memory, `room` keeps it (null: nothing is kept).
template <class T, int kColumns, class Form>
struct Scores {
  Form form;
  T* room;  // (m, kColumns) shared, at this thread's column

  __device__ __forceinline__ T at(int64_t i) const { return room ? room[i * kColumns] : form(i); }
};

// score[u] of row first + u * step; -inf beyond the last. Forms may have a better one of their own.
template <int U, class T, class Form>
__device__ __forceinline__ void form_several(const Form& form, int64_t first, int64_t step,
                                             int64_t m, T (&score)[U]) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t i = first + u * step;
    score[u] = i < m ? form(i) : lowest<T>();
  }
}

// The one read: every score of this thread is formed, kept, and handed to visit(i, score).
template <class T, int kColumns, class Form, class Visit>
__device__ __forceinline__ void read_scores(const Team<T, kColumns>& team,
                                            const Scores<T, kColumns, Form>& scores, Visit visit) {
  constexpr int kUnroll = 4;
  const int lanes = team.lanes();
  for (int64_t first = team.lane(); first < team.m; first += kUnroll * lanes) {
    T score[kUnroll];
    form_several(scores.form, first, lanes, team.m, score);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * lanes;
      if (i >= team.m) break;
      if (scores.room) scores.room[i * kColumns] = score[u];
      visit(i, score[u]);
    }
  }
}

// The one read, for the highest score.
template <class T, int kColumns, class Form>
__device__ T read_highest(Team<T, kColumns>& team, const Scores<T, kColumns, Form>& scores) {
  T highest = lowest<T>();
  read_scores(team, scores, [&](int64_t, T score) { highest = Max{}(highest, score); });
  return team.all({highest, highest}, Max{}).first;
}

// ---- The k largest, listed -------------------------------------------------------------------

// Descending; of equal scores the first rows.
template <class T, int L>
struct List {
  T value[L];
  int row[L];

  __device__ __forceinline__ static bool before(T value, int row, T than, int than_row) {
    return value > than || (value == than && row < than_row);
  }
  // A score of a later row than all that are listed.
  __device__ __forceinline__ void insert(T score, int i) {
    if (!(score > value[L - 1])) return;
#pragma unroll
    for (int q = L - 1; q > 0; --q) {
      const bool down = score > value[q - 1], here = score > value[q];
      value[q] = down ? value[q - 1] : here ? score : value[q];
      row[q] = down ? row[q - 1] : here ? i : row[q];
    }
    if (score > value[0]) value[0] = score, row[0] = i;
  }
  // value, row: another list's last entry for q = 0, its first for q = L - 1.
  __device__ __forceinline__ void take_larger(int q, T other, int other_row) {
    const bool larger = before(other, other_row, value[q], row[q]);
    value[q] = larger ? other : value[q];
    row[q] = larger ? other_row : row[q];
  }
  // After take_larger for all q the list is bitonic.
  __device__ __forceinline__ void sort_bitonic() {
#pragma unroll
    for (int step = L / 2; step > 0; step /= 2) {
#pragma unroll
      for (int q = 0; q < L; ++q) {
        if (q & step) continue;
        if (before(value[q + step], row[q + step], value[q], row[q])) {
          const T v = value[q];
          const int r = row[q];
          value[q] = value[q + step], row[q] = row[q + step];
          value[q + step] = v, row[q + step] = r;
        }
      }
    }
  }
};

// Lists that warps exchange, in shared memory.
template <class T, int kColumns, int L>
struct Lists {
  T value[kWarps][L][kColumns];
  int row[kWarps][L][kColumns];
};

// Every thread of a column gets the L largest of it.
template <int L, class T, int kColumns>
__device__ void merge_lists(List<T, L>& list, Lists<T, kColumns, L>* lists) {
  const int column = threadIdx.x % kColumns, warp = threadIdx.x / 32;
  const auto within = [&] {
#pragma unroll
    for (int far = kColumns; far < 32; far *= 2) {
      T value[L];
      int row[L];
#pragma unroll
      for (int q = 0; q < L; ++q) {
        value[q] = __shfl_xor_sync(kAll, list.value[L - 1 - q], far);
        row[q] = __shfl_xor_sync(kAll, list.row[L - 1 - q], far);
      }
#pragma unroll
      for (int q = 0; q < L; ++q) list.take_larger(q, value[q], row[q]);
      list.sort_bitonic();
    }
  };
  within();
  const int warps = blockDim.x / 32;
  if (warps == 1) return;
  __syncthreads();  // the last tile's readers are done
  if (threadIdx.x % 32 < kColumns) {
#pragma unroll
    for (int q = 0; q < L; ++q) {
      lists->value[warp][q][column] = list.value[q];
      lists->row[warp][q][column] = list.row[q];
    }
  }
  __syncthreads();
  for (int other = 0; other < warps; ++other) {
    if (other == warp) continue;
#pragma unroll
    for (int q = 0; q < L; ++q) {
      list.take_larger(q, lists->value[other][L - 1 - q][column],
                       lists->row[other][L - 1 - q][column]);
    }
    list.sort_bitonic();
  }
}

// ---- The choice ------------------------------------------------------------------------------

template <class T>
struct Found {
  T theta;        // subtracted from the scores
  T bound;        // scores above it are chosen,
  int64_t limit;  // and those equal to it in the rows before this one

  __device__ __forceinline__ bool has(int64_t i, T score) const {
    return score > bound || (score == bound && i < limit);
  }
};

template <class T>
__device__ Found<T> nothing() {
  return {lowest<T>(), -lowest<T>(), 0};
}

template <class T, int L>
__device__ Found<T> choose_listed(const List<T, L>& top, int k, T budget, bool dual) {
  const T highest = top.value[0];
  if (highest == lowest<T>()) return nothing<T>();
  T theta = dual ? T(0) : highest, sum = 0, last = highest;
  int last_row = top.row[0];
#pragma unroll
  for (int q = 0; q < L; ++q) {
    const bool listed = q < k;               // no break: the list's places must stay constants
    const T below = top.value[q] - highest;  // differences: sums of them stay small
    sum += below;
    const T candidate = (sum - budget) / (q + 1);
    theta = listed && !dual && below > candidate ? highest + candidate : theta;
    last = listed ? top.value[q] : last;
    last_row = listed ? top.row[q] : last_row;
  }
  if (last > theta) return {theta, last, last_row + int64_t{1}};
  return {theta, theta, 0};
}

// Over the scores above `level`: sum (s - level) and their number.
template <class T, int kColumns, class Form>
__device__ Pair<T> above(Team<T, kColumns>& team, const Scores<T, kColumns, Form>& scores,
                         T level) {
  Pair<T> mine{0, 0};
  for (int64_t i = team.lane(); i < team.m; i += team.lanes()) {
    const T gap = scores.at(i) - level;
    mine.first += gap > 0 ? gap : T(0);
    mine.second += gap > 0 ? T(1) : T(0);
  }
  return team.all(mine, Sum{});
}

// The number half way between two in the order of all floating-point numbers.
template <class T, class Bits>
__device__ T half_way(T low, T high) {
  Bits a, b;
  memcpy(&a, &low, sizeof a);
  memcpy(&b, &high, sizeof b);
  constexpr Bits kPositive = static_cast<Bits>(~(Bits{1} << (8 * sizeof(Bits) - 1)));
  a = a < 0 ? a ^ kPositive : a;  // now the order of the integers is that of the numbers
  b = b < 0 ? b ^ kPositive : b;
  Bits middle = (a & b) + ((a ^ b) >> 1);
  middle = middle < 0 ? middle ^ kPositive : middle;
  T number;
  memcpy(&number, &middle, sizeof number);
  return number;
}
__device__ inline float middle_of(float low, float high) {
  return half_way<float, int32_t>(low, high);
}
__device__ inline double middle_of(double low, double high) {
  return half_way<double, int64_t>(low, high);
}

// The row before which `room` scores are equal to `level`; 0 where not asked for. More are in all.
template <class T, int kColumns, class Form>
__device__ int64_t first_equals(Team<T, kColumns>& team, const Scores<T, kColumns, Form>& scores,
                                T level, T room, bool asked) {
  int64_t low = 0, high = asked ? team.m : 0;
  while (__syncthreads_or(high - low > 1)) {
    const int64_t middle = (low + high) / 2;
    Pair<T> mine{0, 0};
    for (int64_t i = team.lane(); i < middle; i += team.lanes()) {
      mine.first += scores.at(i) == level ? T(1) : T(0);
    }
    const T count = team.all(mine, Sum{}).first;
    if (high - low > 1) (count <= room ? low : high) = middle;
  }
  return low;
}

template <class T, int kColumns, class Form>
__device__ Found<T> choose_by_threshold(Team<T, kColumns>& team,
                                        const Scores<T, kColumns, Form>& scores, T highest, T k,
                                        T budget, bool dual) {
  const bool dead = highest == lowest<T>();
  T theta = dual || dead ? T(0) : highest - budget;
  Pair<T> over_it = above(team, scores, theta);
  if (!dual) {
    // The root lies ahead; each step lands before it or on it, and the count must fall.
    T before = -lowest<T>();
    while (true) {
      const bool moving = !dead && over_it.second > 0 && over_it.second < before;
      if (!__syncthreads_or(moving)) break;
      if (moving) theta += (over_it.first - budget) / over_it.second;
      before = over_it.second;
      over_it = above(team, scores, theta);
    }
  }
  Found<T> found{theta, theta, 0};
  const bool too_many = !dead && over_it.second > k;
  bool open = too_many, tied = false;
  if (__syncthreads_or(too_many)) {
    // More than k scores are above low, fewer than k above high.
    T low = theta, high = highest, of_low = over_it.second, of_high = 0;
    for (int round = 0; __syncthreads_or(open); ++round) {
      const T middle = middle_of(low, high);
      T level = low + (high - low) * ((of_low - k) / (of_low - of_high));
      if (round % 2 || !(level > low && level < high)) level = middle;
      const bool between = level > low && level < high;
      const T count = above(team, scores, level).second;
      if (!open) continue;
      if (!between) {  // neighbours: those equal to high are tied for the last places
        found.bound = high, tied = true, open = false;
      } else if (count == k) {
        found.bound = level, open = false;
      } else if (count > k) {
        low = level, of_low = count;
      } else {
        high = level, of_high = count;
      }
    }
    found.limit = first_equals(team, scores, found.bound, k - of_high, tied);
    const T excess = above(team, scores, found.bound).first;  // those equal to it add 0
    if (too_many && !dual) found.theta = found.bound + (excess - budget) / k;
  }
  return dead ? nothing<T>() : found;
}

// What a column with `budget` chooses, from one read of its scores: by the k <= L largest, which
// are left in `top` (L > 0), or by the threshold (L = 0).
template <int L, class T, int kColumns, class Form>
__device__ Found<T> choose(Team<T, kColumns>& team, const Scores<T, kColumns, Form>& scores,
                           Lists<T, kColumns, L ? L : 1>* lists, List<T, L ? L : 1>& top, int64_t k,
                           T budget, bool dual) {
  if constexpr (L > 0) {
#pragma unroll
    for (int q = 0; q < L; ++q) top.value[q] = lowest<T>(), top.row[q] = INT32_MAX;
    read_scores(team, scores, [&](int64_t i, T score) { top.insert(score, static_cast<int>(i)); });
    merge_lists(top, lists);
    return choose_listed(top, static_cast<int>(k), budget, dual);
  } else {
    const T highest = read_highest(team, scores);
    return choose_by_threshold(team, scores, highest, static_cast<T>(k), budget, dual);
  }
}

}  // namespace
}  // namespace dashpot::transport
