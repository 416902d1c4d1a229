// spectral_loss on the device: input, target (rows, n) -> loss () or (rows,), slopes (rows, n).
//
// Pairs, one launch and a sum: a block holds some rows of both signals in shared memory (rows times
// n up to 2,048), transforms, compares and transforms back; 12 bytes of traffic per sample. Teams
// of threads own rows where a row's loss is summed. Batch averages, three launches: rows
// transformed and |X| added over a block's rows, partial sums to memory; one block adds them
// (float64, in order), takes logarithms, writes the loss and a factor per bin; rows transformed
// again, multiplied and transformed back. Transforming again reads 4 bytes a sample where keeping
// the spectra would write and read 8.
//
// Lengths that no block transforms come as spectra from PyTorch's FFT. Pairs: one pass reads both,
// writes the slopes' in place (32 bytes a bin) and a partial sum for every kChunk bins of a row.
// Batch averages: a pass for the levels (16 rows and 256 bins a block), the same factors, a pass
// that scales. Channels and rows lie along the first axis of every grid: it has no limit of 65,535.
//
// Per sample of a signal, float32, L = 2.5 log2 n FLOPs for a transform (compare: about 30 a bin):
//
//   pairs     12 or 16 bytes (one slope or two)   3 L or 4 L
//   batch     4 bytes, L; then 8 bytes, 2 L       factors: 4 bytes for each block and bin
//   compare   16 bytes      levels   4 bytes      scale   8 bytes      and those of PyTorch's FFT
#include "common/fft.cuh"
#include "common/numeric.cuh"
#include "spectral/cuda.h"

namespace dashpot::spectral {
namespace {

constexpr int kThreads = 256;
constexpr int kSamples = 2048;  // of a signal in a block, if rows are shorter
constexpr int kMostRows = 8;    // so that a team is a warp at least
constexpr int kChunk = 2048;    // bins of a row in a block, of spectra that come as they are
constexpr int kGroup = 16;      // rows in a block, where levels are summed

struct Shape {
  BlockFft fft;  // of half the length
  int64_t rows;  // all of them
  int group;     // rows of a block
  float scale;
  bool power, log, l1, complex;
  float eps;
};

__device__ __forceinline__ bool is_twice(int64_t k, int64_t n) { return k > 0 && 2 * k != n; }

// h_k w_k over the number of bins.
__device__ __forceinline__ float bin_weight(int64_t k, int64_t n, bool onesided,
                                            const float* weight) {
  const float h =
      (is_twice(k, n) && !onesided ? 2.f : 1.f) / static_cast<float>(onesided ? n / 2 + 1 : n);
  return weight != nullptr ? h * weight[k] : h;
}

// |z| without overflow or underflow on the way.
__device__ __forceinline__ float modulus(float2 z) {
  const float a = fabsf(z.x), b = fabsf(z.y), large = fmaxf(a, b);
  const float ratio = large > 0.f ? fminf(a, b) / large : 0.f;
  return large * sqrtf(1.f + ratio * ratio);
}

__device__ __forceinline__ float inverse_or_zero(float value) {
  return value >= 1.2e-38f ? 1.f / value : 0.f;
}

// Tables first, then `signals` groups of rows.
struct Layout {
  float2* roots;
  unsigned short* place;
  float2* rows[2];
  __device__ Layout(float2* shared, const Shape& shape)
      : roots(shared), place(reinterpret_cast<unsigned short*>(shared + shape.fft.n)) {
    rows[0] = shared + shape.fft.n + (shape.fft.n + 3) / 4;
    rows[1] = rows[0] + shape.group * pitch_of(shape.fft.n);
  }
};

int64_t shared_bytes(const Shape& shape, int signals) {
  const int64_t n = shape.fft.n;
  return (n + (n + 3) / 4 + signals * shape.group * pitch_of(static_cast<int>(n))) *
         static_cast<int64_t>(sizeof(float2));
}

// Row `index` of a group into shared memory, times scale; minus `other` where it is given.
template <class In>
__device__ __forceinline__ void load_row(const In* from, const In* other, float scale, int m,
                                         float2* to) {
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    float a = device_cast<float>(from[2 * j]), b = device_cast<float>(from[2 * j + 1]);
    if (other != nullptr) {
      a -= device_cast<float>(other[2 * j]);
      b -= device_cast<float>(other[2 * j + 1]);
    }
    to[padded(j)] = make_float2(a * scale, b * scale);
  }
}

__device__ __forceinline__ void store_row(const float2* from, float scale, int m, float* to) {
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    const float2 z = from[padded(j)];
    to[2 * j] = scale * z.x;
    to[2 * j + 1] = scale * z.y;
  }
}

