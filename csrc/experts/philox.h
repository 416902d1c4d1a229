// Philox4x32-10 and the choice of experts from its words, one source for CPU and CUDA.
//
//   key (lo32 seed, hi32 seed), counter (unit, block, lo32 offset, hi32 offset) -> 4 words
//   choice j: word j mod 4 of block j div 4; index(r, n) = (r * n) >> 32
//   without replacement: m = index(r_j, E - j), then m += (m >= c) over the chosen c, ascending
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define DASHPOT_ROUTE_HD __host__ __device__
#else
#define DASHPOT_ROUTE_HD
#endif

namespace dashpot::experts {

inline constexpr uint32_t kBalancedBlock = 0x80000000u;

struct Words {
  uint32_t word[4];
};

DASHPOT_ROUTE_HD inline Words philox(uint64_t seed, uint64_t offset, uint32_t unit,
                                     uint32_t block) {
  uint32_t c0 = unit, c1 = block;
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t next0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

DASHPOT_ROUTE_HD inline int index_of(uint32_t word, int n) {
  return static_cast<int>((uint64_t{word} * static_cast<uint32_t>(n)) >> 32);
}

// What route_random is asked for; row t of its result is unit t mod U of pass t div U.
struct Route {
  uint64_t seed, offset;
  int64_t units;
  int experts, k;
  bool replace;
};

// The k choices of row t, written to ids with a distance of 1. They serve as the list of what was
// chosen, too: each draw looks for the smallest m that leaves m of the others below it.
DASHPOT_ROUTE_HD inline void choose(const Route& route, int64_t t, int32_t* ids) {
  const uint64_t pass = static_cast<uint64_t>(t / route.units);
  const uint32_t unit = static_cast<uint32_t>(t % route.units);
  Words words{};
  for (int j = 0; j < route.k; ++j) {
    if (j % 4 == 0) words = philox(route.seed, route.offset + pass, unit, j / 4);
    const int draw = index_of(words.word[j % 4], route.replace ? route.experts : route.experts - j);
    int pick = draw;
    if (!route.replace) {
      // pick = draw + (number chosen that are <= pick), the fixed point of the ascending walk.
      for (int before = -1, below = 0; below != before;) {
        before = below;
        below = 0;
        for (int i = 0; i < j; ++i) below += ids[i] <= draw + before;
        pick = draw + below;
      }
    }
    ids[j] = pick;
  }
}

}  // namespace dashpot::experts
