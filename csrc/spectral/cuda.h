// What the spectral family's `.cu` files offer to the bindings: plain pointers, no Python.
#pragma once

#include <cstdint>

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

}  // namespace dashpot::spectral
