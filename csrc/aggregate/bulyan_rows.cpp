// bulyan_rows: sqdist (p, p) float64 -> chosen (p,) bool; the choice is in bulyan_select.h.
#include <vector>

#include "aggregate/bulyan_select.h"
#include "aggregate/cuda.h"
#include "common/bind.h"
#include "common/tensor.h"

namespace dashpot::aggregate {
namespace {

int checked_size(const Tensor& sqdist, int64_t f) {
  const int64_t p = sqdist.size(0);
  if (sqdist.dtype != Dtype::kFloat64 || sqdist.numel != p * p || f < 0 || 2 * f >= p) {
    throw std::invalid_argument("sqdist: expected (p, p) float64, p > 2 f");
  }
  return static_cast<int>(p);
}

Tensor bulyan_rows_forward(const Tensor& sqdist, int64_t f) {
  const int p = checked_size(sqdist, f);
  const Tensor chosen = sqdist.new_empty({p}, Dtype::kBool);
  const py::gil_scoped_release release;
  std::vector<double> work(bulyan_work_size(p));
  bulyan_select(Alone{}, sqdist.as<double>(), p, static_cast<int>(f), work.data(),
                chosen.as<bool>());
  return chosen;
}

#ifdef DASHPOT_CUDA
Tensor bulyan_rows_forward_cuda(const Tensor& sqdist, int64_t f) {
  const int p = checked_size(sqdist, f);
  const Tensor chosen = sqdist.new_empty({p}, Dtype::kBool);
  // From torch's allocator, which keeps it alive on this stream.
  const Tensor work = sqdist.new_empty({bulyan_work_size(p)}, Dtype::kFloat64);
  const Place place = place_of(sqdist);
  bulyan_rows_cuda(sqdist.as<double>(), p, static_cast<int>(f), work.as<double>(),
                   chosen.as<bool>(), place.device, place.stream);
  return chosen;
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("bulyan_rows_forward", &bulyan_rows_forward);
#ifdef DASHPOT_CUDA
  m.def("bulyan_rows_forward_cuda", &bulyan_rows_forward_cuda);
#endif
}

}  // namespace dashpot::aggregate
