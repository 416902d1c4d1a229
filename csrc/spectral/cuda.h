// What the spectral family's `.cu` files offer to the bindings: plain pointers, no Python.
#pragma once

#include <cstdint>
#include <functional>
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

// Spectra that PyTorch's FFT made, (rows, F) complex in x and y (null for "complex"): compared, and
// turned into those of the slopes that are wanted.
int64_t spectral_whole_scratch(const SpectralCall& call, bool batch_mean);
void spectral_whole_cuda(const SpectralCall& call, bool batch_mean, float* x, float* y,
                         bool wants_x, bool wants_y, float* scratch, float* loss, int device,
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
  std::vector<bool> whole;  // resolutions that no block transforms
};

// PyTorch's transforms of frames, and the memory they read.
struct StftTransforms {
  std::function<float*(int64_t count, int64_t n)> frames;     // -> (2, count, n)
  std::function<const float*()> forward;                      // of those -> (2, count, F) complex
  std::function<float*(int64_t count, int64_t bins)> slopes;  // -> (count, F) complex
  std::function<const float*(int64_t n)> back;                // of those -> (count, n)
};

// Elements of float scratch. losses: () or (E,); slopes (rows, T) or null.
int64_t stft_scratch(const StftDeviceCall& call);
void stft_cuda(const StftDeviceCall& call, const StftTransforms& transforms, float* scratch,
               float* losses, float* slope_x, float* slope_y, int device, void* stream);

// focal_frequency_loss on the device: patches of images in the block's shared memory, or `spectra`
// that PyTorch's FFT made, (items, h, F) complex, in place.
struct FocalCall {
  const void *x, *y;
  float *slope, *spectra;  // one of them, or none where no slope is wanted
  Dtype dtype;
  int64_t images, factor, h, w;  // of a patch
  FocalOptions options;
  bool mean, wanted;
  double share;  // 1 / elements of a loss
};

// Whether a patch of these sides, w even, fits a block.
bool focal_in_block(int64_t h, int64_t w);
int64_t focal_scratch(const FocalCall& call);
// loss: () or (images,).
void focal_cuda(const FocalCall& call, float* scratch, float* loss, int device, void* stream);

}  // namespace dashpot::spectral
