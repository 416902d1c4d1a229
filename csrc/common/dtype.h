// Element types and the conversions between them; plain C++, for the CPU kernels and bindings.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

namespace dashpot {

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16, kInt64, kInt32, kBool };
inline constexpr int kDtypes = 7;
inline constexpr const char* kDtypeNames[kDtypes] = {"float64", "float32", "bfloat16", "float16",
                                                     "int64",   "int32",   "bool"};

inline int64_t element_size(Dtype dtype) {
  constexpr int64_t kSizes[kDtypes] = {8, 4, 2, 2, 8, 4, 1};
  return kSizes[static_cast<int>(dtype)];
}

// 16-bit floats as storage: arithmetic happens in float32. The conversions are integer and float
// operations without branches, so that a loop over them vectorises on every instruction set.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class To, class From>
inline __attribute__((always_inline)) To convert(From value);

template <>
inline __attribute__((always_inline)) float convert<float, BFloat16>(BFloat16 value) {
  return float_of(uint32_t{value.bits} << 16);
}

template <>
inline __attribute__((always_inline)) float convert<float, Float16>(Float16 value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  // The exponent's bias differs by 112; as a product this also makes subnormals right.
  const uint32_t scaled = bits_of(float_of(magnitude) * float_of((127u + 112u) << 23));
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;  // inf, NaN
  return float_of(scaled | special | uint32_t(value.bits & 0x8000u) << 16);
}

template <>
inline __attribute__((always_inline)) BFloat16 convert<BFloat16, float>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // nearest, ties to even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u | (bits >> 16) : rounded >> 16)};
}

template <>
inline __attribute__((always_inline)) Float16 convert<Float16, float>(float value) {
  const uint32_t sign = bits_of(value) & 0x80000000u;
  const uint32_t bits = bits_of(value) ^ sign;
  // Normal results: move the exponent's bias by -112, round at bit 13, ties to even.
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 shifts the wanted bits to the end, and the adder rounds.
  const uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = bits < (113u << 23) ? subnormal : normal;
  const uint32_t large = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN : overflow or inf
  return {static_cast<uint16_t>((bits >= (143u << 23) ? large : finite) | sign >> 16)};
}

template <class To, class From>
inline __attribute__((always_inline)) To convert(From value) {
  constexpr bool from16 = std::is_same_v<From, BFloat16> || std::is_same_v<From, Float16>;
  if constexpr (from16) {
    return static_cast<To>(convert<float>(value));  // to double; exact
  } else {
    return static_cast<To>(value);
  }
}

// Calls function(T{}) with the element type T of a floating dtype.
template <class Function>
auto dispatch_floating(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::kFloat64:
      return function(double{});
    case Dtype::kFloat32:
      return function(float{});
    case Dtype::kBFloat16:
      return function(BFloat16{});
    case Dtype::kFloat16:
      return function(Float16{});
    default:
      throw std::invalid_argument("expected a floating dtype");
  }
}

}  // namespace dashpot
