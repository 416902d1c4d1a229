// The scores next to a level, of each lane on the side that is asked for: what has to change sides
// where the last evaluation's level has nearly, but not quite, k scores above it.
//
// One walk over the scores; those of the side become numbers that ascend from the level on, all
// others larger ones, and a vector passes down the list of the least so far by minimum and maximum.
// As integers in the order of the scores (sorted.h) this takes no comparison: differences from the
// level, without sign, wrap around.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/simd.h"
#include "transport/sorted.h"

namespace dashpot::transport {

// Scores on one side of `level`: where `below` is 1 those that are not above it, descending, else
// those above it, ascending.
template <class T, Isa isa, bool whole = Key<T, isa>::kWhole>
class Side {
 public:
  using V = Vec<T, isa>;
  using Order = V;

  DASHPOT_INLINE Side(V level, V below) {
    const V one = V{} + T(1);
    sign_ = below > V{} ? -one : one;
    level_ = level * sign_;
    open_ = one - below;
  }
  DASHPOT_INLINE Order place(V score) const {
    const V far = V{} + std::numeric_limits<T>::infinity();
    const V number = score * sign_, at = number == level_ ? open_ : V{};
    const V here = number >= level_ ? number : far;
    return at > V{} ? far : here;
  }
  DASHPOT_INLINE V number(Order place) const { return place * sign_; }

 private:
  V sign_, level_, open_;  // open: 1 where the level itself is not of the side
};

template <class T, Isa isa>
class Side<T, isa, true> {
 public:
  using V = Vec<T, isa>;
  using Order = Vec<uint32_t, isa>;

  DASHPOT_INLINE Side(V level, V below) {
    turn_ = reinterpret_cast<Order>(below > V{});  // all bits, or none
    least_ = (key(level + T(0)) ^ turn_) + 1u + turn_;
  }
  DASHPOT_INLINE Order place(V score) const { return (key(score) ^ turn_) - least_; }
  DASHPOT_INLINE V number(Order place) const {
    const auto bits = reinterpret_cast<Vec<int32_t, isa>>((place + least_) ^ turn_);
    return reinterpret_cast<V>(in_order<T, isa>(bits));
  }

 private:
  static DASHPOT_INLINE Order key(V number) {
    return reinterpret_cast<Order>(Key<T, isa>::of(number));
  }
  Order turn_, least_;
};

// The Q scores nearest to the level, from it outwards; beyond the last of the side anything.
template <int Q, class T, Isa isa>
DASHPOT_INLINE void nearest(const Side<T, isa>& side, const T* scores, int64_t m,
                            Vec<T, isa>* near) {
  using Order = typename Side<T, isa>::Order;
  Order list[Q];
  for (int q = 0; q < Q; ++q) {
    list[q] = Order{} + std::numeric_limits<std::decay_t<decltype(list[q][0])>>::max();
  }
  for (int64_t i = 0; i < m; ++i) {
    Order passing = side.place(load<T, isa>(scores + i * kLanes<T, isa>));
    for (int q = 0; q < Q; ++q) {
      const Order further = passing < list[q] ? list[q] : passing;
      list[q] = passing < list[q] ? passing : list[q];
      passing = further;
    }
  }
  for (int q = 0; q < Q; ++q) near[q] = side.number(list[q]);
}

}  // namespace dashpot::transport
