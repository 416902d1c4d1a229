// Tensor-core products of one warp, behind functions that the emulator serves as well.
//
// d (16, 8) += a (16, K) b (K, 8); K = 8 for TF32, 16 for 16-bit floats. With g = lane / 4 and
// t = lane % 4 a lane holds
//   a[0..3]: rows g, g + 8, g, g + 8, columns t, t, t + 4, t + 4   (16-bit: column pairs)
//   b[0..1]: rows t, t + 4, column g
//   d[0..3]: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// so a and b of x x^T come from the same registers: b's column g is x's row g. Which coordinate
// stands in which of the K columns is free, as long as a and b agree: a lane may fill them from 16
// neighbouring bytes.
#pragma once

#include "common/cuda.cuh"
#include "common/numeric.cuh"

namespace dashpot {

#ifdef DASHPOT_EMULATE
// The same sums by shuffles; widen(register, half) reads one of a register's numbers.
template <int kPerRegister, class Widen>
__device__ inline void mma_by_shuffles(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2], Widen widen) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int half = 0; half < 2; ++half) {
    for (int owner = 0; owner < 4; ++owner) {
      const uint32_t upper = __shfl_sync(0xffffffffu, a[2 * half], 4 * g + owner);
      const uint32_t lower = __shfl_sync(0xffffffffu, a[2 * half + 1], 4 * g + owner);
      const uint32_t left = __shfl_sync(0xffffffffu, b[half], 8 * t + owner);
      const uint32_t right = __shfl_sync(0xffffffffu, b[half], 8 * t + 4 + owner);
      for (int part = 0; part < kPerRegister; ++part) {
        d[0] += widen(upper, part) * widen(left, part);
        d[1] += widen(upper, part) * widen(right, part);
        d[2] += widen(lower, part) * widen(left, part);
        d[3] += widen(lower, part) * widen(right, part);
      }
    }
  }
}
#endif

// Element types as the tensor cores take them: registers of 32 bits, kPerRegister numbers in each.
template <class T>
struct Mma;

template <>
struct Mma<float> {
  static constexpr int kPerRegister = 1;
  static __device__ __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#ifdef DASHPOT_EMULATE
    mma_by_shuffles<1>(d, a, b, [](uint32_t bits, int) { return __uint_as_float(bits); });
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};

template <>
struct Mma<__nv_bfloat16> {
  static constexpr int kPerRegister = 2;
  static __device__ __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#ifdef DASHPOT_EMULATE
    mma_by_shuffles<2>(d, a, b, [](uint32_t bits, int part) {
      return __uint_as_float(part ? bits & 0xffff0000u : bits << 16);
    });
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};

template <>
struct Mma<__half> {
  static constexpr int kPerRegister = 2;
  static __device__ __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#ifdef DASHPOT_EMULATE
    mma_by_shuffles<2>(d, a, b, [](uint32_t bits, int part) {
      __half value;
      const uint16_t half = static_cast<uint16_t>(part ? bits >> 16 : bits);
      memcpy(&value, &half, sizeof value);
      return __half2float(value);
    });
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};

}  // namespace dashpot
