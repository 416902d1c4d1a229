// Eigenvalues and eigenvectors of a small symmetric matrix by one block of threads.
//
// Parallel cyclic Jacobi: a round-robin tournament pairs the n indices; the n/2 rotations of a
// round touch disjoint rows and columns, so the matrix falls into disjoint 2 x 2 blocks, each
// updated from both sides by one thread. Two barriers a round, n - 1 rounds a sweep, some six
// sweeps. float64 throughout; the matrix may lie in shared or global memory.
#pragma once

#include "common/cuda.cuh"

namespace dashpot {

// Who plays whom: player number `seat` of pair `pair` in round `round` of a tournament of `even`.
__device__ __forceinline__ int jacobi_player(int pair, int seat, int round, int even) {
  const int ring = even - 1;
  if (pair == 0) return seat == 0 ? ring : round;
  return seat == 0 ? (round + pair) % ring : (round - pair + ring) % ring;
}

// a (n, n) symmetric, destroyed -> vectors (n, n) with eigenvector l in row l, values (n,) in no
// particular order; scratch (n + 1,). Every thread of the block calls it.
__device__ inline void jacobi_eigh(double* a, double* vectors, double* values, double* scratch,
                                   int n) {
  const int rank = threadIdx.x, size = blockDim.x;
  const int even = n + n % 2, half = even / 2;  // an odd tournament has a player who sits out
  for (int e = rank; e < n * n; e += size) vectors[e] = e / n == e % n;
  double largest = 0;
  for (int i = 0; i < n; ++i) largest = fmax(largest, fabs(a[i * n + i]));
  const double negligible = 1e-15 * largest;
  bool rotated = n > 1;
  for (int sweep = 0; rotated && sweep < 30; ++sweep) {
    rotated = false;
    for (int round = 0; round < even - 1; ++round) {
      __syncthreads();
      for (int pair = rank; pair < half; pair += size) {
        const int i = jacobi_player(pair, 0, round, even);
        const int j = jacobi_player(pair, 1, round, even);
        double cosine = 1, sine = 0;
        if (i < n && j < n && fabs(a[i * n + j]) > negligible) {
          const double ratio = (a[j * n + j] - a[i * n + i]) / (2 * a[i * n + j]);
          const double tangent = copysign(1 / (fabs(ratio) + sqrt(ratio * ratio + 1)), ratio);
          cosine = rsqrt(tangent * tangent + 1);
          sine = tangent * cosine;
          rotated = true;
        }
        scratch[2 * pair] = cosine;
        if (2 * pair + 1 <= n) scratch[2 * pair + 1] = sine;
      }
      __syncthreads();
      for (int item = rank; item < half * half; item += size) {
        const int left = item / half, right = item % half;
        const int i = jacobi_player(left, 0, round, even), j = jacobi_player(left, 1, round, even);
        const int k = jacobi_player(right, 0, round, even), l = jacobi_player(right, 1, round, even);
        const double c = scratch[2 * left], s = scratch[2 * left + 1];
        const double e = scratch[2 * right], t = scratch[2 * right + 1];
        const double ik = i < n && k < n ? a[i * n + k] : 0, il = i < n && l < n ? a[i * n + l] : 0;
        const double jk = j < n && k < n ? a[j * n + k] : 0, jl = j < n && l < n ? a[j * n + l] : 0;
        const double up_k = c * ik - s * jk, up_l = c * il - s * jl;  // rows turned
        const double down_k = s * ik + c * jk, down_l = s * il + c * jl;
        if (i < n && k < n) a[i * n + k] = e * up_k - t * up_l;  // columns turned
        if (i < n && l < n) a[i * n + l] = t * up_k + e * up_l;
        if (j < n && k < n) a[j * n + k] = e * down_k - t * down_l;
        if (j < n && l < n) a[j * n + l] = t * down_k + e * down_l;
      }
      for (int item = rank; item < half * n; item += size) {
        const int pair = item / n, k = item % n;
        const int i = jacobi_player(pair, 0, round, even);
        const int j = jacobi_player(pair, 1, round, even);
        if (i >= n || j >= n) continue;
        const double c = scratch[2 * pair], s = scratch[2 * pair + 1];
        const double upper = vectors[i * n + k], lower = vectors[j * n + k];
        vectors[i * n + k] = c * upper - s * lower;
        vectors[j * n + k] = s * upper + c * lower;
      }
    }
    rotated = __syncthreads_or(rotated);
  }
  __syncthreads();
  for (int i = rank; i < n; i += size) values[i] = a[i * n + i];
  __syncthreads();
}

}  // namespace dashpot
