// gram in float32 on tensor cores: K = X X^T, rows (p, d) -> (p, p) float64 (CUDA).
//
// Rows are taken in tiles of 16 (p <= 16) or 32; a block owns a pair of tiles and a chunk, its
// warps every kWarps-th step of it. A step is 16 bytes of each row and lane: eight rows of 64 bytes
// per load, which are the operands of mma.sync as they come, with no shared memory in between
// (mma.cuh). 16-bit rows multiply exactly; a float32 x is split into TF32 numbers big + small, and
// big big + big small + small big is x y but for small small, 2^-22 of it.
//
// Tensor cores cut off, not round, when they add, so a chain of additions is half a step long;
// half steps are added in float32 registers, kRun steps of them in float64 in shared memory. Then
// pairs.cuh.
//
// Per 16 coordinates and warp: 2 loads, 24 operations to split, 12 mma, 16 additions (tile of 16,
// float32): less than the memory takes, at 4 bytes for each of the 16 x 16 numbers.
#include "aggregate/cuda.h"
#include "aggregate/pairs.cuh"
#include "common/mma.cuh"

namespace dashpot::aggregate {
namespace {

constexpr int kChunks = 1584;  // several waves of blocks on any GPU: the last one may be part full
constexpr int kRun = 32;       // steps

template <int kTile>
constexpr int kWarpsOf = kTile == 16 ? 8 : 4;  // float64 sums of a block: 16 or 32 KiB

// A lane's rows of a tile. A row that is not to be read points to one that is, so that loads need
// no branch (a branch would keep the compiler from having several in flight), and reads as 0.
template <class In, int kGroups>
struct LaneRows {
  const In* row[kGroups];
  bool live[kGroups];
};

// 16 bytes of a row from coordinate k: four registers; whole: all of them lie before `length`.
template <class In, bool aligned, bool whole>
__device__ __forceinline__ void load_step(const In* row, bool live, int64_t k, int64_t length,
                                          uint32_t (&x)[4]) {
  if constexpr (aligned && whole) {
    const uint4 bits = *reinterpret_cast<const uint4*>(row + k);
    x[0] = bits.x, x[1] = bits.y, x[2] = bits.z, x[3] = bits.w;
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if constexpr (sizeof(In) == 4) {
        x[r] = whole || k + r < length ? __float_as_uint(row[k + r]) : 0;
      } else {
        const auto* halves = reinterpret_cast<const unsigned short*>(row);
        const uint32_t low = whole || k + 2 * r < length ? halves[k + 2 * r] : 0;
        const uint32_t high = whole || k + 2 * r + 1 < length ? halves[k + 2 * r + 1] : 0;
        x[r] = low | high << 16;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) x[r] = live ? x[r] : 0;
}

// One step's numbers as tensor-core operands: 16-bit as they are, float32 as big + small in TF32.
template <class In>
struct Operand {
  static constexpr int kParts = sizeof(In) == 4 ? 2 : 1;
  uint32_t part[kParts];
  __device__ __forceinline__ explicit Operand(uint32_t bits) {
    if constexpr (kParts == 2) {
      // Integer operations: four times the rate of the conversion instruction. big is x cut off, so
      // that NaN and inf stay; the rest is exact, and rounded.
      part[0] = bits & 0xffffe000u;
      const float rest = __uint_as_float(bits) - __uint_as_float(part[0]);
      part[1] = (__float_as_uint(rest) + 0x1000u) & 0xffffe000u;
    } else {
      part[0] = bits;
    }
  }
};

// d += a b, rows g, g + 8 of `upper`, `lower`; the smallest products first.
template <class In>
__device__ __forceinline__ void multiply(float (&d)[4], const Operand<In> (&upper)[2],
                                         const Operand<In> (&lower)[2],
                                         const Operand<In> (&right)[2]) {
#pragma unroll
  for (int which = Operand<In>::kParts == 2 ? 2 : 0; which >= 0; --which) {
    const int i = which == 2, j = which == 1;  // small big, big small, big big
    const uint32_t a[4] = {upper[0].part[i], lower[0].part[i], upper[1].part[i], lower[1].part[i]};
    const uint32_t b[2] = {right[0].part[j], right[1].part[j]};
    Mma<In>::add(d, a, b);
  }
}

template <int kTile>
using Sums = float[kTile / 16][kTile / 8][4];

// One step: sum += a b^T, each lane giving 16 bytes of its rows a[r], b[r] from coordinate k.
template <class In, int kTile, bool aligned, bool diagonal, bool whole>
__device__ __forceinline__ void add_step(const LaneRows<In, kTile / 8>& a,
                                         const LaneRows<In, kTile / 8>& b, int64_t k,
                                         int64_t length, Sums<kTile>& sum) {
  constexpr int kGroups = kTile / 8;
  uint32_t x[kGroups][4], y[kGroups][4];
#pragma unroll
  for (int r = 0; r < kGroups; ++r) {
    load_step<In, aligned, whole>(a.row[r], a.live[r], k, length, x[r]);
    if (!diagonal) load_step<In, aligned, whole>(b.row[r], b.live[r], k, length, y[r]);
  }
#pragma unroll
  for (int h = 0; h < 4; h += 2) {
#pragma unroll
    for (int m = 0; m < kTile / 16; ++m) {
      const Operand<In> upper[2] = {Operand<In>(x[2 * m][h]), Operand<In>(x[2 * m][h + 1])};
      const Operand<In> lower[2] = {Operand<In>(x[2 * m + 1][h]), Operand<In>(x[2 * m + 1][h + 1])};
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const uint32_t (&z)[4] = diagonal ? x[n] : y[n];
        const Operand<In> right[2] = {Operand<In>(z[h]), Operand<In>(z[h + 1])};
        float d[4] = {};
        multiply<In>(d, upper, lower, right);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][n][e] += d[e];
      }
    }
  }
}

// All steps of a warp over a span; total[] (float64, one slot per sum and lane) is added to.
template <class In, int kTile, bool aligned, bool diagonal>
__device__ __forceinline__ void add_span(const LaneRows<In, kTile / 8>& a,
                                         const LaneRows<In, kTile / 8>& b, int64_t length,
                                         double (*total)[32]) {
  constexpr int kStep = 4 * 16 / sizeof(In), kStride = kWarpsOf<kTile> * kStep;
  const int lane = threadIdx.x % 32, first = lane % 4 * (kStep / 4);
  for (int64_t run = threadIdx.x / 32 * kStep; run < length; run += kRun * kStride) {
    Sums<kTile> sum = {};
    int64_t k = run;
#pragma unroll(kTile == 16 ? 4 : 2)
    for (; k < run + kRun * kStride && k + kStep <= length; k += kStride) {
      add_step<In, kTile, aligned, diagonal, true>(a, b, k + first, length, sum);
    }
    if (k < run + kRun * kStride && k < length) {  // the span's last step, for one warp
      add_step<In, kTile, aligned, diagonal, false>(a, b, k + first, length, sum);
    }
#pragma unroll
    for (int e = 0; e < kTile * kTile / 32; ++e) {
      total[e][lane] += sum[e / 4 / (kTile / 8)][e / 4 % (kTile / 8)][e % 4];
    }
  }
}

// Grid: (tile pair, chunk), tile pairs fastest. partials (chunks, tile pairs, kTile, kTile).
template <class In, int kTile, bool aligned>
__global__ void __launch_bounds__(32 * kWarpsOf<kTile>, kTile == 16 ? 3 : 2)
    gram_kernel(const __grid_constant__ Table table, const bool* mask, int64_t first_chunk,
                double* partials) {
  constexpr int kWarps = kWarpsOf<kTile>, kGroups = kTile / 8;  // groups of 8 rows
  constexpr int kSums = kTile * kTile / 32;                     // of a lane
  __shared__ double totals[kWarps][kSums][32];
  const int p = table.p, tile_pairs = tile_pairs_of(p, kTile);
  const int pair = blockIdx.x % tile_pairs;
  const int64_t chunk = blockIdx.x / tile_pairs;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  int tile_a, tile_b;
  tile_pair(pair, tiles_of(p, kTile), tile_a, tile_b);
  const Span span = span_of(table, chunk);
  LaneRows<In, kGroups> a, b;
  const void* const* rows = table.row + span.segment * p;
#pragma unroll
  for (int r = 0; r < kGroups; ++r) {
    const int i = tile_a * kTile + 8 * r + g, j = tile_b * kTile + 8 * r + g;
    a.live[r] = i < p && (!mask || mask[i]);
    b.live[r] = j < p && (!mask || mask[j]);
    a.row[r] = static_cast<const In*>(rows[a.live[r] ? i : 0]) + span.begin;
    b.row[r] = static_cast<const In*>(rows[b.live[r] ? j : 0]) + span.begin;
  }
#pragma unroll
  for (int e = 0; e < kSums; ++e) totals[warp][e][lane] = 0;  // this lane's alone until the end
  if (kTile == 16 || tile_a == tile_b) {                      // 16: p <= 16, one tile
    add_span<In, kTile, aligned, true>(a, b, span.length, totals[warp]);
  } else {
    add_span<In, kTile, aligned, false>(a, b, span.length, totals[warp]);
  }
  __syncthreads();
  double* out = partials + ((first_chunk + chunk) * tile_pairs + pair) * (kTile * kTile);
  for (int item = threadIdx.x; item < kSums * 32; item += 32 * kWarps) {
    const int sum = item / 32, owner = item % 32, e = sum % 4;
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += totals[w][sum][owner];
    const int row = sum / 4 / kGroups * 16 + owner / 4 + e / 2 * 8;
    const int column = sum / 4 % kGroups * 8 + owner % 4 * 2 + e % 2;
    out[row * kTile + column] = total;
  }
}

int tile_of(int64_t p) { return p <= 16 ? 16 : 32; }

int64_t chunk_of(const Rows& rows) { return chunk_length(rows, kChunks, 1024); }

// Whether 16 bytes can be read from every row at every step.
bool aligned_rows(const Rows& rows) {
  uintptr_t bits = 0;
  for (const void* row : rows.pointers) bits |= reinterpret_cast<uintptr_t>(row);
  return bits % 16 == 0;
}

template <class In, int kTile, bool aligned>
int64_t launch_gram(const Rows& rows, const bool* mask, double* partials, cudaStream_t stream) {
  int64_t first = 0;
  for_each_table(rows, chunk_of(rows), {}, [&](const Table& table, int64_t chunks) {
    launch(&gram_kernel<In, kTile, aligned>,
           dim3(static_cast<unsigned>(chunks * tile_pairs_of(table.p, kTile))),
           dim3(32 * kWarpsOf<kTile>), 0, stream, table, mask, first, partials);
    first += chunks;
  });
  return first;
}

template <int kTile>
void gram_tiles(const Rows& rows, const bool* mask, double* scratch, int* note, double* out,
                cudaStream_t stream) {
  const int p = static_cast<int>(rows.p);
  int64_t chunks = 0;
  dispatch_device(rows.dtype, [&](auto element) {
    using In = decltype(element);
    if constexpr (!std::is_same_v<In, double>) {
      chunks = aligned_rows(rows) ? launch_gram<In, kTile, true>(rows, mask, scratch, stream)
                                  : launch_gram<In, kTile, false>(rows, mask, scratch, stream);
    }
  });
  launch(&sum_kernel<kTile>, dim3(kTile * kTile / kSumEntries, tile_pairs_of(p, kTile)),
         dim3(kSumEntries * kSumLanes), 0, stream, scratch, chunks, p, mask, nullptr, 0, true,
         false, 1e-30 * static_cast<double>(rows.d), note, out);
}

}  // namespace

PairsScratch gram_scratch(const Rows& rows) {
  const int p = static_cast<int>(rows.p), tile = tile_of(p);
  return {chunk_count(rows, chunk_of(rows)) * tile_pairs_of(p, tile) * tile * tile,
          notes_of(p, tile)};
}

void gram_cuda(const Rows& rows, const bool* mask, double* scratch, int* note, double* out,
               int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (tile_of(rows.p) == 16) {
    gram_tiles<16>(rows, mask, scratch, note, out, on);
  } else {
    gram_tiles<32>(rows, mask, scratch, note, out, on);
  }
}

}  // namespace dashpot::aggregate
