// Sums over coordinates of a function of two rows, for every pair of rows, by FMA (CUDA).
//
//   out[i][j] = sum_k f(x_ik, x_jk)      x (p, d) -> out (p, p) float64
//   f = squared difference, in float32 or float64; f = product in float64 (float32: gram.cu)
//   norms: squared differences, but |x_i|^2 in place of |x_i - x_i|^2 on the diagonal
//
// Tiles, chunks and the sum over chunks are in pairs.cuh. Each thread holds a pair of tiles of 8
// rows, 64 sums in registers, and takes every kThreads-th coordinate: 16 coalesced loads serve 64
// multiply-adds. Blocks of one chunk are neighbours in the grid, so a row comes from device memory
// once and from the L2 cache for the other tile pairs. After kRun coordinates per thread (2,048
// per warp) the sums are added over the warp by a transposing butterfly (62 shuffles for 64 sums,
// not 320) and go on in float64 in shared memory.
//
// Sums of float32 squares may leave float32's range. sum_kernel notes where a square is not finite
// or suspiciously small, and a pass in float64 follows; its blocks return at once if there is no
// note. So the host never has to look.
#include "aggregate/cuda.h"
#include "aggregate/pairs.cuh"

namespace dashpot::aggregate {
namespace {

constexpr int kTile = 8;
constexpr int kEntries = kTile * kTile;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRun = 64;
constexpr int kChunks = 256;
constexpr int kRedoBlocks = 256;  // a pass that is rarely asked for should cost little to refuse

struct ProductSum {
  template <class Acc>
  __device__ static __forceinline__ void add(Acc& sum, Acc a, Acc b) {
    sum = fma(a, b, sum);
  }
};

struct SquaredDifferenceSum {
  template <class Acc>
  __device__ static __forceinline__ void add(Acc& sum, Acc a, Acc b) {
    sum = fma(a - b, a - b, sum);
  }
};

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

// A tile's rows. A row that is not to be read points to one that is, so that loads need no branch
// (a branch would keep the compiler from having all of them in flight), and reads as 0. Pointers
// stay in the kernel's parameters: the same for all threads, they need no registers of each.
template <class In>
struct TileRows {
  const void* const* row;  // the segment's p rows
  int64_t begin;
  int place[kTile];
  uint32_t live;  // bit r: row r is read

  __device__ __forceinline__ TileRows(const Table& table, const Span& span, int tile,
                                      const bool* mask)
      : row(table.row + span.segment * table.p), begin(span.begin), live(0) {
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      const int i = tile * kTile + r;
      const bool read = i < table.p && (!mask || mask[i]);
      place[r] = i < table.p ? i : 0;
      live |= static_cast<uint32_t>(read) << r;
    }
  }
  template <class Acc>
  __device__ __forceinline__ void load(int64_t k, Acc (&x)[kTile]) const {
    In raw[kTile];
#pragma unroll
    for (int r = 0; r < kTile; ++r) raw[r] = static_cast<const In*>(row[place[r]])[begin + k];
#pragma unroll
    for (int r = 0; r < kTile; ++r) x[r] = live >> r & 1 ? device_cast<Acc>(raw[r]) : Acc(0);
  }
};

// sum[r][c] += f(a[r], b[c]) over coordinates [begin, end) of this thread; diagonal: only r <= c.
template <class F, class Acc, class In, bool diagonal>
__device__ __forceinline__ void add_run(const TileRows<In>& a, const TileRows<In>& b, bool norms,
                                        int64_t begin, int64_t end, Acc (&sum)[kEntries]) {
#pragma unroll 1
  for (int64_t k = begin + threadIdx.x; k < end; k += kThreads) {
    Acc left[kTile], right[kTile];
    a.load(k, left);
    if (!diagonal) b.load(k, right);
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
#pragma unroll
      for (int c = diagonal ? r : 0; c < kTile; ++c) {
        const Acc other = !diagonal ? right[c] : r == c && norms ? Acc(0) : left[c];
        F::add(sum[r * kTile + c], left[r], other);
      }
    }
  }
}

