// Sums over coordinates of a function of two rows, for every pair of rows (CPU).
//
//   out[i][j] = sum_k f(x_ik, x_jk)      x (p, d) -> out (p, p) float64
//   f = product: Gram matrix; f = squared difference: pairwise distances, which may carry the rows'
//   squared norms (distances from the origin) on their diagonal.
//
// Blocks of coordinates small enough that p rows stay in the L2 cache are taken through register
// tiles of kTile x kTile pairs: 2 kTile loads serve kTile^2 multiply-adds. Sums run in Acc within a
// block and in float64 from block to block, lane by lane: adding up the lanes of every pair in
// every block took a fifth of the time at p = 60. 16-bit rows, and any rows for Acc = double, are
// converted once per block into a buffer.
//
// While a block is worked on, the next one is fetched, evenly: at p = 15 arithmetic (105
// subtractions and multiply-adds a coordinate) and memory take about as long as each other, would
// else take turns, and fetches in a burst fill the core's miss buffers and stop its loads.
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
inline constexpr int64_t kTerms =
    256;                              // that a lane adds up between two float64 additions, at most
inline constexpr int64_t kWidth = 8;  // float64 lanes kept per pair, at most

constexpr int64_t pair_count(int64_t p) { return p * (p + 1) / 2; }
// Place of the pair (i, j), i <= j, in the upper triangle of (p, p).
constexpr int64_t pair_index(int64_t p, int64_t i, int64_t j) {
  return i * p - i * (i - 1) / 2 + j - i;
}

// One block of n coordinates of p rows, where the rows' next block lies, and the sums.
template <class Acc>
struct Block {
  const Acc* const* rows;   // (p,) of (n,)
  const char* const* next;  // (p,) the first byte of the next block, as stored
  int64_t p, n, element;    // element: bytes of a stored coordinate
  double* lanes;            // (p (p + 1) / 2, kWidth) added to, lane by lane
};

// lanes[0..kLanes<double>) += sum
template <class Acc, Isa isa>
DASHPOT_INLINE void add_lanes(double* lanes, Vec<Acc, isa> sum) {
  constexpr int kDoubles = kLanes<double, isa>;
  Vec<double, isa> total = load<double, isa>(lanes);
  if constexpr (std::is_same_v<Acc, double>) {
    total += sum;
  } else {
    typedef float Half __attribute__((vector_size(vector_bytes(isa) / 2)));
    Half halves[2];
    __builtin_memcpy(halves, &sum, sizeof sum);
    for (const Half& half : halves) total += __builtin_convertvector(half, Vec<double, isa>);
  }
  static_assert(kDoubles <= kWidth);
  store<double, isa>(lanes, total);
}

// The pairs (i + r, j + c); `diagonal`: i = j, only r <= c. Meanwhile the lines of rows
// [first, last) of the next block are fetched.
template <Isa isa, class F, class Acc, int R, int C, bool diagonal>
DASHPOT_INLINE void tile(const Block<Acc>& block, int64_t i, int64_t j, int64_t first,
                         int64_t last) {
  constexpr int kStep = kLanes<Acc, isa>;
  const Acc *a[R], *b[C];
  for (int r = 0; r < R; ++r) a[r] = block.rows[i + r];
  for (int c = 0; c < C; ++c) b[c] = block.rows[j + c];
  const int64_t n = block.n;
  Vec<Acc, isa> sum[R][C] = {};
  int64_t k = 0;
  for (; k + kStep <= n; k += kStep) {
    for (int64_t row = first; row < last; ++row) {
      __builtin_prefetch(block.next[row] + k * block.element, 0, 2);
    }
    Vec<Acc, isa> right[C];
    for (int c = 0; c < C; ++c) right[c] = load<Acc, isa>(b[c] + k);
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
      double* lanes = block.lanes + pair_index(block.p, i + r, j + c) * kWidth;
      add_lanes<Acc, isa>(lanes, sum[r][c]);
      const bool origin = F::kNorms && diagonal && r == c;
      for (int64_t t = k; t < n; ++t)
        lanes[0] += F::add(Acc(0), a[r][t], origin ? Acc(0) : b[c][t]);
    }
  }
}

