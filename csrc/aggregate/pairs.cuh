// What the kernels over pairs of rows share: tiles, chunks, and the sum over chunks.
//
// Rows are taken in tiles of T; a block owns one pair of tiles and one chunk of coordinates and
// writes its T x T sums as `partials` (chunks, tile pairs, T, T) float64. sum_kernel adds them over
// the chunks in a fixed order. No atomics, and chunks depend on d alone: the bits are the same on
// every run and every GPU.
#pragma once

#include "aggregate/rows.cuh"

namespace dashpot::aggregate {
namespace {

constexpr double kLargest = 1.7976931348623157e308;
constexpr int kSumEntries = 16;  // a block of sum_kernel adds so many entries
constexpr int kSumLanes = 64;    // over so many chunks side by side

__host__ __device__ inline int tiles_of(int p, int tile) { return (p + tile - 1) / tile; }
__host__ __device__ inline int tile_pairs_of(int p, int tile) {
  return tiles_of(p, tile) * (tiles_of(p, tile) + 1) / 2;
}

// Notes that sum_kernel leaves: one per block.
__host__ __device__ inline int notes_of(int p, int tile) {
  return tile_pairs_of(p, tile) * (tile * tile / kSumEntries);
}

// Tile pair number `index` of the upper triangle, row by row.
__device__ inline void tile_pair(int index, int tiles, int& first, int& second) {
  first = 0;
  while (index >= tiles - first) index -= tiles - first++;
  second = first + index;
}

// Whether an earlier pass asks for this one; every thread of the block calls it.
__device__ inline bool asked(const int* redo, int count) {
  if (redo == nullptr) return true;
  int any = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) any |= redo[i];
  return __syncthreads_or(any);
}

// Grid: (entries / kSumEntries, tile pairs). partials -> out (p, p), both halves; note[block]: a
// sum of squares is not finite or below `smallest`. Those are the diagonal of a Gram matrix, the
// rest of a distance matrix, or both where that has norms on its diagonal.
template <int kTile>
__global__ void __launch_bounds__(kSumEntries* kSumLanes)
    sum_kernel(const double* partials, int64_t chunks, int p, const bool* mask, const int* redo,
               int redo_count, bool check_diagonal, bool check_rest, double smallest, int* note,
               double* out) {
  constexpr int kEntries = kTile * kTile;
  __shared__ double totals[kSumLanes][kSumEntries];
  if (!asked(redo, redo_count)) return;
  const int slot = threadIdx.x % kSumEntries, lane = threadIdx.x / kSumEntries;
  const int entry = blockIdx.x * kSumEntries + slot;
  double total = 0;
#pragma unroll 4
  for (int64_t chunk = lane; chunk < chunks; chunk += kSumLanes) {
    total += partials[(chunk * gridDim.y + blockIdx.y) * kEntries + entry];
  }
  totals[lane][slot] = total;
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) totals[lane][slot] += totals[lane + half][slot];
  }
  bool odd = false;
  if (lane == 0) {
    total = totals[0][slot];
    int tile_a, tile_b;
    tile_pair(blockIdx.y, tiles_of(p, kTile), tile_a, tile_b);
    const int i = tile_a * kTile + entry / kTile, j = tile_b * kTile + entry % kTile;
    if (i <= j && j < p) {
      const bool read = !mask || (mask[i] && mask[j]);
      out[i * p + j] = out[j * p + i] = read ? total : 0;
      odd = read && (i == j ? check_diagonal : check_rest) &&
            !(total >= smallest && total <= kLargest);
    }
  }
  const int any = __syncthreads_or(odd);
  if (note != nullptr && threadIdx.x == 0) note[blockIdx.y * gridDim.x + blockIdx.x] = any;
}

// Coordinates of a chunk: about `wanted` chunks, whatever d, of at least `least` coordinates.
inline int64_t chunk_length(const Rows& rows, int64_t wanted, int64_t least) {
  const int64_t fair = (rows.d + wanted - 1) / wanted;
  return (fair < least ? least : fair + least - 1) / least * least;
}

inline int64_t chunk_count(const Rows& rows, int64_t chunk) {
  int64_t count = 0;
  for (const int64_t n : rows.lengths) count += (n + chunk - 1) / chunk;
  return count;
}

}  // namespace
}  // namespace dashpot::aggregate
