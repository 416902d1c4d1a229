// Rows moved through a plan on the CPU: gathers and weighted sums of gathered rows.
//
// Work is cut by rows, a block of about kBlockBytes at a time; a row is written once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"
#include "experts/lanes.h"

namespace dashpot::experts {

inline constexpr int64_t kBlockBytes = 1 << 18;

template <class Body>
void for_row_blocks(int64_t rows, int64_t row_bytes, int threads, const Body& body) {
  const int64_t length = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, row_bytes));
  parallel_for((rows + length - 1) / length, threads,
               [&](int64_t block) { body(block * length, std::min(rows, (block + 1) * length)); });
}

// to[r] = from[order[r] / k], zeros where order is -1; rows of `bytes`.
inline void gather_rows(const char* from, const int32_t* order, int64_t k, int64_t begin,
                        int64_t end, int64_t bytes, char* to) {
  for (int64_t r = begin; r < end; ++r, to += bytes) {
    const int64_t i = order[r];
    if (i < 0) {
      std::memset(to, 0, bytes);
    } else {
      std::memcpy(to, from + (k == 1 ? i : i / k) * bytes, bytes);
    }
  }
}

// y (d,) = sum_j w_j h[rank_j], j in order, dropped choices left out; w null: 1.
template <class T>
struct SumRows {
  template <Isa isa, class Weight>
  static DASHPOT_INLINE void row(const T* h, const int32_t* rank, const Weight* weights, int64_t k,
                                 int64_t d, T* y) {
    using W = Wide<T>;
    constexpr int64_t kStep = kLanes<W, isa>;
    for (int64_t c = 0; c < d; c += kStep) {
      Vec<W, isa> total{};
      for (int64_t j = 0; j < k; ++j) {
        if (rank[j] < 0) continue;
        const Vec<W, isa> value = load_part<isa>(h + int64_t{rank[j]} * d + c, d - c, W(0));
        total += weights ? value * convert<W>(weights[j]) : value;
      }
      store_part<isa>(y + c, total, d - c);
    }
  }

  template <Isa isa, class Weight>
  static DASHPOT_INLINE void run(const T* h, const int32_t* rank, const Weight* weights, int64_t k,
                                 int64_t d, int64_t begin, int64_t end, T* y) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* at = rank + t * k;
      if (k == 1 && weights == nullptr) {
        if (at[0] < 0) {
          std::memset(y + t * d, 0, d * sizeof(T));
        } else {
          std::memcpy(y + t * d, h + int64_t{at[0]} * d, d * sizeof(T));
        }
      } else {
        row<isa>(h, at, weights ? weights + t * k : nullptr, k, d, y + t * d);
      }
    }
  }
};

}  // namespace dashpot::experts
