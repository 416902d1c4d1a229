// coordinate_rules: rows (p, d), of which `count` take part -> R updates (d,), one streaming pass.
//
// A vector of coordinates is sorted into the L1 cache, then every rule reads it there: two kernels,
// so that sorting is compiled for each number of workers and the rules are not. (A tile of several
// vectors would leave the memory idle while the rules run.) Up to 16 rows are sorted in registers,
// more in blocks of 16 (sorting.h). Values are compared as floats; a run of vectors with a NaN or
// inf is done again with integers of the same order, NaN last. 16-bit floats are always compared as
// 16-bit integers, twice as many in a vector, where only a negative NaN needs the second attempt.
// Chunks go from the last coordinate to the first: what the pass over distances before it read last
// is still in the cache.
#include "aggregate/coordinate_rules.h"

#include <array>
#include <cstddef>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>

#include "aggregate/cuda_binding.h"
#include "aggregate/rows.h"
#include "common/bind.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace dashpot::aggregate {
namespace {

inline constexpr int64_t kChunk = 4096;
inline constexpr int kRun = 16;               // vectors between two looks for NaN, at most
inline constexpr int64_t kTileBytes = 32768;  // of more than kSortBlock rows

template <class T>
using Key = std::conditional_t<sizeof(T) == 8, int64_t,
                               std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;

template <class T>
constexpr Key<T> infinity_bits() {
  if constexpr (std::is_same_v<T, double>) return 0x7ff0000000000000;
  if constexpr (std::is_same_v<T, float>) return 0x7f800000;
  return std::is_same_v<T, BFloat16> ? 0x7f80 : 0x7c00;
}

template <class Kernel, class... A>
__attribute__((noinline)) void run_baseline(A... arguments) {
  Kernel::template run<Isa::kBaseline>(arguments...);
}

// Calls a kernel from another one, of the same instruction set and not inlined.
template <class Kernel, Isa isa, class... A>
DASHPOT_INLINE void run_as(A... arguments) {
  if constexpr (isa == Isa::kAvx512) return run_avx512<Kernel>(arguments...);
  if constexpr (isa == Isa::kAvx2) return run_avx2<Kernel>(arguments...);
  if constexpr (isa == Isa::kBaseline) return run_baseline<Kernel>(arguments...);
}

// Whether any lane is not 0.
template <Isa isa, class V>
DASHPOT_INLINE bool any(V lanes) {
  const auto words = reinterpret_cast<Vec<int64_t, isa>>(lanes);
  int64_t all = 0;
  for (int i = 0; i < kLanes<int64_t, isa>; ++i) all |= words[i];
  return all != 0;
}

// How a vector of T is compared: E its elements in the network, kSafe: whatever NaN there is.
template <class T, bool kSafe, Isa isa>
struct Order {
  static constexpr bool kFloats = !kSafe && !kIsSixteen<T>;
  using E = std::conditional_t<kFloats, T, Key<T>>;
  using V = Vec<E, isa>;
  using Bits = Vec<Key<T>, isa>;
  static constexpr Key<T> kMax = std::numeric_limits<Key<T>>::max();
  static constexpr Key<T> kLowest = ~infinity_bits<T>();  // -inf
  static constexpr int kSignShift = 8 * sizeof(T) - 1;
  V unclean{};  // not 0 in lanes that need kSafe

  // Bits of a float to an integer of the same order, and back.
  static DASHPOT_INLINE Bits turn(Bits bits) { return bits ^ ((bits >> kSignShift) & kMax); }

