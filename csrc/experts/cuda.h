// What the experts family's `.cu` files offer to the bindings: plain pointers, no Python.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/dtype.h"

namespace dashpot::experts {

// Experts whose counters fit a block's shared memory, and choices of a unit that random_plan draws
// again in registers.
inline constexpr int64_t kMaxExperts = 8192;
inline constexpr int64_t kMaxDrawn = 8;

inline std::optional<std::string> too_many_experts(int64_t experts) {
  if (experts <= kMaxExperts) return std::nullopt;
  return "takes at most " + std::to_string(kMaxExperts) + " experts, got " +
         std::to_string(experts);
}

// What route_random is asked for; seed and offset stay on the device.
struct DeviceRoute {
  const int64_t *seed, *offset;
  int64_t units;
  int experts, k;
  bool replace;
};

void route_random_cuda(const DeviceRoute& route, int64_t rows, int32_t* ids, int device,
                       void* stream);

// What route_balanced is asked for.
struct DeviceBalance {
  const int64_t *seed, *offset;
  int64_t units, experts;
};

// Counters (int32) of scratch memory for so many units, beside an int64 for each unit.
int64_t balanced_buckets(int64_t units);

void route_balanced_cuda(const DeviceBalance& route, int32_t* counts, int64_t* pairs, int32_t* ids,
                         int device, void* stream);

// A plan to make on the device; tensors as in plan.h. capacity -1: none; by_choice: first choices
// of all tokens come before second ones.
struct CudaPlan {
  int32_t *counts, *routed, *offsets, *order, *rank;
  int64_t tokens, k, experts, align, slots, capacity;
  bool by_choice;
};

template <class Plan, class Shape>
CudaPlan cuda_plan(const Plan& plan, const Shape& shape, const std::string& priority) {
  return {plan.counts.template as<int32_t>(),
          plan.routed.template as<int32_t>(),
          plan.offsets.template as<int32_t>(),
          plan.order.template as<int32_t>(),
          plan.rank.template as<int32_t>(),
          shape.tokens,
          shape.k,
          shape.experts,
          shape.align,
          shape.slots(),
          shape.capacity.value_or(-1),
          shape.capacity && priority == "choice"};
}

// int32 numbers of scratch memory.
int64_t plan_scratch(const CudaPlan& plan);

void dispatch_plan_cuda(const CudaPlan& plan, const int32_t* ids, int32_t* scratch, int device,
                        void* stream);
void random_plan_cuda(const CudaPlan& plan, const DeviceRoute& route, int32_t* scratch, int device,
                      void* stream);

}  // namespace dashpot::experts
