// sparse_simplex_projection: u (R, n), total (R,) -> x (R, n), tau (R,); x = [u - tau]+ on the k
// largest entries, sum x = total. A row is a column of columns.h: 16 rows become the lanes of a
// tile.
#include <tuple>

#include "common/bind.h"
#include "common/parallel.h"
#include "transport/evaluate.h"

namespace dashpot::transport {
namespace {

inline constexpr int64_t kRowsPerChunk = 64;

template <class T, class U>
void project(const U* input, const T* total, U* output, T* tau, int64_t rows, int64_t n, int64_t k,
             int threads) {
  const int64_t lanes = vector_bytes(isa()) / sizeof(T);
  parallel_for((rows + kRowsPerChunk - 1) / kRowsPerChunk, threads, [&](int64_t chunk) {
    std::vector<T> room(2 * n * lanes);
    T* scores = room.data();
    T* found = scores + n * lanes;
    Tile<T> tile({n, 1, k, 1, Reg::kSparse, false}, scores, found);
    const int64_t end = std::min(rows, (chunk + 1) * kRowsPerChunk);
    for (int64_t first = chunk * kRowsPerChunk; first < end; first += lanes) {
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

std::tuple<Tensor, Tensor> sparse_simplex_projection_forward(const Tensor& input,
                                                             const Tensor& total, int64_t max_nz) {
  const int64_t rows = input.size(0), n = input.size(1);
  const std::tuple<Tensor, Tensor> out{input.new_empty({rows, n}, input.dtype),
                                       input.new_empty({rows}, total.dtype)};
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

std::optional<std::string> sparse_simplex_projection_supports(const py::args& args) {
  return too_many_rows(py::cast<Tensor>(args[0]).size(1));
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("sparse_simplex_projection_forward", &sparse_simplex_projection_forward);
  m.def("sparse_simplex_projection_supports", &sparse_simplex_projection_supports);
}

}  // namespace dashpot::transport
