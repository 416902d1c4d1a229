// exp, log and roots of vectors (simd.h), float32 and float64, within 2 ulp; NaN and inf as in
// <cmath>.
//
//   exp(x) = 2^n e^r,  n = round(x / ln 2), |r| <= ln(2)/2: the series of e^r to the rounding
//   log(x) = n ln 2 + 2 atanh(s),  x = 2^n m, m in [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1)
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/simd.h"

namespace dashpot {

template <class T>
struct FloatLayout;
template <>
struct FloatLayout<float> {
  using Int = int32_t;
  static constexpr int kDigits = 23, kBias = 127, kTerms = 7, kAtanhTerms = 5;
  static constexpr float kLowest = -104, kHighest = 89;      // beyond: 0 and inf
  static constexpr float kRound = 12582912;                  // 1.5 * 2^23: adding it rounds
  static constexpr float kLn2 = 0x1.62e4p-1f;                // n * kLn2 is exact
  static constexpr float kLn2Rest = 0x1.7f7d1cf79abcap-20f;  // ln 2 = kLn2 + kLn2Rest
};
template <>
struct FloatLayout<double> {
  using Int = int64_t;
  static constexpr int kDigits = 52, kBias = 1023, kTerms = 13, kAtanhTerms = 11;
  static constexpr double kLowest = -746, kHighest = 710;
  static constexpr double kRound = 6755399441055744;
  static constexpr double kLn2 = 0x1.62e42fefap-1;
  static constexpr double kLn2Rest = 0x1.cf79abc9e3b3ap-40;
};

template <class T, Isa isa>
using IntVec = Vec<typename FloatLayout<T>::Int, isa>;

// 2^n for -kBias < n <= kBias.
template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> power_of_two(IntVec<T, isa> n) {
  return reinterpret_cast<Vec<T, isa>>((n + FloatLayout<T>::kBias) << FloatLayout<T>::kDigits);
}

template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> exp(Vec<T, isa> x) {
  using Layout = FloatLayout<T>;
  x = x < Layout::kLowest ? Layout::kLowest - Vec<T, isa>{} : x;  // NaN stays
  x = x > Layout::kHighest ? Layout::kHighest - Vec<T, isa>{} : x;
  const Vec<T, isa> shifted = x * T(0x1.71547652b82fep0) + Layout::kRound;
  const Vec<T, isa> whole = shifted - Layout::kRound;
  const Vec<T, isa> r = (x - whole * Layout::kLn2) - whole * Layout::kLn2Rest;
  double factorial = 1;
  for (int k = 2; k <= Layout::kTerms; ++k) factorial *= k;
  Vec<T, isa> series = Vec<T, isa>{} + T(1 / factorial);
  for (int k = Layout::kTerms; k > 0; --k) {
    factorial /= k;
    series = series * r + T(1 / factorial);
  }
  // In two steps, since 2^n itself may be beyond the numbers.
  const IntVec<T, isa> n = __builtin_convertvector(whole, IntVec<T, isa>);
  const IntVec<T, isa> half = n >> 1;
  return series * power_of_two<T, isa>(half) * power_of_two<T, isa>(n - half);
}

// 2^x for |x| < kBias - 1, unchecked (beyond, or for NaN, the result means nothing): what a sweep
// over logits of known range needs, in two thirds of the operations.
template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> exp2_bounded(Vec<T, isa> x) {
  using Layout = FloatLayout<T>;
  constexpr int kTerms = sizeof(T) == 4 ? 6 : Layout::kTerms;  // (ln(2) / 2)^7 / 7! is 2^-23
  const Vec<T, isa> shifted = x + Layout::kRound;
  const Vec<T, isa> r = x - (shifted - Layout::kRound);
  double factors[kTerms + 1] = {1};  // ln(2)^k / k!
  for (int k = 1; k <= kTerms; ++k) factors[k] = factors[k - 1] * 0x1.62e42fefa39efp-1 / k;
  Vec<T, isa> series = Vec<T, isa>{} + T(factors[kTerms]);
  for (int k = kTerms - 1; k >= 0; --k) series = series * r + T(factors[k]);
  // The whole part stands in the last bits of `shifted`; it goes to the exponent.
  const IntVec<T, isa> whole = reinterpret_cast<IntVec<T, isa>>(shifted) << Layout::kDigits;
  return reinterpret_cast<Vec<T, isa>>(reinterpret_cast<IntVec<T, isa>>(series) + whole);
}

template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> log(Vec<T, isa> x) {
  using Layout = FloatLayout<T>;
  using Int = typename Layout::Int;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  constexpr T kScale = T(Int{1} << (Layout::kDigits + 2));
  const auto small = x < std::numeric_limits<T>::min();  // subnormal: scaled into the normals
  const Vec<T, isa> normal = small ? x * kScale : x;
  // Halves of an octave below sqrt(2) go down, those above up.
  constexpr Int kRootHalf = sizeof(T) == 4 ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcd);
  const IntVec<T, isa> bits = reinterpret_cast<IntVec<T, isa>>(normal) - kRootHalf;
  const IntVec<T, isa> n = bits >> Layout::kDigits;
  const IntVec<T, isa> mantissa = (bits & ((Int{1} << Layout::kDigits) - 1)) + kRootHalf;
  const Vec<T, isa> f = reinterpret_cast<Vec<T, isa>>(mantissa) - T(1);
  const Vec<T, isa> s = f / (f + T(2));
  const Vec<T, isa> square = s * s;
  Vec<T, isa> series = Vec<T, isa>{} + T(2) / T(2 * Layout::kAtanhTerms + 1);
  for (int k = Layout::kAtanhTerms - 1; k > 0; --k) series = series * square + T(2) / T(2 * k + 1);
  Vec<T, isa> power = __builtin_convertvector(n, Vec<T, isa>);
  power = small ? power - T(Layout::kDigits + 2) : power;
  // 2 atanh(s) = f - s (f - square * series), since f = 2 s + s f
  Vec<T, isa> result =
      power * Layout::kLn2 + ((f - s * (f - square * series)) + power * Layout::kLn2Rest);
  result = x == T(0) ? -kInfinity - Vec<T, isa>{} : result;
  result = x == kInfinity ? x : result;
  return x >= T(0) ? result : std::numeric_limits<T>::quiet_NaN() - Vec<T, isa>{};
}

template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> sqrt(Vec<T, isa> x) {
  constexpr int kWidth = kLanes<T, isa>;
  T lanes[kWidth];
  store<T, isa>(lanes, x);
  for (int i = 0; i < kWidth; ++i) lanes[i] = std::sqrt(lanes[i]);  // one instruction
  return load<T, isa>(lanes);
}

// sqrt(a^2 + b^2) without overflow or underflow on the way: a power of two brings squares that left
// the range back into it.
template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> hypot(Vec<T, isa> a, Vec<T, isa> b) {
  using V = Vec<T, isa>;
  constexpr bool kDouble = sizeof(T) == 8;
  constexpr T kLarge = kDouble ? T(0x1p900) : T(0x1p100), kSmall = T(1) / kLarge;
  constexpr T kDown = kDouble ? T(0x1p-600) : T(0x1p-80), kUp = kDouble ? T(0x1p600) : T(0x1p100);
  const V square = a * a + b * b;
  const auto large = square > kLarge, small = square < kSmall;
  const V one = V{} + T(1);
  const V by = large ? V{} + kDown : small ? V{} + kUp : one;
  const V back = large ? V{} + T(1) / kDown : small ? V{} + T(1) / kUp : one;
  const V c = a * by, d = b * by;
  return sqrt<T, isa>(c * c + d * d) * back;
}

}  // namespace dashpot
