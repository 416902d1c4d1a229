// From the plain pointers of cuda.h to what kernels read costs from.
#pragma once

#include "transport/cuda.h"
#include "transport/evaluate.cuh"

namespace dashpot::transport {
namespace {

// Calls function(T{}, source) with the state's type and the source of the costs.
template <class Function>
void with_source(const CudaCost& cost, int64_t m, int64_t n, const Function& function) {
  if (cost.y) {
    const auto of_points = [&](auto state) {
      using T = decltype(state);
      function(state, PointsCost<T>{static_cast<const T*>(cost.cost), static_cast<const T*>(cost.y),
                                    m, n, cost.d, cost.metric});
    };
    cost.dtype == Dtype::kFloat64 ? of_points(double{}) : of_points(float{});
    return;
  }
  dispatch_device(cost.dtype, [&](auto element) {
    using C = decltype(element);
    using T = std::conditional_t<std::is_same_v<C, double>, double, float>;
    function(T{}, StoredCost<T, C>{static_cast<const C*>(cost.cost), m * n, cost.by_rows ? 1 : n,
                                   cost.by_rows ? m : 1});
  });
}

}  // namespace
}  // namespace dashpot::transport
