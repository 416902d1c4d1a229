// The kSorted + 1 largest numbers of each lane, by sorting networks on registers.
//
//     32 rows are sorted (Batcher's odd-even merge sort, 191 comparators), then merged with the 32
//     largest so far: of a descending and an ascending list the larger of each pair are the 32
//     largest of both, a bitonic sequence, which 80 comparators sort.
//
// A comparator is a maximum and a minimum of whole vectors: about 18 instructions per row, the same
// for any input and from no start, where counting the scores above a level costs four per row and
// trial and takes a dozen trials. The network is unrolled over 32 variables, the registers of
// AVX-512; with fewer of them part lie on the stack, in the nearest cache.
#pragma once

#include <array>
#include <limits>
#include <utility>

#include "common/simd.h"

namespace dashpot::transport {

inline constexpr int kSorted = 32;

struct Comparator {
  int high, low;  // places that receive the larger and the smaller
};

// visit(high, low) of each comparator of the sort, in order.
template <class Visit>
constexpr void each_of_sort(Visit visit) {
  for (int p = 1; p < kSorted; p *= 2) {
    for (int d = p; d >= 1; d /= 2) {
      for (int i = d % p; i + d < kSorted; ++i) {
        if ((i - d % p) / d % 2 == 0 && i / (2 * p) == (i + d) / (2 * p)) visit(i, i + d);
      }
    }
  }
}

// The same of the merge of a bitonic sequence.
template <class Visit>
constexpr void each_of_merge(Visit visit) {
  for (int d = kSorted / 2; d >= 1; d /= 2) {
    for (int i = 0; i < kSorted; ++i) {
      if (i / d % 2 == 0) visit(i, i + d);
    }
  }
}

struct Sort {
  static constexpr auto comparators() {
    std::array<Comparator, 191> all{};
    int n = 0;
    each_of_sort([&](int high, int low) { all[n++] = {high, low}; });
    return all;
  }
};

struct Merge {
  static constexpr auto comparators() {
    std::array<Comparator, 80> all{};
    int n = 0;
    each_of_merge([&](int high, int low) { all[n++] = {high, low}; });
    return all;
  }
};

template <int high, int low, class V>
DASHPOT_INLINE void compare(V* x) {
  const V a = x[high], b = x[low];
  x[high] = a > b ? a : b;
  x[low] = a < b ? a : b;
}

template <class Network, class V, size_t... s>
DASHPOT_INLINE void pass_through(V* x, std::index_sequence<s...>) {
  constexpr auto all = Network::comparators();
  (compare<all[s].high, all[s].low>(x), ...);
}

// x (kSorted,) through a network.
template <class Network, class V>
DASHPOT_INLINE void pass_through(V* x) {
  pass_through<Network>(x, std::make_index_sequence<Network::comparators().size()>());
}

// Of scores (m, lanes) the largest of each lane, descending, into top (kSorted + 1, lanes): -inf
// where there are not so many.
template <class T, Isa isa>
DASHPOT_INLINE void sort_largest(const T* scores, int64_t m, Vec<T, isa>* top) {
  using V = Vec<T, isa>;
  constexpr int kWidth = kLanes<T, isa>;
  const V lowest = V{} - std::numeric_limits<T>::infinity();
  V rest = lowest;
  for (int q = 0; q < kSorted; ++q) top[q] = lowest;
  for (int64_t i = 0; i < m; i += kSorted) {
    V x[kSorted];
    if (m - i >= kSorted) {
#pragma GCC unroll 32
      for (int q = 0; q < kSorted; ++q) x[q] = load<T, isa>(scores + (i + q) * kWidth);
    } else {
      for (int q = 0; q < kSorted; ++q) {
        x[q] = i + q < m ? load<T, isa>(scores + (i + q) * kWidth) : lowest;
      }
    }
    pass_through<Sort>(x);
    if (i > 0) {
#pragma GCC unroll 32
      for (int q = 0; q < kSorted; ++q) {
        const V old = top[kSorted - 1 - q], less = old < x[q] ? old : x[q];
        x[q] = old > x[q] ? old : x[q];
        rest = less > rest ? less : rest;
      }
      pass_through<Merge>(x);
    }
#pragma GCC unroll 32
    for (int q = 0; q < kSorted; ++q) top[q] = x[q];
  }
  top[kSorted] = rest;
}

}  // namespace dashpot::transport
