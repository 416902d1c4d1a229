// CUDA on the CPU, for tests: a `.cu` file that is compiled as host C++ against this header runs
// its kernels without a GPU. Included by csrc/common/cuda.cuh under -DDASHPOT_EMULATE.
//
// Each CUDA thread is a fiber. The threads of a block run one at a time, each until its next
// barrier or warp intrinsic, and which one goes on is drawn at random, lanes of a warp included: a
// missing __syncthreads or __syncwarp gives wrong results here instead of being hidden by luck.
// Blocks run one after the other, in random order. The draws come from a seed, which
// DASHPOT_EMULATOR_SEED or set_seed() sets; an error message ends with the seed that repeats its
// launch.
//
// Errors come out of launch() as a std::runtime_error that names block, thread and source line:
// barriers that not all threads reach, threads that wait for each other (with where each waits),
// shuffles from a lane that is outside the mask, outside the block, or has exited.
//
// Shared memory holds 0xFF bytes (NaN as a float, −1 as an integer) when a block begins. Static
// arrays are plain static variables: AddressSanitizer guards them as any other, and the linker
// script cuda_emulator.ld collects them in one place, so that they can be filled. Kernels with
// `__shared__` variables therefore live in an anonymous namespace, templates above all: the
// compiler gives variables with external linkage no guard zones, and build.py refuses them.
//
// Not served: blocks that wait for each other (they would wait for ever), clusters, cooperative
// groups, textures, inline PTX, kernels launched by kernels. Not seen: races between two barriers
// in which every order of the threads gives the right answer when each runs uninterrupted (two
// threads that both do `total += 1` without an atomic).
#pragma once

#include <assert.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tuple>
#include <type_traits>

#include "cuda_math.h"
#include "cuda_types.h"

// ---- What stands before a declaration --------------------------------------------------------

#define __device__
#define __host__
#define __global__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// noinit is only a mark here, by which the linker script finds the variables to fill.
#define __shared__ static __attribute__((noinit))
#define DASHPOT_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::dashpot::emulator::dynamic_shared())

// ---- The engine (cuda_emulator.cpp) ----------------------------------------------------------

