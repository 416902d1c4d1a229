// What the aggregate family's `.cu` files offer to the bindings: plain pointers, no Python.
#pragma once

#include <cstdint>

#include "aggregate/flag_solve.h"
#include "aggregate/rows.h"

namespace dashpot::aggregate {

// Most workers whose pointers fit a kernel's parameters.
inline constexpr int64_t kMaxWorkers = 384;

enum class PairSum { kProduct, kSquaredDifference };

// float64 numbers of scratch memory that `pairs_cuda` needs.
int64_t pairs_scratch_size(const Rows& rows);

// out (p, p) float64; mask (p,) bool on the device or null; scratch as above.
void pairs_cuda(const Rows& rows, PairSum sum, bool wide, const bool* mask, double* scratch,
                double* out, int device, void* stream);

// out: S device pointers (n_s,); coeffs (p,) float64 on the device.
void combine_cuda(const Rows& rows, const double* coeffs, const std::vector<void*>& out, int device,
                  void* stream);

// Whether the solve's matrices fit a block's shared memory; if not, `work` must be given.
bool flag_coeffs_fits(int64_t p, int device);
void flag_coeffs_cuda(const double* k, int p, const FlagOptions& options, double* work, double* c,
                      double* v, double* objective, int64_t* iters, int device, void* stream);

}  // namespace dashpot::aggregate
