// Rows moved through a plan on the CPU: gathers and weighted sums of gathered rows.
//
// Work is cut by rows, a block of about kBlockBytes at a time; a row is written once. Results of
// kStreamBytes and more are written past the caches, which spares the memory the read of each line
// before it is overwritten (a third of a gather's traffic), with the rows to come fetched ahead: a
// row of a few kB ends before the processor has learnt its direction. Four rows are written side by
// side, a line of each in turn: the memory serves several of its pages at once. On an EPYC, rows of
// 4 kB, 16 MiB in and out: 1.39 ms, where one row after the other takes 1.97, plain copies of the
// rows 2.30 and one straight copy 1.67. Smaller results are what the next product finds in the
// cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"
#include "experts/lanes.h"

namespace dashpot::experts {

inline constexpr int64_t kBlockBytes = 1 << 18;

template <class Body>
void for_row_blocks(int64_t rows, int64_t row_bytes, int threads, const Body& body) {
  const int64_t length = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, row_bytes));
  parallel_for((rows + length - 1) / length, threads,
               [&](int64_t block) { body(block * length, std::min(rows, (block + 1) * length)); });
}

inline constexpr int64_t kStreamBytes = 8 << 20, kLine = 64;
inline constexpr int kAbreast = 4;  // rows

// Whether rows of `bytes` of a result that starts at `to` are written past the caches.
inline bool streams(const void* to, int64_t rows, int64_t bytes) {
#if defined(__x86_64__)
  return rows * bytes >= kStreamBytes && bytes % kLine == 0 &&
         reinterpret_cast<uintptr_t>(to) % kLine == 0;
#else
  return false;
#endif
}

// The row that slot r gathers; null where order is -1.
DASHPOT_INLINE const char* gathered(const char* from, const int32_t* order, int64_t k, int64_t r,
                                    int64_t bytes) {
  const int64_t i = order[r];
  return i < 0 ? nullptr : from + (k == 1 ? i : i / k) * bytes;
}

#if defined(__x86_64__)
// A vector of 8 to 64 bytes, past the caches. Who calls it ends with an sfence.
template <class V>
DASHPOT_INLINE void stream_store(void* to, V value) {
  if constexpr (sizeof(V) == 64) {
    __builtin_ia32_movntpd512(static_cast<double*>(to),
                              reinterpret_cast<Vec<double, Isa::kAvx512>>(value));
  } else if constexpr (sizeof(V) == 32) {
    __builtin_ia32_movntpd256(static_cast<double*>(to),
                              reinterpret_cast<Vec<double, Isa::kAvx2>>(value));
  } else if constexpr (sizeof(V) == 16) {
    __builtin_ia32_movntpd(static_cast<double*>(to),
                           reinterpret_cast<Vec<double, Isa::kBaseline>>(value));
  } else {
    static_assert(sizeof(V) == 8);
    __builtin_ia32_movnti64(static_cast<long long*>(to), reinterpret_cast<long long>(value));
  }
}

// gather_rows, past the caches.
struct StreamRows {
  // Where a row's lines lie: those of zeros are all the same.
  struct Source {
    const char* at;
    int64_t mask;
    DASHPOT_INLINE const char* line(int64_t c) const { return at + (c & mask); }
  };

  static DASHPOT_INLINE Source source(const char* row) {
    alignas(kLine) static constexpr char kZeros[kLine] = {};
    return row ? Source{row, -1} : Source{kZeros, 0};
  }

  // Slots [r, r + kRows), and those to fetch meanwhile.
  template <Isa isa, int kRows>
  static DASHPOT_INLINE void rows(const char* from, const int32_t* order, int64_t k, int64_t r,
                                  int64_t end, int64_t bytes, char* to) {
    using Doubles = Vec<double, isa>;
    Source row[kRows], next[kRows];
    for (int i = 0; i < kRows; ++i) {
      const int64_t ahead = r + kRows + i;
      row[i] = source(gathered(from, order, k, r + i, bytes));
      next[i] = source(ahead < end ? gathered(from, order, k, ahead, bytes) : nullptr);
    }
    for (int64_t c = 0; c < bytes; c += kLine) {
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(next[i].line(c));
      for (int i = 0; i < kRows; ++i) {
        for (int64_t part = 0; part < kLine; part += int64_t{sizeof(Doubles)}) {
          Doubles value;
          __builtin_memcpy(&value, row[i].line(c) + part, sizeof value);
          stream_store(to + i * bytes + c + part, value);
        }
      }
    }
  }

