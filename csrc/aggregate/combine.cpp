// combine: u = sum_i c_i g_i, rows (p, d), c (p,) float64 -> S updates (n_s,), one streaming pass.
//
// Each step holds kUnroll vectors of u in registers while all rows with c_i != 0 pass by; rows with
// c_i = 0 are never read (their NaN must not leak). Chunks are taken from the last coordinate to
// the first: the Gram pass before it went forwards, so the first chunks are still in the cache.
#include <optional>
#include <type_traits>

#include "aggregate/cuda_binding.h"
#include "aggregate/rows.h"
#include "common/bind.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace dashpot::aggregate {
namespace {

inline constexpr int kUnroll = 4;
inline constexpr int64_t kGroup = 16;  // rows that pass together: streams a prefetcher can follow
inline constexpr int64_t kChunk = 16384;

// u[0..length) = sum_i c_i x_i; rows, c: (q,) the rows with c_i != 0; sum: (length,) float32 or
// float64 accumulators in the cache, used when more than kGroup rows must pass in turns.
template <class Acc, class T>
struct CombineChunk {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* const* rows, const double* c, int64_t q, int64_t length,
                                 Acc* sum, T* u) {
    constexpr int kStep = kLanes<Acc, isa>;
    for (int64_t first = 0; first < q || first == 0; first += kGroup) {
      const int64_t last = first + kGroup < q ? first + kGroup : q;
      int64_t k = 0;
      for (; k + kUnroll * kStep <= length; k += kUnroll * kStep) {
        Vec<Acc, isa> total[kUnroll] = {};
        if (first > 0) {
          for (int s = 0; s < kUnroll; ++s) total[s] = load<Acc, isa>(sum + k + s * kStep);
        }
        for (int64_t i = first; i < last; ++i) {
          const Acc weight = static_cast<Acc>(c[i]);
          for (int s = 0; s < kUnroll; ++s) {
            total[s] += weight * load_as<Acc, isa>(rows[i] + k + s * kStep);
          }
        }
        for (int s = 0; s < kUnroll; ++s) store<Acc, isa>(sum + k + s * kStep, total[s]);
      }
      for (; k < length; ++k) {
        Acc total = first > 0 ? sum[k] : Acc(0);
        for (int64_t i = first; i < last; ++i) {
          total += static_cast<Acc>(c[i]) * convert<Acc>(rows[i][k]);
        }
        sum[k] = total;
      }
    }
    if constexpr (!std::is_same_v<Acc, T>) ConvertBlock<T, Acc>::template run<isa>(u, sum, length);
  }
};

template <class Acc, class T>
void combine(const Rows& rows, const std::vector<int64_t>& live, const std::vector<double>& c,
             int threads, const std::vector<void*>& out) {
  const std::vector<Chunk> chunks = rows.chunks(kChunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  parallel_for(count, threads, [&](int64_t item) {
    const Chunk& chunk = chunks[count - 1 - item];
    std::vector<const T*> pointers(live.size());
    for (size_t i = 0; i < live.size(); ++i) pointers[i] = rows.row<T>(chunk, live[i]);
    T* u = static_cast<T*>(out[chunk.segment]) + chunk.begin;
    std::vector<Acc> buffer(std::is_same_v<Acc, T> ? 0 : chunk.length);
    Acc* sum = buffer.data();
    if constexpr (std::is_same_v<Acc, T>) sum = u;
    run_on_isa<CombineChunk<Acc, T>>(pointers.data(), c.data(), static_cast<int64_t>(live.size()),
                                     chunk.length, sum, u);
  });
}

using Outs = std::optional<std::vector<Tensor>>;

// out: S tensors (n_s,) to write, or none to allocate them.
std::vector<Tensor> outputs(const std::vector<Tensor>& grads, const Tensor& coeffs,
                            const Rows& rows, Outs out) {
  if (coeffs.dtype != Dtype::kFloat64 || coeffs.numel != rows.p) {
    throw std::invalid_argument("coeffs: expected (p,) float64");
  }
  if (!out) {
    out.emplace();
    for (const int64_t n : rows.lengths) out->push_back(grads[0].new_empty({n}, rows.dtype));
  }
  for (int64_t s = 0; s < rows.segments(); ++s) {
    if ((*out)[s].numel != rows.lengths[s] || (*out)[s].dtype != rows.dtype) {
      throw std::invalid_argument("out: expected one row's length and dtype per segment");
    }
  }
  return *std::move(out);
}

std::vector<void*> pointers_of(const std::vector<Tensor>& tensors) {
  std::vector<void*> pointers;
  for (const Tensor& tensor : tensors) pointers.push_back(tensor.data);
  return pointers;
}

std::vector<Tensor> combine_forward(const std::vector<Tensor>& grads, const Tensor& coeffs,
                                    int64_t p, Outs given) {
  const Rows rows(grads, p);
  std::vector<Tensor> out = outputs(grads, coeffs, rows, std::move(given));
  const std::vector<void*> pointers = pointers_of(out);
  const int threads = num_threads();
  const py::gil_scoped_release release;
  std::vector<int64_t> live;
  std::vector<double> c;
  for (int64_t i = 0; i < p; ++i) {
    if (coeffs.as<double>()[i] != 0) {  // true for NaN: it must show
      live.push_back(i);
      c.push_back(coeffs.as<double>()[i]);
    }
  }
  dispatch_floating(rows.dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
    combine<Acc, T>(rows, live, c, threads, pointers);
  });
  return out;
}

#ifdef DASHPOT_CUDA
std::vector<Tensor> combine_forward_cuda(const std::vector<Tensor>& grads, const Tensor& coeffs,
                                         int64_t p, Outs given) {
  const Rows rows(grads, p);
  std::vector<Tensor> out = outputs(grads, coeffs, rows, std::move(given));
  const Place place = place_of(grads[0]);
  combine_cuda(rows, coeffs.as<double>(), pointers_of(out), place.device, place.stream);
  return out;
}

std::optional<std::string> combine_supports_cuda(const py::args& args) {
  return too_many_workers(py::cast<int64_t>(args[2]));
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("combine_forward", &combine_forward, py::arg("grads"), py::arg("coeffs"), py::arg("p"),
        py::arg("out") = py::none());
#ifdef DASHPOT_CUDA
  m.def("combine_forward_cuda", &combine_forward_cuda, py::arg("grads"), py::arg("coeffs"),
        py::arg("p"), py::arg("out") = py::none());
  m.def("combine_supports_cuda", &combine_supports_cuda);
#endif
}

}  // namespace dashpot::aggregate
