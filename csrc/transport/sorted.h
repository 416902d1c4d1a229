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
//
// float32 numbers are sorted as integers of the same order, whose maximum and minimum take half the
// time of those of floating point (Zen 4; elsewhere as long).
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/simd.h"

namespace dashpot::transport {

inline constexpr int kSorted = 32;

struct Comparator {
  int high, low;  // places that receive the larger and the smaller
};

// visit(high, low) of each comparator of the sort of places [first, first + count), halves first:
// what is at work at a time fits the registers.
template <class Visit>
constexpr void each_of_sort(Visit visit, int first = 0, int count = kSorted) {
  if (count == 1) return;
  each_of_sort(visit, first, count / 2);
  each_of_sort(visit, first + count / 2, count / 2);
  for (int d = count / 2; d >= 1; d /= 2) {
    for (int i = d % (count / 2); i + d < count; ++i) {
      if ((i - d % (count / 2)) / d % 2 == 0) visit(first + i, first + i + d);
    }
  }
}

// The same of the merge of a bitonic sequence.
template <class Visit>
constexpr void each_of_merge(Visit visit, int first = 0, int count = kSorted) {
  if (count == 1) return;
  for (int i = first; i < first + count / 2; ++i) visit(i, i + count / 2);
  each_of_merge(visit, first, count / 2);
  each_of_merge(visit, first + count / 2, count / 2);
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

template <class T>
using IntOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Integers in the order of the numbers whose bits they are made of, and back: those of negative
// numbers ascend with their magnitudes' complements.
template <class T, Isa isa>
DASHPOT_INLINE Vec<IntOf<T>, isa> in_order(Vec<IntOf<T>, isa> bits) {
  return bits ^ ((bits >> (8 * sizeof(T) - 1)) & std::numeric_limits<IntOf<T>>::max());
}

// What numbers are sorted by. SSE2 has no maximum of integers.
template <class T, Isa isa>
struct Key {
  static constexpr bool kWhole = std::is_same_v<T, float> && isa != Isa::kBaseline;
  using Vector = Vec<std::conditional_t<kWhole, int32_t, T>, isa>;

  static DASHPOT_INLINE Vector of(Vec<T, isa> number) {
    if constexpr (kWhole) {
      return in_order<T, isa>(reinterpret_cast<Vector>(number));
    } else {
      return number;
    }
  }
  static DASHPOT_INLINE Vec<T, isa> number(Vector key) {
    if constexpr (kWhole) {
      return reinterpret_cast<Vec<T, isa>>(in_order<T, isa>(key));
    } else {
      return key;
    }
  }
};

// Of scores (m, lanes) the largest of each lane, descending, into top (kSorted + 1, lanes): -inf
// where there are not so many.
template <class T, Isa isa>
DASHPOT_INLINE void sort_largest(const T* scores, int64_t m, Vec<T, isa>* top) {
  using Order = Key<T, isa>;
  using Keys = typename Order::Vector;
  constexpr int kWidth = kLanes<T, isa>;
  const Keys lowest = Order::of(Vec<T, isa>{} - std::numeric_limits<T>::infinity());
  Keys best[kSorted], rest = lowest;
  for (int q = 0; q < kSorted; ++q) best[q] = lowest;
  for (int64_t i = 0; i < m; i += kSorted) {
    Keys x[kSorted];
    if (m - i >= kSorted) {
#pragma GCC unroll 32
      for (int q = 0; q < kSorted; ++q) {
        x[q] = Order::of(load<T, isa>(scores + (i + q) * kWidth));
      }
    } else {
      for (int q = 0; q < kSorted; ++q) {
        x[q] = i + q < m ? Order::of(load<T, isa>(scores + (i + q) * kWidth)) : lowest;
      }
    }
    pass_through<Sort>(x);
    if (i > 0) {
#pragma GCC unroll 32
      for (int q = 0; q < kSorted; ++q) {
        const Keys old = best[kSorted - 1 - q], less = old < x[q] ? old : x[q];
        x[q] = old > x[q] ? old : x[q];
        rest = less > rest ? less : rest;
      }
      pass_through<Merge>(x);
    }
#pragma GCC unroll 32
    for (int q = 0; q < kSorted; ++q) best[q] = x[q];
  }
  for (int q = 0; q < kSorted; ++q) top[q] = Order::number(best[q]);
  top[kSorted] = Order::number(rest);
}

}  // namespace dashpot::transport
