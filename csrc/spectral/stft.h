// What both ways through a STFT loss on the CPU share: the shapes of a resolution, the comparison
// of a vector of bins, the end of the loss and of its slopes.
//
// An item is a segment of one row's frames at one resolution; it leaves sums of its bins and its
// part of the slope. The slope is linear in the terms, but the norms of the first term are known
// only at the end. So a resolution has channels: what is multiplied with 1 / (|m_x - m_y| |m_y|)
// later, and what is not. In the end segments and channels are added, mirrored edges folded back,
// in a fixed order.
#pragma once

#include <algorithm>
#include <vector>

#include "spectral/rows.h"

namespace dashpot::spectral {

inline constexpr int64_t kSegment = 64;  // frames at most: what segments share is small beside them
inline constexpr int kSums = 4;          // (m_x - m_y)^2, m_y^2, log, linear
enum Factor { kOne, kGap, kNorm };       // what a channel is multiplied with at the end

// d loss / d m of one side is gap (m_x - m_y) + norm m + log rho'/m + linear rho'.
struct Channel {
  bool target;
  double gap, norm, log, linear;
  Factor factor;
  int output, term;  // which slope it belongs to
};

struct Resolution {
  int64_t n_fft, hop, length, frames, segment, segments;              // segment: frames of one
  int64_t begin() const { return (n_fft - length) / 2 - n_fft / 2; }  // first frame's first sample
  int64_t span(int64_t count) const { return (count - 1) * hop + length; }
};

template <class T>
struct FrameTask {
  const RealPlan<T>* plan;
  T power_floor;
  bool l2, log, linear;
};

// A vector of bins of both signals.
template <class T, Isa isa>
struct FrameBins {
  using V = Vec<T, isa>;
  Complex<V> x, y;
  V m_x, m_y, gap, over, step;  // over: rho' of the logarithm, step: of the difference

  // counts: how often a bin enters the sums, a number or a vector of them.
  template <class W>
  DASHPOT_INLINE void compare(const FrameTask<T>& task, V* sums, W counts) {
    const V power_x = x.re * x.re + x.im * x.im, power_y = y.re * y.re + y.im * y.im;
    const V least = V{} + task.power_floor;
    m_x = sqrt<T, isa>(power_x < least ? least : power_x);
    m_y = sqrt<T, isa>(power_y < least ? least : power_y);
    // Below the floor a bin has no gradient; otherwise d m / dX = X / m.
    const V back_x = power_x < least ? V{} : T(1) / m_x;
    const V back_y = power_y < least ? V{} : T(1) / m_y;
    x.re *= back_x, x.im *= back_x, y.re *= back_y, y.im *= back_y;
    gap = m_x - m_y;
    const V sign = gap > V{} ? V{} + T(1) : gap < V{} ? V{} - T(1) : V{};
    over = step = sign;
    sums[0] += counts * (gap * gap);
    sums[1] += counts * (m_y * m_y);
    if (task.log) {
      const V ratio = log<T, isa>(m_x / m_y);
      sums[2] += counts * (task.l2 ? ratio * ratio : sign * ratio);
      if (task.l2) over = T(2) * ratio;
    }
    if (task.linear) sums[3] += counts * (task.l2 ? gap * gap : sign * gap);
    if (task.l2) step = T(2) * gap;
  }

  template <class W>
  DASHPOT_INLINE Complex<V> slope(const Channel& c, W weight) const {
    const V m = c.target ? m_y : m_x;
    V d = T(c.gap) * gap + T(c.norm) * m + T(c.linear) * step;
    if (c.log != 0) d += T(c.log) * over / m;
    d *= weight;
    const Complex<V>& z = c.target ? y : x;
    return {d * z.re, d * z.im};
  }
};

template <class T>
std::vector<T> window_of(int64_t length, const T* given) {
  std::vector<T> window(length);
  for (int64_t t = 0; t < length; ++t) {
    window[t] = given ? given[t] : static_cast<T>(0.5 - 0.5 * std::cos(2 * M_PI * t / length));
  }
  return window;
}

struct StftCall {
  std::vector<Resolution> resolutions;
  std::vector<double> weights;  // sc, log, linear
  double power_floor;
  bool l2, sc_batch, sum, none, split;
  int64_t rows, t, examples, channels;

