// Vectors at the end of a row: a last step of fewer elements than lanes goes through a padded copy,
// so that every element meets the same instructions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/simd.h"

namespace dashpot::experts {

// What sums are formed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements [0, n) of `from`, the lanes beyond them `fill`.
template <Isa isa, class T>
DASHPOT_INLINE Vec<Wide<T>, isa> load_part(const T* from, int64_t n, Wide<T> fill) {
  using W = Wide<T>;
  constexpr int64_t kStep = kLanes<W, isa>;
  if (n >= kStep) return load_as<W, isa>(from);
  W padded[kStep];
  for (int64_t i = 0; i < kStep; ++i) padded[i] = i < n ? convert<W>(from[i]) : fill;
  return load<W, isa>(padded);
}

template <Isa isa, class T>
DASHPOT_INLINE void store_part(T* to, Vec<Wide<T>, isa> value, int64_t n) {
  using W = Wide<T>;
  constexpr int64_t kStep = kLanes<W, isa>;
  if (n >= kStep) {
    if constexpr (std::is_same_v<T, W>) {
      store<W, isa>(to, value);
    } else {
      Sixteen<isa>::narrow(to, value);
    }
    return;
  }
  W padded[kStep];
  store<W, isa>(padded, value);
  for (int64_t i = 0; i < n; ++i) to[i] = convert<T>(padded[i]);
}

template <class W, Isa isa>
DASHPOT_INLINE W max_lane(Vec<W, isa> value) {
  W most = value[0];
  for (int i = 1; i < kLanes<W, isa>; ++i) most = value[i] > most ? value[i] : most;
  return most;
}

}  // namespace dashpot::experts
