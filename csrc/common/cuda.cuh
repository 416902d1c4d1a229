// The one header that a `.cu` file includes for CUDA itself.
//
// The same source is compiled in three worlds, and this file is where they differ:
//   nvcc       the CUDA runtime, and launch() in place of <<<>>>;
//   NVRTC      device code only, with no host header in sight;
//   emulator   (-DDASHPOT_EMULATE) host C++ that runs the kernels on the CPU, for the tests: see
//              tests/emulator/cuda_emulator.h, which serves the same names.
#pragma once

#if defined(DASHPOT_EMULATE)

#include "cuda_emulator.h"

#else

#if !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Names the block's dynamic shared memory as `type* name`, aligned to 16 bytes. All kernels share
// one untyped array, because two `extern __shared__` arrays of one name must be of one type.
#define DASHPOT_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char dashpot_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(dashpot_dynamic_shared)

#endif

#if !defined(__CUDACC_RTC__)

#include <stdexcept>
#include <string>
#include <tuple>

namespace dashpot {

// Throws where a CUDA call failed; `doing` completes "CUDA error while …".
inline void check_cuda(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // reported here, so that the next call does not report it again
  throw std::runtime_error(std::string("CUDA error while ") + doing + ": " +
                           cudaGetErrorString(error));
}

#if !defined(DASHPOT_EMULATE)

// kernel<<<grid, block, shared_bytes, stream>>>(args...), except that the arguments are cast to the
// kernel's parameter types, a grid with no block does nothing, a refused launch throws, and dynamic
// shared memory may be as large as the device has. Never waits for the kernel.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // A kernel gets 48 KiB, its static arrays included, unless it asks for more. The static share is
  // not known here, so 16 KiB are left for it.
  if (shared_bytes > 32 * 1024) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "asking for dynamic shared memory");
  }
  std::tuple<P...> parameters(static_cast<P>(args)...);
  std::apply(
      [&](P&... parameter) {
        void* pointers[] = {&parameter..., nullptr};  // the nullptr: an array needs an element
        check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                                    shared_bytes, stream),
                   "launching a kernel");
      },
      parameters);
}

#endif
}  // namespace dashpot

#endif
