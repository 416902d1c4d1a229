// What a sweep does with a tile of cosines s (rows, columns): sums of exponentials, and weights.
//
//   e_ij = keep_ij exp(c s_ij - shift)
//   forward   row_sum_i += sum_j e_ij,  column_sum_j += sum_i e_ij
//   backward  s_ij <- keep_ij exp(c s_ij) (g_i exp(-lse_i) + h_j exp(-lse_j))
//
// keep_ij = 0 where the codes of row and column are equal (same subject, or the row itself), and in
// the padding, whose code is kNoColumn.
//
// |c s| <= bound is known (the rows' norms are), so one constant shift = bound serves all rows: no
// running maximum, one exponential for row and column. It holds while exp(-2 bound) is a normal
// number: for unit rows and float32, down to a temperature of 0.025. Beyond, and where a row is
// not finite, the wide form keeps a running maximum per row and per column.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/math.h"
#include "common/simd.h"

namespace dashpot::contrastive {

template <class Work>
using Code = typename FloatLayout<Work>::Int;

inline constexpr int kNoColumn = -1;  // code of padding
inline constexpr int kNoRow = -2;     // code of a row that drops nothing
inline constexpr int64_t kMaxPanel = 128;

inline constexpr double kLog2E = 0x1.71547652b82fep0;

template <class Work>
constexpr double widest_bound() {
  return sizeof(Work) == 4 ? 40 : 340;
}

// A tile and what is known of its rows and columns.
template <class Work>
struct Tile {
  Work* s;  // (rows, stride)
  int64_t stride, rows, columns;
  const Code<Work>* row_codes;     // (rows,), or none: nothing is dropped
  const Code<Work>* column_codes;  // (padded columns,)
};

// 1 where a comparison holds, else 0. Conditions on a vector are combined by adding these up: GCC
// 12 takes `&` and `|` of comparisons, and one selection inside another, apart number by number
// where the vectors have 512 bits.
template <class Int, class Condition>
DASHPOT_INLINE Int ones(Condition condition) {
  return condition ? Int{} + 1 : Int{};
}

// value where the pair is kept, else `otherwise`.
template <class Work, Isa isa, bool all>
DASHPOT_INLINE Vec<Work, isa> kept(Vec<Work, isa> value, const Code<Work>* codes, Code<Work> row,
                                   Vec<Work, isa> otherwise = Vec<Work, isa>{}) {
  if constexpr (all) {
    return value;
  } else {
    const IntVec<Work, isa> code = load<Code<Work>, isa>(codes);
    const IntVec<Work, isa> drop = ones<IntVec<Work, isa>>(code == row) +
                                   ones<IntVec<Work, isa>>(code == Code<Work>(kNoColumn));
    return drop == 0 ? value : otherwise;
  }
}

template <class Work>
Code<Work> code_of(const Tile<Work>& tile, int64_t i) {
  return tile.row_codes ? tile.row_codes[i] : Code<Work>(kNoRow);
}

// all: every entry of the tile is kept. columns: column sums too.
template <class Work, bool all, bool columns>
struct AddExponentials {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Tile<Work>* at, Work factor, Work shift, double* row_sum,
                                 double* column_sum) {
    constexpr int kStep = kLanes<Work, isa>;
    const Tile<Work> tile = *at;
    alignas(64) Work sums[kMaxPanel] = {};
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Work* s = tile.s + i * tile.stride;
      const Code<Work> row = all ? Code<Work>(0) : code_of(tile, i);
      Vec<Work, isa> sum{};
      for (int64_t j = 0; j < tile.columns; j += kStep) {
        const Vec<Work, isa> e =
            kept<Work, isa, all>(exp2_bounded<Work, isa>(load<Work, isa>(s + j) * factor - shift),
                                 tile.column_codes + j, row);
        sum += e;
        if constexpr (columns) store<Work, isa>(sums + j, load<Work, isa>(sums + j) + e);
      }
      row_sum[i] += sum_lanes<Work, isa>(sum);
    }
    if constexpr (columns) {
      for (int64_t j = 0; j < tile.columns; ++j) column_sum[j] += static_cast<double>(sums[j]);
    }
  }
};

