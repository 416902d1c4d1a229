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

// Global memory for a solve, where its matrices do not fit a block's shared memory. torch's
// allocator keeps it for this stream.
class Work {
 public:
  Work(const Tensor& like, int64_t numbers, int device) {
    if (!fits_block(numbers, device)) memory_ = like.new_empty({numbers}, Dtype::kFloat64);
  }
  double* get() const { return memory_ ? memory_->as<double>() : nullptr; }

 private:
  std::optional<Tensor> memory_;
};

}  // namespace dashpot::aggregate

#endif
