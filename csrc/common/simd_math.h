// Square root and logarithm of a vector's lanes, in float32 and float64, without intrinsics.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/simd.h"

namespace dashpot {

template <class T>
using IntOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> sqrt_lanes(Vec<T, isa> value) {
  constexpr int kWidth = kLanes<T, isa>;
  T lanes[kWidth];
  store<T, isa>(lanes, value);
  for (int i = 0; i < kWidth; ++i) lanes[i] = std::sqrt(lanes[i]);  // one instruction
  return load<T, isa>(lanes);
}

// Natural logarithm to about one rounding. With x = 2^e m, 2/3 <= m < 4/3, and s = (m - 1)/(m + 1),
// log x = e log 2 + 2 (s + s^3/3 + s^5/5 + ...), |s| <= 1/5. 0 gives -inf, below 0 NaN.
template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> log_lanes(Vec<T, isa> x) {
  using Int = IntOf<T>;
  using Ints = Vec<Int, isa>;
  using V = Vec<T, isa>;
  constexpr bool kDouble = sizeof(T) == 8;
  constexpr int kMantissa = kDouble ? 52 : 23;
  constexpr Int kTwoThirds = kDouble ? Int(0x3fe5555555555555) : Int(0x3f2aaaab);
  constexpr T kLeast = kDouble ? T(2.2250738585072014e-308) : T(1.17549435e-38);
  constexpr T kLift = kDouble ? T(18014398509481984.0) : T(33554432.0);  // 2^54, 2^25
  const Ints small = x < kLeast;                                         // all ones or 0
  const V lifted = small ? x * kLift : x;
  const Ints bits = reinterpret_cast<Ints>(lifted);
  const Ints exponent = (bits - kTwoThirds) >> kMantissa;  // floor, since >> keeps the sign
  const V m = reinterpret_cast<V>(bits - (exponent << kMantissa));
  const V e = __builtin_convertvector(exponent - (small & Int(kDouble ? 54 : 25)), V);
  const V s = (m - T(1)) / (m + T(1));
  const V z = s * s;
  V tail = V{} + T(2) / T(kDouble ? 25 : 9);
  for (int k = kDouble ? 23 : 7; k >= 3; k -= 2) tail = tail * z + T(2) / T(k);
  V result = (T(2) * s + s * z * tail) + e * T(0.693147180559945309417);
  result = x == V{} ? V{} - T(HUGE_VAL) : result;
  result = x == V{} + T(HUGE_VAL) ? x : result;
  return (x >= V{}) ? result : V{} + T(NAN);
}

}  // namespace dashpot