template <Isa isa, class F, class Acc, int R, int C = 1>
DASHPOT_INLINE void tile_of_width(const Block<Acc>& block, int64_t i, int64_t j, int64_t width,
                                  int64_t first, int64_t last) {
  if constexpr (C < tile_rows(isa)) {
    if (width > C) return tile_of_width<isa, F, Acc, R, C + 1>(block, i, j, width, first, last);
  }
  tile<isa, F, Acc, R, C, false>(block, i, j, first, last);
}

template <Isa isa, class F, class Acc, int R = 1>
DASHPOT_INLINE void diagonal_tile(const Block<Acc>& block, int64_t i, int64_t height, int64_t first,
                                  int64_t last) {
  if constexpr (R < tile_rows(isa)) {
    if (height > R) return diagonal_tile<isa, F, Acc, R + 1>(block, i, height, first, last);
  }
  tile<isa, F, Acc, R, R, true>(block, i, i, first, last);
}

// All pairs i <= j of one block. Each tile fetches its share of the next block, by its pairs: the
// memory is asked as evenly as it answers.
template <class F, class Acc>
struct PairsOfBlock {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Block<Acc>* given) {
    const Block<Acc>& block = *given;
    constexpr int64_t kTile = tile_rows(isa);
    const int64_t p = block.p;
    int64_t done = 0, fetched = 0;
    for (int64_t i = 0; i < p; i += kTile) {
      const int64_t height = p - i < kTile ? p - i : kTile;
      done += pair_count(height);
      int64_t until = done * p / pair_count(p);
      diagonal_tile<isa, F, Acc>(block, i, height, fetched, until);
      fetched = until;
      for (int64_t j = i + height; j < p; j += kTile) {  // then height = kTile
        const int64_t width = p - j < kTile ? p - j : kTile;
        done += height * width;
        until = done * p / pair_count(p);
        tile_of_width<isa, F, Acc, kTile>(block, i, j, width, fetched, until);
        fetched = until;
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
  const int64_t most = kTerms * vector_bytes(isa()) / element;
  const int64_t block = std::clamp<int64_t>(
      (int64_t{256} << 10) / (std::max<int64_t>(p, 1) * element) / 64 * 64, 256, most);
  // Enough chunks for any machine's threads; few, as each begins with a block that was not fetched
  // (on several threads) and ends with sums of lanes.
  const int64_t chunk = std::max<int64_t>(4 * block, (rows.d / 128 + block - 1) / block * block);
  const std::vector<Chunk> chunks = rows.chunks(chunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<double> partials(count * p * p);  // (chunks, p, p)
  parallel_for(count, threads, [&](int64_t item) {
    std::vector<Acc> buffer(std::is_same_v<In, Acc> ? 0 : p * block);
    std::vector<const Acc*> view(p);
    std::vector<const char*> next(p);
    std::vector<double> lanes(pair_count(p) * kWidth);
    for (int64_t begin = 0; begin < chunks[item].length; begin += block) {
      const int64_t n = std::min(block, chunks[item].length - begin);
      for (int64_t i = 0; i < p; ++i) {
        const In* row = rows.row<In>(chunks[item], live[i]) + begin;
        next[i] = reinterpret_cast<const char*>(row + n);
        if constexpr (std::is_same_v<In, Acc>) {
          view[i] = row;
        } else {
          run_on_isa<ConvertBlock<Acc, In>>(buffer.data() + i * block, row, n);
          view[i] = buffer.data() + i * block;
        }
      }
      const Block<Acc> one{view.data(), next.data(), p, n, sizeof(In), lanes.data()};
      run_on_isa<PairsOfBlock<F, Acc>>(&one);
    }
    double* partial = partials.data() + item * p * p;
    for (int64_t i = 0; i < p; ++i) {
      for (int64_t j = i; j < p; ++j) {
        double* sum = lanes.data() + pair_index(p, i, j) * kWidth;
        for (int64_t half = kWidth / 2; half > 0; half /= 2) {
          for (int64_t k = 0; k < half; ++k) sum[k] += sum[k + half];
        }
        partial[i * p + j] = sum[0];
      }
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
