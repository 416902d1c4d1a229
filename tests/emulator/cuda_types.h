// CUDA's vector types, half and bfloat16 for the emulator: same sizes, alignments and roundings.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

// Vector types, aligned as on the device, so that a misaligned float4 load shows in a build with
// -fsanitize=alignment as it would there.
#define DASHPOT_VECTORS(type, name, align2, align4)                           \
  struct alignas(align2) name##2 { type x, y; };                              \
  struct name##3 { type x, y, z; };                                           \
  struct alignas(align4) name##4 { type x, y, z, w; };                        \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

DASHPOT_VECTORS(signed char, char, 2, 4)
DASHPOT_VECTORS(unsigned char, uchar, 2, 4)
DASHPOT_VECTORS(short, short, 4, 8)
DASHPOT_VECTORS(unsigned short, ushort, 4, 8)
DASHPOT_VECTORS(int, int, 8, 16)
DASHPOT_VECTORS(unsigned, uint, 8, 16)
DASHPOT_VECTORS(long long, longlong, 16, 16)
DASHPOT_VECTORS(unsigned long long, ulonglong, 16, 16)
DASHPOT_VECTORS(float, float, 8, 16)
DASHPOT_VECTORS(double, double, 16, 16)
#undef DASHPOT_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace dashpot::emulator {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline float half_to_float(uint16_t half) {
  uint32_t sign = (half & 0x8000u) << 16, magnitude = (half & 0x7FFFu) << 13;
  if (magnitude >= 0x7C00u << 13) return bit_cast<float>(sign | magnitude | 0x7F800000u);
  // The exponent is now 112 too small; one exact product mends normal and subnormal numbers.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f));
}

// To nearest, ties to even; NaN becomes 0x7FFF, as on the device.
inline uint16_t float_to_half(float value) {
  uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7FFFFFFFu;
  uint16_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > 0x7F800000u) return 0x7FFF;
  if (magnitude >= 0x47800000u) return sign | 0x7C00;  // 65536 and above
  if (magnitude < 0x38800000u)                         // below 2^-14: a multiple of 2^-24
    return sign | static_cast<uint16_t>(lrintf(bit_cast<float>(magnitude) * 0x1p24f));
  uint32_t rebiased = magnitude - (112u << 23);
  return sign | static_cast<uint16_t>((rebiased + 0xFFFu + ((rebiased >> 13) & 1)) >> 13);
}

inline float bfloat16_to_float(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

}  // namespace dashpot::emulator

// Storage types: they convert from and to float, and arithmetic on them happens in float. (On the
// device, sums and products of two halves are rounded to half; kernels here compute in float.)
#define DASHPOT_STORAGE_TYPE(type, pair, convert)                                       \
  struct type {                                                                         \
    uint16_t bits;                                                                      \
    type() = default;                                                                   \
    type(float value) : bits(dashpot::emulator::float_to_##convert(value)) {}           \
    operator float() const { return dashpot::emulator::convert##_to_float(bits); }      \
  };                                                                                    \
  struct alignas(4) pair {                                                              \
    type x, y;                                                                          \
  };                                                                                    \
  inline type __ushort_as_##convert(uint16_t bits) {                                    \
    return dashpot::emulator::bit_cast<type>(bits);                                     \
  }                                                                                     \
  inline uint16_t __##convert##_as_ushort(type value) { return value.bits; }            \
  inline float __##convert##2float(type value) { return value; }                        \
  inline type __float2##convert(float value) { return type(value); }                    \
  inline type __float2##convert##_rn(float value) { return type(value); }               \
  inline pair __floats2##convert##2_rn(float x, float y) { return {type(x), type(y)}; } \
  inline float __low2float(pair value) { return value.x; }                              \
  inline float __high2float(pair value) { return value.y; }

DASHPOT_STORAGE_TYPE(__half, __half2, half)
DASHPOT_STORAGE_TYPE(__nv_bfloat16, __nv_bfloat162, bfloat16)
#undef DASHPOT_STORAGE_TYPE

using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {value.x, value.y}; }
inline __half2 __float22half2_rn(float2 value) { return __floats2half2_rn(value.x, value.y); }
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) {
  return __floats2bfloat162_rn(value.x, value.y);
}