  template <Isa isa>
  static DASHPOT_INLINE void run(const char* from, const int32_t* order, int64_t k, int64_t begin,
                                 int64_t end, int64_t bytes, char* to) {
    int64_t r = begin;
    for (; r + kAbreast <= end; r += kAbreast, to += kAbreast * bytes) {
      rows<isa, kAbreast>(from, order, k, r, end, bytes, to);
    }
    for (; r < end; ++r, to += bytes) rows<isa, 1>(from, order, k, r, end, bytes, to);
    __builtin_ia32_sfence();  // before other threads read
  }
};
#endif

// to[r - begin] = from[order[r] / k], zeros where order is -1; rows of `bytes`.
inline void gather_rows(const char* from, const int32_t* order, int64_t k, int64_t begin,
                        int64_t end, int64_t bytes, bool stream, char* to) {
#if defined(__x86_64__)
  if (stream) return run_on_isa<StreamRows>(from, order, k, begin, end, bytes, to);
#endif
  for (int64_t r = begin; r < end; ++r, to += bytes) {
    const char* row = gathered(from, order, k, r, bytes);
    if (row == nullptr) {
      std::memset(to, 0, bytes);
    } else {
      std::memcpy(to, row, bytes);
    }
  }
}

// The choices of a token that were not dropped: where their rows begin, and their weights.
template <class T>
struct Terms {
  std::vector<const T*> row;
  std::vector<Wide<T>> weight;
  int64_t count = 0;

  explicit Terms(int64_t k) : row(k), weight(k) {}

  // weights null: 1.
  template <class Weight>
  DASHPOT_INLINE void take(const T* h, const int32_t* rank, const Weight* weights, int64_t k,
                           int64_t d) {
    count = 0;
    for (int64_t j = 0; j < k; ++j) {
      if (rank[j] < 0) continue;
      row[count] = h + int64_t{rank[j]} * d;
      weight[count++] = weights ? convert<Wide<T>>(weights[j]) : Wide<T>(1);
    }
  }
};

// As many as the compiler is told, so that they stay in registers.
template <class T, int kCount>
struct FewTerms {
  const T* row[kCount];
  Wide<T> weight[kCount];
  static constexpr int64_t count = kCount;

  DASHPOT_INLINE explicit FewTerms(const Terms<T>& terms) {
    for (int j = 0; j < kCount; ++j) {
      row[j] = terms.row[j];
      weight[j] = terms.weight[j];
    }
  }
};

// y (d,) = sum_j w_j h[rank_j], j in order, dropped choices left out.
template <class T>
struct SumRows {
  using W = Wide<T>;

  template <Isa isa, class Any>
  static DASHPOT_INLINE void row(const Any& terms, int64_t d, T* y) {
    constexpr int64_t kStep = kLanes<W, isa>;
    for (int64_t c = 0; c < d; c += kStep) {
      Vec<W, isa> total{};
      for (int64_t j = 0; j < terms.count; ++j) {
        total += load_part<isa>(terms.row[j] + c, d - c, W(0)) * terms.weight[j];
      }
      store_part<isa>(y + c, total, d - c);
    }
  }

#if defined(__x86_64__)
  // Past the caches; d is a multiple of a line's elements. What comes next is fetched ahead only
  // where conversions keep the loads of the next row waiting; float32 rows are slower with it.
  template <Isa isa, class Any>
  static DASHPOT_INLINE void stream(const Any& terms, const Terms<T>& next, int64_t d, T* y) {
    constexpr int64_t kElements = kLine / sizeof(T);
    constexpr int64_t kStep = kLanes<W, isa> * (std::is_same_v<T, BFloat16> ? 2 : 1);
    for (int64_t c = 0; c < d; c += kElements) {
      for (int64_t j = 0; kIsSixteen<T> && j < next.count; ++j) {
        __builtin_prefetch(next.row[j] + c);
      }
      for (int64_t i = c; i < c + kElements; i += kStep) {
        if constexpr (std::is_same_v<T, BFloat16>) {
          stream_store(y + i, pairs<isa>(terms, i));
        } else {
          Vec<W, isa> total{};
          for (int64_t j = 0; j < terms.count; ++j) {
            total += load_as<W, isa>(terms.row[j] + i) * terms.weight[j];
          }
          T stored[kStep];
          store_part<isa>(stored, total, kStep);
          typedef char Part __attribute__((vector_size(sizeof stored)));
          Part part;
          __builtin_memcpy(&part, stored, sizeof part);
          stream_store(y + i, part);
        }
      }
    }
  }