  // Terms of one slope: which channels give it, and with which weights.
  std::vector<Channel> slopes(size_t r, bool target) const {
    const double sign = target ? -1 : 1, share = 1.0 / static_cast<double>(resolutions.size());
    const double bins = static_cast<double>(resolutions[r].n_fft / 2 + 1) *
                        static_cast<double>(resolutions[r].frames * (none ? channels : rows));
    const double each = sum ? 1 : 1 / bins;
    double w[3];
    for (int i = 0; i < 3; ++i) w[i] = split ? (weights[i] != 0) : weights[i] * share;
    const int at = split ? static_cast<int>(3 * r) : 0;
    std::vector<Channel> found;
    if (w[0] != 0) {
      found.push_back({target, sign * w[0], 0, 0, 0, kGap, at, 0});
      if (target) found.push_back({true, 0, -w[0], 0, 0, kNorm, at, 0});
    }
    const double log = sign * w[1] * each, linear = sign * w[2] * each;
    if (split) {
      if (log != 0) found.push_back({target, 0, 0, log, 0, kOne, at + 1, 1});
      if (linear != 0) found.push_back({target, 0, 0, 0, linear, kOne, at + 2, 2});
    } else if (log != 0 || linear != 0) {
      found.push_back({target, 0, 0, log, linear, kOne, at, 1});
    }
    return found;
  }
};

// One resolution: its windows, channels and the segments' parts of the slopes.
template <class T>
struct Part {
  Resolution shape;
  const RealPlan<T>* plan;  // null: by PyTorch's FFT
  std::vector<T> window;
  std::vector<Channel> channels;
  int64_t span;              // samples of a full segment
  T* slopes = nullptr;       // (rows, segments, channels, span)
  std::vector<double> sums;  // (rows, segments, 4)

