// Sums over coordinates of a function of two rows, for every pair of rows (CUDA).
//
//   out[i][j] = sum_k f(x_ik, x_jk)      x (p, d) -> out (p, p) float64
//   f = product: Gram matrix; f = squared difference: pairwise distances.
//
// Rows are taken in tiles of 8; a block owns one pair of tiles and one chunk of coordinates. Each
// thread holds the tile pair's 64 sums in registers and takes every kThreads-th coordinate: 16
// coalesced loads serve 64 multiply-adds. Blocks of one chunk are neighbours in the grid, so a row
// comes from device memory once and from the L2 cache for the other tile pairs.
//
// After kRun coordinates per thread (2,048 per warp) the sums are added over the warp by a
// transposing butterfly (62 shuffles for 64 sums, not 320) and go on in float64 in shared memory.
// Each block writes its 64 totals; a second kernel adds them over the chunks in order. No atomics:
// chunks depend on d alone, so the bits are the same on every run and every GPU.
//
// Sums of float32 squares may leave float32's range. The second kernel notes where a square is
// not finite or suspiciously small, and the same two kernels, in float64, follow; they return at
// once if there is no note. So the host never has to look.
#include <cstring>

#include "aggregate/cuda.h"
#include "aggregate/rows.cuh"

namespace dashpot::aggregate {
namespace {

constexpr int kTile = 8;
constexpr int kEntries = kTile * kTile;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRun = 64;
constexpr int kChunks = 256;   // about so many chunks, whatever d
constexpr int kSumLanes = 16;  // chunks that the second kernel adds side by side

struct ProductSum {
  static constexpr bool kSquaresOnDiagonal = true;
  template <class Acc>
  __device__ static __forceinline__ void add(Acc& sum, Acc a, Acc b) {
    sum = fma(a, b, sum);
  }
};

struct SquaredDifferenceSum {
  static constexpr bool kSquaresOnDiagonal = false;
  template <class Acc>
  __device__ static __forceinline__ void add(Acc& sum, Acc a, Acc b) {
    sum = fma(a - b, a - b, sum);
  }
};

__host__ __device__ inline int tiles_of(int p) { return (p + kTile - 1) / kTile; }
__host__ __device__ inline int tile_pairs_of(int p) { return tiles_of(p) * (tiles_of(p) + 1) / 2; }

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

// sum[0..64) over the lanes of a warp: lane l is left with the totals of entries 2l and 2l + 1.
// Recursive, so that every index is a constant and the sums stay in registers.
template <int kHalf = kEntries / 2, class Acc>
__device__ __forceinline__ void transpose_sum(Acc (&sum)[kEntries]) {
  const bool upper = threadIdx.x & (kHalf / 2);
#pragma unroll
  for (int e = 0; e < kHalf; ++e) {
    const Acc keep = upper ? sum[e + kHalf] : sum[e];
    const Acc give = upper ? sum[e] : sum[e + kHalf];
    sum[e] = keep + __shfl_xor_sync(0xffffffffu, give, kHalf / 2);
  }
  if constexpr (kHalf > 2) transpose_sum<kHalf / 2>(sum);
}

// Grid: (tile pair, chunk), tile pairs fastest. partials (chunks, tile pairs, 64).
template <class F, class Acc, class In>
__global__ void __launch_bounds__(kThreads, sizeof(Acc) == 4 ? 4 : 2)
    pairs_kernel(const __grid_constant__ Table table, const bool* mask, const int* redo,
                 int64_t first_chunk, double* partials) {
  __shared__ double totals[kWarps][kEntries];
  const int p = table.p, tile_pairs = tile_pairs_of(p);
  if (!asked(redo, tile_pairs)) return;
  const int pair = blockIdx.x % tile_pairs;
  const int64_t chunk = blockIdx.x / tile_pairs;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int tile_a, tile_b;
  tile_pair(pair, tiles_of(p), tile_a, tile_b);
  const Span span = span_of(table, chunk);

  const In* a[kTile];  // the tiles' rows at this thread's first coordinate; null: reads as 0
  const In* b[kTile];
#pragma unroll
  for (int r = 0; r < kTile; ++r) {
    const int i = tile_a * kTile + r, j = tile_b * kTile + r;
    const void* const* rows = table.row + span.segment * p;
    a[r] = i < p && (!mask || mask[i]) ? static_cast<const In*>(rows[i]) + span.begin : nullptr;
    b[r] = j < p && (!mask || mask[j]) ? static_cast<const In*>(rows[j]) + span.begin : nullptr;
  }
  totals[warp][lane] = totals[warp][lane + 32] = 0;  // slots of this lane: see transpose_sum
  __syncwarp();
  for (int64_t run = 0; run < span.length; run += int64_t{kRun} * kThreads) {
    Acc sum[kEntries] = {};
    const int64_t end = run + int64_t{kRun} * kThreads;
#pragma unroll 1
    for (int64_t k = run + threadIdx.x; k < (end < span.length ? end : span.length);
         k += kThreads) {
      Acc left[kTile], right[kTile];
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
        left[r] = a[r] ? device_cast<Acc>(a[r][k]) : Acc(0);
        right[r] = b[r] ? device_cast<Acc>(b[r][k]) : Acc(0);
      }
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
#pragma unroll
        for (int c = 0; c < kTile; ++c) F::add(sum[r * kTile + c], left[r], right[c]);
      }
    }
    transpose_sum(sum);
    totals[warp][2 * lane] += sum[0];
    totals[warp][2 * lane + 1] += sum[1];
  }
  __syncthreads();
  if (threadIdx.x < kEntries) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += totals[w][threadIdx.x];
    partials[((first_chunk + chunk) * tile_pairs + pair) * kEntries + threadIdx.x] = total;
  }
}

