// Who runs a solve on p x p matrices: one thread (CPU) or a block of them (CUDA; team.cuh). Every
// thread of a team runs the same function: elements are dealt out by `rank` and `size`, scalars are
// computed by all threads alike, so control flow is uniform; `sync` stands between.
#pragma once

#include <stdint.h>
#ifndef __CUDACC_RTC__
#include <math.h>
#endif

#include "common/device.h"

namespace dashpot::aggregate {

struct Alone {
  static constexpr int rank = 0, size = 1;
  void sync() const {}
  double max(double value) const { return value; }
};

DASHPOT_HD inline bool is_finite(double value) { return fabs(value) <= 1.7976931348623157e308; }

}  // namespace dashpot::aggregate
