// The vector functions of math.h, for the tests: x (...) float32 or float64 -> f(x) (...).
#include "common/math.h"

#include "common/bind.h"
#include "common/tensor.h"

namespace dashpot {
namespace {

template <class T, bool logarithm>
struct Map {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* from, T* to, int64_t n) {
    constexpr int64_t kStep = kLanes<T, isa>;
    for (int64_t k = 0; k < n; k += kStep) {
      T lanes[kStep] = {};
      const int64_t count = n - k < kStep ? n - k : kStep;
      for (int64_t i = 0; i < count; ++i) lanes[i] = from[k + i];
      const Vec<T, isa> x = load<T, isa>(lanes);
      store<T, isa>(lanes, logarithm ? log<T, isa>(x) : exp<T, isa>(x));
      for (int64_t i = 0; i < count; ++i) to[k + i] = lanes[i];
    }
  }
};

template <bool logarithm>
Tensor map(const Tensor& x) {
  const Tensor out = x.new_empty({x.numel}, x.dtype);
  if (x.dtype == Dtype::kFloat64) {
    run_on_isa<Map<double, logarithm>>(x.as<const double>(), out.as<double>(), x.numel);
  } else if (x.dtype == Dtype::kFloat32) {
    run_on_isa<Map<float, logarithm>>(x.as<const float>(), out.as<float>(), x.numel);
  } else {
    throw std::invalid_argument("expected float64 or float32");
  }
  return out;
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("vector_exp", &map<false>, "exp of (n,) by common/math.h; for tests.");
  m.def("vector_log", &map<true>, "log of (n,) by common/math.h; for tests.");
}

}  // namespace dashpot
