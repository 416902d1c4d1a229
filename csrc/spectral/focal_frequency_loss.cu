// focal_frequency_loss on the device: input, target (N, C, H, W) -> loss () or (N, C), slope.
//
// The transform is linear: x - y is transformed once. Where a patch (h, w) fits, a block keeps it
// in shared memory: rows of half-length transforms, split into the half spectrum's columns, those
// transformed, weighted by w = P^(alpha/2), transformed back the same way: 12 bytes of traffic per
// pixel. Larger patches, odd and prime sides come as spectra from PyTorch's FFT; a pass then weighs
// them in place (a block for every kChunk bins of a patch), and one divides by the largest weight.
// In both, one block adds the patches' sums in order (float64). With D the spectrum, P = |D|^2:
//
//   loss = sum w P / (numel top),   slope = 2 / (numel top) idft(w D)
//
// Per pixel, float32: block 12 bytes, 5 log2 (h w) FLOPs for the transforms; weigh 8 bytes, scale 8
// bytes, and those of PyTorch's FFT.
#include "common/fft.cuh"
#include "common/numeric.cuh"
#include "spectral/cuda.h"

namespace dashpot::spectral {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kChunk = 2048;        // bins of a patch in a block
constexpr int64_t kShared = 96 * 1024;  // sm_86 has 99 KiB, less what is static

struct Weights {
  float half_alpha;
  bool log;
};

__device__ __forceinline__ float weight_of(float power, Weights options) {
  const float a = options.half_alpha;
  const float w = a == 0.f      ? 1.f
                  : a == 0.5f   ? sqrtf(power)
                  : a == 1.f    ? power
                  : power > 0.f ? powf(power, a)
                                : 0.f;
  return options.log ? log1pf(w) : w;
}

// The block's sum and maximum, for thread 0; two barriers.
struct Found {
  float total, top;
};
__device__ __forceinline__ Found of_block(float total, float top) {
  __shared__ float totals[kWarps], tops[kWarps];
  for (int half = 16; half > 0; half /= 2) {
    total += __shfl_down_sync(0xffffffffu, total, half);
    top = fmaxf(top, __shfl_down_sync(0xffffffffu, top, half));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = total, tops[threadIdx.x / 32] = top;
  __syncthreads();
  Found all{totals[0], tops[0]};
  for (int w = 1; w < kWarps; ++w) {
    all.total += totals[w];
    all.top = fmaxf(all.top, tops[w]);
  }
  return all;
}

struct Patch {
  BlockFft rows, columns;  // of w / 2 and of h
  int h, w, factor;
};

// Tables, the rows (h, w/2) and the half spectrum's columns (w/2 + 1, h).
struct Layout {
  float2 *roots_rows, *roots_columns, *rows, *columns;
  unsigned short *place_rows, *place_columns;
  __device__ Layout(float2* shared, const Patch& p) {
    roots_rows = shared;
    roots_columns = roots_rows + p.rows.n;
    rows = roots_columns + p.columns.n;
    columns = rows + p.h * pitch_of(p.rows.n);
    place_rows = reinterpret_cast<unsigned short*>(columns + (p.rows.n + 1) * pitch_of(p.h));
    place_columns = place_rows + p.rows.n;
  }
};

int64_t shared_bytes(int64_t h, int64_t w) {
  const int m = static_cast<int>(w / 2), n = static_cast<int>(h);
  return (m + n + h * pitch_of(m) + (m + 1) * int64_t{pitch_of(n)}) *
             static_cast<int64_t>(sizeof(float2)) +
         2 * (m + n);
}

// Grid: patches. found (items, 2): sum of w P, largest w. slope may be null.
template <class In>
__global__ void __launch_bounds__(kThreads)
    focal_block_kernel(const __grid_constant__ Patch p, const In* x, const In* y, Weights options,
                       bool batch, float share, float* found, float* slope) {
  DASHPOT_DYNAMIC_SHARED(float2, shared);
  const Layout at(shared, p);
  const int m = p.rows.n, of_row = pitch_of(m), of_column = pitch_of(p.h), pairs = m / 2 + 1;
  const int64_t image = blockIdx.x / (p.factor * p.factor), width = int64_t{p.w} * p.factor;
  const int patch = static_cast<int>(blockIdx.x % (p.factor * p.factor));
  const int64_t corner =
      ((image * p.factor + patch / p.factor) * p.h) * width + int64_t{patch % p.factor} * p.w;
  block_fft_tables(p.rows, at.roots_rows, at.place_rows);
  block_fft_tables(p.columns, at.roots_columns, at.place_columns);
  const float scale = rsqrtf(static_cast<float>(p.h) * static_cast<float>(p.w));
  for (int i = threadIdx.x; i < p.h * m; i += kThreads) {
    const int row = i / m, j = i - row * m;
    const int64_t from = corner + row * width + 2 * j;
    at.rows[row * of_row + padded(j)] =
        make_float2(scale * (device_cast<float>(x[from]) - device_cast<float>(y[from])),
                    scale * (device_cast<float>(x[from + 1]) - device_cast<float>(y[from + 1])));
  }
  __syncthreads();
  block_fft<false>(at.rows, p.h, p.rows, at.roots_rows);
  for (int i = threadIdx.x; i < p.h * pairs; i += kThreads) {
    const int k = i / p.h, row = i - k * p.h;
    const PairOfBins z = split_bins(at.rows + row * of_row, at.place_rows, at.roots_rows, m, k);
    at.columns[(m - k) * of_column + padded(row)] = z.high;
    at.columns[k * of_column + padded(row)] = z.low;
  }
  __syncthreads();
  block_fft<false>(at.columns, m + 1, p.columns, at.roots_columns);
  float total = 0.f, top = 0.f;
  for (int i = threadIdx.x; i < (m + 1) * p.h; i += kThreads) {
    const int k = i / p.h, row = i - k * p.h;
    float2& z = at.columns[k * of_column + padded(row)];
    const float power = z.x * z.x + z.y * z.y, w = weight_of(power, options);
    total += (k > 0 && k < m ? 2.f : 1.f) * w * power;
    top = fmaxf(top, w);
    z = make_float2(w * z.x, w * z.y);
  }
  const Found all = of_block(total, top);
  if (threadIdx.x == 0) {
    found[2 * static_cast<int64_t>(blockIdx.x)] = all.total;
    found[2 * static_cast<int64_t>(blockIdx.x) + 1] = all.top;
  }
  if (slope == nullptr) return;
  block_fft<true>(at.columns, m + 1, p.columns, at.roots_columns);
  for (int i = threadIdx.x; i < p.h * pairs; i += kThreads) {
    const int k = i / p.h, row = i - k * p.h;
    PairOfBins z{at.columns[k * of_column + padded(row)],
                 at.columns[(m - k) * of_column + padded(row)]};
    if (k == 0) z.low.y = z.high.y = 0.f;  // bins 0 and m of a real row are real
    merge_bins(at.rows + row * of_row, at.place_rows, at.roots_rows, m, k, z);
  }
  __syncthreads();
  block_fft<true>(at.rows, p.h, p.rows, at.roots_rows);
  const float by = batch ? 1.f : all.top;
  const float back = by > 0.f ? 2.f * share * scale / by : 0.f;
  for (int i = threadIdx.x; i < p.h * m; i += kThreads) {
    const int row = i / m, j = i - row * m;
    const float2 z = at.rows[row * of_row + padded(j)];
    float* to = slope + corner + row * width + 2 * j;
    to[0] = back * z.x;
    to[1] = back * z.y;
  }
}

// Grid: patches times chunks. spectra (items, h, F) become w D; found (items, chunks, 2).
__global__ void __launch_bounds__(kThreads)
    focal_weigh_kernel(float2* spectra, int64_t size, int64_t w, unsigned chunks, Weights options,
                       float* found) {
  const int64_t item = blockIdx.x / chunks, bins = w / 2 + 1;
  const int64_t first = static_cast<int64_t>(blockIdx.x % chunks) * kChunk;
  const int64_t end = size - first < kChunk ? size : first + kChunk;
  float total = 0.f, top = 0.f;
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    float2& z = spectra[item * size + i];
    const int64_t k = i % bins;
    const float power = z.x * z.x + z.y * z.y, weight = weight_of(power, options);
    total += (k > 0 && 2 * k != w ? 2.f : 1.f) * weight * power;
    top = fmaxf(top, weight);
    z = make_float2(weight * z.x, weight * z.y);
  }
  const Found all = of_block(total, top);
  if (threadIdx.x == 0) {
    found[2 * static_cast<int64_t>(blockIdx.x)] = all.total;
    found[2 * static_cast<int64_t>(blockIdx.x) + 1] = all.top;
  }
}

// One block. found (items, chunks, 2) -> losses, and factors (items,): 1 / the largest weight.
__global__ void __launch_bounds__(kThreads)
    focal_finish_kernel(const float* found, int64_t images, int64_t patches, int64_t chunks,
                        bool batch, bool mean, double share, float* factors, float* losses) {
  __shared__ float tops[kThreads];
  __shared__ double totals[kThreads];
  const int64_t items = images * patches;
  float top = 0.f;
  for (int64_t i = threadIdx.x; i < items * chunks; i += kThreads) {
    top = fmaxf(top, found[2 * i + 1]);
  }
  tops[threadIdx.x] = top;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      tops[threadIdx.x] = fmaxf(tops[threadIdx.x], tops[threadIdx.x + half]);
    }
  }
  __syncthreads();
  const float all = tops[0];
  double total = 0;
  for (int64_t image = threadIdx.x; image < images; image += kThreads) {
    double own = 0;
    for (int64_t item = image * patches; item < (image + 1) * patches; ++item) {
      double sum = 0;
      float by = 0.f;
      for (int64_t i = item * chunks; i < (item + 1) * chunks; ++i) {
        sum += found[2 * i];
        by = fmaxf(by, found[2 * i + 1]);
      }
      if (batch) by = all;
      own += by > 0.f ? sum / by : 0.0;
      factors[item] = by > 0.f ? 1.f / by : 0.f;
    }
    if (!mean) losses[image] = static_cast<float>(own * share);
    total += own;
  }
  totals[threadIdx.x] = total;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) totals[threadIdx.x] += totals[threadIdx.x + half];
  }
  if (mean && threadIdx.x == 0) *losses = static_cast<float>(totals[0] * share);
}

