// What the family's `.cu` files offer to the bindings: plain pointers, no Python.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "transport/solvers.h"

namespace dashpot::transport {

// Blocks that share a problem's columns: by n alone, so that a problem's bits do not depend on its
// batch. A tile is 32 bytes of a row of the cost.
inline int64_t device_chunks(int64_t n, int64_t element_size) {
  const int64_t columns = 32 / element_size, tiles = (n + columns - 1) / columns;
  return tiles < 256 ? tiles : 256;
}

// The costs of a batch of problems: stored (B, m, n), or by_rows (B, n, m); or with y (B, n, d) the
// points x (B, m, d) in their place, of the state's type.
struct CudaCost {
  const void* cost;
  Dtype dtype;
  bool by_rows = false;
  const void* y = nullptr;
  int64_t d = 0;
  Metric metric = Metric::kSqeuclidean;
};

// A batch of problems on the device. State (float64 where the cost is, else float32): alpha, a,
// grad_alpha (B, m); beta (dual, else null), b, column (B, n); obj (B,). Of the smoothed dual:
// smoothing (B,), level (B, n) to start from or null, to_level (B, n).
// Scratch: row_sums (B, chunks, m) of the state's type, values (B, chunks) float64.
struct CudaEvaluation {
  Options options;
  int64_t batch;
  CudaCost cost;
  const void *alpha, *beta, *a, *b;
  void *obj, *grad_alpha, *column, *row_sums;
  double* values;
  const void *smoothing = nullptr, *level = nullptr;
  void* to_level = nullptr;
};

void evaluate_cuda(const CudaEvaluation& evaluation, int device, void* stream);

// Whole solves, a problem a block. State's type: a, alpha, to_alpha (B, m), b, beta, to_beta (B,
// n), value, gap (B,), row_error, col_error (B, 2); counts (B, 4): iterations, evaluations, tied
// columns, status. room (B, solve_numbers(m, n)) float64: scratch.
struct CudaSolve {
  Settings settings;
  int64_t batch;
  CudaCost cost;
  const void *a, *b, *alpha, *beta;
  double* room;
  void *to_alpha, *to_beta, *value, *row_error, *col_error, *gap;
  int32_t* counts;
};

int64_t solve_numbers(int64_t m, int64_t n);
// Whether a block's shared memory holds the vectors of a problem, and of points the cost too.
bool solve_fits(int64_t m, int64_t n, Dtype dtype, bool of_points, int device);
void solve_cuda(const CudaSolve& solve, int device, void* stream);

// alpha (B, m), b, beta (dual, else null) (B, n) -> rows, values (B, k, n).
struct CudaPlan {
  Options options;
  int64_t batch;
  CudaCost cost;
  const void *alpha, *beta, *b;
  int32_t* rows;
  void* values;
};

void plan_cuda(const CudaPlan& plan, int device, void* stream);

// input, output (R, n); total, tau (R,) of the state's type.
void project_cuda(const void* input, Dtype dtype, const void* total, void* output, void* tau,
                  int64_t rows, int64_t n, int64_t k, int device, void* stream);
// grad_output, output, grad_input (R, n); grad_total (R,).
void project_backward_cuda(const void* grad_output, const void* output, Dtype dtype,
                           void* grad_input, void* grad_total, int64_t rows, int64_t n, int device,
                           void* stream);

}  // namespace dashpot::transport
