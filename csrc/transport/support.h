// The support W (m, n) of an l2 plan, listed; its products, and its systems of equations.
//
// Entries are listed along the cost's memory: per line (a row; a column where columns lie one after
// another or are made from points) the places in it. One read of the cost, then O(entries) per
// product.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "transport/bipartite.h"
#include "transport/columns.h"

namespace dashpot::transport {

// Numbers that are appended without a look at the room, which is made before.
class Places {
 public:
  const int32_t* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  void clear() { size_ = 0; }
  int32_t* end() { return data_.get() + size_; }
  void end(const int32_t* end) { size_ = end - data_.get(); }
  // Room for `more` beyond the end.
  void reserve(int64_t more) {
    if (size_ + more <= room_) return;
    room_ = std::max(size_ + more, 2 * room_);
    std::unique_ptr<int32_t[]> larger(new int32_t[room_]);
    std::copy_n(data_.get(), size_, larger.get());
    data_ = std::move(larger);
  }

 private:
  std::unique_ptr<int32_t[]> data_;
  int64_t size_ = 0, room_ = 0;
};

// Bit 8 a + b of the result: bit 8 b + a of the word.
inline uint64_t transposed(uint64_t word) {
  const auto exchange = [&](uint64_t mask, int shift) {
    const uint64_t moved = (word ^ word >> shift) & mask;
    word ^= moved ^ moved << shift;
  };
  exchange(0x00aa00aa00aa00aau, 7);
  exchange(0x0000cccc0000ccccu, 14);
  exchange(0x00000000f0f0f0f0u, 28);
  return word;
}

// Of each line l in [first, last) the places c where own_l + other_c - C_lc > 0, ascending, to
// `to`, and where they end; there is room for kAtOnce places more than there are.
template <class T, class C>
struct ListLines {
  static constexpr int kWord = 64, kAtOnce = 4;
  template <Isa isa>
  static DASHPOT_INLINE void run(const Cost<C>* cost, const T* own, const T* other, int64_t first,
                                 int64_t last, int64_t length, int32_t* to, int32_t** ends) {
    for (int64_t l = first; l < last; ++l) {
      const auto* const line = cost->line(l, length);
      int64_t begin = 0;
      for (; begin + kWord <= length; begin += kWord) {
        const auto score = [&](int c) __attribute__((always_inline)) {
          return own[l] + load<T, isa>(other + begin + c) - load_as<T, isa>(line + begin + c);
        };
        to = write(to, begin, positive<isa>(score));
      }
      if (begin < length) {
        T rest[kWord];
        std::fill_n(rest, kWord, -std::numeric_limits<T>::infinity());
        for (int64_t c = begin; c < length; ++c) {
          rest[c - begin] = own[l] + other[c] - convert<T>(line[c]);
        }
        const auto score = [&](int c)
                               __attribute__((always_inline)) { return load<T, isa>(rest + c); };
        to = write(to, begin, positive<isa>(score));
      }
      *ends++ = to;
    }
  }

  // A bit for each of kWord scores, score(c) a vector from place c on. GCC has no good way from a
  // mask to bits: a lane gathers those of all vectors, which stand across the word's bytes.
  template <Isa isa, class Score>
  static DASHPOT_INLINE uint64_t positive(const Score& score) {
    constexpr int kWidth = kLanes<T, isa>;
    constexpr int kParts = kWidth < 8 ? 8 / kWidth : 1, kGroups = kWidth > 8 ? kWidth / 8 : 1;
    using Ints = Vec<IntOf<T>, isa>;
    typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
    Ints bits[kParts] = {};
    for (int v = 0; v < kWord / kWidth; ++v) {
      const Ints bit = Ints{} + (1 << (v / kParts * kGroups));
      bits[v % kParts] |= score(v * kWidth) > Vec<T, isa>{} ? bit : Ints{};
    }
    uint8_t bytes[8 * kGroups];  // a lane each
    for (int p = 0; p < kParts; ++p) {
      const Bytes part = __builtin_convertvector(bits[p], Bytes);
      std::memcpy(bytes + p * kWidth, &part, sizeof part);
    }
    uint64_t word = 0;
    for (int g = 0; g < kGroups; ++g) {
      uint64_t lanes;
      std::memcpy(&lanes, bytes + 8 * g, 8);
      word |= lanes << g;
    }
    return transposed(word);
  }