  T* slope(int64_t row, int64_t segment, int64_t channel) const {
    const int64_t count = static_cast<int64_t>(channels.size());
    return slopes + ((row * shape.segments + segment) * count + channel) * span;
  }
  int64_t frames_of(int64_t segment) const {
    return std::min(shape.segment, shape.frames - segment * shape.segment);
  }
};

inline int64_t mirrored(int64_t t, int64_t length) {
  if (t < 0) t = -t;
  return t < length ? t : 2 * (length - 1) - t;
}

// The segment's samples of a row, reflected at the edges.
template <class T, class In>
void lay_out(const In* row, int64_t t, const Resolution& shape, int64_t segment, int64_t span,
             T* to) {
  const int64_t begin = shape.begin() + segment * shape.segment * shape.hop;
  const int64_t first = std::clamp<int64_t>(-begin, 0, span);
  const int64_t last = std::clamp<int64_t>(t - begin, first, span);
  for (int64_t i = 0; i < first; ++i) to[i] = convert<T>(row[mirrored(begin + i, t)]);
  run_on_isa<ConvertBlock<T, In>>(to + first, row + begin + first, last - first);
  for (int64_t i = last; i < span; ++i) to[i] = convert<T>(row[mirrored(begin + i, t)]);
}

// Per example (or for the batch) what the first term's channels are multiplied with; adds to
// losses, and fills terms where they are wanted.
template <class T>
std::vector<double> finish(const StftCall& call, const Part<T>& part, size_t r, T* terms,
                           double* losses) {
  const int64_t each = call.none ? call.examples : 1;  // entries of a term
  const bool together = call.sc_batch && !call.none;
  const double share = 1.0 / static_cast<double>(call.resolutions.size());
  const double bins =
      static_cast<double>(part.shape.n_fft / 2 + 1) * static_cast<double>(part.shape.frames);
  std::vector<double> sums(call.examples * kSums), factors(call.examples * 3, 1.0);
  for (int64_t row = 0; row < call.rows; ++row) {
    for (int64_t s = 0; s < part.shape.segments; ++s) {
      for (int i = 0; i < kSums; ++i) {
        sums[row / call.channels * kSums + i] +=
            part.sums[(row * part.shape.segments + s) * kSums + i];
      }
    }
  }
  double all[kSums] = {};
  for (int64_t e = 0; e < call.examples; ++e) {
    for (int i = 0; i < kSums; ++i) all[i] += sums[e * kSums + i];
  }
  std::vector<double> found(3 * each, 0.0);
  for (int64_t e = 0; e < call.examples; ++e) {
    const double* of = together ? all : sums.data() + e * kSums;
    const double gap = std::sqrt(of[0]), norm = std::sqrt(of[1]);
    const double weight = together || call.none ? 1.0 : 1.0 / static_cast<double>(call.examples);
    factors[3 * e + kGap] = gap > 0 ? weight / (gap * norm) : 0.0;
    factors[3 * e + kNorm] = weight * gap / (norm * norm * norm);
    const int64_t at = call.none ? e : 0;
    const double count = bins * static_cast<double>(call.none ? call.channels : call.rows);
    if (!together || e == 0) found[at] += weight * gap / norm;
    for (int i = 1; i < 3; ++i) {
      found[i * each + at] += sums[e * kSums + 1 + i] / (call.sum ? 1.0 : count);
    }
  }
  for (int i = 0; i < 3; ++i) {
    for (int64_t e = 0; e < each; ++e) {
      const double term = call.weights[i] != 0 ? found[i * each + e] : 0.0;
      if (terms) terms[(3 * r + i) * each + e] = static_cast<T>(term);
      losses[e] += share * call.weights[i] * term;
    }
  }
  return factors;
}

// y[i] += factor * x[i].
template <class T>
struct AddScaled {
  template <Isa isa>
  static DASHPOT_INLINE void run(T* y, const T* x, int64_t n, T factor) {
    constexpr int kWidth = kLanes<T, isa>;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      store<T, isa>(y + i, load<T, isa>(y + i) + factor * load<T, isa>(x + i));
    }
    for (; i < n; ++i) y[i] += factor * x[i];
  }
};

// A row's slope from the segments of all resolutions, mirrored samples folded back.
template <class T>
void gather(const StftCall& call, const std::vector<Part<T>>& parts,
            const std::vector<std::vector<double>>& factors, int64_t row, bool target, T* slope) {
  const int64_t outputs = call.split ? 3 * static_cast<int64_t>(parts.size()) : 1;
  for (int64_t k = 0; k < outputs; ++k) {
    std::fill_n(slope + (k * call.rows + row) * call.t, call.t, T(0));
  }
  for (size_t r = 0; r < parts.size(); ++r) {
    const Part<T>& part = parts[r];
    for (int64_t s = 0; s < part.shape.segments; ++s) {
      const int64_t begin = part.shape.begin() + s * part.shape.segment * part.shape.hop;
      const int64_t span = part.shape.span(part.frames_of(s));
      const int64_t first = std::clamp<int64_t>(-begin, 0, span);
      const int64_t last = std::clamp<int64_t>(call.t - begin, first, span);
      for (size_t c = 0; c < part.channels.size(); ++c) {
        const Channel& channel = part.channels[c];
        if (channel.target != target) continue;
        const T factor = static_cast<T>(factors[r][row / call.channels * 3 + channel.factor]);
        const T* from = part.slope(row, s, static_cast<int64_t>(c));
        T* to = slope + (channel.output * call.rows + row) * call.t;
        for (int64_t i = 0; i < first; ++i) to[mirrored(begin + i, call.t)] += factor * from[i];
        run_on_isa<AddScaled<T>>(to + begin + first, from + first, last - first, factor);
        for (int64_t i = last; i < span; ++i) {
          to[mirrored(begin + i, call.t)] += factor * from[i];
        }
      }
    }
  }
}

}  // namespace dashpot::spectral
