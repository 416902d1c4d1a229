// Orders in which all pairs of panels pass, so that threads need neither locks nor buffers.
//
// The pairs of one round have no panel in common: body(i, j) may write to panel i and to panel j.
// Rounds follow each other, so a panel meets the others in the same order, and sums come out with
// the same bits, whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.h"

namespace dashpot {

// body(i, j) once for each 0 <= i <= j < n: first the (i, i), then a tournament in which one
// panel keeps its place and the others move round the table.
template <class Body>
void for_pairs(int64_t n, int threads, const Body& body) {
  parallel_for(n, threads, [&](int64_t i) { body(i, i); });
  const int64_t seats = n + n % 2;  // with an odd number, one panel rests
  for (int64_t round = 0; round + 1 < seats; ++round) {
    parallel_for(seats / 2, threads, [&](int64_t table) {
      const int64_t a = table == 0 ? seats - 1 : (round + table) % (seats - 1);
      const int64_t b = (round + seats - 1 - table) % (seats - 1);
      if (a < n && b < n) body(std::min(a, b), std::max(a, b));
    });
  }
}

// body(i, j) once for each 0 <= i < rows, 0 <= j < columns: the shorter side walks along the other.
template <class Body>
void for_grid(int64_t rows, int64_t columns, int threads, const Body& body) {
  const int64_t few = std::min(rows, columns), many = std::max(rows, columns);
  for (int64_t round = 0; few > 0 && round < many; ++round) {
    parallel_for(few, threads, [&](int64_t a) {
      const int64_t b = (a + round) % many;
      if (rows <= columns) {
        body(a, b);
      } else {
        body(b, a);
      }
    });
  }
}

}  // namespace dashpot
