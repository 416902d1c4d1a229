// Batch averages of levels in lanes: groups of rows are transformed and their levels summed over
// the rows; when all are done, bins become coefficients (float64), and what was kept of the spectra
// slopes.
//
// Kept are the directions S_k = X_k / |X_k| (for powers X_k itself), in the slope's own memory
// where groups fill it: the way back then needs neither root nor division. While a group is
// compared the next one's rows come to the second-level cache: 16 rows side by side are more
// streams than the hardware follows.
#pragma once

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/scratch.h"
#include "spectral/bins.h"

namespace dashpot::spectral {

template <class T, class In>
struct Signals {
  const In *x, *y;       // (batch, channels, n)
  T *slope_x, *slope_y;  // null where not wanted
  int64_t batch_x, batch_y, channels, n;
};

// Memory that is wanted soon, fetched a part at each of `steps`.
struct Ahead {
  const char* from = nullptr;
  int64_t bytes = 0, step = 0;

  Ahead(const void* memory, int64_t size, int64_t steps)
      : from(static_cast<const char*>(memory)), bytes(size), step((size / steps + 64) / 64 * 64) {}

  DASHPOT_INLINE void fetch(int64_t part) const {
    const int64_t end = (part + 1) * step < bytes ? (part + 1) * step : bytes;
    for (int64_t at = part * step; at < end; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
};

// Sums over a group's rows of |X_k| or |X_k|^2: sums[k], k <= m; with `keep` the directions take
// the packed transform's places, bins 0 and m, which are real, one place. levels: (m + 1) vectors
// of scratch.
template <class T, bool keep>
struct SumLevels {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* x, const RealPlan<T>* plan, bool power, const Ahead* ahead,
                                 T* levels, T* sums) {
    using V = Vec<T, isa>;
    constexpr int kWidth = kLanes<T, isa>;
    const int64_t m = plan->n / 2;
    for (int64_t k = 0; 2 * k <= m; ++k) {
      auto [low, high] = split<T, isa>(x, *plan, k);
      const V of_low = level_of<T, isa>(low, power), of_high = level_of<T, isa>(high, power);
      store<T, isa>(levels + k * kWidth, of_low);
      store<T, isa>(levels + (m - k) * kWidth, of_high);
      ahead->fetch(k);
      if (!keep) continue;
      if (!power) {
        const V by_low = inverse_or_zero<T, isa>(of_low),
                by_high = inverse_or_zero<T, isa>(of_high);
        low.re *= by_low, low.im *= by_low, high.re *= by_high, high.im *= by_high;
      }
      T* a = x + 2 * kWidth * plan->half->place[k];
      T* b = x + 2 * kWidth * plan->half->place[k == 0 ? 0 : m - k];
      store<T, isa>(a, low.re);
      store<T, isa>(a + kWidth, k == 0 ? high.re : low.im);
      if (k == 0) continue;
      store<T, isa>(b, high.re);
      store<T, isa>(b + kWidth, high.im);
    }
    for (int64_t k = 0; k <= m; k += kWidth) {
      V value[kWidth];
      const int64_t end = m + 1 - k < kWidth ? m + 1 - k : kWidth;
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        value[i] = load<T, isa>(levels + (i < end ? k + i : m) * kWidth);
      }
      const V total = Transpose<T, isa>::sums(value);
      for (int64_t i = 0; i < end; ++i) sums[k + i] = total[i];
    }
  }
};

// The packed spectra of a group's slopes, factor_k S_k, from its directions.
template <class T>
struct SpreadFactors {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* kept, const RealPlan<T>* plan, const T* factors,
                                 T* data) {
    using V = Vec<T, isa>;
    constexpr int kWidth = kLanes<T, isa>;
    const int64_t m = plan->n / 2;
    for (int64_t k = 0; 2 * k <= m; ++k) {
      const T* a = kept + 2 * kWidth * plan->half->place[k];
      const T* b = kept + 2 * kWidth * plan->half->place[k == 0 ? 0 : m - k];
      Complex<V> low{load<T, isa>(a), load<T, isa>(a + kWidth)};
      Complex<V> high{load<T, isa>(b), load<T, isa>(b + kWidth)};
      if (k == 0) high.re = low.im, low.im = high.im = V{};
      const T of_low = factors[k], of_high = factors[m - k];
      low.re *= of_low, low.im *= of_low, high.re *= of_high, high.im *= of_high;
      merge<T, isa>(data, *plan, k, low, high);
    }
  }
};

// One side of the batch average: groups of rows of one channel, their sums and kept spectra.
template <class T, class In>
struct Side {
  const In* from;
  T* slope;
  int64_t batch, channels, n, width, groups;
  T *kept, *sums;  // (channels, groups, n, width) or null, (channels, groups, F)

  // Spectra are kept in the slope's own memory where the rows fill it group by group.
  static bool fits(int64_t batch, int64_t channels) {
    return channels == 1 && batch % lanes<T>() == 0;
  }
  static int64_t memory(bool slope, int64_t batch, int64_t channels, int64_t n) {
    const int64_t items = channels * ((batch + lanes<T>() - 1) / lanes<T>());
    return room<T>(items * (n / 2 + 1)) +
           (slope && !fits(batch, channels) ? room<T>(items * n * lanes<T>()) : 0);
  }

  Side(const In* x, T* to, int64_t b, int64_t c, int64_t length, Share& share)
      : from(x),
        slope(to),
        batch(b),
        channels(c),
        n(length),
        width(lanes<T>()),
        groups((b + width - 1) / width),
        kept(to == nullptr || fits(b, c) ? to : share.take<T>(items() * n * width)),
        sums(share.take<T>(items() * (n / 2 + 1))) {}

