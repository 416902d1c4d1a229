// multi_resolution_stft_loss on the device: input, target (rows, T) -> loss, slopes (rows, T).
//
// Frames are never in memory. First pass, per resolution: a block takes some neighbouring frames of
// a row from the signals (edges mirrored, windowed, in shared memory), transforms them and writes
// four partial sums. One block then adds those (float64, in order) and writes the loss and, per
// example, what the first term's derivative is multiplied with. Second pass: a block owns a segment
// of a row, transforms the frames that touch it again, turns their bins into derivatives,
// transforms back and adds windowed samples up in shared memory: no atomics, one order. The last
// kernel adds resolutions and folds mirrored samples back. A segment is four windows long, so a
// quarter of the frames are transformed twice; shorter where four windows would not fit the shared
// memory that every device since sm_80 gives a block. Memory: the padded slopes of R resolutions.
//
// Lengths that no block transforms: the frames of some rows are in memory, transformed by PyTorch's
// FFT there and back; what comes before, between and after is one kernel each.
//
// Per resolution and sample of a row, with c = length / hop frames over each (5 by default, so that
// all but the first read of a sample come from the caches), L = 2.5 log2 n_fft:
//
//   sums     8 c bytes read, 16 written per group of frames   2 L n_fft / hop FLOPs
//   slopes   10 c bytes read, 4 written                       3.75 L n_fft / hop FLOPs
//   fold     4 bytes read, 4 to 8 at the slope
#include <algorithm>

#include "common/fft.cuh"
#include "common/numeric.cuh"
#include "spectral/cuda.h"

namespace dashpot::spectral {
namespace {

constexpr int kThreads = 256;
constexpr int kSamples = 2048;  // of a signal in a block, if frames are shorter
constexpr int kMostFrames = 8;
constexpr int kSums = 4;                  // (m_x - m_y)^2, m_y^2, log, linear
constexpr int64_t kWholeBlock = 1 << 26;  // samples of frames that PyTorch's FFT takes at a time
constexpr int64_t kShared = 96 * 1024;    // sm_86 has 99 KiB, less what is static

struct Frames {
  BlockFft fft;  // of half of n_fft
  int hop, length, group;
  int64_t rows, t, frames, begin;  // begin: first sample of the first frame's window, may be < 0
  const float* window;             // (length,) or null: periodic Hann
  float power_floor;
  bool l2, log, linear;
};

struct Bins {
  float2 x, y;  // X / m_x, Y / m_y, or 0 below the floor
  float m_x, m_y, gap, over, step;
};

__device__ __forceinline__ Bins compare(const Frames& f, float2 x, float2 y, float counts,
                                        float (&sums)[kSums]) {
  const float power_x = x.x * x.x + x.y * x.y, power_y = y.x * y.x + y.y * y.y;
  Bins b;
  b.m_x = sqrtf(fmaxf(power_x, f.power_floor));
  b.m_y = sqrtf(fmaxf(power_y, f.power_floor));
  const float back_x = power_x < f.power_floor ? 0.f : 1.f / b.m_x;
  const float back_y = power_y < f.power_floor ? 0.f : 1.f / b.m_y;
  b.x = make_float2(x.x * back_x, x.y * back_x);
  b.y = make_float2(y.x * back_y, y.y * back_y);
  b.gap = b.m_x - b.m_y;
  const float sign = b.gap > 0.f ? 1.f : b.gap < 0.f ? -1.f : 0.f;
  const float ratio = f.log ? logf(b.m_x / b.m_y) : 0.f;
  b.over = f.l2 ? 2.f * ratio : sign;
  b.step = f.l2 ? 2.f * b.gap : sign;
  sums[0] += counts * b.gap * b.gap;
  sums[1] += counts * b.m_y * b.m_y;
  sums[2] += counts * (f.l2 ? ratio * ratio : sign * ratio);
  sums[3] += counts * (f.l2 ? b.gap * b.gap : sign * b.gap);
  return b;
}

__device__ __forceinline__ int64_t mirrored(int64_t t, int64_t length) {
  if (t < 0) t = -t;
  return t < length ? t : 2 * (length - 1) - t;
}

__device__ __forceinline__ float window_at(const Frames& f, int t) {
  if (f.window != nullptr) return f.window[t];
  const float s = sinpif(static_cast<float>(t) / static_cast<float>(f.length));
  return s * s;
}

// d loss / d m of one side at a bin, times the bin's direction.
struct Derivative {
  float of_gap, of_norm, of_log, of_linear;
  bool target;

