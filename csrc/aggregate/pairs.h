// Sums over coordinates of a function of two rows, for every pair of rows (CPU).
//
//   out[i][j] = sum_k f(x_ik, x_jk)      x (p, d) -> out (p, p) float64
//   f = product: Gram matrix; f = squared difference: pairwise distances, which may carry the rows'
//   squared norms (distances from the origin) on their diagonal.
//
// Blocks of coordinates small enough that p rows stay in the L2 cache (L1 for few rows) are taken
// through register tiles of kTile x kTile pairs: 2 kTile loads serve kTile^2 multiply-adds. Sums
// run in Acc within a block and in float64 from block to block. 16-bit rows, and any rows for
// Acc = double, are converted once per block into a buffer. While a block is worked on, the next
// one is fetched: arithmetic and memory take about as long as each other, and would else take
// turns.
//
// Work is divided into chunks by d alone, each chunk writes its own partial matrix, and the
// partials are added in order: the same bits for any number of threads.
#pragma once

#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "aggregate/rows.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace dashpot::aggregate {

struct Product {
  template <class V>
  static DASHPOT_INLINE V add(V sum, V a, V b) {
    return sum + a * b;
  }
  static constexpr bool kNorms = false;
  // Which entries are sums of squares, whose range tells whether float32 sufficed.
  static constexpr bool kDiagonal = true, kOffDiagonal = false;
  template <class T>
  static bool is_zero(T a, T) {
    return convert<double>(a) == 0;
  }
};

// norms: the diagonal holds |x_i|^2, the distance from the origin, in place of |x_i - x_i|^2.
template <bool norms>
struct SquaredDifference {
  template <class V>
  static DASHPOT_INLINE V add(V sum, V a, V b) {
    const V difference = a - b;
    return sum + difference * difference;
  }
  static constexpr bool kNorms = norms;
  static constexpr bool kDiagonal = norms, kOffDiagonal = true;
  template <class T>
  static bool is_zero(T a, T b) {
    return convert<double>(a) == convert<double>(b);
  }
};

// Rows R x C of register tiles: 25 of 32 registers on AVX-512, 9 of 16 elsewhere.
constexpr int tile_rows(Isa isa) { return isa == Isa::kAvx512 ? 5 : 3; }
inline constexpr int64_t kMostBlock = 2048;  // coordinates between two float64 additions