// x (items, each) *= scale factors[item].
__global__ void __launch_bounds__(kThreads)
    focal_scale_kernel(float* x, int64_t each, int64_t count, float scale, const float* factors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) x[i] *= scale * factors[i / each];
}

int64_t chunks_of(const FocalCall& call) {
  return call.spectra ? (call.h * (call.w / 2 + 1) + kChunk - 1) / kChunk : 1;
}

}  // namespace

bool focal_in_block(int64_t h, int64_t w) {
  return h * w <= kShared && shared_bytes(h, w) <= kShared;
}

int64_t focal_scratch(const FocalCall& call) {
  const int64_t items = call.images * call.factor * call.factor;
  return items * (2 * chunks_of(call) + 1);
}

void focal_cuda(const FocalCall& call, float* scratch, float* loss, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t patches = call.factor * call.factor, items = call.images * patches;
  const int64_t chunks = chunks_of(call), size = call.h * (call.w / 2 + 1);
  float *factors = scratch, *found = scratch + items;
  const Weights options{static_cast<float>(call.options.alpha / 2), call.options.log};
  const auto share = static_cast<float>(call.share);
  const auto blocks = [](int64_t count) {
    return dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads));
  };
  if (call.spectra) {
    launch(&focal_weigh_kernel, dim3(static_cast<unsigned>(items * chunks)), dim3(kThreads), 0, on,
           reinterpret_cast<float2*>(call.spectra), size, call.w, chunks, options, found);
  } else {
    const Patch patch{block_fft_plan(static_cast<int>(call.w / 2)),
                      block_fft_plan(static_cast<int>(call.h)), static_cast<int>(call.h),
                      static_cast<int>(call.w), static_cast<int>(call.factor)};
    dispatch_device(call.dtype, [&](auto element) {
      using In = decltype(element);
      if constexpr (!std::is_same_v<In, double>) {  // the binding declines float64
        launch(&focal_block_kernel<In>, dim3(static_cast<unsigned>(items)), dim3(kThreads),
               shared_bytes(call.h, call.w), on, patch, static_cast<const In*>(call.x),
               static_cast<const In*>(call.y), options, call.options.batch, share, found,
               call.slope);
      }
    });
  }
  launch(&focal_finish_kernel, dim3(1), dim3(kThreads), 0, on, static_cast<const float*>(found),
         call.images, patches, chunks, call.options.batch, call.mean, call.share, factors, loss);
  const float* of_items = factors;
  if (call.spectra && call.wanted) {
    launch(&focal_scale_kernel, blocks(2 * items * size), dim3(kThreads), 0, on, call.spectra,
           2 * size, 2 * items * size, 2.f * share, of_items);
  } else if (call.slope && call.options.batch) {
    const int64_t count = items * call.h * call.w;  // one factor for all: the order does not matter
    launch(&focal_scale_kernel, blocks(count), dim3(kThreads), 0, on, call.slope, count, count, 1.f,
           of_items);
  }
}

}  // namespace dashpot::spectral