  static DASHPOT_INLINE V last() {
    if constexpr (kFloats) return V{} + std::numeric_limits<T>::infinity();
    if constexpr (!kFloats) return V{} + kMax;
  }
  DASHPOT_INLINE V read(const T* from) {
    V value;
    __builtin_memcpy(&value, from, sizeof value);
    if constexpr (kFloats) {
      unclean += value * 0;  // NaN for NaN and inf, in one instruction
    } else if constexpr (kSafe) {
      value = (value & kMax) > V{} + infinity_bits<T>() ? V{} + kMax : turn(value);
    } else {
      value = turn(value);
    }
    return value;
  }
  // Of a vector's smallest values: a negative NaN lies below -inf.
  DASHPOT_INLINE void look(V smallest) {
    if constexpr (!kFloats && !kSafe) unclean += smallest < V{} + kLowest ? V{} + 1 : V{};
  }
  static DASHPOT_INLINE V written(V value) {
    if constexpr (!kFloats) return turn(value);
    return value;
  }
};

// Value i of a vector of coordinates, or of a part of one of 16-bit floats, in a tile.
template <class T, Isa isa>
struct FromTile {
  using Value = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int kStep = kLanes<Key<T>, isa>;
  const T* base;
  Value scalar = 0;
  DASHPOT_INLINE Vec<Value, isa> operator()(int i) const {
    return load_as<Value, isa>(base + i * kStep);
  }
};

template <class T>
struct Lane {
  const T* base;
  int step;
  double scalar = 0;
  double operator()(int i) const { return convert<double>(base[i * step]); }
};

template <class T>
__attribute__((noinline)) double exact_lane(const T* base, int step, const RuleSet& set,
                                            Rule rule) {
  return exact_window<double>(Lane<T>{base, step}, set, rule);
}

// meamed and phocas of float32 values; the lanes where that may not suffice again in float64.
template <class T, Isa isa>
DASHPOT_INLINE Vec<float, isa> window_rule(const FromTile<T, isa>& get, const RuleSet& set,
                                           Rule rule) {
  Vec<float, isa> unsure;
  Vec<float, isa> mean = fast_window(get, set, rule, unsure);
  if (__builtin_expect(any<isa>(unsure), 0)) {
    for (int lane = 0; lane < kLanes<float, isa>; ++lane) {
      if (unsure[lane] == 0) continue;
      mean[lane] = static_cast<float>(exact_lane(get.base + lane, get.kStep, set, rule));
    }
  }
  return mean;
}

// outs[r][at ..] = rule r of the sorted values in tile (count, lanes).
template <class T>
struct ApplyRules {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* tile, const RuleSet* set, T* const* outs, int64_t at) {
    using Get = FromTile<T, isa>;
    using Value = typename Get::Value;
    constexpr int kWidth = kLanes<Value, isa>;
    for (int part = 0; part < Get::kStep; part += kWidth, at += kWidth) {
      const Get get{tile + part};
      for (int r = 0; r < set->rules; ++r) {
        const Vec<Value, isa> result = apply<isa>(get, *set, set->rule[r]);
        if constexpr (kIsSixteen<T>) {
          Sixteen<isa>::narrow(outs[r] + at, result);
        } else {
          store<T, isa>(outs[r] + at, result);
        }
      }
    }
  }

  template <Isa isa, class Get>
  static DASHPOT_INLINE auto apply(const Get& get, const RuleSet& set, Rule rule) {
    using V = Vec<typename Get::Value, isa>;
    const int count = set.count;
    if (rule == Rule::kMedian) return median_of<V>(get, count);
    if (rule == Rule::kLowerMedian) return V(get((count - 1) / 2));
    if (rule == Rule::kTrimmedMean) {
      return core_sum<V>(get, count, set.f) / static_cast<typename Get::Value>(count - 2 * set.f);
    }
    if constexpr (std::is_same_v<T, double>) return exact_window<V>(get, set, rule);
    if constexpr (!std::is_same_v<T, double>) return window_rule<T, isa>(get, set, rule);
  }
};

// Sorts `vectors` vectors of coordinates, the first at rows[.][at], and applies the rules to each.
// P: count rounded up (to an even number, for kSafe to kSortBlock); tile is (P, lanes). Or 0 for
// more than kSortBlock rows: then kSortBlock of them pass at a time (streams that a prefetcher can
// follow), for all the vectors; tile is (vectors, count in whole blocks, lanes). unclean: whether
// there was a value that kSafe is needed for.
template <class T, int P, bool kSafe>
struct SortAndApply {
  static constexpr int kHeld = P ? P : kSortBlock;
  static constexpr int kSure = kSafe ? 0 : P - 1;  // rows that need no test

