// What the spectral losses share between their bindings and kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace dashpot::spectral {

enum Kind { kComplex, kMagnitude, kPower, kLogMagnitude, kLogPower };

inline Kind kind_of(const std::string& name) {
  const char* names[] = {"complex", "magnitude", "power", "log_magnitude", "log_power"};
  for (int i = 0; i < 5; ++i) {
    if (name == names[i]) return static_cast<Kind>(i);
  }
  throw std::invalid_argument("kind: unknown: " + name);
}

struct SpectralOptions {
  Kind kind;
  bool l1;
  double eps, scale;  // scale: the transform's factor
  bool power() const { return kind == kPower || kind == kLogPower; }
  bool log() const { return kind == kLogMagnitude || kind == kLogPower; }
};

struct FocalOptions {
  double alpha;
  bool log, batch;
};

inline double norm_scale(const std::string& norm, int64_t n) {
  if (norm == "backward") return 1;
  return norm == "ortho" ? 1 / std::sqrt(static_cast<double>(n)) : 1 / static_cast<double>(n);
}

// Frames of torch.stft: centred, so an odd n_fft leaves one sample less.
inline int64_t frames_of(int64_t t, int64_t n_fft, int64_t hop) {
  return 1 + (t - n_fft % 2) / hop;
}

// Per bin: `loss` is h_k w_k over the number of bins, `slope` is what a derivative of the one-sided
// sum is multiplied with to become a term of the full sum: halved where a bin stands for two.
struct BinWeights {
  std::vector<double> loss, slope;

  BinWeights(int64_t n, bool onesided, double scale) : loss(n / 2 + 1), slope(n / 2 + 1) {
    for (int64_t k = 0; k <= n / 2; ++k) {
      const bool twice = k > 0 && 2 * k != n;
      loss[k] = (twice && !onesided ? 2.0 : 1.0) / static_cast<double>(onesided ? n / 2 + 1 : n);
      slope[k] = loss[k] * scale * (twice ? 0.5 : 1.0);
    }
  }

  template <class W>
  void times(const W* weight) {
    for (size_t k = 0; k < loss.size(); ++k) {
      loss[k] *= static_cast<double>(weight[k]);
      slope[k] *= static_cast<double>(weight[k]);
    }
  }
};

// rho and its derivative.
struct Distance {
  bool l1;
  double value(double gap) const { return l1 ? std::fabs(gap) : gap * gap; }
  double slope(double gap) const {
    return l1 ? static_cast<double>((gap > 0) - (gap < 0)) : 2 * gap;
  }
};

}  // namespace dashpot::spectral
