// Sorting networks over values in registers, the same source for SIMD lanes and for CUDA threads.
//
// A value is anything with < and ?:, a scalar or a vector of lanes. Networks are made at compile
// time: Batcher's odd-even merge up to 8 values (19 comparators, the fewest there are), above that
// Green's 60 comparators for 16 values, cut to the values there are (56 for 15). More than 16
// values are blocks of 16: sorted one by one, then merged two by two after a network of blocks, in
// which a comparator puts the lower half of both blocks into one and the upper half into the other.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>

#ifdef __CUDACC__
#define DASHPOT_HD_INLINE __host__ __device__ __forceinline__
#define DASHPOT_UNROLL _Pragma("unroll")
#else
#define DASHPOT_HD_INLINE inline __attribute__((always_inline))
#define DASHPOT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace dashpot::aggregate {

inline constexpr int kSortBlock = 16;  // values sorted in registers

struct Network {
  int count = 0;
  int low[64] = {}, high[64] = {};  // comparators in order; the smaller value goes to low
  DASHPOT_HD_INLINE constexpr void add(int i, int j) {
    low[count] = i;
    high[count++] = j;
  }
};

// Calls visit(i, j) for the comparators of Batcher's merge exchange on n values, in order.
template <class Visit>
DASHPOT_HD_INLINE constexpr void merge_exchange(int n, Visit&& visit) {
  for (int run = 1; run < n; run *= 2) {
    for (int step = run; step >= 1; step /= 2) {
      for (int start = step % run; start + step < n; start += 2 * step) {
        for (int i = start; i < start + step && i + step < n; ++i) {
          if (i / (2 * run) == (i + step) / (2 * run)) visit(i, i + step);
        }
      }
    }
  }
}

DASHPOT_HD_INLINE constexpr Network sorting_network(int n) {
  Network network;
  if (n <= 8) {
    merge_exchange(n, [&](int i, int j) { network.add(i, j); });
    return network;
  }
  for (int bit = 1; bit < kSortBlock; bit *= 2) {
    for (int i = 0; i < n; ++i) {
      if (!(i & bit) && (i | bit) < n) network.add(i, i | bit);
    }
  }
  // What four comparators along each axis of a 4-dimensional cube leave open.
  constexpr int kRest[28][2] = {{5, 10},  {6, 9},  {3, 12}, {13, 14}, {4, 8},   {7, 11}, {1, 2},
                                {1, 4},   {7, 13}, {2, 8},  {11, 14}, {2, 4},   {5, 6},  {9, 10},
                                {11, 13}, {3, 8},  {7, 12}, {6, 8},   {10, 12}, {3, 5},  {7, 9},
                                {3, 4},   {5, 6},  {7, 8},  {9, 10},  {11, 12}, {6, 7},  {8, 9}};
  for (const auto& pair : kRest) {
    if (pair[1] < n) network.add(pair[0], pair[1]);
  }
  return network;
}

// Sorts kSortBlock values that rise and then fall.
DASHPOT_HD_INLINE constexpr Network bitonic_network() {
  Network network;
  for (int step = kSortBlock / 2; step >= 1; step /= 2) {
    for (int i = 0; i < kSortBlock; ++i) {
      if (!(i & step)) network.add(i, i + step);
    }
  }
  return network;
}

template <int n>
inline constexpr Network kSorting = sorting_network(n);
inline constexpr Network kBitonic = bitonic_network();

template <class V>
DASHPOT_HD_INLINE void exchange(V& low, V& high) {
  const V smaller = high < low ? high : low;
  high = high < low ? low : high;
  low = smaller;
}

// Indices as template arguments: device code cannot read a host's constant.
template <int i, int j, class V>
DASHPOT_HD_INLINE void exchange_at(V* x) {
  exchange(x[i], x[j]);
}

template <const Network& network, class V, size_t... k>
DASHPOT_HD_INLINE void apply_network(V* x, std::index_sequence<k...>) {
  (exchange_at<network.low[k], network.high[k]>(x), ...);
}

// x[0..n) in rising order.
template <int n, class V>
DASHPOT_HD_INLINE void sort_registers(V* x) {
  if constexpr (n > 1) {
    apply_network<kSorting<n>>(x, std::make_index_sequence<kSorting<n>.count>{});
  }
}

// Two sorted blocks of kSortBlock values, `stride` apart each: the lower half of all to `low`, the
// upper half to `high`, both sorted.
template <class V>
DASHPOT_HD_INLINE void merge_blocks(V* low, V* high, int stride) {
  V x[kSortBlock];
  DASHPOT_UNROLL
  for (int i = 0; i < kSortBlock; ++i) {
    V smaller = low[i * stride], larger = high[(kSortBlock - 1 - i) * stride];
    exchange(smaller, larger);
    x[i] = smaller;
    high[(kSortBlock - 1 - i) * stride] = larger;
  }
  using All = std::make_index_sequence<kBitonic.count>;
  apply_network<kBitonic>(x, All{});
  DASHPOT_UNROLL
  for (int i = 0; i < kSortBlock; ++i) low[i * stride] = x[i];
  DASHPOT_UNROLL
  for (int i = 0; i < kSortBlock; ++i) x[i] = high[i * stride];
  apply_network<kBitonic>(x, All{});
  DASHPOT_UNROLL
  for (int i = 0; i < kSortBlock; ++i) high[i * stride] = x[i];
}

}  // namespace dashpot::aggregate