  template <Isa isa>
  static DASHPOT_INLINE void run(const T* const* rows, const RuleSet* set, int64_t at, int vectors,
                                 T* tile, T* const* outs, bool* unclean) {
    using Sort = Order<T, kSafe, isa>;
    using V = typename Sort::V;
    constexpr int kStep = kLanes<Key<T>, isa>;
    const int count = set->count;
    Sort sort;
    V* const to = reinterpret_cast<V*>(tile);
    if constexpr (P > 0) {
      for (int v = 0; v < vectors; ++v, at += kStep) {
        sort_block(sort, rows, count, at, to);
        run_as<ApplyRules<T>, isa>(static_cast<const T*>(tile), set, outs, at);
      }
    } else {
      const int blocks = (count + kSortBlock - 1) / kSortBlock;
      for (int b = 0; b < blocks; ++b) {
        for (int v = 0; v < vectors; ++v) {
          sort_block(sort, rows + b * kSortBlock, count - b * kSortBlock, at + v * kStep,
                     to + (v * blocks + b) * kSortBlock);
        }
      }
      for (int v = 0; v < vectors; ++v, at += kStep) {
        V* const one = to + v * blocks * kSortBlock;
        merge_exchange(blocks, [&](int i, int j) {
          merge_blocks(one + i * kSortBlock, one + j * kSortBlock, 1);
        });
        for (int i = 0; i < count; ++i) one[i] = Sort::written(one[i]);
        run_as<ApplyRules<T>, isa>(reinterpret_cast<const T*>(one), set, outs, at);
      }
    }
    *unclean = any<isa>(sort.unclean);
  }

  // One vector of up to kHeld rows, sorted and padded, to `to`.
  template <class Sort, class V>
  static DASHPOT_INLINE void sort_block(Sort& sort, const T* const* rows, int count, int64_t at,
                                        V* to) {
    V x[kHeld];
    DASHPOT_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      x[i] = i < kSure || i < count ? sort.read(rows[i] + at) : Sort::last();
    }
    sort_registers<kHeld>(x);
    sort.look(x[0]);
    DASHPOT_UNROLL
    for (int i = 0; i < kHeld; ++i) to[i] = P ? Sort::written(x[i]) : x[i];
  }
};

template <class T>
using Function = void (*)(const T* const*, const RuleSet*, int64_t, int, T*, T* const*, bool*);

template <class T, int P, bool kSafe>
void sort_and_apply(const T* const* rows, const RuleSet* set, int64_t at, int vectors, T* tile,
                    T* const* outs, bool* unclean) {
  run_on_isa<SortAndApply<T, P, kSafe>>(rows, set, at, vectors, tile, outs, unclean);
}

// For up to 2, 4, .. 16 rows, and for more.
template <class T, size_t... k>
Function<T> function_for(int count, std::index_sequence<k...>) {
  static constexpr Function<T> kFew[] = {&sort_and_apply<T, 2 * (k + 1), false>...};
  return count > kSortBlock ? &sort_and_apply<T, 0, false> : kFew[(count - 1) / 2];
}

// A call's rules, and how they are run; what chunks share.
template <class T>
struct Pass {
  RuleSet set;
  int stride;     // rows in a tile: count padded to whole blocks
  int lanes;      // coordinates per vector
  int run;        // vectors sorted before NaN is looked for
  int tiles = 1;  // of one vector each
  Function<T> fast, safe;

  explicit Pass(const RuleSet& rules) : set(rules) {
    stride = (set.count + kSortBlock - 1) / kSortBlock * kSortBlock;
    lanes = vector_bytes(isa()) / static_cast<int>(sizeof(T));
    run = kRun;
    if (set.count > kSortBlock) {
      const int64_t bytes = int64_t{stride} * vector_bytes(isa());
      run = tiles = static_cast<int>(std::clamp<int64_t>(kTileBytes / bytes, 1, kRun));
    }
    fast = function_for<T>(set.count, std::make_index_sequence<kSortBlock / 2>{});
    safe =
        set.count > kSortBlock ? &sort_and_apply<T, 0, true> : &sort_and_apply<T, kSortBlock, true>;
  }

