// Rows of router logits (T, E) on the CPU: the log-sum-exp, and what is written from it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/math.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "experts/lanes.h"

namespace dashpot::experts {

inline constexpr int64_t kRouterRows = 256;  // of a block, whose sums are added in its order

inline int64_t router_blocks(int64_t rows) { return (rows + kRouterRows - 1) / kRouterRows; }

template <class Body>
void for_router_blocks(int64_t rows, int threads, const Body& body) {
  parallel_for(router_blocks(rows), threads, [&](int64_t block) {
    body(block, block * kRouterRows, std::min(rows, (block + 1) * kRouterRows));
  });
}

// e (padded to whole vectors) = exp(z - max z) of a row; returns {max, sum}. n may be few.
template <class T>
struct RowExp {
  using W = Wide<T>;
  W most, sum;
};

template <Isa isa, class T>
DASHPOT_INLINE RowExp<T> row_exp(const T* z, int64_t n, Wide<T>* e) {
  using W = Wide<T>;
  constexpr int64_t kStep = kLanes<W, isa>;
  constexpr W kLow = -std::numeric_limits<W>::infinity();
  Vec<W, isa> most = Vec<W, isa>{} + kLow;
  for (int64_t c = 0; c < n; c += kStep) {
    const Vec<W, isa> value = load_part<isa>(z + c, n - c, kLow);
    store<W, isa>(e + c, value);
    most = most < value ? value : most;  // NaN is left out here and comes through the sum
  }
  const W top = max_lane<W, isa>(most);
  const W shift = top == kLow ? W(0) : top;
  double sum = 0;
  Vec<W, isa> part{};
  for (int64_t c = 0; c < n; c += kStep) {
    const Vec<W, isa> value = dashpot::exp<W, isa>(load<W, isa>(e + c) - shift);
    store<W, isa>(e + c, value);
    part += value;
  }
  sum += sum_lanes<W, isa>(part);
  return {shift, static_cast<W>(sum)};
}

// Whole vectors that hold n numbers.
template <class W>
int64_t padded(int64_t n) {
  constexpr int64_t kMost = 64 / sizeof(W);
  return (n + kMost - 1) / kMost * kMost;
}

}  // namespace dashpot::experts