// Compares two bins: returns rho and turns x, y into the slopes' spectra but for `slope`.
__device__ __forceinline__ float compare(const Shape& s, float slope, float2& x, float2& y) {
  float u = s.power ? x.x * x.x + x.y * x.y : modulus(x);
  if (s.complex) {
    const float by = s.l1 ? slope * inverse_or_zero(u) : 2.f * slope;
    x = make_float2(x.x * by, x.y * by);
    return s.l1 ? u : u * u;
  }
  float v = s.power ? y.x * y.x + y.y * y.y : modulus(y);
  float du = s.power ? 2.f : inverse_or_zero(u), dv = s.power ? 2.f : inverse_or_zero(v), gap;
  if (s.log) {
    u += s.eps, v += s.eps;
    gap = logf(u) - logf(v);
    du /= u, dv /= v;
  } else {
    gap = u - v;
  }
  const float sign = gap > 0.f ? 1.f : gap < 0.f ? -1.f : 0.f;
  const float factor = slope * (s.l1 ? sign : 2.f * gap);
  x = make_float2(x.x * du * factor, x.y * du * factor);
  y = make_float2(-y.x * dv * factor, -y.y * dv * factor);
  return s.l1 ? sign * gap : gap * gap;
}

template <class In>
__global__ void __launch_bounds__(kThreads, 2)
    spectral_pairs_kernel(const __grid_constant__ Shape shape, const In* x, const In* y,
                          float* slope_x, float* slope_y, const float* weight, bool onesided,
                          float share, float* losses) {
  DASHPOT_DYNAMIC_SHARED(float2, shared);
  __shared__ float partial[kThreads / 32];
  const Layout at(shared, shape);
  const int m = shape.fft.n, pitch = pitch_of(m);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * shape.group, n = 2 * int64_t{m};
  const int count = static_cast<int>(shape.rows - first < shape.group ? shape.rows - first
                                                                      : int64_t{shape.group});
  block_fft_tables(shape.fft, at.roots, at.place);
  for (int g = 0; g < count; ++g) {
    const In *from = x + (first + g) * n, *other = y + (first + g) * n;
    const In* none = nullptr;
    load_row(from, shape.complex ? other : none, shape.scale, m, at.rows[0] + g * pitch);
    if (!shape.complex) load_row(other, none, shape.scale, m, at.rows[1] + g * pitch);
  }
  __syncthreads();
  block_fft<false>(at.rows[0], count, shape.fft, at.roots);
  if (!shape.complex) block_fft<false>(at.rows[1], count, shape.fft, at.roots);

  const int team = kThreads / shape.group, row = threadIdx.x / team;
  float total = 0.f;
  if (row < count) {
    float2 *of_x = at.rows[0] + row * pitch, *of_y = at.rows[1] + row * pitch;
    for (int k = threadIdx.x % team; 2 * k <= m; k += team) {
      PairOfBins a = split_bins(of_x, at.place, at.roots, m, k), b{};
      if (!shape.complex) b = split_bins(of_y, at.place, at.roots, m, k);
      const float half = (k == 0 ? 1.f : 0.5f) * share * shape.scale;
      const float low = bin_weight(k, n, onesided, weight);
      const float high = bin_weight(m - k, n, onesided, weight);
      total += low * compare(shape, low * half, a.low, b.low);
      const float more = high * compare(shape, high * half, a.high, b.high);
      if (2 * k != m) total += more;  // else it is the same bin
      merge_bins(of_x, at.place, at.roots, m, k, a);
      if (!shape.complex) merge_bins(of_y, at.place, at.roots, m, k, b);
    }
  }
  for (int half = 16; half > 0; half /= 2) total += __shfl_down_sync(0xffffffffu, total, half);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x % team == 0 && row < count) {
    float sum = 0.f;
    for (int w = 0; w < team / 32; ++w) sum += partial[threadIdx.x / 32 + w];
    losses[first + row] = sum;
  }
  if (slope_x != nullptr || shape.complex) {
    block_fft<true>(at.rows[0], count, shape.fft, at.roots);
  }
  if (slope_y != nullptr && !shape.complex) {
    block_fft<true>(at.rows[1], count, shape.fft, at.roots);
  }
  for (int g = 0; g < count; ++g) {
    if (slope_x != nullptr) store_row(at.rows[0] + g * pitch, 1.f, m, slope_x + (first + g) * n);
    if (slope_y == nullptr) continue;
    store_row((shape.complex ? at.rows[0] : at.rows[1]) + g * pitch, shape.complex ? -1.f : 1.f, m,
              slope_y + (first + g) * n);
  }
}