  __device__ Derivative(const StftTerms& terms, const float* factors, int64_t row, bool of_target)
      : target(of_target) {
    const int64_t example = row / terms.channels;
    const float side = target ? -1.f : 1.f;
    of_gap = side * terms.gap * factors[2 * example];
    of_norm = target ? -terms.gap * factors[2 * example + 1] : 0.f;
    of_log = side * terms.log, of_linear = side * terms.linear;
  }

  // weight: 1/2 where the bin stands for two.
  __device__ __forceinline__ float2 at(const Frames& f, float2 x, float2 y, float weight) const {
    float unused[kSums] = {};
    const Bins bin = compare(f, x, y, 0.f, unused);
    const float level = target ? bin.m_y : bin.m_x;
    const float d = weight * (of_gap * bin.gap + of_norm * level + of_log * bin.over / level +
                              of_linear * bin.step);
    const float2 z = target ? bin.y : bin.x;
    return make_float2(d * z.x, d * z.y);
  }
};

// The block's sums, added up in one order: sums (4,). partial: (4, warps).
__device__ __forceinline__ void add_up(float (&total)[kSums], float (*partial)[kThreads / 32],
                                       float* sums) {
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    for (int half = 16; half > 0; half /= 2) {
      total[s] += __shfl_down_sync(0xffffffffu, total[s], half);
    }
    if (threadIdx.x % 32 == 0) partial[s][threadIdx.x / 32] = total[s];
  }
  __syncthreads();
  if (threadIdx.x < kSums) {
    float all = 0.f;
    for (int w = 0; w < kThreads / 32; ++w) all += partial[threadIdx.x][w];
    sums[threadIdx.x] = all;
  }
}

// Tables, the window and two groups of frames.
struct Layout {
  float2* roots;
  unsigned short* place;
  float2 *x, *y;
  float *window, *sum;
  __device__ Layout(float2* shared, const Frames& f)
      : roots(shared), place(reinterpret_cast<unsigned short*>(shared + f.fft.n)) {
    x = shared + f.fft.n + (f.fft.n + 3) / 4;
    y = x + f.group * pitch_of(f.fft.n);
    window = reinterpret_cast<float*>(y + f.group * pitch_of(f.fft.n));
    sum = window + f.length;
  }
};

int64_t shared_bytes(const Frames& f, int segment) {
  const int64_t n = f.fft.n;
  return (n + (n + 3) / 4 + 2 * f.group * pitch_of(static_cast<int>(n))) *
             static_cast<int64_t>(sizeof(float2)) +
         (f.length + segment) * static_cast<int64_t>(sizeof(float));
}

__device__ __forceinline__ void tables(const Frames& f, const Layout& at) {
  for (int t = threadIdx.x; t < f.length; t += kThreads) at.window[t] = window_at(f, t);
  block_fft_tables(f.fft, at.roots, at.place);
}

// Frames first, first + 1, ... of a row, windowed; zeros follow the window.
template <class In>
__device__ __forceinline__ void load_frames(const Frames& f, const In* row, int64_t first,
                                            int count, const float* window, float2* to) {
  const int n = 2 * f.fft.n, pitch = pitch_of(f.fft.n);
  for (int i = threadIdx.x; i < count * n; i += kThreads) {
    const int frame = i / n, t = i - frame * n;
    float value = 0.f;
    if (t < f.length) {
      const int64_t at = mirrored(f.begin + (first + frame) * f.hop + t, f.t);
      value = device_cast<float>(row[at]) * window[t];
    }
    float2* pair = to + frame * pitch + padded(t / 2);
    (t % 2 ? pair->y : pair->x) = value;
  }
}

template <class In>
__device__ __forceinline__ void transform_frames(const Frames& f, const In* x, const In* y,
                                                 int64_t row, int64_t first, int count,
                                                 const Layout& at) {
  load_frames(f, x + row * f.t, first, count, at.window, at.x);
  load_frames(f, y + row * f.t, first, count, at.window, at.y);
  __syncthreads();
  block_fft<false>(at.x, count, f.fft, at.roots);
  block_fft<false>(at.y, count, f.fft, at.roots);
}

// Grid: rows times groups of frames. sums (rows, groups, 4).
template <class In>
__global__ void __launch_bounds__(kThreads)
    stft_sums_kernel(const __grid_constant__ Frames f, const In* x, const In* y, unsigned groups,
                     float* sums) {
  DASHPOT_DYNAMIC_SHARED(float2, shared);
  __shared__ float partial[kSums][kThreads / 32];
  const Layout at(shared, f);
  const int64_t first = static_cast<int64_t>(blockIdx.x % groups) * f.group;
  const int64_t row = blockIdx.x / groups;
  const int m = f.fft.n, pitch = pitch_of(m);
  const int count =
      static_cast<int>(f.frames - first < f.group ? f.frames - first : int64_t{f.group});
  tables(f, at);
  transform_frames(f, x, y, row, first, count, at);
  float total[kSums] = {};
  const int pairs = m / 2 + 1;
  for (int i = threadIdx.x; i < count * pairs; i += kThreads) {
    const int frame = i / pairs, k = i - frame * pairs;
    const PairOfBins a = split_bins(at.x + frame * pitch, at.place, at.roots, m, k);
    const PairOfBins b = split_bins(at.y + frame * pitch, at.place, at.roots, m, k);
    compare(f, a.low, b.low, 1.f, total);
    compare(f, a.high, b.high, 2 * k == m ? 0.f : 1.f, total);
  }
  add_up(total, partial, sums + static_cast<int64_t>(blockIdx.x) * kSums);
}

// One block per resolution's call: adds the partial sums per example, adds to losses (each,), and
// writes factors (E, 2): of m_x - m_y and of m_y.
__global__ void __launch_bounds__(kThreads)
    stft_finish_kernel(const float* sums, int64_t groups, const __grid_constant__ StftTerms terms,
                       bool first, float* factors, float* losses) {
  __shared__ double part[kThreads][kSums + 1];  // the last: examples' first terms
  __shared__ double batch[kSums + 1];
  const int64_t per_example = terms.channels * groups;
  double all[kSums + 1] = {};
  // Each example's sums by one thread, in order.
  for (int64_t e = threadIdx.x; e < terms.examples; e += kThreads) {
    double own[kSums] = {};
    for (int64_t i = 0; i < per_example; ++i) {
      for (int s = 0; s < kSums; ++s) own[s] += sums[(e * per_example + i) * kSums + s];
    }
    for (int s = 0; s < kSums; ++s) all[s] += own[s];
    const double gap = sqrt(own[0]), norm = sqrt(own[1]);
    const double weight = terms.none ? 1.0 : 1.0 / static_cast<double>(terms.examples);
    factors[2 * e] = static_cast<float>(gap > 0 ? weight / (gap * norm) : 0.0);
    factors[2 * e + 1] = static_cast<float>(weight * gap / (norm * norm * norm));
    all[kSums] += weight * gap / norm;
    const double loss = terms.gap * gap / norm + terms.log * own[2] + terms.linear * own[3];
    if (terms.none) losses[e] = static_cast<float>((first ? 0.0 : losses[e]) + loss);
  }
  if (terms.none) return;
  for (int s = 0; s <= kSums; ++s) part[threadIdx.x][s] = all[s];
  __syncthreads();
  if (threadIdx.x <= kSums) {
    double total = 0;
    for (int i = 0; i < kThreads; ++i) total += part[i][threadIdx.x];
    batch[threadIdx.x] = total;
  }
  __syncthreads();
  const double gap = sqrt(batch[0]), norm = sqrt(batch[1]);
  if (terms.together) {
    for (int64_t e = threadIdx.x; e < terms.examples; e += kThreads) {
      factors[2 * e] = static_cast<float>(gap > 0 ? 1.0 / (gap * norm) : 0.0);
      factors[2 * e + 1] = static_cast<float>(gap / (norm * norm * norm));
    }
  }
  if (threadIdx.x != 0) return;
  const double ratio = terms.together ? gap / norm : batch[kSums];
  const double loss = terms.gap * ratio + terms.log * batch[2] + terms.linear * batch[3];
  *losses = static_cast<float>((first ? 0.0 : *losses) + loss);
}

// Grid: rows times segments. slopes: (rows, span) of positions from f.begin on; may be null.
template <class In>
__global__ void __launch_bounds__(kThreads)
    stft_slopes_kernel(const __grid_constant__ Frames f, const In* x, const In* y,
                       const __grid_constant__ StftTerms terms, const float* factors, bool target,
                       int segment, unsigned segments, int64_t span, float* slopes) {
  DASHPOT_DYNAMIC_SHARED(float2, shared);
  const Layout at(shared, f);
  const int64_t start = static_cast<int64_t>(blockIdx.x % segments) * segment;
  const int64_t row = blockIdx.x / segments;
  const int m = f.fft.n, pitch = pitch_of(m), pairs = m / 2 + 1;
  const int size = static_cast<int>(span - start < segment ? span - start : int64_t{segment});
  const Derivative derivative(terms, factors, row, target);
  for (int i = threadIdx.x; i < size; i += kThreads) at.sum[i] = 0.f;
  tables(f, at);
  // Frames k with k hop < start + size and k hop + length > start.
  const int64_t from = start < f.length ? 0 : (start - f.length) / f.hop + 1;
  const int64_t last = (start + size - 1) / f.hop;
  const int64_t end = last < f.frames ? last + 1 : f.frames;
  for (int64_t first = from; first < end; first += f.group) {
    const int count = static_cast<int>(end - first < f.group ? end - first : int64_t{f.group});
    transform_frames(f, x, y, row, first, count, at);
    for (int i = threadIdx.x; i < count * pairs; i += kThreads) {
      const int frame = i / pairs, k = i - frame * pairs;
      float2* own = (target ? at.y : at.x) + frame * pitch;
      const PairOfBins a = split_bins(at.x + frame * pitch, at.place, at.roots, m, k);
      const PairOfBins b = split_bins(at.y + frame * pitch, at.place, at.roots, m, k);
      const float half = k == 0 ? 1.f : 0.5f;
      const PairOfBins slopes_of{derivative.at(f, a.low, b.low, half),
                                 derivative.at(f, a.high, b.high, half)};
      merge_bins(own, at.place, at.roots, m, k, slopes_of);
    }
    __syncthreads();
    float2* own = target ? at.y : at.x;
    block_fft<true>(own, count, f.fft, at.roots);
    // A thread owns positions, and adds the group's frames to each in order.
    for (int i = threadIdx.x; i < size; i += kThreads) {
      float total = at.sum[i];
      for (int frame = 0; frame < count; ++frame) {
        const int64_t t = start + i - (first + frame) * f.hop;
        if (t < 0 || t >= f.length) continue;
        const float2 z = own[frame * pitch + padded(static_cast<int>(t / 2))];
        total += at.window[t] * (t % 2 ? z.y : z.x);
      }
      at.sum[i] = total;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < size; i += kThreads) slopes[row * span + start + i] = at.sum[i];
}

// slope[t] (+)= what lies at t and at the positions mirrored to it.
__global__ void __launch_bounds__(kThreads)
    stft_fold_kernel(const float* slopes, int64_t rows, int64_t t, int64_t begin, int64_t span,
                     bool first, float* slope) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * t) return;
  const int64_t row = i / t, at = i - row * t;
  const float* of = slopes + row * span - begin;
  float total = first ? 0.f : slope[i];
  const int64_t after = 2 * (t - 1) - at;
  if (at >= begin && at < begin + span) total += of[at];
  if (at > 0 && -at >= begin && -at < begin + span) total += of[-at];
  if (at < t - 1 && after >= begin && after < begin + span) total += of[after];
  slope[i] = total;
}

