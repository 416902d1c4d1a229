// What the spectral family's `.cu` files offer to the bindings: plain pointers, no Python.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "spectral/options.h"

namespace dashpot::spectral {

inline constexpr int64_t kLongestInBlock = 4096;  // samples of a row in shared memory

// One side of spectral_loss on the device: rows (batch, channels, n); slope may be null.
struct DeviceSide {
  const void* from;
  float* slope;
  int64_t batch;
};

struct SpectralCall {
  DeviceSide x, y;
  int64_t channels, n;
  Dtype dtype;
  SpectralOptions options;
  bool onesided, mean;
  const float* weight;  // (n/2 + 1,) or null
};

// Elements of float scratch: losses per row; or partial sums and factors.
int64_t spectral_pairs_scratch(const SpectralCall& call);
int64_t spectral_batch_scratch(const SpectralCall& call);
// loss: (rows,) or ().
void spectral_pairs_cuda(const SpectralCall& call, float* scratch, float* loss, int device,
                         void* stream);
void spectral_batch_cuda(const SpectralCall& call, float* scratch, float* loss, int device,
                         void* stream);

// One resolution's terms: what norms' ratio and the sums of log and linear are multiplied with.
struct StftTerms {
  float gap, log, linear;
  int64_t examples, channels;
  bool none, together;  // one loss per example; norms over the whole batch
};

struct StftDeviceCall {
  const void *x, *y;  // (rows, T)
  Dtype dtype;
  int64_t rows, t;
  std::vector<int64_t> n_ffts, hops, lengths;
  std::vector<const float*> windows;  // null: periodic Hann
  std::vector<StftTerms> terms;
  float power_floor;
  bool l2;
};

// Elements of float scratch. losses: () or (E,); slopes (rows, T) or null.
int64_t stft_scratch(const StftDeviceCall& call);
void stft_cuda(const StftDeviceCall& call, float* scratch, float* losses, float* slope_x,
               float* slope_y, int device, void* stream);

}  // namespace dashpot::spectral
