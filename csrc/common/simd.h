// SIMD without intrinsics, one source for three instruction sets, chosen at run time.
//
// A kernel is a struct with `template <Isa> static DASHPOT_INLINE void run(...)`, built from
// Vec<T, Isa> values; `run_on_isa<Kernel>(...)` calls it through one of three entry points, each
// compiled for its instruction set. GCC lowers vector_size types to what the entry point's target
// offers. (target_clones would do the same for loops that GCC vectorises by itself; register tiles
// need the vector's width as a constant.)
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/dtype.h"

#define DASHPOT_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define DASHPOT_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define DASHPOT_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define DASHPOT_TARGET_AVX512
#define DASHPOT_TARGET_AVX2
#endif

namespace dashpot {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline";
}

inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

inline Isa& current_isa() {
  static Isa current = best_isa();
  return current;
}

inline Isa isa() { return current_isa(); }

inline void set_isa(const char* name) {
  if (name == nullptr) {
    current_isa() = best_isa();
    return;
  }
  for (const Isa one : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string(name) == isa_name(one)) {
      if (one > best_isa())
        throw std::invalid_argument(std::string(name) + ": not on this machine");
      current_isa() = one;
      return;
    }
  }
  throw std::invalid_argument(std::string("expected avx512, avx2 or baseline, got ") + name);
}

constexpr int vector_bytes(Isa isa) {
  return isa == Isa::kAvx512 ? 64 : isa == Isa::kAvx2 ? 32 : 16;
}

template <class T, Isa isa>
struct VecOf {
  static constexpr int kLanes = vector_bytes(isa) / sizeof(T);
  typedef T type __attribute__((vector_size(vector_bytes(isa))));
};
template <class T, Isa isa>
using Vec = typename VecOf<T, isa>::type;

template <class T, Isa isa>
inline constexpr int kLanes = VecOf<T, isa>::kLanes;

template <class T, Isa isa>
DASHPOT_INLINE Vec<T, isa> load(const T* from) {
  Vec<T, isa> value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class T, Isa isa>
DASHPOT_INLINE void store(T* to, Vec<T, isa> value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// 16-bit floats to and from float32, a vector at a time: the formulas of dtype.h (which GCC does
// not vectorise by itself in functions with their own target).
template <Isa isa>
struct Sixteen {
  static constexpr int kWidth = kLanes<float, isa>;
  typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
  using Words = Vec<uint32_t, isa>;
  using Floats = Vec<float, isa>;

  template <class T>
  static DASHPOT_INLINE Floats widen(const T* from) {
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words);
    if constexpr (std::is_same_v<T, BFloat16>) {
      return reinterpret_cast<Floats>(words << 16);
    } else {
      const Words magnitude = (words & 0x7fffu) << 13;
      const Floats scaled = reinterpret_cast<Floats>(magnitude) * float_of((127u + 112u) << 23);
      const Words special = magnitude >= (0x7c00u << 13) ? Words{} + 0x7f800000u : Words{};
      return reinterpret_cast<Floats>(reinterpret_cast<Words>(scaled) | special |
                                      (words & 0x8000u) << 16);
    }
  }

  template <class T>
  static DASHPOT_INLINE void narrow(T* to, Floats value) {
    const Words bits = reinterpret_cast<Words>(value);
    Words result;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      result = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x7fc0u : rounded;
    } else {
      const Words size = bits & 0x7fffffffu;
      const Words normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
      const Words subnormal =
          reinterpret_cast<Words>(reinterpret_cast<Floats>(size) + 0.5f) - bits_of(0.5f);
      const Words finite = size < (113u << 23) ? subnormal : normal;
      const Words large = size > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
      result = (size >= (143u << 23) ? large : finite) | (bits >> 16 & 0x8000u);
    }
    const Halves halves = __builtin_convertvector(result, Halves);
    __builtin_memcpy(to, &halves, sizeof halves);
  }
};

template <class T>
inline constexpr bool kIsSixteen = std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>;

// kLanes<To> elements of a storage type, converted.
template <class To, Isa isa, class From>
DASHPOT_INLINE Vec<To, isa> load_as(const From* from) {
  if constexpr (std::is_same_v<To, From>) {
    return load<To, isa>(from);
  } else if constexpr (kIsSixteen<From> && std::is_same_v<To, float>) {
    return Sixteen<isa>::widen(from);
  } else if constexpr (std::is_same_v<From, float> && std::is_same_v<To, double>) {
    typedef float Half __attribute__((vector_size(vector_bytes(isa) / 2)));
    Half half;
    __builtin_memcpy(&half, from, sizeof half);
    return __builtin_convertvector(half, Vec<To, isa>);
  } else {
    Vec<To, isa> value;
    for (int i = 0; i < kLanes<To, isa>; ++i) value[i] = convert<To>(from[i]);
    return value;
  }
}

// The first (or last) half of a vector's numbers.
template <bool last, class V, int... i>
DASHPOT_INLINE auto half_of(V value, std::integer_sequence<int, i...>) {
  constexpr int first = last ? sizeof...(i) : 0;
  return __builtin_shufflevector(value, value, (first + i)...);
}