// Lengths that no block transforms come and go through PyTorch's FFT, some rows at a time. Windowed
// frames of rows from first_row on: to (2, count, n), first those of x.
template <class In>
__global__ void __launch_bounds__(kThreads)
    stft_window_kernel(const __grid_constant__ Frames f, const In* x, const In* y, int64_t n,
                       int64_t first_row, int64_t count, float* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= 2 * count * n) return;
  const int64_t both = i / n, t = i - both * n, frame = both < count ? both : both - count;
  float value = 0.f;
  if (t < f.length) {
    const int64_t at = mirrored(f.begin + frame % f.frames * f.hop + t, f.t);
    const In* row = (both < count ? x : y) + (first_row + frame / f.frames) * f.t;
    value = device_cast<float>(row[at]) * window_at(f, static_cast<int>(t));
  }
  to[i] = value;
}

// Grid: frames. spectra (2, count, bins) -> sums (count, 4).
__global__ void __launch_bounds__(kThreads)
    stft_bins_kernel(const __grid_constant__ Frames f, const float2* spectra, int64_t count,
                     int64_t bins, float* sums) {
  __shared__ float partial[kSums][kThreads / 32];
  const float2 *x = spectra + blockIdx.x * bins, *y = x + count * bins;
  float total[kSums] = {};
  for (int64_t k = threadIdx.x; k < bins; k += kThreads) compare(f, x[k], y[k], 1.f, total);
  add_up(total, partial, sums + static_cast<int64_t>(blockIdx.x) * kSums);
}