  void vectors(const T* const* rows, int64_t at, int count, T* tile, T* const* outs) const {
    bool unclean = false;
    fast(rows, &set, at, count, tile, outs, &unclean);
    if (unclean) safe(rows, &set, at, count, tile, outs, &unclean);
  }

  // rows: (count,) pointers to a chunk, spoilt; space: room for `space()` numbers.
  void chunk(const T** rows, int64_t length, T* space, T* const* outs) const {
    const int64_t whole = length / lanes;
    for (int64_t v = 0; v < whole; v += run) {
      const int some = static_cast<int>(std::min<int64_t>(run, whole - v));
      vectors(rows, v * lanes, some, space, outs);
    }
    const int64_t begin = whole * lanes, rest = length - begin;
    if (rest == 0) return;
    // The last coordinates, less than a vector: copied beside zeros.
    T* copies = space + tiles * stride * lanes;
    std::array<T*, kRules> results;
    for (int r = 0; r < set.rules; ++r) results[r] = copies + (set.count + r) * lanes;
    for (int i = 0; i < set.count; ++i) {
      T* copy = copies + i * lanes;
      for (int k = 0; k < lanes; ++k) copy[k] = k < rest ? rows[i][begin + k] : T{};
      rows[i] = copy;
    }
    vectors(rows, 0, 1, space, results.data());
    for (int r = 0; r < set.rules; ++r) std::copy_n(results[r], rest, outs[r] + begin);
  }

  int64_t space() const { return int64_t{tiles * stride + set.count + kRules} * lanes; }
};

// out: (R, S) pointers; live: (count,) the rows that take part.
template <class T>
void coordinate_rules(const Rows& rows, const std::vector<int64_t>& live, const RuleSet& set,
                      int threads, const std::vector<void*>& out) {
  const Pass<T> pass(set);
  const std::vector<Chunk> chunks = rows.chunks(kChunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  parallel_for(count, threads, [&](int64_t item) {
    const Chunk& chunk = chunks[count - 1 - item];
    std::vector<const T*> pointers(live.size());
    for (size_t i = 0; i < live.size(); ++i) pointers[i] = rows.row<T>(chunk, live[i]);
    std::array<T*, kRules> outs;
    for (int r = 0; r < set.rules; ++r) {
      outs[r] = static_cast<T*>(out[r * rows.segments() + chunk.segment]) + chunk.begin;
    }
    std::vector<T> room(pass.space() + 64 / sizeof(T));
    void* space = room.data();
    size_t bytes = room.size() * sizeof(T);
    std::align(64, pass.space() * sizeof(T), space, bytes);
    pass.chunk(pointers.data(), chunk.length, static_cast<T*>(space), outs.data());
  });
}

using Outs = std::optional<std::vector<Tensor>>;

RuleSet rule_set(int64_t p, int64_t count, int64_t f, const std::vector<std::string>& names) {
  RuleSet set{static_cast<int>(count), static_cast<int>(f), 0, {}};
  if (count < 1 || count > p || f < 0 || f >= count || names.size() > kRules) {
    throw std::invalid_argument("coordinate_rules: expected 1 <= count <= p and 0 <= f < count");
  }
  constexpr const char* kNames[kRules] = {"median", "lower_median", "trimmed_mean", "meamed",
                                          "phocas"};
  for (const std::string& name : names) {
    int rule = 0;
    while (rule < kRules && name != kNames[rule]) ++rule;
    const bool trims =
        rule == static_cast<int>(Rule::kTrimmedMean) || rule == static_cast<int>(Rule::kPhocas);
    if (rule == kRules || (trims && 2 * f >= count)) {
      throw std::invalid_argument("coordinate_rules: no rule " + name + " with this f");
    }
    set.rule[set.rules++] = static_cast<Rule>(rule);
  }
  return set;
}

// out: R * S tensors (n_s,) to write, or none to allocate them.
std::vector<Tensor> outputs(const std::vector<Tensor>& grads, const Rows& rows,
                            const std::optional<Tensor>& mask, int rules, Outs out) {
  if (mask && (mask->dtype != Dtype::kBool || mask->numel != rows.p)) {
    throw std::invalid_argument("mask: expected (p,) bool");
  }
  if (!out) {
    out.emplace();
    for (int r = 0; r < rules; ++r) {
      for (const int64_t n : rows.lengths) out->push_back(grads[0].new_empty({n}, rows.dtype));
    }
  }
  for (int64_t i = 0; i < rules * rows.segments(); ++i) {
    const Tensor& one = (*out)[i];
    if (one.numel != rows.lengths[i % rows.segments()] || one.dtype != rows.dtype) {
      throw std::invalid_argument("out: expected one row's length and dtype per segment");
    }
  }
  return *std::move(out);
}

std::vector<void*> pointers_of(const std::vector<Tensor>& tensors) {
  std::vector<void*> pointers;
  for (const Tensor& tensor : tensors) pointers.push_back(tensor.data);
  return pointers;
}

void fill_with_nan(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    dispatch_floating(tensor.dtype, [&](auto element) {
      using T = decltype(element);
      const T nan = convert<T>(std::numeric_limits<float>::quiet_NaN());
      std::fill_n(tensor.as<T>(), tensor.numel, nan);
    });
  }
}