// Items (tile pair, chunk), tile pairs fastest, dealt out to the blocks of the grid.
template <class F, class Acc, class In>
__global__ void __launch_bounds__(kThreads, 2)
    pairs_kernel(const __grid_constant__ Table table, const bool* mask, bool norms, const int* redo,
                 int redo_count, int64_t items, int64_t first_chunk, double* partials) {
  __shared__ double totals[kWarps][kEntries];
  if (!asked(redo, redo_count)) return;
  const int p = table.p, tile_pairs = tile_pairs_of(p, kTile);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int pair = static_cast<int>(item % tile_pairs);
    const int64_t chunk = item / tile_pairs;
    int tile_a, tile_b;
    tile_pair(pair, tiles_of(p, kTile), tile_a, tile_b);
    const Span span = span_of(table, chunk);
    const TileRows<In> a(table, span, tile_a, mask), b(table, span, tile_b, mask);
    totals[warp][2 * lane] = totals[warp][2 * lane + 1] = 0;  // this lane's alone until the end
    for (int64_t run = 0; run < span.length; run += int64_t{kRun} * kThreads) {
      Acc sum[kEntries] = {};
      const int64_t most = run + int64_t{kRun} * kThreads;
      const int64_t end = most < span.length ? most : span.length;
      if (tile_a == tile_b) {
        add_run<F, Acc, In, true>(a, b, norms, run, end, sum);
      } else {
        add_run<F, Acc, In, false>(a, b, norms, run, end, sum);
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
    __syncthreads();
  }
}

int64_t chunk_of(const Rows& rows) { return chunk_length(rows, kChunks, 8 * kThreads); }

// redo: run only where an earlier pass noted something; note: say so.
template <class F, class Acc, class In>
void pass(const Rows& rows, const bool* mask, bool norms, const int* redo, int redo_count,
          int* note, double* partials, double* out, cudaStream_t stream) {
  const int p = static_cast<int>(rows.p), tile_pairs = tile_pairs_of(p, kTile);
  int64_t first = 0;
  for_each_table(rows, chunk_of(rows), {}, [&](const Table& table, int64_t chunks) {
    const int64_t items = chunks * tile_pairs;
    const int64_t blocks = redo ? std::min<int64_t>(items, kRedoBlocks) : items;
    launch(&pairs_kernel<F, Acc, In>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
           stream, table, mask, norms, redo, redo_count, items, first, partials);
    first += chunks;
  });
  launch(&sum_kernel<kTile>, dim3(kEntries / kSumEntries, tile_pairs),
         dim3(kSumEntries * kSumLanes), 0, stream, partials, first, p, mask, redo, redo_count,
         norms || std::is_same_v<F, ProductSum>, !std::is_same_v<F, ProductSum>,
         1e-30 * static_cast<double>(rows.d), note, out);
}

}  // namespace

PairsScratch pairs_scratch(const Rows& rows) {
  const int p = static_cast<int>(rows.p);
  return {chunk_count(rows, chunk_of(rows)) * tile_pairs_of(p, kTile) * kEntries,
          notes_of(p, kTile)};
}

void gram_wide_cuda(const Rows& rows, const bool* mask, const int* redo, int redo_count,
                    double* scratch, double* out, int device, void* stream) {
  const DeviceGuard guard(device);
  dispatch_device(rows.dtype, [&](auto element) {
    pass<ProductSum, double, decltype(element)>(rows, mask, false, redo, redo_count, nullptr,
                                                scratch, out, static_cast<cudaStream_t>(stream));
  });
}

void sqdist_cuda(const Rows& rows, const bool* mask, bool norms, double* scratch, int* note,
                 double* out, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const int count = notes_of(static_cast<int>(rows.p), kTile);
  dispatch_device(rows.dtype, [&](auto element) {
    using In = decltype(element);
    using F = SquaredDifferenceSum;
    if constexpr (std::is_same_v<In, double>) {
      pass<F, double, In>(rows, mask, norms, nullptr, 0, nullptr, scratch, out, on);
    } else {
      pass<F, float, In>(rows, mask, norms, nullptr, 0, note, scratch, out, on);
      pass<F, double, In>(rows, mask, norms, note, count, nullptr, scratch, out, on);
    }
  });
}

}  // namespace dashpot::aggregate