  // Sums of bfloat16, two in a word as they lie: what row() gives, with half of the conversions,
  // which take as long as the memory does.
  template <Isa isa, class Any>
  static DASHPOT_INLINE Vec<uint32_t, isa> pairs(const Any& terms, int64_t c) {
    using Words = Vec<uint32_t, isa>;
    using Floats = Vec<float, isa>;
    Floats low{}, high{};
    for (int64_t j = 0; j < terms.count; ++j) {
      Words two;
      __builtin_memcpy(&two, terms.row[j] + c, sizeof two);
      low += reinterpret_cast<Floats>(two << 16) * terms.weight[j];
      high += reinterpret_cast<Floats>(two & 0xffff0000u) * terms.weight[j];
    }
    return (upper<isa>(low) >> 16) | (upper<isa>(high) & 0xffff0000u);
  }

  // Rounded to bfloat16 in the upper half of each word.
  template <Isa isa>
  static DASHPOT_INLINE Vec<uint32_t, isa> upper(Vec<float, isa> value) {
    using Words = Vec<uint32_t, isa>;
    const Words bits = reinterpret_cast<Words>(value);
    const Words near = bits + 0x7fffu + ((bits >> 16) & 1u);
    return value == value ? near : bits | 0x00400000u;
  }
#endif

  template <Isa isa, class Any>
  static DASHPOT_INLINE void write(const Any& terms, const Terms<T>& next, int64_t d, bool streams,
                                   T* y) {
#if defined(__x86_64__)
    if (streams) return stream<isa>(terms, next, d, y);
#endif
    row<isa>(terms, d, y);
  }

  template <Isa isa, class Weight>
  static DASHPOT_INLINE void run(const T* h, const int32_t* rank, const Weight* weights, int64_t k,
                                 int64_t d, int64_t begin, int64_t end, bool streams, T* y) {
    Terms<T> terms(k), next(k);
    for (int64_t t = begin; t <= end; ++t) {  // a token is taken one step before it is written
      std::swap(terms, next);
      next.count = 0;
      if (t < end) next.take(h, rank + t * k, weights ? weights + t * k : nullptr, k, d);
      if (t == begin) continue;
      T* const to = y + (t - 1) * d;
      if (terms.count == 1) {
        write<isa>(FewTerms<T, 1>(terms), next, d, streams, to);
      } else if (terms.count == 2) {
        write<isa>(FewTerms<T, 2>(terms), next, d, streams, to);
      } else {
        write<isa>(terms, next, d, streams, to);
      }
    }
#if defined(__x86_64__)
    if (streams) __builtin_ia32_sfence();
#endif
  }
};

// y (T, d) of all tokens.
template <class T, class Weight>
void sum_rows(const T* h, const int32_t* rank, const Weight* weights, int64_t tokens, int64_t k,
              int64_t d, int threads, T* y) {
  const int64_t bytes = d * sizeof(T);
  const bool stream = streams(y, tokens, bytes);
  for_row_blocks(tokens, bytes * k, threads, [&](int64_t begin, int64_t end) {
    if (k == 1 && weights == nullptr) {
      gather_rows(reinterpret_cast<const char*>(h), rank, 1, begin, end, bytes, stream,
                  reinterpret_cast<char*>(y + begin * d));
    } else {
      run_on_isa<SumRows<T>>(h, rank, weights, k, d, begin, end, stream, y);
    }
  });
}

}  // namespace dashpot::experts
