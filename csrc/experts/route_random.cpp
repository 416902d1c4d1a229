// route_random: seed, offset -> ids (P*U, k) int32; see philox.h.
#include "common/bind.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "experts/cuda.h"
#include "experts/plan.h"

namespace dashpot::experts {
namespace {

Tensor route_random_forward(const Tensor& seed, const Tensor& offset, int64_t units, int experts,
                            int k, bool replace, int64_t passes) {
  const Tensor ids = seed.new_empty({passes * units, k}, Dtype::kInt32);
  const Route route = route_of(seed, offset, units, experts, k, replace);
  const int threads = num_threads();
  const py::gil_scoped_release release;
  choose_all(route, passes * units, ids.as<int32_t>(), threads);
  return ids;
}

#ifdef DASHPOT_CUDA
Tensor route_random_forward_cuda(const Tensor& seed, const Tensor& offset, int64_t units,
                                 int experts, int k, bool replace, int64_t passes) {
  const Tensor ids = seed.new_empty({passes * units, k}, Dtype::kInt32);
  const Place place = place_of(seed);
  route_random_cuda({seed.as<int64_t>(), offset.as<int64_t>(), units, experts, k, replace},
                    passes * units, ids.as<int32_t>(), place.device, place.stream);
  return ids;
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("route_random_forward", &route_random_forward);
#ifdef DASHPOT_CUDA
  m.def("route_random_forward_cuda", &route_random_forward_cuda);
#endif
}

}  // namespace dashpot::experts