// Grid: tile pairs. partials (chunks, tile pairs, 64) -> out (p, p), both halves; note[pair]: a
// square is not finite or below `smallest`.
template <class F>
__global__ void __launch_bounds__(kEntries* kSumLanes)
    sum_kernel(const double* partials, int64_t chunks, int p, const bool* mask, const int* redo,
               double smallest, int* note, double* out) {
  __shared__ double totals[kSumLanes][kEntries];
  const int tile_pairs = tile_pairs_of(p);
  if (!asked(redo, tile_pairs)) return;
  const int entry = threadIdx.x % kEntries, lane = threadIdx.x / kEntries;
  double total = 0;
#pragma unroll 4
  for (int64_t chunk = lane; chunk < chunks; chunk += kSumLanes) {
    total += partials[(chunk * tile_pairs + blockIdx.x) * kEntries + entry];
  }
  totals[lane][entry] = total;
  __syncthreads();
  bool odd = false;
  if (lane == 0) {
    for (int other = 1; other < kSumLanes; ++other) total += totals[other][entry];
    int tile_a, tile_b;
    tile_pair(blockIdx.x, tiles_of(p), tile_a, tile_b);
    const int i = tile_a * kTile + entry / kTile, j = tile_b * kTile + entry % kTile;
    if (i < p && j < p) {
      const bool read = !mask || (mask[i] && mask[j]);
      out[i * p + j] = out[j * p + i] = read ? total : 0;
      const bool square = F::kSquaresOnDiagonal == (i == j);
      odd = read && square && !(total >= smallest && total <= 1.7976931348623157e308);
    }
  }
  const int any = __syncthreads_or(odd);
  if (note != nullptr && threadIdx.x == 0) note[blockIdx.x] = any;
}

int64_t chunk_length(const Rows& rows) {
  const int64_t fair = (rows.d + kChunks - 1) / kChunks;
  return (fair < 8 * kThreads ? 8 * kThreads : fair + kThreads - 1) / kThreads * kThreads;
}

int64_t chunk_count(const Rows& rows) {
  const int64_t chunk = chunk_length(rows);
  int64_t count = 0;
  for (const int64_t n : rows.lengths) count += (n + chunk - 1) / chunk;
  return count;
}

// One pass: both kernels. redo: run only where an earlier pass noted something; note: say so.
template <class F, class Acc, class In>
void pass(const Rows& rows, const bool* mask, const int* redo, int* note, double* partials,
          double* out, cudaStream_t stream) {
  const int p = static_cast<int>(rows.p), tile_pairs = tile_pairs_of(p);
  int64_t first = 0;
  for_each_table(rows, chunk_length(rows), {}, [&](const Table& table, int64_t chunks) {
    launch(&pairs_kernel<F, Acc, In>, dim3(static_cast<unsigned>(chunks * tile_pairs)),
           dim3(kThreads), 0, stream, table, mask, redo, first, partials);
    first += chunks;
  });
  launch(&sum_kernel<F>, dim3(tile_pairs), dim3(kEntries * kSumLanes), 0, stream, partials, first, p,
         mask, redo, 1e-30 * static_cast<double>(rows.d), note, out);
}

template <class F>
void passes(const Rows& rows, bool wide, const bool* mask, double* scratch, double* out,
            cudaStream_t stream) {
  double* partials = scratch;
  int* note = reinterpret_cast<int*>(scratch + chunk_count(rows) *
                                                   tile_pairs_of(static_cast<int>(rows.p)) *
                                                   kEntries);
  dispatch_device(rows.dtype, [&](auto element) {
    using In = decltype(element);
    if constexpr (std::is_same_v<In, double>) {
      pass<F, double, In>(rows, mask, nullptr, nullptr, partials, out, stream);
    } else {
      if (!wide) pass<F, float, In>(rows, mask, nullptr, note, partials, out, stream);
      pass<F, double, In>(rows, mask, wide ? nullptr : note, nullptr, partials, out, stream);
    }
  });
}

}  // namespace

int64_t pairs_scratch_size(const Rows& rows) {
  const int64_t tile_pairs = tile_pairs_of(static_cast<int>(rows.p));
  return chunk_count(rows) * tile_pairs * kEntries + tile_pairs;  // partials, notes
}

void pairs_cuda(const Rows& rows, PairSum sum, bool wide, const bool* mask, double* scratch,
                double* out, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (sum == PairSum::kProduct) {
    passes<ProductSum>(rows, wide, mask, scratch, out, on);
  } else {
    passes<SquaredDifferenceSum>(rows, wide, mask, scratch, out, on);
  }
}

}  // namespace dashpot::aggregate
