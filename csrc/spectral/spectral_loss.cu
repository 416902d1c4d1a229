// spectral_loss on the device: input, target (rows, n) -> loss () or (rows,), slopes (rows, n).
//
// Pairs, one launch and a sum: a block holds some rows of both signals in shared memory (rows times
// n up to 2,048), transforms, compares and transforms back; 12 bytes of traffic per sample. Teams
// of threads own rows where a row's loss is summed. Batch averages, three launches: rows
// transformed and |X| added over a block's rows, partial sums to memory; one block adds them
// (float64, in order), takes logarithms, writes the loss and a factor per bin; rows transformed
// again, multiplied and transformed back. Transforming again reads 4 bytes a sample where keeping
// the spectra would write and read 8.
#include "common/fft.cuh"
#include "common/numeric.cuh"
#include "spectral/cuda.h"

namespace dashpot::spectral {
namespace {

constexpr int kThreads = 256;
constexpr int kSamples = 2048;  // of a signal in a block, if rows are shorter
constexpr int kMostRows = 8;    // so that a team is a warp at least

struct Shape {
  BlockFft fft;  // of half the length
  int64_t rows;  // all of them
  int group;     // rows of a block
  float scale;
  bool power, log, l1, complex;
  float eps;
};

// h_k w_k over the number of bins.
__device__ __forceinline__ float bin_weight(int k, int m, bool onesided, const float* weight) {
  const bool twice = k > 0 && k < m;
  const float h = (twice && !onesided ? 2.f : 1.f) / static_cast<float>(onesided ? m + 1 : 2 * m);
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
      const float low = bin_weight(k, m, onesided, weight);
      const float high = bin_weight(m - k, m, onesided, weight);
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

// loss = mean of losses (rows,), one block, in a fixed order.
__global__ void __launch_bounds__(kThreads)
    spectral_mean_kernel(const float* losses, int64_t rows, float* loss) {
  __shared__ double sums[kThreads];
  double total = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) total += losses[i];
  sums[threadIdx.x] = total;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *loss = static_cast<float>(sums[0] / static_cast<double>(rows));
}

// Grid: (groups, channels). With factors: slopes of a group's rows; else partial sums of their
// levels, sums (channels, groups, F).
template <class In>
__global__ void __launch_bounds__(kThreads, 2)
    spectral_batch_kernel(const __grid_constant__ Shape shape, const In* from, int64_t batch,
                          float* sums, const float* factors, float* slope) {
  DASHPOT_DYNAMIC_SHARED(float2, shared);
  const Layout at(shared, shape);
  const int m = shape.fft.n, pitch = pitch_of(m), bins = m + 1;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * shape.group, n = 2 * int64_t{m};
  const int64_t channel = blockIdx.y, channels = gridDim.y;
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
    float* to = sums + (channel * gridDim.x + blockIdx.x) * bins;
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
    spectral_factors_kernel(const __grid_constant__ Shape shape, BatchSums sums, int64_t channels,
                            const float* weight, bool onesided, float* factors_x, float* factors_y,
                            float* loss) {
  __shared__ double totals[kThreads];
  const int m = shape.fft.n, bins = m + 1;
  double total = 0;
  for (int64_t i = threadIdx.x; i < channels * bins; i += kThreads) {
    const int64_t channel = i / bins;
    const int k = static_cast<int>(i - channel * bins);
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
    const double h = bin_weight(k, m, onesided, weight) / static_cast<double>(channels);
    total += h * (shape.l1 ? sign * gap : gap * gap);
    const double slope =
        h * shape.scale * (k > 0 && k < m ? 0.5 : 1.0) * (shape.l1 ? sign : 2 * gap);
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

Shape shape_of(const SpectralCall& call) {
  const SpectralOptions& o = call.options;
  int group = 1;
  while (group < kMostRows && 2 * group * call.n <= kSamples) group *= 2;
  return {block_fft_plan(static_cast<int>(call.n / 2)),
          call.x.batch * call.channels,
          group,
          static_cast<float>(o.scale),
          o.power(),
          o.log(),
          o.l1,
          o.kind == kComplex,
          static_cast<float>(o.eps)};
}

int64_t groups_of(int64_t rows, const Shape& shape) {
  return (rows + shape.group - 1) / shape.group;
}

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
  launch(&spectral_mean_kernel, dim3(1), dim3(kThreads), 0, on, losses, shape.rows, loss);
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
      launch(&spectral_batch_kernel<In>,
             dim3(static_cast<unsigned>(groups), static_cast<unsigned>(call.channels)),
             dim3(kThreads), shared_bytes(shape, 1), on, shape, static_cast<const In*>(side.from),
             side.batch, sums, factors, side.slope);
    };
    const float* none = nullptr;
    run(call.x, groups_x, sums_x, none);
    run(call.y, groups_y, sums_y, none);
    launch(&spectral_factors_kernel, dim3(1), dim3(kThreads), 0, on, shape,
           BatchSums{sums_x, sums_y, groups_x, groups_y, call.x.batch, call.y.batch}, call.channels,
           call.weight, call.onesided, factors_x, factors_y, loss);
    if (call.x.slope) run(call.x, groups_x, nullptr, factors_x);
    if (call.y.slope) run(call.y, groups_y, nullptr, factors_y);
  });
}

}  // namespace dashpot::spectral