std::vector<Tensor> coordinate_rules_forward(const std::vector<Tensor>& grads,
                                             const std::optional<Tensor>& mask, int64_t p,
                                             int64_t count, int64_t f,
                                             const std::vector<std::string>& names, Outs given) {
  const Rows rows(grads, p);
  const RuleSet set = rule_set(p, count, f, names);
  std::vector<Tensor> out = outputs(grads, rows, mask, set.rules, std::move(given));
  const std::vector<void*> pointers = pointers_of(out);
  const int threads = num_threads();
  const py::gil_scoped_release release;
  std::vector<int64_t> live;
  for (int64_t i = 0; i < p; ++i) {
    if (!mask || mask->as<bool>()[i]) live.push_back(i);
  }
  if (static_cast<int64_t>(live.size()) != count) {
    fill_with_nan(out);
    return out;
  }
  dispatch_floating(rows.dtype, [&](auto element) {
    coordinate_rules<decltype(element)>(rows, live, set, threads, pointers);
  });
  return out;
}

#ifdef DASHPOT_CUDA
std::vector<Tensor> coordinate_rules_forward_cuda(const std::vector<Tensor>& grads,
                                                  const std::optional<Tensor>& mask, int64_t p,
                                                  int64_t count, int64_t f,
                                                  const std::vector<std::string>& names,
                                                  Outs given) {
  const Rows rows(grads, p);
  const RuleSet set = rule_set(p, count, f, names);
  std::vector<Tensor> out = outputs(grads, rows, mask, set.rules, std::move(given));
  const Place place = place_of(grads[0]);
  coordinate_rules_cuda(rows, mask ? mask->as<bool>() : nullptr, set, pointers_of(out),
                        place.device, place.stream);
  return out;
}

std::optional<std::string> coordinate_rules_supports_cuda(const py::args& args) {
  return too_many_workers(py::cast<int64_t>(args[2]) + kRules);
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("coordinate_rules_forward", &coordinate_rules_forward, py::arg("grads"), py::arg("mask"),
        py::arg("p"), py::arg("count"), py::arg("f"), py::arg("rules"),
        py::arg("out") = py::none());
#ifdef DASHPOT_CUDA
  m.def("coordinate_rules_forward_cuda", &coordinate_rules_forward_cuda, py::arg("grads"),
        py::arg("mask"), py::arg("p"), py::arg("count"), py::arg("f"), py::arg("rules"),
        py::arg("out") = py::none());
  m.def("coordinate_rules_supports_cuda", &coordinate_rules_supports_cuda);
#endif
}

}  // namespace dashpot::aggregate