  int64_t items() const { return channels * groups; }
  int64_t row(int64_t item, int64_t lane) const {
    return ((item % groups * width + lane) * channels + item / groups) * n;
  }
  int64_t count(int64_t item) const { return std::min(width, batch - item % groups * width); }

  // An item's rows, if they lie together.
  Ahead next(int64_t item) const {
    const bool some = item < items() && channels == 1;
    const int64_t size = some ? count(item) * n * static_cast<int64_t>(sizeof(In)) : 0;
    return {some ? from + row(item, 0) : from, size, n / 4 + 1};
  }

  void transform(int64_t item, const SpectralOptions& options, const RealPlan<T>& plan, int threads,
                 Share share) const {
    const In* rows[kMaxLanes];
    for (int64_t l = 0; l < count(item); ++l) rows[l] = from + row(item, l);
    T* data = kept ? kept + item * n * width : share.take<T>(n * width);
    const In* const* none = nullptr;
    run_on_isa<LoadRows<T, In>>(rows, none, count(item), n, static_cast<T>(options.scale), nullptr,
                                data);
    forward_transform(data, plan);
    T *levels = share.take<T>((n / 2 + 1) * width), *to = sums + item * (n / 2 + 1);
    const Ahead ahead = next(item + threads);
    if (kept) {
      run_on_isa<SumLevels<T, true>>(data, &plan, options.power(), &ahead, levels, to);
    } else {
      run_on_isa<SumLevels<T, false>>(data, &plan, options.power(), &ahead, levels, to);
    }
  }

  void transform_back(int64_t item, const RealPlan<T>& plan, const std::vector<T>& factors,
                      Share share) const {
    T* rows[kMaxLanes];
    for (int64_t l = 0; l < count(item); ++l) rows[l] = slope + row(item, l);
    T* data = share.take<T>(n * width);
    run_on_isa<SpreadFactors<T>>(static_cast<const T*>(kept + item * n * width), &plan,
                                 factors.data() + item / groups * (n / 2 + 1), data);
    inverse_transform(data, plan);
    run_on_isa<StoreRows<T, false>>(data, n, T(1), nullptr, rows, count(item));
  }

  // (channels, F), in the order of the groups.
  std::vector<double> totals() const {
    const int64_t bins = n / 2 + 1;
    std::vector<double> found(channels * bins, 0.0);
    for (int64_t item = 0; item < items(); ++item) {
      double* to = found.data() + item / groups * bins;
      for (int64_t k = 0; k < bins; ++k) to[k] += static_cast<double>(sums[item * bins + k]);
    }
    return found;
  }
};

// From the levels' sums (channels, F): the loss, and what each side's X / |X| (powers: X) are to be
// multiplied with, (channels, F).
template <class T>
struct Coefficients {
  double loss = 0;
  std::vector<T> x, y;

  Coefficients(const std::vector<double>& sums_x, const std::vector<double>& sums_y,
               int64_t batch_x, int64_t batch_y, int64_t channels, const SpectralOptions& options,
               const BinWeights& weights)
      : x(sums_x.size()), y(sums_x.size()) {
    const Distance distance{options.l1};
    const double rise = options.power() ? 2 : 1;  // d |X|^2 = 2 X
    const size_t bins = weights.loss.size();
    for (size_t i = 0; i < x.size(); ++i) {
      double u = sums_x[i] / static_cast<double>(batch_x), du = 1;
      double v = sums_y[i] / static_cast<double>(batch_y), dv = 1;
      if (options.log()) {
        du = 1 / (u + options.eps), dv = 1 / (v + options.eps);
        u = std::log(u + options.eps), v = std::log(v + options.eps);
      }
      loss += weights.loss[i % bins] * distance.value(u - v);
      const double factor =
          rise * weights.slope[i % bins] * distance.slope(u - v) / static_cast<double>(channels);
      x[i] = static_cast<T>(factor * du / static_cast<double>(batch_x));
      y[i] = static_cast<T>(-factor * dv / static_cast<double>(batch_y));
    }
    loss /= static_cast<double>(channels);
  }
};

template <class T, class In>
void batch_means(const Signals<T, In>& s, const SpectralOptions& options, const BinWeights& weights,
                 int threads, const Scratch& scratch, T* loss) {
  Share sides = scratch.common();
  const RealPlan<T>& plan = RealPlan<T>::of(static_cast<int>(s.n));
  const Side<T, In> x(s.x, s.slope_x, s.batch_x, s.channels, s.n, sides);
  const Side<T, In> y(s.y, s.slope_y, s.batch_y, s.channels, s.n, sides);
  parallel_for(x.items() + y.items(), threads, [&](int64_t item) {
    item < x.items() ? x.transform(item, options, plan, threads, scratch.mine())
                     : y.transform(item - x.items(), options, plan, threads, scratch.mine());
  });
  const Coefficients<T> found(x.totals(), y.totals(), s.batch_x, s.batch_y, s.channels, options,
                              weights);
  *loss = static_cast<T>(found.loss);
  const int64_t of_x = s.slope_x ? x.items() : 0, of_y = s.slope_y ? y.items() : 0;
  parallel_for(of_x + of_y, threads, [&](int64_t item) {
    item < of_x ? x.transform_back(item, plan, found.x, scratch.mine())
                : y.transform_back(item - of_x, plan, found.y, scratch.mine());
  });
}

}  // namespace dashpot::spectral
