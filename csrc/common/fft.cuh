// Fourier transforms of float32 rows in shared memory, by one block of threads.
//
//   Z_f = sum_j z_j exp(-2 pi i f j / n),   n = 2^a 3^b 5^c <= 2048, several rows side by side
//
// In place and never permuted, as in fft.h: the forward leaves Z_f at place f, the inverse (without
// 1/n) takes it there. A thread holds one butterfly of radix up to 8 in registers, so 1,000 points
// take 4 passes through shared memory. Every 16th number is followed by a gap: butterflies of any
// stride meet all banks. Twiddles come from one table of 2n-th roots of unity, made by the block
// itself, exact to a rounding.
#pragma once

#include "common/butterfly.h"
#include "common/cuda.cuh"

namespace dashpot {

struct BlockFft {
  int n, stages;
  unsigned char radix[12];
};

inline BlockFft block_fft_plan(int n) {
  BlockFft plan{n, 0, {}};
  for (const int r : {5, 3, 8, 4, 2}) {
    for (; n % r == 0; n /= r) plan.radix[plan.stages++] = static_cast<unsigned char>(r);
  }
  return plan;
}

// Where number i lies, and what a row of n takes.
__host__ __device__ __forceinline__ int padded(int i) { return i + (i >> 4); }
__host__ __device__ __forceinline__ int pitch_of(int n) { return padded(n) + 1; }

// exp(-2 pi i k / 2n), 0 <= k < 2n, from the n roots of the upper half.
__device__ __forceinline__ float2 root_of(const float2* roots, int n, int k) {
  const float2 root = roots[k < n ? k : k - n];
  return k < n ? root : make_float2(-root.x, -root.y);
}

// Fills roots (n,) and place (n,), with a barrier at the end.
__device__ inline void block_fft_tables(const BlockFft& plan, float2* roots,
                                        unsigned short* place) {
  for (int k = threadIdx.x; k < plan.n; k += blockDim.x) {
    float s, c;
    sincospif(static_cast<float>(k) / static_cast<float>(plan.n), &s, &c);
    roots[k] = make_float2(c, -s);
    int at = 0, size = plan.n, left = k;
    for (int stage = 0; stage < plan.stages; ++stage) {
      const int r = plan.radix[stage];
      size /= r;
      at += left % r * size;
      left /= r;
    }
    place[k] = static_cast<unsigned short>(at);
  }
  __syncthreads();
}

template <int radix, bool inverse>
__device__ __forceinline__ void block_fft_pass(float2* data, int rows, int n, int length,
                                               const float2* roots) {
  const int stride = length / radix, each = n / radix, turn = 2 * n / length;
  const int pitch = pitch_of(n);
  for (int i = threadIdx.x; i < rows * each; i += blockDim.x) {
    const int row = i / each, q = i - row * each, block = q / stride, j = q - block * stride;
    float2* base = data + row * pitch;
    const int first = block * length + j;
    float re[radix], im[radix];
#pragma unroll
    for (int k = 0; k < radix; ++k) {
      float2 z = base[padded(first + k * stride)];
      if (inverse) z = make_float2(z.y, z.x);  // the inverse is the forward of exchanged parts
      if (inverse && k > 0) {
        const float2 w = root_of(roots, n, turn * j * k);
        z = make_float2(z.x * w.x - z.y * w.y, z.x * w.y + z.y * w.x);
      }
      re[k] = z.x, im[k] = z.y;
    }
    Butterfly<radix, float, float>::run(re, im);
#pragma unroll
    for (int k = 0; k < radix; ++k) {
      float2 z = make_float2(re[k], im[k]);
      if (!inverse && k > 0) {
        const float2 w = root_of(roots, n, turn * j * k);
        z = make_float2(z.x * w.x - z.y * w.y, z.x * w.y + z.y * w.x);
      }
      base[padded(first + k * stride)] = inverse ? make_float2(z.y, z.x) : z;
    }
  }
  __syncthreads();
}

// data: `rows` rows, pitch_of(n) apart; the block has seen a barrier since they were written.
template <bool inverse>
__device__ inline void block_fft(float2* data, int rows, const BlockFft& plan,
                                 const float2* roots) {
  int length = inverse ? 1 : plan.n;
  for (int s = 0; s < plan.stages; ++s) {
    const int r = plan.radix[inverse ? plan.stages - 1 - s : s];
    if (inverse) length *= r;
    switch (r) {
      case 2:
        block_fft_pass<2, inverse>(data, rows, plan.n, length, roots);
        break;
      case 3:
        block_fft_pass<3, inverse>(data, rows, plan.n, length, roots);
        break;
      case 4:
        block_fft_pass<4, inverse>(data, rows, plan.n, length, roots);
        break;
      case 5:
        block_fft_pass<5, inverse>(data, rows, plan.n, length, roots);
        break;
      default:
        block_fft_pass<8, inverse>(data, rows, plan.n, length, roots);
    }
    if (!inverse) length /= r;
  }
}

// A real row of 2n samples as n complex numbers; the formulas are those of spectral/rows.h.
struct PairOfBins {
  float2 low, high;  // X_k, X_n-k
};

__device__ __forceinline__ PairOfBins split_bins(const float2* row, const unsigned short* place,
                                                 const float2* roots, int n, int k) {
  const float2 a = row[padded(place[k])], b = row[padded(place[k == 0 ? 0 : n - k])];
  const float2 w = roots[k];
  const float er = 0.5f * (a.x + b.x), ei = 0.5f * (a.y - b.y);
  const float qr = 0.5f * (a.y + b.y), qi = 0.5f * (b.x - a.x);
  const float pr = w.x * qr - w.y * qi, pi = w.x * qi + w.y * qr;
  return {make_float2(er + pr, ei + pi), make_float2(er - pr, pi - ei)};
}

__device__ __forceinline__ void merge_bins(float2* row, const unsigned short* place,
                                           const float2* roots, int n, int k, PairOfBins bins) {
  const float2 w = roots[k], x = bins.low, y = bins.high;
  const float er = x.x + y.x, ei = x.y - y.y, dr = x.x - y.x, di = x.y + y.y;
  const float qr = w.x * dr + w.y * di, qi = w.x * di - w.y * dr;
  row[padded(place[k])] = make_float2(er - qi, ei + qr);
  row[padded(place[k == 0 ? 0 : n - k])] = make_float2(er + qi, qr - ei);
}

}  // namespace dashpot
