// What the aggregate family's `.cu` files offer to the bindings: plain pointers, no Python.
#pragma once

#include <cstdint>

#include "aggregate/center_solve.h"
#include "aggregate/coordinate_rules.h"
#include "aggregate/flag_solve.h"
#include "aggregate/rows.h"

namespace dashpot::aggregate {

// Most workers whose pointers fit a kernel's parameters.
inline constexpr int64_t kMaxWorkers = 384;

// Scratch memory of a pass over pairs of rows: float64 partial sums, and int32 notes on where
// float32 did not suffice.
struct PairsScratch {
  int64_t partials, notes;
};

// K (p, p) float64 of float32 or 16-bit rows; mask (p,) bool on the device or null. note[i] != 0
// asks for gram_wide_cuda.
PairsScratch gram_scratch(const Rows& rows);
void gram_cuda(const Rows& rows, const bool* mask, double* partials, int* note, double* out,
               int device, void* stream);

// K with every product in float64; given redo, only if one of its redo_count notes is set.
PairsScratch pairs_scratch(const Rows& rows);
void gram_wide_cuda(const Rows& rows, const bool* mask, const int* redo, int redo_count,
                    double* partials, double* out, int device, void* stream);

// D (p, p) float64, |g_i|^2 on the diagonal for norms; in float64 where float32 does not suffice.
void sqdist_cuda(const Rows& rows, const bool* mask, bool norms, double* partials, int* note,
                 double* out, int device, void* stream);

// out: S device pointers (n_s,); coeffs (p,) float64 on the device.
void combine_cuda(const Rows& rows, const double* coeffs, const std::vector<void*>& out, int device,
                  void* stream);

// out: (R, S) device pointers (n_s,); mask (p,) bool on the device or null. Takes p + kRules <=
// kMaxWorkers.
void coordinate_rules_cuda(const Rows& rows, const bool* mask, const RuleSet& set,
                           const std::vector<void*>& out, int device, void* stream);

// sqdist (p, p) float64, work (bulyan_work_size(p),), chosen (p,), all on the device.
void bulyan_rows_cuda(const double* sqdist, int p, int f, double* work, bool* chosen, int device,
                      void* stream);

// Whether so many float64 numbers fit a block's shared memory. If not, a solve's `work` must be
// given, in global memory; if so, it may be null.
bool fits_block(int64_t numbers, int device);
void flag_coeffs_cuda(const double* k, int p, const FlagOptions& options, double* work, double* c,
                      double* v, double* objective, int64_t* iters, int device, void* stream);
void krum_coeffs_cuda(const double* d, int p, int k, int neighbours, bool squared, double* work,
                      double* c, double* scores, int device, void* stream);
void nnm_coeffs_cuda(const double* d, int p, int f, double* work, double* mixing, int device,
                     void* stream);
void mda_coeffs_cuda(const double* d, int p, int f, double* work, double* c, double* diameter,
                     int device, void* stream);
void geometric_median_coeffs_cuda(const double* d, int q, const double* weights,
                                  const MedianOptions& options, double* work, double* c,
                                  int64_t* iters, int device, void* stream);
void centered_clipping_coeffs_cuda(const double* d, int q, double tau, int n_iter, double* work,
                                   double* c, int device, void* stream);

}  // namespace dashpot::aggregate
