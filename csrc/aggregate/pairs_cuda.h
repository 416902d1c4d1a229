// The binding that gram and pairwise_sqdist share on CUDA.
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

// grads -> (p, p) float64; wide: sums in float64 throughout.
inline Tensor pairs_forward_cuda(const std::vector<Tensor>& grads, const std::optional<Tensor>& mask,
                                 int64_t p, PairSum sum, bool wide) {
  const Rows rows(grads, p);
  const Tensor out = grads[0].new_empty({p, p}, Dtype::kFloat64);  // (p, p)
  const Tensor scratch = grads[0].new_empty({pairs_scratch_size(rows)}, Dtype::kFloat64);
  const Place place = place_of(grads[0]);
  pairs_cuda(rows, sum, wide, mask ? mask->as<bool>() : nullptr, scratch.as<double>(),
             out.as<double>(), place.device, place.stream);
  return out;
}

}  // namespace dashpot::aggregate

#endif
