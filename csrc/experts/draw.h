// philox.h on the CPU, a vector of units at a time: the same bits.
//
// A 32 x 32 -> 64 bit product is two 64-bit products, of the even and of the odd lanes; the units
// of a vector share all else of the counter, and the key. Without replacement a draw m becomes
// m + #{keys <= m}, where the keys are the chosen ids, each less the number of smaller ones: what
// walking the chosen ids in ascending order gives, without sorting them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.h"
#include "common/simd.h"
#include "experts/philox.h"

namespace dashpot::experts {

template <Isa isa>
struct Draw {
  using Words = Vec<uint32_t, isa>;
  using Pairs = Vec<uint64_t, isa>;
  static constexpr int64_t kUnits = kLanes<uint32_t, isa>;

  static DASHPOT_INLINE Words high(Words a, uint32_t factor) {
    const Pairs pairs = reinterpret_cast<Pairs>(a), wide = Pairs{} + factor;
    const Pairs even = (pairs & 0xffffffffu) * wide, odd = (pairs >> 32) * wide;
    return reinterpret_cast<Words>((even >> 32) | (odd & 0xffffffff00000000u));
  }

  static DASHPOT_INLINE Words units_from(uint32_t first) {
    Words units;
    for (int64_t i = 0; i < kUnits; ++i) units[i] = first + static_cast<uint32_t>(i);
    return units;
  }

  // Words 0 to 3 of kUnits units.
  static DASHPOT_INLINE void philox(uint64_t seed, uint64_t offset, uint32_t first, uint32_t block,
                                    Words* word) {
    Words c0 = units_from(first), c1 = Words{} + block;
    Words c2 = Words{} + static_cast<uint32_t>(offset);
    Words c3 = Words{} + static_cast<uint32_t>(offset >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Words next0 = high(c2, 0xCD9E8D57u) ^ c1 ^ k0, next2 = high(c0, 0xD2511F53u) ^ c3 ^ k1;
      c1 = c2 * 0xCD9E8D57u;
      c3 = c0 * 0xD2511F53u;
      c0 = next0;
      c2 = next2;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
  }
};

// Rows [begin, end) of a route, all of one pass, at most kMaxKeys choices each.
inline constexpr int kMaxKeys = 16;

struct DrawRows {
  template <Isa isa>
  static DASHPOT_INLINE void run(Route route, int64_t begin, int64_t end, int32_t* ids) {
    using D = Draw<isa>;
    using Words = typename D::Words;
    constexpr int64_t kStep = D::kUnits;
    const int k = route.k;
    const uint64_t offset = route.offset + static_cast<uint64_t>(begin / route.units);
    for (int64_t t = begin; t < end; t += kStep) {
      const int64_t count = std::min(kStep, end - t);
      Words word[4], keys[kMaxKeys];
      for (int j = 0; j < k; ++j) {
        if (j % 4 == 0) {
          D::philox(route.seed, offset, static_cast<uint32_t>(t % route.units), j / 4, word);
        }
        const int left = route.replace ? route.experts : route.experts - j;
        const Words draw = D::high(word[j % 4], static_cast<uint32_t>(left));
        Words pick = draw;
        if (!route.replace) {
          for (int i = 0; i < j; ++i) {
            const Words above = reinterpret_cast<Words>(keys[i] > draw);  // all ones where true
            pick += above + 1u;
            keys[i] += above;
          }
          keys[j] = draw;
        }
        if (k == 1 && count == kStep) {
          __builtin_memcpy(ids + t, &pick, sizeof pick);
        } else {
          for (int64_t i = 0; i < count; ++i) {
            ids[(t + i) * k + j] = static_cast<int32_t>(pick[i]);
          }
        }
      }
    }
  }
};

// keys[u] = word 0 of unit u with the block word of route_balanced, u in [begin, end).
struct BalancedKeys {
  template <Isa isa>
  static DASHPOT_INLINE void run(uint64_t seed, uint64_t offset, int64_t begin, int64_t end,
                                 uint32_t* keys) {
    using D = Draw<isa>;
    for (int64_t u = begin; u < end; u += D::kUnits) {
      typename D::Words word[4];
      D::philox(seed, offset, static_cast<uint32_t>(u), kBalancedBlock, word);
      for (int64_t i = 0; i < std::min(D::kUnits, end - u); ++i) keys[u + i] = word[0][i];
    }
  }
};

// ids (rows, k) of the whole route.
inline void choose_all(const Route& route, int64_t rows, int32_t* ids, int threads) {
  constexpr int64_t kBlock = 4096;
  parallel_for((rows + kBlock - 1) / kBlock, threads, [&](int64_t block) {
    const int64_t end = std::min(rows, (block + 1) * kBlock);
    for (int64_t t = block * kBlock; t < end;) {
      const int64_t stop = std::min(end, (t / route.units + 1) * route.units);  // of the pass
      if (route.k <= kMaxKeys) {
        run_on_isa<DrawRows>(route, t, stop, ids);
      } else {
        for (int64_t row = t; row < stop; ++row) choose(route, row, ids + row * route.k);
      }
      t = stop;
    }
  });
}

}  // namespace dashpot::experts