// loss[row] = the sum of losses (rows, each) over each, divided; a block for a row, in a fixed
// order.
__global__ void __launch_bounds__(kThreads)
    spectral_mean_kernel(const float* losses, int64_t each, double divisor, float* loss) {
  __shared__ double sums[kThreads];
  const float* own = losses + blockIdx.x * each;
  double total = 0;
  for (int64_t i = threadIdx.x; i < each; i += kThreads) total += own[i];
  sums[threadIdx.x] = total;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) loss[blockIdx.x] = static_cast<float>(sums[0] / divisor);
}

// Grid: channels times groups. With factors: slopes of a group's rows; else partial sums of their
// levels, sums (channels, groups, F).
template <class In>
__global__ void __launch_bounds__(kThreads, 2)
    spectral_batch_kernel(const __grid_constant__ Shape shape, const In* from, int64_t batch,
                          int64_t channels, unsigned groups, float* sums, const float* factors,
                          float* slope) {
  DASHPOT_DYNAMIC_SHARED(float2, shared);
  const Layout at(shared, shape);
  const int m = shape.fft.n, pitch = pitch_of(m), bins = m + 1;
  const int64_t channel = blockIdx.x / groups, n = 2 * int64_t{m};
  const int64_t first = static_cast<int64_t>(blockIdx.x % groups) * shape.group;
  const int count =
      static_cast<int>(batch - first < shape.group ? batch - first : int64_t{shape.group});
  block_fft_tables(shape.fft, at.roots, at.place);
  for (int g = 0; g < count; ++g) {
    const In* none = nullptr;
    load_row(from + ((first + g) * channels + channel) * n, none, shape.scale, m,
             at.rows[0] + g * pitch);
  }
  __syncthreads();
  block_fft<false>(at.rows[0], count, shape.fft, at.roots);
  for (int k = threadIdx.x; 2 * k <= m; k += kThreads) {
    float low = 0.f, high = 0.f;
    for (int g = 0; g < count; ++g) {
      float2* row = at.rows[0] + g * pitch;
      PairOfBins z = split_bins(row, at.place, at.roots, m, k);
      const float a = shape.power ? z.low.x * z.low.x + z.low.y * z.low.y : modulus(z.low);
      const float b = shape.power ? z.high.x * z.high.x + z.high.y * z.high.y : modulus(z.high);
      low += a, high += b;
      if (factors == nullptr) continue;
      const float by = factors[channel * bins + k] * (shape.power ? 2.f : inverse_or_zero(a));
      const float to = factors[channel * bins + m - k] * (shape.power ? 2.f : inverse_or_zero(b));
      z.low = make_float2(z.low.x * by, z.low.y * by);
      z.high = make_float2(z.high.x * to, z.high.y * to);
      merge_bins(row, at.place, at.roots, m, k, z);
    }
    if (factors != nullptr) continue;
    float* to = sums + static_cast<int64_t>(blockIdx.x) * bins;
    to[k] = low;
    to[m - k] = high;
  }
  if (factors == nullptr) return;
  __syncthreads();
  block_fft<true>(at.rows[0], count, shape.fft, at.roots);
  for (int g = 0; g < count; ++g) {
    store_row(at.rows[0] + g * pitch, 1.f, m, slope + ((first + g) * channels + channel) * n);
  }
}