// One side's slopes' spectra (count, bins).
__global__ void __launch_bounds__(kThreads)
    stft_spread_kernel(const __grid_constant__ Frames f, const __grid_constant__ StftTerms terms,
                       const float* factors, bool target, int64_t first_row, const float2* spectra,
                       int64_t count, int64_t n, float2* slopes) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, bins = n / 2 + 1;
  if (i >= count * bins) return;
  const int64_t frame = i / bins, k = i - frame * bins;
  const Derivative derivative(terms, factors, first_row + frame / f.frames, target);
  const float weight = k == 0 || 2 * k == n ? 1.f : 0.5f;
  slopes[i] = derivative.at(f, spectra[i], spectra[i + count * bins], weight);
}

// Frames (rows, frames, n), windowed and added up: a thread owns a position. slopes (rows, span).
__global__ void __launch_bounds__(kThreads)
    stft_add_kernel(const __grid_constant__ Frames f, const float* frames, int64_t n, int64_t rows,
                    int64_t span, float* slopes) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * span) return;
  const int64_t row = i / span, at = i - row * span, last = at / f.hop;
  const int64_t from = at < f.length ? 0 : (at - f.length) / f.hop + 1;
  const int64_t end = last < f.frames ? last + 1 : f.frames;
  float total = 0.f;
  for (int64_t frame = from; frame < end; ++frame) {
    const int t = static_cast<int>(at - frame * f.hop);
    total += window_at(f, t) * frames[(row * f.frames + frame) * n + t];
  }
  slopes[i] = total;
}