// out[r][c] += sum_k f(a[r][k], b[c][k]) over n coordinates; `diagonal`: only r <= c.
template <Isa isa, class F, class Acc, int R, int C, bool diagonal>
DASHPOT_INLINE void tile(const Acc* const* a, const Acc* const* b, int64_t n, double* out,
                         int64_t stride) {
  constexpr int kStep = kLanes<Acc, isa>;
  Vec<Acc, isa> sum[R][C] = {};
  int64_t k = 0;
  for (; k + kStep <= n; k += kStep) {
    Vec<Acc, isa> right[C];
    for (int c = 0; c < C; ++c) right[c] = load<Acc, isa>(b[c] + k);
    if constexpr (diagonal) {  // every row is in one diagonal tile
      for (int c = 0; c < C; ++c) __builtin_prefetch(b[c] + k + n, 0, 2);
    }
    for (int r = 0; r < R; ++r) {
      const Vec<Acc, isa> left = diagonal ? right[r] : load<Acc, isa>(a[r] + k);
      for (int c = diagonal ? r : 0; c < C; ++c) {
        const bool origin = F::kNorms && diagonal && r == c;
        sum[r][c] = F::add(sum[r][c], left, origin ? Vec<Acc, isa>{} : right[c]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = diagonal ? r : 0; c < C; ++c) {
      double total = sum_lanes<Acc, isa>(sum[r][c]);
      const bool origin = F::kNorms && diagonal && r == c;
      for (int64_t t = k; t < n; ++t) total += F::add(Acc(0), a[r][t], origin ? Acc(0) : b[c][t]);
      out[r * stride + c] += total;
    }
  }
}

template <Isa isa, class F, class Acc, int R, int C = 1>
DASHPOT_INLINE void tile_of_width(const Acc* const* a, const Acc* const* b, int64_t n, double* out,
                                  int64_t stride, int64_t width) {
  if constexpr (C < tile_rows(isa)) {
    if (width > C) return tile_of_width<isa, F, Acc, R, C + 1>(a, b, n, out, stride, width);
  }
  tile<isa, F, Acc, R, C, false>(a, b, n, out, stride);
}

template <Isa isa, class F, class Acc, int R = 1>
DASHPOT_INLINE void diagonal_tile(const Acc* const* a, int64_t n, double* out, int64_t stride,
                                  int64_t height) {
  if constexpr (R < tile_rows(isa)) {
    if (height > R) return diagonal_tile<isa, F, Acc, R + 1>(a, n, out, stride, height);
  }
  tile<isa, F, Acc, R, R, true>(a, a, n, out, stride);
}

// All pairs i <= j of p rows over one block of n coordinates: out (p, p) upper triangle, added to.
template <class F, class Acc>
struct PairsOfBlock {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Acc* const* rows, int64_t p, int64_t n, double* out) {
    constexpr int64_t kTile = tile_rows(isa);
    for (int64_t i = 0; i < p; i += kTile) {
      const int64_t height = p - i < kTile ? p - i : kTile;
      diagonal_tile<isa, F, Acc>(rows + i, n, out + i * p + i, p, height);
      for (int64_t j = i + height; j < p; j += kTile) {  // then height = kTile
        tile_of_width<isa, F, Acc, kTile>(rows + i, rows + j, n, out + i * p + j, p, p - j);
      }
    }
  }
};

// Upper triangle of the sums over all coordinates into out (q, q); live: the q rows to read.
template <class F, class Acc, class In>
void pairs(const Rows& rows, const std::vector<int64_t>& live, int threads, double* out) {
  const int64_t p = static_cast<int64_t>(live.size());
  const int64_t element = sizeof(Acc);
  // Up to 16 rows of a full block lie in the L2 cache beside the next; more rows, shorter blocks.
  const int64_t block = std::clamp<int64_t>(
      (int64_t{128} << 10) / (std::max<int64_t>(p, 1) * element) / 64 * 64, 256, kMostBlock);
  // Enough chunks for any machine's threads, few enough that their partials cost nothing.
  const int64_t chunk = std::max<int64_t>(4 * block, (rows.d / 512 + block - 1) / block * block);
  const std::vector<Chunk> chunks = rows.chunks(chunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<double> partials(count * p * p);  // (chunks, p, p)
  parallel_for(count, threads, [&](int64_t item) {
    std::vector<const In*> pointers(p);
    for (int64_t i = 0; i < p; ++i) pointers[i] = rows.row<In>(chunks[item], live[i]);
    std::vector<Acc> buffer(std::is_same_v<In, Acc> ? 0 : p * block);
    std::vector<const Acc*> view(p);
    for (int64_t begin = 0; begin < chunks[item].length; begin += block) {
      const int64_t n = std::min(block, chunks[item].length - begin);
      for (int64_t i = 0; i < p; ++i) {
        if constexpr (std::is_same_v<In, Acc>) {
          view[i] = pointers[i] + begin;
        } else {
          run_on_isa<ConvertBlock<Acc, In>>(buffer.data() + i * block, pointers[i] + begin, n);
          view[i] = buffer.data() + i * block;
        }
      }
      run_on_isa<PairsOfBlock<F, Acc>>(view.data(), p, n, partials.data() + item * p * p);
    }
  });
  std::fill(out, out + p * p, 0.0);
  for (int64_t item = 0; item < count; ++item) {
    const double* partial = partials.data() + item * p * p;
    for (int64_t at = 0; at < p * p; ++at) out[at] += partial[at];
  }
}

// Whether every term of the pair (i, j) is exactly 0; reads until the first that is not.
template <class F, class In>
bool all_zero(const Rows& rows, int64_t i, int64_t j) {
  const bool origin = F::kNorms && i == j;
  for (const Chunk& whole : rows.chunks(std::max<int64_t>(rows.d, 1))) {
    const In* a = rows.row<In>(whole, i);
    const In* b = rows.row<In>(whole, j);
    for (int64_t k = 0; k < whole.length; ++k) {
      if (!F::is_zero(a[k], origin ? In{} : b[k])) return false;
    }
  }
  return true;
}

// Whether float32 squares left their range somewhere: a sum that is not finite, or so small that
// its terms may have lost digits to underflow (and is not exactly 0).
template <class F, class In>
bool out_of_range(const Rows& rows, const std::vector<int64_t>& live, const double* out) {
  const int64_t p = static_cast<int64_t>(live.size());
  const double smallest = 1e-30 * static_cast<double>(rows.d);
  for (int64_t i = 0; i < p; ++i) {
    for (int64_t j = F::kDiagonal ? i : i + 1; j < (F::kOffDiagonal ? p : i + 1); ++j) {
      const double sum = out[i * p + j];
      if (!std::isfinite(sum)) return true;
      if (sum < smallest && !all_zero<F, In>(rows, live[i], live[j])) return true;
    }
  }
  return false;
}

// grads -> (p, p) float64, symmetric; rows with mask 0 are not read and give 0. `wide`: sums in
// float64 throughout; otherwise in float32 within a block, and again in float64 if that overflowed.
template <class F>
Tensor pairs_forward(const std::vector<Tensor>& grads, const std::optional<Tensor>& mask, int64_t p,
                     bool wide) {
  const Rows rows(grads, p);
  std::vector<int64_t> live;
  for (int64_t i = 0; i < p; ++i) {
    if (!mask || mask->as<bool>()[i]) live.push_back(i);
  }
  const Tensor out = grads[0].new_empty({p, p}, Dtype::kFloat64);  // (p, p)
  const int threads = num_threads();
  const pybind11::gil_scoped_release release;
  const int64_t q = static_cast<int64_t>(live.size());
  std::vector<double> triangle(q * q);  // (q, q)
  dispatch_floating(rows.dtype, [&](auto element) {
    using In = decltype(element);
    if constexpr (!std::is_same_v<In, double>) {
      if (!wide) {
        pairs<F, float, In>(rows, live, threads, triangle.data());
        if (!out_of_range<F, In>(rows, live, triangle.data())) return;
      }
    }
    pairs<F, double, In>(rows, live, threads, triangle.data());
  });
  double* k = out.as<double>();
  std::fill(k, k + p * p, 0.0);
  for (int64_t a = 0; a < q; ++a) {
    for (int64_t b = a; b < q; ++b) {
      k[live[a] * p + live[b]] = k[live[b] * p + live[a]] = triangle[a * q + b];
    }
  }
  return out;
}

}  // namespace dashpot::aggregate
