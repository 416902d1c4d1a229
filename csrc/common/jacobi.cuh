// Eigenvalues and eigenvectors of a small symmetric matrix by one block of threads.
//
// Parallel cyclic Jacobi: a round-robin tournament pairs the n indices; the n/2 rotations of a
// round touch disjoint rows and columns, so the matrix falls into disjoint 2 x 2 blocks, each
// turned from both sides by one thread. Two barriers a round, n - 1 rounds a sweep, five or six
// sweeps. float64 throughout; the matrix may lie in shared or global memory.
//
// A round is short, so what counts is the chain of dependent operations in it:
//  - the angle needs no accuracy (the next sweep mends it), so it is found in float32; only
//    cos^2 + sin^2 = 1 must hold in float64, by two Newton steps from float32's rsqrt: some 150
//    cycles in place of 500 for float64's division and square roots;
//  - each item's place is found by a multiplication, not by integer division;
//  - a sweep starts by looking whether anything is left to rotate, so none is run in vain.
#pragma once

#include "common/cuda.cuh"

namespace dashpot {

// item / by for 0 <= item < 2^20, with scale = 1 / by: exact, as the quotient is off by >= 0.5 /
// by.
__device__ __forceinline__ int quotient(int item, float scale) {
  return static_cast<int>((item + 0.5f) * scale);
}

// The two players of a pair in a round of a tournament among `even` players.
__device__ __forceinline__ void jacobi_players(int pair, int round, int even, int& first,
                                               int& second) {
  const int ring = even - 1;
  const int ahead = round + pair, behind = round - pair;
  first = pair == 0 ? ring : ahead < ring ? ahead : ahead - ring;
  second = behind < 0 ? behind + ring : behind;  // pair 0: round itself
}

// cos and sin of the rotation that removes a_ij from ((a_ii, a_ij), (a_ij, a_jj)), nearly; scale
// brings the matrix to the order of 1, where float32 holds whatever counts.
__device__ __forceinline__ void jacobi_rotation(double a_ii, double a_jj, double a_ij, double scale,
                                                double& cosine, double& sine) {
  const float ratio =
      __fdividef(static_cast<float>((a_jj - a_ii) * scale), 2 * static_cast<float>(a_ij * scale));
  const float square_of_root = fmaf(ratio, ratio, 1.0f);
  const float size = __fdividef(1.0f, fabsf(ratio) + square_of_root * rsqrtf(square_of_root));
  const double tangent = ratio < 0 ? -size : size;
  const double square = fma(tangent, tangent, 1.0);  // in [1, 2]
  double root = rsqrtf(static_cast<float>(square));
#pragma unroll
  for (int step = 0; step < 2; ++step) root *= fma(-0.5 * square * root, root, 1.5);
  cosine = root;
  sine = tangent * root;
}

// a (n, n) symmetric, destroyed -> vectors (n, n) with eigenvector l in row l, values (n,) in no
// particular order; scratch (n + 1,). Every thread of the block calls it.
__device__ inline void jacobi_eigh(double* a, double* vectors, double* values, double* scratch,
                                   int n) {
  const int rank = threadIdx.x, size = blockDim.x;
  const int even = n + n % 2, half = even / 2;  // an odd tournament has a player who sits out
  const int blocks = half * half, items = blocks + half * n;
  const float per_half = 1.0f / half, per_n = 1.0f / n;
  for (int e = rank; e < n * n; e += size) {
    const int row = quotient(e, per_n);
    vectors[e] = row == e - row * n;
  }
  double largest = 0;
  for (int i = 0; i < n; ++i) largest = fmax(largest, fabs(a[i * n + i]));
  // Done where rounding would only be stirred: it leaves some 1e-16 on each of n turns of an entry.
  const double done = 6.7e-16 * sqrtf(static_cast<float>(n)) * largest;
  const double zero = 1e-17 * largest, scale = 1 / largest;
  for (int sweep = 0; sweep < 15; ++sweep) {
    bool left = false;
    for (int e = rank; e < n * n; e += size) {
      const int row = quotient(e, per_n);
      left |= row < e - row * n && fabs(a[e]) > done;
    }
    if (!__syncthreads_or(left)) break;
    for (int round = 0; round < even - 1; ++round) {
      for (int pair = rank; pair < half; pair += size) {
        int i, j;
        jacobi_players(pair, round, even, i, j);
        double cosine = 1, sine = 0;
        if (i < n && j < n && fabs(a[i * n + j]) > zero) {
          jacobi_rotation(a[i * n + i], a[j * n + j], a[i * n + j], scale, cosine, sine);
        }
        scratch[2 * pair] = cosine;
        if (2 * pair + 1 <= n) scratch[2 * pair + 1] = sine;
      }
      __syncthreads();
      for (int item = rank; item < items; item += size) {
        if (item < blocks) {
          const int p = quotient(item, per_half), q = item - p * half;
          int i, j, k, l;
          jacobi_players(p, round, even, i, j);
          jacobi_players(q, round, even, k, l);
          const double c = scratch[2 * p], s = scratch[2 * p + 1];
          const double e = scratch[2 * q], t = scratch[2 * q + 1];
          if (s == 0 && t == 0) continue;  // the last sweeps rotate little
          const bool has_i = i < n, has_j = j < n, has_k = k < n, has_l = l < n;
          const double ik = has_i && has_k ? a[i * n + k] : 0;
          const double il = has_i && has_l ? a[i * n + l] : 0;
          const double jk = has_j && has_k ? a[j * n + k] : 0;
          const double jl = has_j && has_l ? a[j * n + l] : 0;
          const double up_k = c * ik - s * jk, up_l = c * il - s * jl;  // rows turned
          const double down_k = s * ik + c * jk, down_l = s * il + c * jl;
          if (has_i && has_k) a[i * n + k] = e * up_k - t * up_l;  // columns turned
          if (has_i && has_l) a[i * n + l] = t * up_k + e * up_l;
          if (has_j && has_k) a[j * n + k] = e * down_k - t * down_l;
          if (has_j && has_l) a[j * n + l] = t * down_k + e * down_l;
        } else {
          const int pair = quotient(item - blocks, per_n), k = item - blocks - pair * n;
          int i, j;
          jacobi_players(pair, round, even, i, j);
          if (i >= n || j >= n) continue;
          const double c = scratch[2 * pair], s = scratch[2 * pair + 1];
          if (s == 0) continue;
          const double upper = vectors[i * n + k], lower = vectors[j * n + k];
          vectors[i * n + k] = c * upper - s * lower;
          vectors[j * n + k] = s * upper + c * lower;
        }
      }
      __syncthreads();
    }
  }
  __syncthreads();
  for (int i = rank; i < n; i += size) values[i] = a[i * n + i];
  __syncthreads();
}

}  // namespace dashpot