  // A few places are written whether they are there or not: no branch to foretell.
  static DASHPOT_INLINE int32_t* write(int32_t* to, int64_t begin, uint64_t word) {
    const int count = __builtin_popcountll(word);
    for (int q = 0; q < kAtOnce; ++q, word &= word - 1) {
      to[q] = static_cast<int32_t>(begin) + __builtin_ctzll(word | uint64_t{1} << 63);
    }
    for (int q = kAtOnce; q < count; ++q, word &= word - 1) {
      to[q] = static_cast<int32_t>(begin) + __builtin_ctzll(word);
    }
    return to + count;
  }
};

template <class T, class C>
class Support {
 public:
  // Of [alpha + beta - C]+, alpha (m,), beta (n,).
  void list(const Options& options, const Cost<C>& cost, const T* alpha, const T* beta,
            int threads) {
    by_rows_ = cost.lines_are_rows();
    m_ = options.m, n_ = options.n;
    const int64_t lines = by_rows_ ? m_ : n_, length = by_rows_ ? n_ : m_;
    const T* const own = by_rows_ ? alpha : beta;
    const T* const other = by_rows_ ? beta : alpha;
    chunks_.resize((lines + kChunk - 1) / kChunk);
    parallel_for(static_cast<int64_t>(chunks_.size()), threads, [&](int64_t item) {
      Chunk& chunk = chunks_[item];
      chunk.places.clear();
      chunk.ends.clear();
      const int64_t last = std::min(lines, (item + 1) * kChunk);
      const int64_t step =
          std::max<int64_t>(1, kRoom / length);  // few: room is made for all of them
      for (int64_t l = item * kChunk; l < last; l += step) {
        const int64_t to = std::min(last, l + step);
        chunk.places.reserve((to - l) * length + ListLines<T, C>::kAtOnce);
        int32_t* ends[kChunk];
        run_on_isa<ListLines<T, C>>(&cost, own, other, l, to, length, chunk.places.end(),
                                    static_cast<int32_t**>(ends));
        for (int64_t q = 0; q < to - l; ++q) {
          chunk.ends.push_back(ends[q] - chunk.places.data());
        }
        chunk.places.end(ends[to - l - 1]);
      }
    });
    edges_.assign(m_ + n_, {0, 0});
    const int64_t own_node = by_rows_ ? 0 : m_, other_node = by_rows_ ? m_ : 0;
    Edges* const others = edges_.data() + other_node;
    each_line([&](int64_t l, const int32_t* place, const int32_t* end) {
      const int32_t node = static_cast<int32_t>(own_node + l);
      int32_t link = 0;
      edges_[node].count = static_cast<int32_t>(end - place);
      for (; place < end; ++place) {
        ++others[*place].count;
        others[*place].link ^= node;
        link ^= static_cast<int32_t>(other_node + *place);
      }
      edges_[node].link = link;
    });
  }

  double row(int64_t i) const { return edges_[i].count; }          // (W 1)_i
  double column(int64_t j) const { return edges_[m_ + j].count; }  // (W^T 1)_j

  // to (m,) = W v, v (n,)
  void to_rows(const double* v, double* to) const { by_rows_ ? gather(v, to) : spread(v, m_, to); }
  // to (n,) = W^T u, u (m,)
  void to_columns(const double* u, double* to) const {
    by_rows_ ? spread(u, n_, to) : gather(u, to);
  }

  // d (m + n,) = (p, q) becomes the step of bipartite.h, or is spoiled: false. rough: float32 will
  // do.
  bool solve(double delta, bool rough, double* d) {
    const auto each = [&](const auto& visit) { each_line(visit); };
    return rough ? system_.template solve<float>(m_, n_, edges_, by_rows_, each, delta, d)
                 : system_.template solve<double>(m_, n_, edges_, by_rows_, each, delta, d);
  }

 private:
  static constexpr int64_t kChunk = 64, kRoom = 8192;  // lines; places
  struct Chunk {
    Places places;
    std::vector<int64_t> ends;  // of each line, in places
  };

  // visit(line, its first place, its end)
  template <class Visit>
  void each_line(const Visit& visit) const {
    int64_t l = 0;
    for (const Chunk& chunk : chunks_) {
      const int32_t* place = chunk.places.data();
      for (const int64_t end : chunk.ends) {
        const int32_t* const last = chunk.places.data() + end;
        visit(l++, place, last);
        place = last;
      }
    }
  }

  // to (lines,): the sums of x over each line's places.
  void gather(const double* x, double* to) const {
    each_line([&](int64_t l, const int32_t* place, const int32_t* end) {
      double sum = 0;
      for (; place < end; ++place) sum += x[*place];
      to[l] = sum;
    });
  }

  // to (length of a line,): each line's x into its places.
  void spread(const double* x, int64_t length, double* to) const {
    std::fill_n(to, length, 0.0);
    each_line([&](int64_t l, const int32_t* place, const int32_t* end) {
      for (; place < end; ++place) to[*place] += x[l];
    });
  }

  bool by_rows_ = true;
  int64_t m_ = 0, n_ = 0;
  std::vector<Chunk> chunks_;
  std::vector<Edges> edges_;  // (m + n,) of the rows, then of the columns
  Bipartite system_;
};

}  // namespace dashpot::transport