int group_of(int64_t n_fft) {
  int group = 1;
  while (group < kMostFrames && 2 * group * n_fft <= kSamples) group *= 2;
  return group;
}

struct Sizes {
  int64_t frames, groups, span;
  int segment;
  Sizes(const StftDeviceCall& call, size_t r)
      : frames(frames_of(call.t, call.n_ffts[r], call.hops[r])),
        groups(frames),
        span((frames - 1) * call.hops[r] + call.lengths[r]),
        segment(0) {
    if (call.whole[r]) return;
    groups = (frames + group_of(call.n_ffts[r]) - 1) / group_of(call.n_ffts[r]);
    segment = static_cast<int>(std::min(4 * call.lengths[r], room(call, r)));
  }

  // Samples that the shared memory has room for beside the tables and the frames.
  static int64_t room(const StftDeviceCall& call, size_t r) {
    Frames f{};
    f.fft.n = static_cast<int>(call.n_ffts[r] / 2);
    f.group = group_of(call.n_ffts[r]);
    f.length = static_cast<int>(call.lengths[r]);
    return (kShared - shared_bytes(f, 0)) / static_cast<int64_t>(sizeof(float));
  }
};

dim3 blocks_of(int64_t threads) {
  return dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
}

// One resolution of a call: its kernels' arguments and scratch.
struct Resolution {
  const StftDeviceCall& call;
  size_t r;
  Sizes sizes;
  int64_t n;
  Frames f;
  float *factors, *sums, *slopes;
  cudaStream_t on;

  Resolution(const StftDeviceCall& of, size_t at, float* scratch, void* stream)
      : call(of), r(at), sizes(of, at), n(of.n_ffts[at]), on(static_cast<cudaStream_t>(stream)) {
    const int64_t length = call.lengths[r];
    f = Frames{block_fft_plan(call.whole[r] ? 1 : static_cast<int>(n / 2)),
               static_cast<int>(call.hops[r]),
               static_cast<int>(length),
               group_of(n),
               call.rows,
               call.t,
               sizes.frames,
               (n - length) / 2 - n / 2,
               call.windows[r],
               call.power_floor,
               call.l2,
               call.terms[r].log != 0,
               call.terms[r].linear != 0};
    factors = scratch;
    sums = factors + 2 * call.terms[r].examples;
    slopes = sums + call.rows * sizes.groups * kSums;
  }

  void finish(float* losses) const {
    launch(&stft_finish_kernel, dim3(1), dim3(kThreads), 0, on, static_cast<const float*>(sums),
           sizes.groups, call.terms[r], r == 0, factors, losses);
  }
  void fold(float* slope) const {
    launch(&stft_fold_kernel, blocks_of(call.rows * call.t), dim3(kThreads), 0, on,
           static_cast<const float*>(slopes), call.rows, call.t, f.begin, sizes.span, r == 0,
           slope);
  }
};

