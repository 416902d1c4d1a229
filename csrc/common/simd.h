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

// kLanes<To> elements of a storage type, converted.
template <class To, Isa isa, class From>
DASHPOT_INLINE Vec<To, isa> load_as(const From* from) {
  if constexpr (std::is_same_v<To, From>) {
    return load<To, isa>(from);
  } else {
    Vec<To, isa> value;
    for (int i = 0; i < kLanes<To, isa>; ++i) value[i] = convert<To>(from[i]);
    return value;
  }
}

// Sum of the lanes in float64, pairwise: the order is the same on every run.
template <class T, Isa isa>
DASHPOT_INLINE double sum_lanes(Vec<T, isa> value) {
  double lanes[kLanes<T, isa>];
  for (int i = 0; i < kLanes<T, isa>; ++i) lanes[i] = static_cast<double>(value[i]);
  for (int half = kLanes<T, isa> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Elements of a storage type converted to another: to[0..n) = from[0..n).
template <class To, class From>
struct ConvertBlock {
  template <Isa isa>
  static DASHPOT_INLINE void run(To* to, const From* from, int64_t n) {
    for (int64_t k = 0; k < n; ++k) to[k] = convert<To>(from[k]);
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
