// The support W (m, n) of an l2 plan, listed, and the Hessian of minus the semi-dual on it:
//
//     H d = (diag(W 1) d - W diag(1 / r) W^T d) / gamma,   r = W^T 1
//
// Entries are listed along the cost's memory: per line (a row; a column where columns lie one after
// another or are made from points) the places in it. One read of the cost, then O(entries) per
// product.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "transport/columns.h"

namespace dashpot::transport {

// Places c of a line where own + other_c - cost_c > 0, appended to `to`.
template <class T, class E>
struct ListLine {
  static constexpr int kTogether = 4;  // vectors looked at together: most hold nothing
  template <Isa isa>
  static DASHPOT_INLINE void run(T own, const T* other, const E* cost, int64_t length,
                                 std::vector<int32_t>* to) {
    constexpr int kWidth = kLanes<T, isa>, kStep = kTogether * kWidth;
    const auto look = [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        if (own + other[c] - convert<T>(cost[c]) > 0) to->push_back(static_cast<int32_t>(c));
      }
    };
    int64_t begin = 0;
    for (; begin + kStep <= length; begin += kStep) {
      Vec<T, isa> most = {};
      const Vec<T, isa> zero = {};
      for (int64_t c = begin; c < begin + kStep; c += kWidth) {
        const Vec<T, isa> score = own + load<T, isa>(other + c) - load_as<T, isa>(cost + c);
        most = score > most ? score : most;
      }
      if (any<T, isa>(most > zero)) look(begin, begin + kStep);
    }
    look(begin, length);
  }
};

template <class T, class C>
class Support {
 public:
  // At alpha (m,), beta (n,) = -theta.
  void list(const Options& options, const Cost<C>& cost, const T* alpha, const double* beta,
            int threads) {
    by_rows_ = cost.lines_are_rows();
    m_ = options.m, n_ = options.n, gamma_ = options.gamma;
    beta_.resize(n_);
    for (int64_t j = 0; j < n_; ++j) {  // not finite: nothing can be chosen
      beta_[j] =
          std::isfinite(beta[j]) ? static_cast<T>(beta[j]) : -std::numeric_limits<T>::infinity();
    }
    const int64_t lines = by_rows_ ? m_ : n_, length = by_rows_ ? n_ : m_;
    const T* const own = by_rows_ ? alpha : beta_.data();
    const T* const other = by_rows_ ? beta_.data() : alpha;
    chunks_.resize((lines + kChunk - 1) / kChunk);
    parallel_for(static_cast<int64_t>(chunks_.size()), threads, [&](int64_t item) {
      Chunk& chunk = chunks_[item];
      chunk.places.clear();
      chunk.ends.clear();
      for (int64_t l = item * kChunk; l < std::min(lines, (item + 1) * kChunk); ++l) {
        run_on_isa<ListLine<T, typename Cost<C>::Entry>>(own[l], other, cost.line(l, length),
                                                         length, &chunk.places);
        chunk.ends.push_back(static_cast<int64_t>(chunk.places.size()));
      }
    });
    ones_.assign(std::max(m_, n_), 1.0);
    rows_.resize(m_);
    columns_.resize(n_);
    mean_.resize(n_);
    from_columns(ones_.data(), rows_.data());
    from_rows(ones_.data(), columns_.data());
  }

  // to (m,) = W 1 / gamma
  void diagonal(double* to) const {
    for (int64_t i = 0; i < m_; ++i) to[i] = rows_[i] / gamma_;
  }

  // to (m,) = H d
  void curve(const double* d, double* to) {
    from_rows(d, mean_.data());
    for (int64_t j = 0; j < n_; ++j) mean_[j] /= std::max(columns_[j], 1.0);
    from_columns(mean_.data(), to);
    for (int64_t i = 0; i < m_; ++i) to[i] = (rows_[i] * d[i] - to[i]) / gamma_;
  }

 private:
  static constexpr int64_t kChunk = 64;  // lines
  struct Chunk {
    std::vector<int32_t> places;
    std::vector<int64_t> ends;  // of each line, in places
  };

  void from_rows(const double* x, double* to) const { by_rows_ ? spread(x, to) : gather(x, to); }
  void from_columns(const double* x, double* to) const { by_rows_ ? gather(x, to) : spread(x, to); }

  // to (lines,): the sums of x over each line's places.
  void gather(const double* x, double* to) const {
    for (const Chunk& chunk : chunks_) {
      const int32_t* place = chunk.places.data();
      for (const int64_t end : chunk.ends) {
        double sum = 0;
        for (; place < chunk.places.data() + end; ++place) sum += x[*place];
        *to++ = sum;
      }
    }
  }

  // to (length of a line,): each line's x into its places.
  void spread(const double* x, double* to) const {
    std::fill_n(to, by_rows_ ? n_ : m_, 0.0);
    for (const Chunk& chunk : chunks_) {
      const int32_t* place = chunk.places.data();
      for (const int64_t end : chunk.ends) {
        for (; place < chunk.places.data() + end; ++place) to[*place] += *x;
        ++x;
      }
    }
  }

  bool by_rows_ = true;
  int64_t m_ = 0, n_ = 0;
  double gamma_ = 1;
  std::vector<Chunk> chunks_;
  std::vector<T> beta_;                 // (n,)
  std::vector<double> rows_, columns_;  // counts (m,), (n,)
  std::vector<double> mean_, ones_;
};

}  // namespace dashpot::transport
