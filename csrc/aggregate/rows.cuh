// The workers' rows as a kernel's parameter: pointers by value, so that no table has to be copied
// to the device and a captured graph holds it. A launch takes as many segments as fit.
#pragma once

#include "aggregate/rows.h"
#include "common/cuda.cuh"
#include "common/numeric.cuh"

namespace dashpot::aggregate {

inline constexpr int kTablePointers = 384;  // with the rest below 4 KiB of parameters
inline constexpr int kTableSegments = 24;

// Some segments of p rows, cut into chunks; block b of a launch owns one chunk.
struct Table {
  int p, segments;
  int64_t chunk;                      // coordinates per chunk
  int64_t length[kTableSegments];     // coordinates of each segment
  int64_t chunk_end[kTableSegments];  // chunks of the segments up to and with this one
  void* out[kTableSegments];          // combine only: where each segment's update goes
  const void* row[kTablePointers];    // (segments, p)
};

struct Span {
  int segment;
  int64_t begin, length;
};

__device__ inline Span span_of(const Table& table, int64_t chunk) {
  int s = 0;
  while (chunk >= table.chunk_end[s]) ++s;
  const int64_t begin = (chunk - (s ? table.chunk_end[s - 1] : 0)) * table.chunk;
  const int64_t rest = table.length[s] - begin;
  return {s, begin, rest < table.chunk ? rest : table.chunk};
}

// Calls visit(table, chunks) for groups of segments that fit one launch each.
template <class Visit>
void for_each_table(const Rows& rows, int64_t chunk, const std::vector<void*>& out, Visit&& visit) {
  int64_t s = 0;
  while (s < rows.segments()) {
    Table table{};
    table.p = static_cast<int>(rows.p);
    table.chunk = chunk;
    int64_t chunks = 0;
    int n = 0;
    for (; s < rows.segments() && n < kTableSegments && (n + 1) * rows.p <= kTablePointers; ++s) {
      if (rows.lengths[s] == 0) continue;
      for (int64_t i = 0; i < rows.p; ++i)
        table.row[n * rows.p + i] = rows.pointers[s * rows.p + i];
      chunks += (rows.lengths[s] + chunk - 1) / chunk;
      table.length[n] = rows.lengths[s];
      table.chunk_end[n] = chunks;
      table.out[n] = out.empty() ? nullptr : out[s];
      ++n;
    }
    table.segments = n;
    if (n > 0) visit(table, chunks);
  }
}

}  // namespace dashpot::aggregate
