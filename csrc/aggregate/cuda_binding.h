// What the family's bindings share on CUDA.
#pragma once

#ifdef DASHPOT_CUDA

#include <optional>
#include <string>
#include <vector>

#include "aggregate/cuda.h"
#include "common/tensor.h"

namespace dashpot::aggregate {

// None, or why the CUDA kernels cannot take the call.
inline std::optional<std::string> too_many_workers(int64_t p) {
  if (p <= kMaxWorkers) return std::nullopt;
  return "takes at most " + std::to_string(kMaxWorkers) + " workers, got " + std::to_string(p);
}

}  // namespace dashpot::aggregate

#endif