struct BatchSums {
  const float *x, *y;  // (channels, groups, F)
  int64_t groups_x, groups_y, batch_x, batch_y;
};

// One block: means, loss, and both sides' factors (channels, F).
__global__ void __launch_bounds__(kThreads)
    spectral_factors_kernel(const __grid_constant__ Shape shape, BatchSums sums, int64_t n,
                            int64_t channels, const float* weight, bool onesided, float* factors_x,
                            float* factors_y, float* loss) {
  __shared__ double totals[kThreads];
  const int64_t bins = n / 2 + 1;
  double total = 0;
  for (int64_t i = threadIdx.x; i < channels * bins; i += kThreads) {
    const int64_t channel = i / bins, k = i - channel * bins;
    double u = 0, v = 0, du = 1, dv = 1;
    for (int64_t g = 0; g < sums.groups_x; ++g) {
      u += sums.x[(channel * sums.groups_x + g) * bins + k];
    }
    for (int64_t g = 0; g < sums.groups_y; ++g) {
      v += sums.y[(channel * sums.groups_y + g) * bins + k];
    }
    u /= static_cast<double>(sums.batch_x), v /= static_cast<double>(sums.batch_y);
    if (shape.log) {
      u += shape.eps, v += shape.eps;
      du = 1 / u, dv = 1 / v;
      u = log(u), v = log(v);
    }
    const double gap = u - v, sign = gap > 0 ? 1.0 : gap < 0 ? -1.0 : 0.0;
    const double h = bin_weight(k, n, onesided, weight) / static_cast<double>(channels);
    total += h * (shape.l1 ? sign * gap : gap * gap);
    const double slope =
        h * shape.scale * (is_twice(k, n) ? 0.5 : 1.0) * (shape.l1 ? sign : 2 * gap);
    factors_x[i] = static_cast<float>(slope * du / static_cast<double>(sums.batch_x));
    factors_y[i] = static_cast<float>(-slope * dv / static_cast<double>(sums.batch_y));
  }
  totals[threadIdx.x] = total;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) totals[threadIdx.x] += totals[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *loss = static_cast<float>(totals[0]);
}

// Grid: rows times chunks. x, y (rows, F): pairs of bins become their slopes'; y null for
// "complex".
__global__ void __launch_bounds__(kThreads)
    spectral_compare_kernel(const __grid_constant__ Shape shape, float2* x, float2* y, int64_t n,
                            unsigned chunks, const float* weight, bool onesided, float share,
                            float* losses) {
  __shared__ float partial[kThreads / 32];
  const int64_t bins = n / 2 + 1, row = blockIdx.x / chunks;
  const int64_t first = static_cast<int64_t>(blockIdx.x % chunks) * kChunk;
  const int64_t end = bins - first < kChunk ? bins : first + kChunk;
  float total = 0.f;
  for (int64_t k = first + threadIdx.x; k < end; k += kThreads) {
    float2 a = x[row * bins + k], b = y != nullptr ? y[row * bins + k] : make_float2(0.f, 0.f);
    const float w = bin_weight(k, n, onesided, weight);
    total += w * compare(shape, w * (is_twice(k, n) ? 0.5f : 1.f) * share * shape.scale, a, b);
    x[row * bins + k] = a;
    if (y != nullptr) y[row * bins + k] = b;
  }
  for (int half = 16; half > 0; half /= 2) total += __shfl_down_sync(0xffffffffu, total, half);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.f;
    for (int w = 0; w < kThreads / 32; ++w) sum += partial[w];
    losses[blockIdx.x] = sum;
  }
}

