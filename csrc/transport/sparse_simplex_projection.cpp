// sparse_simplex_projection: u (R, n), total (R,) -> x (R, n), tau (R,); x = [u - tau]+ on the k
// largest entries, sum x = total. A row is a column of columns.h: 16 rows become the lanes of a
// tile.
#include <tuple>

#include "common/bind.h"
#include "common/parallel.h"
#include "transport/cuda_binding.h"
#include "transport/evaluate.h"

namespace dashpot::transport {
namespace {

inline constexpr int64_t kRowsPerChunk = 64;

using Outputs = std::tuple<Tensor, Tensor>;

// (R, n) in the input's dtype and (R,) in the state's: x and tau, or the gradients of input and
// total.
Outputs outputs_of(const Tensor& input) {
  const Dtype state = input.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const int64_t rows = input.size(0), n = input.size(1);
  return {input.new_empty({rows, n}, input.dtype), input.new_empty({rows}, state)};
}

// body(first, end) over chunks of rows.
template <class Body>
void for_chunks(int64_t rows, int threads, const Body& body) {
  parallel_for((rows + kRowsPerChunk - 1) / kRowsPerChunk, threads, [&](int64_t chunk) {
    body(chunk * kRowsPerChunk, std::min(rows, (chunk + 1) * kRowsPerChunk));
  });
}

template <class T, class U>
void project(const U* input, const T* total, U* output, T* tau, int64_t rows, int64_t n, int64_t k,
             int threads) {
  const int64_t lanes = vector_bytes(isa()) / sizeof(T);
  for_chunks(rows, threads, [&](int64_t begin, int64_t end) {
    std::vector<T> room(2 * n * lanes);
    T* scores = room.data();
    T* found = scores + n * lanes;
    Tile<T> tile({n, 1, k, 1, Reg::kSparse, false}, scores, found);
    for (int64_t first = begin; first < end; first += lanes) {
      const int64_t live = std::min(lanes, end - first);
      std::fill_n(scores, n * lanes, -std::numeric_limits<T>::infinity());
      std::fill_n(found, n * lanes, T(0));
      for (int64_t lane = 0; lane < live; ++lane) {
        tile.mass[lane] = total[first + lane];
        const U* row = input + (first + lane) * n;
        for (int64_t i = 0; i < n; ++i) scores[i * lanes + lane] = convert<T>(row[i]);
      }
      run_on_isa<SolveTile<T>>(&tile);
      for (int64_t lane = 0; lane < live; ++lane) {
        tau[first + lane] = tile.theta[lane];
        U* row = output + (first + lane) * n;
        for (int64_t i = 0; i < n; ++i) row[i] = convert<U>(found[i * lanes + lane]);
      }
    }
  });
}

Outputs sparse_simplex_projection_forward(const Tensor& input, const Tensor& total,
                                          int64_t max_nz) {
  const int64_t rows = input.size(0), n = input.size(1);
  const Outputs out = outputs_of(input);
  const auto& [output, tau] = out;
  const int threads = num_threads();
  const py::gil_scoped_release release;
  dispatch_floating(input.dtype, [&](auto element) {
    using U = decltype(element);
    using T = std::conditional_t<std::is_same_v<U, double>, double, float>;
    project<T, U>(input.as<U>(), total.as<T>(), output.as<U>(), tau.as<T>(), rows, n, max_nz,
                  threads);
  });
  return out;
}

// On the support S of x: du = g - mean_S g, dtotal = mean_S g; 0 elsewhere.
template <class T, class U>
void project_backward(const U* grad_output, const U* output, U* grad_input, T* grad_total,
                      int64_t rows, int64_t n, int threads) {
  for_chunks(rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const U* grad = grad_output + row * n;
      const U* x = output + row * n;
      double sum = 0;
      int64_t count = 0;
      for (int64_t i = 0; i < n; ++i) {
        const bool chosen = convert<T>(x[i]) > 0;
        sum += chosen ? convert<T>(grad[i]) : T(0);
        count += chosen;
      }
      const T mean = count ? static_cast<T>(sum / count) : T(0);
      for (int64_t i = 0; i < n; ++i) {
        const bool chosen = convert<T>(x[i]) > 0;
        grad_input[row * n + i] = convert<U>(chosen ? convert<T>(grad[i]) - mean : T(0));
      }
      grad_total[row] = mean;
    }
  });
}

Outputs sparse_simplex_projection_backward(const Tensor& grad_output, const Tensor& output) {
  const int64_t rows = output.size(0), n = output.size(1);
  const Outputs out = outputs_of(output);
  const auto& [grad_input, grad_total] = out;
  const int threads = num_threads();
  const py::gil_scoped_release release;
  dispatch_floating(output.dtype, [&](auto element) {
    using U = decltype(element);
    using T = std::conditional_t<std::is_same_v<U, double>, double, float>;
    project_backward<T, U>(grad_output.as<U>(), output.as<U>(), grad_input.as<U>(),
                           grad_total.as<T>(), rows, n, threads);
  });
  return out;
}

#ifdef DASHPOT_CUDA
Outputs sparse_simplex_projection_forward_cuda(const Tensor& input, const Tensor& total,
                                               int64_t max_nz) {
  const Outputs out = outputs_of(input);
  const auto& [output, tau] = out;
  const Place place = place_of(input);
  project_cuda(input.data, input.dtype, total.data, output.data, tau.data, input.size(0),
               input.size(1), max_nz, place.device, place.stream);
  return out;
}

Outputs sparse_simplex_projection_backward_cuda(const Tensor& grad_output, const Tensor& output) {
  const Outputs out = outputs_of(output);
  const auto& [grad_input, grad_total] = out;
  const Place place = place_of(output);
  project_backward_cuda(grad_output.data, output.data, output.dtype, grad_input.data,
                        grad_total.data, output.size(0), output.size(1), place.device,
                        place.stream);
  return out;
}
#endif

std::optional<std::string> sparse_simplex_projection_supports(const py::args& args) {
  return too_many_rows(py::cast<Tensor>(args[0]).size(1));
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("sparse_simplex_projection_forward", &sparse_simplex_projection_forward);
  m.def("sparse_simplex_projection_backward", &sparse_simplex_projection_backward);
  m.def("sparse_simplex_projection_supports", &sparse_simplex_projection_supports);
#ifdef DASHPOT_CUDA
  m.def("sparse_simplex_projection_forward_cuda", &sparse_simplex_projection_forward_cuda);
  m.def("sparse_simplex_projection_backward_cuda", &sparse_simplex_projection_backward_cuda);
  m.def("sparse_simplex_projection_supports_cuda", &sparse_simplex_projection_supports);
#endif
}

}  // namespace dashpot::transport