template <int count, class V>
DASHPOT_INLINE double sum_halves(V value) {
  if constexpr (count == 2) {
    return value[0] + value[1];
  } else {
    constexpr auto half = std::make_integer_sequence<int, count / 2>();
    return sum_halves<count / 2>(half_of<false>(value, half) + half_of<true>(value, half));
  }
}

// Sum of the lanes in float64, pairwise: lane i and i + half, over and over, on every run.
template <class T, Isa isa>
DASHPOT_INLINE double sum_lanes(Vec<T, isa> value) {
  constexpr int kCount = kLanes<T, isa>;
  if constexpr (std::is_same_v<T, double>) {
    return sum_halves<kCount>(value);
  } else {
    constexpr auto half = std::make_integer_sequence<int, kCount / 2>();
    using Wide = Vec<double, isa>;
    return sum_halves<kCount / 2>(__builtin_convertvector(half_of<false>(value, half), Wide) +
                                  __builtin_convertvector(half_of<true>(value, half), Wide));
  }
}

// kLanes<T> numbers as doubles.
template <class T, Isa isa>
DASHPOT_INLINE void store_as_double(double* to, Vec<T, isa> value) {
  if constexpr (std::is_same_v<T, double>) {
    store<double, isa>(to, value);
  } else {
    constexpr auto half = std::make_integer_sequence<int, kLanes<T, isa> / 2>();
    using Wide = Vec<double, isa>;
    store<double, isa>(to, __builtin_convertvector(half_of<false>(value, half), Wide));
    store<double, isa>(to + kLanes<T, isa> / 2,
                       __builtin_convertvector(half_of<true>(value, half), Wide));
  }
}

// kLanes<double> numbers to float32 or as they are.
template <class To, Isa isa>
DASHPOT_INLINE void store_from_double(To* to, Vec<double, isa> value) {
  if constexpr (std::is_same_v<To, double>) {
    store<double, isa>(to, value);
  } else {
    typedef To Half __attribute__((vector_size(vector_bytes(isa) / 2)));
    const Half half = __builtin_convertvector(value, Half);
    __builtin_memcpy(to, &half, sizeof half);
  }
}

// Sums of neighbouring lanes: those of a, then those of b.
template <class V, int... i>
DASHPOT_INLINE V add_neighbours(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (2 * i)...) + __builtin_shufflevector(a, b, (2 * i + 1)...);
}

// Lane r: the sum over the lanes of vector(r), pairwise; vector(0), vector(1), ... are called once
// each, in this order.
template <class T, Isa isa, int count = kLanes<T, isa>, int first = 0, class Vector>
DASHPOT_INLINE Vec<T, isa> sums_over_lanes(const Vector& vector) {
  if constexpr (count == 1) {
    return vector(first);
  } else {
    const Vec<T, isa> low = sums_over_lanes<T, isa, count / 2, first>(vector);
    const Vec<T, isa> high = sums_over_lanes<T, isa, count / 2, first + count / 2>(vector);
    return add_neighbours(low, high, std::make_integer_sequence<int, kLanes<T, isa>>());
  }
}

// Elements of a storage type converted to another: to[0..n) = from[0..n).
template <class To, class From>
struct ConvertBlock {
  template <Isa isa>
  static DASHPOT_INLINE void run(To* to, const From* from, int64_t n) {
    constexpr int kStep = Sixteen<isa>::kWidth;
    int64_t k = 0;
    if constexpr (kIsSixteen<From>) {
      for (; k + kStep <= n; k += kStep) {
        const Vec<float, isa> wide = Sixteen<isa>::widen(from + k);
        if constexpr (std::is_same_v<To, float>) {
          store<float, isa>(to + k, wide);
        } else {
          for (int i = 0; i < kStep; ++i) to[k + i] = static_cast<To>(wide[i]);
        }
      }
    } else if constexpr (kIsSixteen<To> && std::is_same_v<From, float>) {
      for (; k + kStep <= n; k += kStep) {
        Sixteen<isa>::narrow(to + k, load<float, isa>(from + k));
      }
    }
    for (; k < n; ++k) to[k] = convert<To>(from[k]);
  }
};

// Runs Kernel::run<isa>(arguments...) compiled for the instruction set in use.
template <class Kernel, class... A>
DASHPOT_TARGET_AVX512 void run_avx512(A... arguments) {
  Kernel::template run<Isa::kAvx512>(arguments...);
}
template <class Kernel, class... A>
DASHPOT_TARGET_AVX2 void run_avx2(A... arguments) {
  Kernel::template run<Isa::kAvx2>(arguments...);
}
template <class Kernel, class... A>
void run_on_isa(A... arguments) {
  switch (isa()) {
    case Isa::kAvx512:
      return run_avx512<Kernel>(arguments...);
    case Isa::kAvx2:
      return run_avx2<Kernel>(arguments...);
    case Isa::kBaseline:
      return Kernel::template run<Isa::kBaseline>(arguments...);
  }
}

}  // namespace dashpot