template <class In>
void in_blocks(const Resolution& of, const In* x, const In* y, float* losses, float* slope_x,
               float* slope_y) {
  const StftDeviceCall& call = of.call;
  const Sizes& sizes = of.sizes;
  launch(&stft_sums_kernel<In>, dim3(static_cast<unsigned>(call.rows * sizes.groups)),
         dim3(kThreads), shared_bytes(of.f, 0), of.on, of.f, x, y, sizes.groups, of.sums);
  of.finish(losses);
  for (const bool target : {false, true}) {
    float* slope = target ? slope_y : slope_x;
    if (slope == nullptr) continue;
    const int64_t segments = (sizes.span + sizes.segment - 1) / sizes.segment;
    launch(&stft_slopes_kernel<In>, dim3(static_cast<unsigned>(call.rows * segments)),
           dim3(kThreads), shared_bytes(of.f, sizes.segment), of.on, of.f, x, y, call.terms[of.r],
           static_cast<const float*>(of.factors), target, sizes.segment, segments, sizes.span,
           of.slopes);
    of.fold(slope);
  }
}

template <class In>
void by_pytorch(const Resolution& of, const In* x, const In* y, const StftTransforms& transforms,
                float* losses, float* slope_x, float* slope_y) {
  const StftDeviceCall& call = of.call;
  const int64_t frames = of.sizes.frames, n = of.n, bins = n / 2 + 1, span = of.sizes.span;
  const int64_t most = std::clamp<int64_t>(kWholeBlock / (frames * n), 1, call.rows);
  const float2* spectra = nullptr;
  const auto transform = [&](int64_t first, int64_t rows) {
    const int64_t count = rows * frames;
    launch(&stft_window_kernel<In>, blocks_of(2 * count * n), dim3(kThreads), 0, of.on, of.f, x, y,
           n, first, count, transforms.frames(count, n));
    spectra = reinterpret_cast<const float2*>(transforms.forward());
  };
  for (int64_t first = 0; first < call.rows; first += most) {
    const int64_t rows = std::min(most, call.rows - first);
    transform(first, rows);
    launch(&stft_bins_kernel, dim3(static_cast<unsigned>(rows * frames)), dim3(kThreads), 0, of.on,
           of.f, spectra, rows * frames, bins, of.sums + first * frames * kSums);
  }
  of.finish(losses);
  for (const bool target : {false, true}) {
    float* slope = target ? slope_y : slope_x;
    if (slope == nullptr) continue;
    for (int64_t first = 0; first < call.rows; first += most) {
      const int64_t rows = std::min(most, call.rows - first), count = rows * frames;
      if (most < call.rows) transform(first, rows);  // else they are there
      launch(&stft_spread_kernel, blocks_of(count * bins), dim3(kThreads), 0, of.on, of.f,
             call.terms[of.r], static_cast<const float*>(of.factors), target, first, spectra, count,
             n, reinterpret_cast<float2*>(transforms.slopes(count, bins)));
      launch(&stft_add_kernel, blocks_of(rows * span), dim3(kThreads), 0, of.on, of.f,
             transforms.back(n), n, rows, span, of.slopes + first * span);
    }
    of.fold(slope);
  }
}

}  // namespace

int64_t stft_scratch(const StftDeviceCall& call) {
  int64_t most = 0;
  for (size_t r = 0; r < call.n_ffts.size(); ++r) {
    const Sizes sizes(call, r);
    most = std::max(most, call.rows * (sizes.groups * kSums + sizes.span));
  }
  return most + 2 * (call.rows / call.terms[0].channels);
}

void stft_cuda(const StftDeviceCall& call, const StftTransforms& transforms, float* scratch,
               float* losses, float* slope_x, float* slope_y, int device, void* stream) {
  const DeviceGuard guard(device);
  for (size_t r = 0; r < call.n_ffts.size(); ++r) {
    const Resolution resolution(call, r, scratch, stream);
    dispatch_device(call.dtype, [&](auto element) {
      using In = decltype(element);
      if constexpr (!std::is_same_v<In, double>) {  // the binding declines float64
        const In *x = static_cast<const In*>(call.x), *y = static_cast<const In*>(call.y);
        if (call.whole[r]) {
          by_pytorch(resolution, x, y, transforms, losses, slope_x, slope_y);
        } else {
          in_blocks(resolution, x, y, losses, slope_x, slope_y);
        }
      }
    });
  }
}

}  // namespace dashpot::spectral