// Grid: channels times groups of rows times tiles of bins. sums (channels, groups, F).
__global__ void __launch_bounds__(kThreads)
    spectral_levels_kernel(const float2* x, int64_t batch, int64_t channels, int64_t bins,
                           bool power, unsigned groups, unsigned tiles, float* sums) {
  const int64_t k = static_cast<int64_t>(blockIdx.x % tiles) * kThreads + threadIdx.x;
  const int64_t item = blockIdx.x / tiles, channel = item / groups;
  const int64_t first = item % groups * kGroup,
                end = first + kGroup < batch ? first + kGroup : batch;
  if (k >= bins) return;
  float total = 0.f;
  for (int64_t row = first; row < end; ++row) {
    const float2 z = x[(row * channels + channel) * bins + k];
    total += power ? z.x * z.x + z.y * z.y : modulus(z);
  }
  sums[item * bins + k] = total;
}

// x (batch, channels, F) becomes the slopes' spectra, by factors (channels, F).
__global__ void __launch_bounds__(kThreads)
    spectral_scale_kernel(float2* x, int64_t entries, int64_t count, bool power,
                          const float* factors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const float2 z = x[i];
  const float by = factors[i % entries] * (power ? 2.f : inverse_or_zero(modulus(z)));
  x[i] = make_float2(z.x * by, z.y * by);
}

Shape shape_of(const SpectralCall& call) {
  const SpectralOptions& o = call.options;
  int group = 1;
  while (group < kMostRows && 2 * group * call.n <= kSamples) group *= 2;
  // Rows that no block transforms come as spectra: there is nothing to plan.
  const bool in_block = call.n > 1 && call.n <= kLongestInBlock;
  const int half = in_block ? static_cast<int>(call.n / 2) : 1;
  return {block_fft_plan(half),
          call.x.batch * call.channels,
          group,
          static_cast<float>(o.scale),
          o.power(),
          o.log(),
          o.l1,
          o.kind == kComplex,
          static_cast<float>(o.eps)};
}

int64_t parts_of(int64_t count, int64_t each) { return (count + each - 1) / each; }
int64_t groups_of(int64_t rows, const Shape& shape) { return parts_of(rows, shape.group); }

// float64 never comes here: the binding declines it.
template <class Function>
void dispatch_narrow(Dtype dtype, Function&& function) {
  dispatch_device(dtype, [&](auto element) {
    if constexpr (!std::is_same_v<decltype(element), double>) function(element);
  });
}

}  // namespace

int64_t spectral_pairs_scratch(const SpectralCall& call) {
  return call.mean ? call.x.batch * call.channels : 0;
}

int64_t spectral_batch_scratch(const SpectralCall& call) {
  const Shape shape = shape_of(call);
  return call.channels * (call.n / 2 + 1) *
         (groups_of(call.x.batch, shape) + groups_of(call.y.batch, shape) + 2);
}

void spectral_pairs_cuda(const SpectralCall& call, float* scratch, float* loss, int device,
                         void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const Shape shape = shape_of(call);
  const float share = call.mean ? 1.f / static_cast<float>(shape.rows) : 1.f;
  float* losses = call.mean ? scratch : loss;
  dispatch_narrow(call.dtype, [&](auto element) {
    using In = decltype(element);
    launch(&spectral_pairs_kernel<In>, dim3(static_cast<unsigned>(groups_of(shape.rows, shape))),
           dim3(kThreads), shared_bytes(shape, shape.complex ? 1 : 2), on, shape,
           static_cast<const In*>(call.x.from), static_cast<const In*>(call.y.from), call.x.slope,
           call.y.slope, call.weight, call.onesided, share, losses);
  });
  if (!call.mean) return;
  launch(&spectral_mean_kernel, dim3(1), dim3(kThreads), 0, on, losses, shape.rows,
         static_cast<double>(shape.rows), loss);
}

