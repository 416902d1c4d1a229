// Element types on the device, conversions, and the host's guard of the current device.
#pragma once

#include "common/cuda.cuh"
#ifndef __CUDACC_RTC__
#include <stdexcept>

#include "common/dtype.h"
#endif

namespace dashpot {

template <class To, class From>
__device__ __forceinline__ To device_cast(From value) {
  return static_cast<To>(value);
}
template <>
__device__ __forceinline__ float device_cast<float, __half>(__half value) {
  return __half2float(value);
}
template <>
__device__ __forceinline__ float device_cast<float, __nv_bfloat16>(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__device__ __forceinline__ double device_cast<double, __half>(__half value) {
  return __half2float(value);
}
template <>
__device__ __forceinline__ double device_cast<double, __nv_bfloat16>(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__device__ __forceinline__ __half device_cast<__half, float>(float value) {
  return __float2half(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 device_cast<__nv_bfloat16, float>(float value) {
  return __float2bfloat16(value);
}

#ifndef __CUDACC_RTC__
// Calls function(T{}) with the device's element type of a floating dtype.
template <class Function>
void dispatch_device(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::kFloat64:
      return function(double{});
    case Dtype::kFloat32:
      return function(float{});
    case Dtype::kBFloat16:
      return function(__nv_bfloat16{});
    case Dtype::kFloat16:
      return function(__half{});
    default:
      throw std::invalid_argument("expected a floating dtype");
  }
}

// Shared memory that a block may ask for.
inline int64_t shared_limit(int device) {
#ifdef DASHPOT_EMULATE
  (void)device;
  return 64 << 10;  // small, so that tests reach both kinds of memory
#else
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "asking for the size of shared memory");
  return bytes;
#endif
}

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "asking for the device");
    if (device != previous_) check_cuda(cudaSetDevice(device), "choosing the device");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};
#endif

}  // namespace dashpot