inline uint3 threadIdx, blockIdx;  // of the fiber that is running
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace dashpot::emulator {

// Where in the source an intrinsic was called; as a default argument it is the caller's place.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

enum class WarpOp { kSync, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kVote };

struct Count {
  int nonzero, threads;  // of the threads that have not exited
};

void set_seed(uint64_t seed);
[[noreturn]] void fail(const char* message);  // throws, naming block and thread
void* dynamic_shared();
int lane();

// Runs body(argument) as every thread of the grid.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);

// Waits for every thread of the block that has not exited.
Count barrier(bool predicate, Site site);

// Waits for every lane in the mask that has not exited. A vote returns the mask of the lanes whose
// value is not zero, any other operation the value that lane `source` brought.
uint64_t exchange(unsigned mask, WarpOp op, uint64_t value, int source, Site site);

// Lets other threads run, without waiting for anything.
void yield();

template <class T>
T shuffle(unsigned mask, WarpOp op, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "at most 8 plain bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, op, bits, source, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// The first lane of the segment of `width` lanes that this lane is in.
inline int segment(int width) {
  if (width < 1 || width > warpSize || (width & (width - 1))) {
    fail("the width of a shuffle must be 1, 2, 4, 8, 16 or 32");
  }
  return lane() & ~(width - 1);
}

}  // namespace dashpot::emulator

// ---- Barriers and warp intrinsics ------------------------------------------------------------

using DashpotSite = dashpot::emulator::Site;
constexpr unsigned kDashpotFullMask = 0xFFFFFFFFu;

inline void __syncthreads(DashpotSite site = DashpotSite::here()) {
  dashpot::emulator::barrier(false, site);
}
inline int __syncthreads_count(int predicate, DashpotSite site = DashpotSite::here()) {
  return dashpot::emulator::barrier(predicate, site).nonzero;
}
inline int __syncthreads_or(int predicate, DashpotSite site = DashpotSite::here()) {
  return dashpot::emulator::barrier(predicate, site).nonzero != 0;
}
inline int __syncthreads_and(int predicate, DashpotSite site = DashpotSite::here()) {
  dashpot::emulator::Count count = dashpot::emulator::barrier(predicate, site);
  return count.nonzero == count.threads;
}
inline void __syncwarp(unsigned mask = kDashpotFullMask, DashpotSite site = DashpotSite::here()) {
  dashpot::emulator::exchange(mask, dashpot::emulator::WarpOp::kSync, 0, dashpot::emulator::lane(),
                              site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              DashpotSite site = DashpotSite::here()) {
  using namespace dashpot::emulator;
  return shuffle(mask, WarpOp::kShuffle, value, segment(width) + (source & (width - 1)), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 DashpotSite site = DashpotSite::here()) {
  using namespace dashpot::emulator;
  unsigned from_start = lane() - segment(width);
  int source = delta > from_start ? lane() : lane() - static_cast<int>(delta);
  return shuffle(mask, WarpOp::kShuffleUp, value, source, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   DashpotSite site = DashpotSite::here()) {
  using namespace dashpot::emulator;
  unsigned to_end = segment(width) + width - 1 - lane();
  int source = delta > to_end ? lane() : lane() + static_cast<int>(delta);
  return shuffle(mask, WarpOp::kShuffleDown, value, source, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  DashpotSite site = DashpotSite::here()) {
  using namespace dashpot::emulator;
  int source = lane() ^ (lane_mask & (warpSize - 1));
  if (source >= segment(width) + width) source = lane();  // earlier segments may be read
  return shuffle(mask, WarpOp::kShuffleXor, value, source, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              DashpotSite site = DashpotSite::here()) {
  using namespace dashpot::emulator;
  return static_cast<unsigned>(exchange(mask, WarpOp::kVote, predicate != 0, lane(), site));
}
inline int __any_sync(unsigned mask, int predicate, DashpotSite site = DashpotSite::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, DashpotSite site = DashpotSite::here()) {
  return __ballot_sync(mask, !predicate, site) == 0;
}

// The device may run the lanes of a warp one at a time, and this emulator does: code that takes
// __activemask() for the lanes that took the same branch is wrong on both.
inline unsigned __activemask() { return 1u << dashpot::emulator::lane(); }

// Folds the values of the lanes in the mask, lane after lane.
template <class T, class Fold>
T dashpot_reduce_sync(unsigned mask, T value, Fold fold, DashpotSite site) {
  T result = __shfl_sync(mask, value, __ffs(mask) - 1, warpSize, site);
  for (unsigned rest = mask & (mask - 1); rest; rest &= rest - 1) {
    result = fold(result, __shfl_sync(mask, value, __ffs(rest) - 1, warpSize, site));
  }
  return result;
}
#define DASHPOT_REDUCE_SYNC(name, type, expression)                                     \
  inline type name(unsigned mask, type value, DashpotSite site = DashpotSite::here()) { \
    return dashpot_reduce_sync(                                                         \
        mask, value, [](type a, type b) -> type { return expression; }, site);          \
  }
DASHPOT_REDUCE_SYNC(__reduce_add_sync, int, a + b)
DASHPOT_REDUCE_SYNC(__reduce_add_sync, unsigned, a + b)
DASHPOT_REDUCE_SYNC(__reduce_min_sync, int, min(a, b))
DASHPOT_REDUCE_SYNC(__reduce_min_sync, unsigned, min(a, b))
DASHPOT_REDUCE_SYNC(__reduce_max_sync, int, max(a, b))
DASHPOT_REDUCE_SYNC(__reduce_max_sync, unsigned, max(a, b))
DASHPOT_REDUCE_SYNC(__reduce_and_sync, unsigned, a& b)
DASHPOT_REDUCE_SYNC(__reduce_or_sync, unsigned, a | b)
DASHPOT_REDUCE_SYNC(__reduce_xor_sync, unsigned, a ^ b)
#undef DASHPOT_REDUCE_SYNC

template <class T>
unsigned __match_any_sync(unsigned mask, T value, DashpotSite site = DashpotSite::here()) {
  unsigned same = 0;
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    int source = __ffs(rest) - 1;
    if (__shfl_sync(mask, value, source, warpSize, site) == value) same |= 1u << source;
  }
  return same;
}

// ---- Memory ----------------------------------------------------------------------------------

inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { dashpot::emulator::yield(); }
[[noreturn]] inline void __trap() { dashpot::emulator::fail("__trap()"); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}

// Atomics are plain, as one thread runs at a time; each is served for the device's types only, so
// that a call the device does not have fails here too. The value is converted to the address's
// type.
template <class T, class... Served>
using DashpotAtomic = std::enable_if_t<(std::is_same_v<T, Served> || ...), T>;
template <class T>
struct DashpotValueOf {
  using type = T;
};
template <class T>
using DashpotValue = typename DashpotValueOf<T>::type;

#define DASHPOT_ATOMIC(name, expression, ...)                             \
  template <class T>                                                      \
  DashpotAtomic<T, __VA_ARGS__> name(T* address, DashpotValue<T> value) { \
    T old = *address;                                                     \
    *address = expression;                                                \
    return old;                                                           \
  }
DASHPOT_ATOMIC(atomicAdd, old + value, int, unsigned, unsigned long long, float, double)
DASHPOT_ATOMIC(atomicSub, old - value, int, unsigned)
DASHPOT_ATOMIC(atomicExch, value, int, unsigned, unsigned long long, float)
DASHPOT_ATOMIC(atomicMin, min(old, value), int, unsigned, long long, unsigned long long)
DASHPOT_ATOMIC(atomicMax, max(old, value), int, unsigned, long long, unsigned long long)
DASHPOT_ATOMIC(atomicAnd, old& value, int, unsigned, unsigned long long)
DASHPOT_ATOMIC(atomicOr, old | value, int, unsigned, unsigned long long)
DASHPOT_ATOMIC(atomicXor, old ^ value, int, unsigned, unsigned long long)
DASHPOT_ATOMIC(atomicInc, old >= value ? 0 : old + 1, unsigned)
DASHPOT_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1, unsigned)
#undef DASHPOT_ATOMIC

template <class T>
DashpotAtomic<T, int, unsigned, unsigned short, unsigned long long> atomicCAS(
    T* address, DashpotValue<T> expected, DashpotValue<T> value) {
  T old = *address;
  if (old == expected) *address = value;
  return old;
}

// ---- The host's side: one device, one stream, all work done when a call returns ----------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t = nullptr) {
  return memset(to, byte, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  return memmove(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;  // few, so that grid strides loop
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 * 1024;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

namespace dashpot {

// As in csrc/common/cuda.cuh, but the kernel has run when this returns.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  std::tuple<P...> parameters(static_cast<P>(args)...);
  auto call = [&] { std::apply(kernel, parameters); };
  auto body = [](void* self) { (*static_cast<decltype(call)*>(self))(); };
  emulator::run_grid(grid, block, shared_bytes, body, &call);
}

}  // namespace dashpot
