// What the rules take from a coordinate's sorted values; one source for SIMD lanes and for CUDA.
//
// get(i) gives value i of `count`, sorted, NaN last, as a V: a float or double, or a vector of
// them. Sums are in V. Which values lie nearest a centre is decided as if in float64: where float32
// could err, the lanes in question are done again in float64 (`Exact`).
#pragma once

#include "aggregate/sorting.h"

namespace dashpot::aggregate {

enum class Rule { kMedian, kLowerMedian, kTrimmedMean, kMeamed, kPhocas };
inline constexpr int kRules = 5;

// The rules of one call. `low`: values dropped, or left out of a window, as f in the Python code.
struct RuleSet {
  int count;  // values of a coordinate
  int f;
  int rules;  // of them in rule
  Rule rule[kRules];
};

template <class V, class Get>
DASHPOT_HD_INLINE V median_of(const Get& get, int count) {
  using T = decltype(get.scalar);
  const V low = get((count - 1) / 2);
  return count % 2 ? low : T(0.5) * (low + get(count / 2));
}

// x_f + ... + x_{count - f - 1}, in this order.
template <class V, class Get>
DASHPOT_HD_INLINE V core_sum(const Get& get, int count, int f) {
  V sum = get(f);
  for (int i = f + 1; i < count - f; ++i) sum += get(i);
  return sum;
}

// Mean of the q values nearest a centre. They are neighbours; starting from the q lowest, the
// window moves up from s to s + 1 while x_{s+q} is nearer than x_s. Modulo q each place of the
// window holds one value, so every place is followed by itself.
template <class V, class Get, class Nearer>
DASHPOT_HD_INLINE V nearest_mean(const Get& get, int count, int q, Nearer& nearer) {
  V sum{};
  for (int r = 0; r < q; ++r) {
    V value = get(r);
    for (int s = r; s + q < count; s += q) value = nearer.pick(get(s), get(s + q), value);
    sum += value;
  }
  return sum / static_cast<decltype(get.scalar)>(q);
}

// 1 where a < b, else 0. Comparisons stand in ?: only, and are joined as numbers: GCC would take
// vectors of truth values lane by lane.
template <class V>
DASHPOT_HD_INLINE V below(V a, V b) {
  return a < b ? V{} + 1 : V{};
}

// pick(a, b, value), a <= b: b if it is strictly nearer the centre than a, else value. In float64.
template <class V>
struct Exact {
  V center;
  DASHPOT_HD_INLINE V pick(V a, V b, V value) const {
    const V equal = b == center ? V{} + 1 : V{};  // the centre may be infinite
    const V nearer = below(0.5 * a + 0.5 * b, center) + equal * below(a, center);
    return V{} < nearer ? b : value;
  }
};

// The same in float32 where the centre is (m + n) / 2: a + b < m + n, both sums with their rounding
// errors, which decide if the sums are the same. Right for every centre whose double is finite.
template <class V>
struct AroundMedian {
  V sum, error;
  DASHPOT_HD_INLINE AroundMedian(V m, V n) { add(m, n, sum, error); }
  static DASHPOT_HD_INLINE void add(V a, V b, V& total, V& rest) {
    total = a + b;
    const V part = total - a;
    rest = (a - (total - part)) + (b - part);
  }
  DASHPOT_HD_INLINE V pick(V a, V b, V value) const {
    V total, rest;
    add(a, b, total, rest);
    const V nearer = below(total, sum) + below((total - sum) + (rest - error), V{});
    return V{} < nearer ? b : value;
  }
};

template <class V>
DASHPOT_HD_INLINE V size_of(V x) {
  return x < V{} ? -x : x;
}

// The same in float32 around a rounded mean of n values no larger than `largest`; `unsure` is
// set in the lanes in which a comparison lies within the rounding errors of both sides.
template <class V>
struct AroundMean {
  V twice, slack, unsure{};
  DASHPOT_HD_INLINE AroundMean(V sum, V largest, int n)
      : twice(2.0f * sum / static_cast<float>(n)), slack(kRounding * (n + 4.0f) * largest) {}
  static constexpr float kRounding = 1.0f / (1 << 23);
  DASHPOT_HD_INLINE V pick(V a, V b, V value) {
    const V gap = (a + b) - twice;
    V error = slack + kRounding * (size_of(a) + size_of(b));
    error = error < V{} + 1e38f ? error : V{} + 1e38f;  // an infinite gap is beyond doubt
    unsure += size_of(gap) <= error ? V{} + 1 : V{};
    return gap < V{} ? b : value;
  }
};

// meamed or phocas in float32; unsure is set where that may not suffice.
template <class V, class Get>
DASHPOT_HD_INLINE V fast_window(const Get& get, const RuleSet& set, Rule rule, V& unsure) {
  const V largest = V{} + 3.40282347e38f;
  const int count = set.count, f = set.f;
  if (rule == Rule::kMeamed) {
    AroundMedian<V> nearer(get((count - 1) / 2), get(count / 2));
    unsure = size_of(nearer.sum) <= largest ? V{} : V{} + 1;
    return nearest_mean<V>(get, count, count - f, nearer);
  }
  const V low = size_of(get(f)), high = size_of(get(count - f - 1));
  AroundMean<V> nearer(core_sum<V>(get, count, f), low < high ? high : low, count - 2 * f);
  const V mean = nearest_mean<V>(get, count, count - f, nearer);
  unsure = nearer.unsure + (size_of(nearer.twice) <= largest ? V{} : V{} + 1);
  return mean;
}

// nearest_mean in float64; around the median, or the mean of the values f .. count - f - 1.
template <class V, class Get>
DASHPOT_HD_INLINE V exact_window(const Get& get, const RuleSet& set, Rule rule) {
  const int count = set.count;
  V center;
  if (rule == Rule::kMeamed) {
    center = 0.5 * get((count - 1) / 2) + 0.5 * get(count / 2);
  } else {
    center = core_sum<V>(get, count, set.f) / double(count - 2 * set.f);
  }
  Exact<V> nearer{center};
  const V mean = nearest_mean<V>(get, count, count - set.f, nearer);
  return center == center ? mean : center;  // NaN
}

}  // namespace dashpot::aggregate