void spectral_batch_cuda(const SpectralCall& call, float* scratch, float* loss, int device,
                         void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const Shape shape = shape_of(call);
  const int64_t entries = call.channels * (call.n / 2 + 1);
  const int64_t groups_x = groups_of(call.x.batch, shape),
                groups_y = groups_of(call.y.batch, shape);
  float *factors_x = scratch, *factors_y = scratch + entries;
  float *sums_x = scratch + 2 * entries, *sums_y = sums_x + groups_x * entries;
  dispatch_narrow(call.dtype, [&](auto element) {
    using In = decltype(element);
    const auto run = [&](const DeviceSide& side, int64_t groups, float* sums,
                         const float* factors) {
      launch(&spectral_batch_kernel<In>, dim3(static_cast<unsigned>(groups * call.channels)),
             dim3(kThreads), shared_bytes(shape, 1), on, shape, static_cast<const In*>(side.from),
             side.batch, call.channels, groups, sums, factors, side.slope);
    };
    const float* none = nullptr;
    run(call.x, groups_x, sums_x, none);
    run(call.y, groups_y, sums_y, none);
    launch(&spectral_factors_kernel, dim3(1), dim3(kThreads), 0, on, shape,
           BatchSums{sums_x, sums_y, groups_x, groups_y, call.x.batch, call.y.batch}, call.n,
           call.channels, call.weight, call.onesided, factors_x, factors_y, loss);
    if (call.x.slope) run(call.x, groups_x, nullptr, factors_x);
    if (call.y.slope) run(call.y, groups_y, nullptr, factors_y);
  });
}

int64_t spectral_whole_scratch(const SpectralCall& call, bool batch_mean) {
  const int64_t bins = call.n / 2 + 1;
  if (!batch_mean) return call.x.batch * call.channels * parts_of(bins, kChunk);
  return call.channels * bins *
         (parts_of(call.x.batch, kGroup) + parts_of(call.y.batch, kGroup) + 2);
}

void spectral_whole_cuda(const SpectralCall& call, bool batch_mean, float* x, float* y,
                         bool wants_x, bool wants_y, float* scratch, float* loss, int device,
                         void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const Shape shape = shape_of(call);
  const int64_t n = call.n, bins = n / 2 + 1, rows = shape.rows, entries = call.channels * bins;
  float2 *of_x = reinterpret_cast<float2*>(x), *of_y = reinterpret_cast<float2*>(y);
  if (!batch_mean) {
    const int64_t chunks = parts_of(bins, kChunk);
    const float share = call.mean ? 1.f / static_cast<float>(rows) : 1.f;
    launch(&spectral_compare_kernel, dim3(static_cast<unsigned>(rows * chunks)), dim3(kThreads), 0,
           on, shape, of_x, of_y, n, chunks, call.weight, call.onesided, share, scratch);
    launch(&spectral_mean_kernel, dim3(call.mean ? 1 : static_cast<unsigned>(rows)), dim3(kThreads),
           0, on, static_cast<const float*>(scratch), call.mean ? rows * chunks : chunks,
           call.mean ? static_cast<double>(rows) : 1.0, loss);
    return;
  }
  const int64_t groups_x = parts_of(call.x.batch, kGroup),
                groups_y = parts_of(call.y.batch, kGroup);
  const int64_t tiles = parts_of(bins, kThreads);
  float *factors_x = scratch, *factors_y = scratch + entries;
  float *sums_x = scratch + 2 * entries, *sums_y = sums_x + groups_x * entries;
  const auto levels = [&](const float2* from, int64_t batch, int64_t groups, float* sums) {
    launch(&spectral_levels_kernel, dim3(static_cast<unsigned>(call.channels * groups * tiles)),
           dim3(kThreads), 0, on, from, batch, call.channels, bins, shape.power, groups, tiles,
           sums);
  };
  levels(of_x, call.x.batch, groups_x, sums_x);
  levels(of_y, call.y.batch, groups_y, sums_y);
  launch(&spectral_factors_kernel, dim3(1), dim3(kThreads), 0, on, shape,
         BatchSums{sums_x, sums_y, groups_x, groups_y, call.x.batch, call.y.batch}, n,
         call.channels, call.weight, call.onesided, factors_x, factors_y, loss);
  const auto scale = [&](float2* of, int64_t batch, const float* factors) {
    const int64_t count = batch * entries;
    launch(&spectral_scale_kernel, dim3(static_cast<unsigned>(parts_of(count, kThreads))),
           dim3(kThreads), 0, on, of, entries, count, shape.power, factors);
  };
  if (wants_x) scale(of_x, call.x.batch, factors_x);
  if (wants_y) scale(of_y, call.y.batch, factors_y);
}

}  // namespace dashpot::spectral