// s <- keep exp2(s factor - shift) (row_weight_i + column_weight_j)
template <class Work, bool all, bool columns>
struct Weigh {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Tile<Work>* at, Work factor, Work shift,
                                 const Work* row_weight, const Work* column_weight) {
    constexpr int kStep = kLanes<Work, isa>;
    const Tile<Work> tile = *at;
    for (int64_t i = 0; i < tile.rows; ++i) {
      Work* s = tile.s + i * tile.stride;
      const Code<Work> row = all ? Code<Work>(0) : code_of(tile, i);
      const Vec<Work, isa> own = Vec<Work, isa>{} + row_weight[i];
      for (int64_t j = 0; j < tile.columns; j += kStep) {
        const Vec<Work, isa> e = exp2_bounded<Work, isa>(load<Work, isa>(s + j) * factor - shift);
        const Vec<Work, isa> weight = columns ? own + load<Work, isa>(column_weight + j) : own;
        store<Work, isa>(s + j, kept<Work, isa, all>(e * weight, tile.column_codes + j, row));
      }
    }
  }
};

// The wide forms: shift and sum of a row or column are updated together.
template <class Work>
void raise(Work maximum, Work* shift, double* sum) {
  if (!(maximum > *shift)) return;
  *sum *= std::exp(static_cast<double>(*shift) - maximum);
  *shift = maximum;
}

template <class Work>
struct AddExponentialsWide {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Tile<Work>* at, Work c, Work* row_shift, double* row_sum,
                                 Work* column_shift, double* column_sum) {
    constexpr int kStep = kLanes<Work, isa>;
    constexpr Work kLeast = -std::numeric_limits<Work>::infinity();
    const Tile<Work> tile = *at;
    alignas(64) Work most[kMaxPanel], shifts[kMaxPanel] = {}, sums[kMaxPanel] = {};
    for (int64_t j = 0; j < kMaxPanel; ++j) most[j] = kLeast;
    const Vec<Work, isa> least = Vec<Work, isa>{} + kLeast;
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Work* s = tile.s + i * tile.stride;
      Vec<Work, isa> highest = least;
      for (int64_t j = 0; j < tile.columns; j += kStep) {
        const Vec<Work, isa> x = kept<Work, isa, false>(
            load<Work, isa>(s + j) * c, tile.column_codes + j, code_of(tile, i), least);
        highest = x > highest ? x : highest;
        const Vec<Work, isa> old = load<Work, isa>(most + j);
        store<Work, isa>(most + j, x > old ? x : old);
      }
      for (int lane = 0; lane < kStep; ++lane) {
        raise<Work>(highest[lane], row_shift + i, row_sum + i);
      }
    }
    if (column_sum) {
      for (int64_t j = 0; j < tile.columns; ++j) {
        raise<Work>(most[j], column_shift + j, column_sum + j);
        shifts[j] = column_shift[j];
      }
    }
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Work* s = tile.s + i * tile.stride;
      Vec<Work, isa> sum{};
      for (int64_t j = 0; j < tile.columns; j += kStep) {
        const Vec<Work, isa> x = load<Work, isa>(s + j) * c;
        const Code<Work>* codes = tile.column_codes + j;
        const Code<Work> row = code_of(tile, i);
        sum += kept<Work, isa, false>(exp<Work, isa>(x - row_shift[i]), codes, row);
        if (column_sum) {
          const Vec<Work, isa> e = exp<Work, isa>(x - load<Work, isa>(shifts + j));
          store<Work, isa>(sums + j,
                           load<Work, isa>(sums + j) + kept<Work, isa, false>(e, codes, row));
        }
      }
      row_sum[i] += sum_lanes<Work, isa>(sum);
    }
    if (column_sum) {
      for (int64_t j = 0; j < tile.columns; ++j) column_sum[j] += static_cast<double>(sums[j]);
    }
  }
};

// s <- keep (row_weight_i exp(c s - row_lse_i) + column_weight_j exp(c s - column_lse_j))
template <class Work>
struct WeighWide {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Tile<Work>* at, Work c, const Work* row_weight,
                                 const Work* row_lse, const Work* column_weight,
                                 const Work* column_lse) {
    constexpr int kStep = kLanes<Work, isa>;
    const Tile<Work> tile = *at;
    for (int64_t i = 0; i < tile.rows; ++i) {
      Work* s = tile.s + i * tile.stride;
      for (int64_t j = 0; j < tile.columns; j += kStep) {
        const Vec<Work, isa> x = load<Work, isa>(s + j) * c;
        Vec<Work, isa> weight = row_weight[i] * exp<Work, isa>(x - row_lse[i]);
        if (column_weight) {
          weight += load<Work, isa>(column_weight + j) *
                    exp<Work, isa>(x - load<Work, isa>(column_lse + j));
        }
        store<Work, isa>(s + j,
                         kept<Work, isa, false>(weight, tile.column_codes + j, code_of(tile, i)));
      }
    }
  }
};

}  // namespace dashpot::contrastive
