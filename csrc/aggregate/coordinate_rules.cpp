// coordinate_rules: rows (p, d), of which `count` take part -> R updates (d,), one streaming pass.
//
// A tile of a few vectors of coordinates (16 KiB) is sorted into the L1 cache, then every rule reads
// it: two kernels, so that sorting is compiled for each number of workers and the rules are not.
// Up to 16 rows are sorted in registers, more in blocks of 16 (sorting.h). Values are compared as
// floats; a tile with a NaN is sorted again as integers of the same order, NaN last. 16-bit floats
// are always compared as 16-bit integers, twice as many in a vector, where only a negative NaN
// needs the second attempt. Chunks go from the last coordinate to the first: what the pass over
// distances before it read last is still in the cache.
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
inline constexpr int64_t kTileBytes = 16384;

template <class T>
using Key = std::conditional_t<sizeof(T) == 8, int64_t,
                               std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;

template <class T>
constexpr Key<T> infinity_bits() {
  if constexpr (std::is_same_v<T, double>) return 0x7ff0000000000000;
  if constexpr (std::is_same_v<T, float>) return 0x7f800000;
  return std::is_same_v<T, BFloat16> ? 0x7f80 : 0x7c00;
}

template <Isa isa, class Mask>
DASHPOT_INLINE bool any(Mask mask) {
  const auto words = reinterpret_cast<Vec<int64_t, isa>>(mask);
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
  using K = Vec<Key<T>, isa>;
  static constexpr Key<T> kMax = std::numeric_limits<Key<T>>::max();
  static constexpr int kSignShift = 8 * sizeof(T) - 1;
  K unclean{};  // lanes that need kSafe

  // Bits of a float to an integer of the same order, and back.
  static DASHPOT_INLINE K turn(K bits) { return bits ^ ((bits >> kSignShift) & kMax); }

  static DASHPOT_INLINE V last() {
    if constexpr (kFloats) return V{} + std::numeric_limits<T>::infinity();
    if constexpr (!kFloats) return V{} + kMax;
  }
  DASHPOT_INLINE V read(const T* from) {
    V value;
    __builtin_memcpy(&value, from, sizeof value);
    if constexpr (kFloats) {
      unclean |= value != value;
    } else if constexpr (kSafe) {
      const K nan = (value & kMax) > infinity_bits<T>();
      value = nan ? V{} + kMax : turn(value);
    } else {
      value = turn(value);
    }
    return value;
  }
  // Of a vector's smallest values: a negative NaN lies below -inf.
  DASHPOT_INLINE void look(V smallest) {
    if constexpr (!kFloats && !kSafe) unclean |= smallest < ~infinity_bits<T>();
  }
  static DASHPOT_INLINE V written(V value) {
    if constexpr (!kFloats) return turn(value);
    return value;
  }
};

// Sorts `vectors` vectors of coordinates, the first at rows[.][at], into tile (vectors, stride,
// lanes); P: count rounded up (to an even number, for kSafe to kBlock), or 0 for more than kBlock.
// unclean: whether there was a NaN that kSafe is needed for.
template <class T, int P, bool kSafe>
struct SortTile {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* const* rows, int count, int64_t at, int vectors,
                                 int stride, T* tile, bool* unclean) {
    using Sort = Order<T, kSafe, isa>;
    using V = typename Sort::V;
    constexpr int kStep = kLanes<Key<T>, isa>;
    constexpr int kHeld = P ? P : kBlock;
    constexpr int kSure = kSafe ? 0 : P - 1;  // rows that need no test
    Sort sort;
    for (int v = 0; v < vectors; ++v, at += kStep, tile += stride * kStep) {
      V* to = reinterpret_cast<V*>(tile);
      for (int first = 0; first < count; first += kHeld) {
        V x[kHeld];
        DASHPOT_UNROLL
        for (int i = 0; i < kHeld; ++i) {
          const bool there = i < kSure || first + i < count;
          x[i] = there ? sort.read(rows[first + i] + at) : Sort::last();
        }
        sort_registers<kHeld>(x);
        sort.look(x[0]);
        DASHPOT_UNROLL
        for (int i = 0; i < kHeld; ++i) to[first + i] = P ? Sort::written(x[i]) : x[i];
      }
      if constexpr (P == 0) {
        merge_exchange(stride / kBlock, [&](int i, int j) {
          merge_blocks(to + i * kBlock, to + j * kBlock, 1);
        });
        for (int i = 0; i < count; ++i) to[i] = Sort::written(to[i]);
      }
    }
    *unclean = any<isa>(sort.unclean);
  }
};

// Value i of a vector of coordinates in a tile; half: which part of 16-bit ones.
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
  using V = Vec<float, isa>;
  using Mask = Vec<int32_t, isa>;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int count = set.count, f = set.f;
  V mean;
  Mask unsure;
  if (rule == Rule::kMeamed) {
    AroundMedian<V> nearer(get((count - 1) / 2), get(count / 2));
    mean = nearest_mean<V>(get, count, count - f, nearer);
    unsure = ~(size_of(nearer.sum) < kInfinity);
  } else {
    const V low = size_of(get(f)), high = size_of(get(count - f - 1));
    AroundMean<V, Mask> nearer(core_sum<V>(get, count, f), low < high ? high : low, count - 2 * f);
    mean = nearest_mean<V>(get, count, count - f, nearer);
    unsure = nearer.unsure | ~(size_of(nearer.twice) < kInfinity);
  }
  if (__builtin_expect(any<isa>(unsure), 0)) {
    for (int lane = 0; lane < kLanes<float, isa>; ++lane) {
      if (!unsure[lane]) continue;
      mean[lane] = static_cast<float>(exact_lane(get.base + lane, get.kStep, set, rule));
    }
  }
  return mean;
}

// outs[r][at ..] = rule r of the sorted values in tile (vectors, stride, lanes).
template <class T>
struct RulesTile {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* tile, int stride, int vectors, const RuleSet* rules,
                                 T* const* outs, int64_t at) {
    using Get = FromTile<T, isa>;
    using Value = typename Get::Value;
    constexpr int kWidth = kLanes<Value, isa>;
    const RuleSet set = *rules;
    for (int v = 0; v < vectors; ++v, tile += stride * Get::kStep) {
      for (int part = 0; part < Get::kStep; part += kWidth, at += kWidth) {
        const Get get{tile + part};
        for (int r = 0; r < set.rules; ++r) {
          const Vec<Value, isa> result = apply<isa>(get, set, set.rule[r]);
          if constexpr (kIsSixteen<T>) {
            Sixteen<isa>::narrow(outs[r] + at, result);
          } else {
            store<T, isa>(outs[r] + at, result);
          }
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
      return core_sum<V>(get, count, set.f) /
             static_cast<typename Get::Value>(count - 2 * set.f);
    }
    if constexpr (std::is_same_v<T, double>) return exact_window<V>(get, set, rule);
    if constexpr (!std::is_same_v<T, double>) return window_rule<T, isa>(get, set, rule);
  }
};

template <class T>
using SortFunction = void (*)(const T* const*, int, int64_t, int, int, T*, bool*);

template <class T, int P, bool kSafe>
void sort_tile(const T* const* rows, int count, int64_t at, int vectors, int stride, T* tile,
               bool* unclean) {
  run_on_isa<SortTile<T, P, kSafe>>(rows, count, at, vectors, stride, tile, unclean);
}

// For up to 2, 4, .. 16 rows, and for more.
template <class T, size_t... k>
SortFunction<T> sort_function(int count, std::index_sequence<k...>) {
  static constexpr SortFunction<T> kFew[] = {&sort_tile<T, 2 * (k + 1), false>...};
  return count > kBlock ? &sort_tile<T, 0, false> : kFew[(count - 1) / 2];
}

// Everything about a call that chunks share.
template <class T>
struct Pass {
  RuleSet set;
  int stride;  // values per coordinate in a tile: what sorting pads them to
  int lanes;   // coordinates per vector
  int vectors;
  SortFunction<T> sort, sort_safe;

  explicit Pass(const RuleSet& rules) : set(rules) {
    const int count = rules.count;
    // As wide as the widest network: the safe one pads to kBlock.
    stride = (count + kBlock - 1) / kBlock * kBlock;
    lanes = vector_bytes(isa()) / static_cast<int>(sizeof(T));
    const int64_t bytes = int64_t{stride} * vector_bytes(isa());
    vectors = static_cast<int>(std::max<int64_t>(1, kTileBytes / bytes));
    sort = sort_function<T>(count, std::make_index_sequence<kBlock / 2>{});
    sort_safe = count > kBlock ? &sort_tile<T, 0, true> : &sort_tile<T, kBlock, true>;
  }

  void tile(const T* const* rows, int64_t at, int count, T* space, T* const* outs,
            int64_t to) const {
    bool unclean = false;
    sort(rows, set.count, at, count, stride, space, &unclean);
    if (unclean) sort_safe(rows, set.count, at, count, stride, space, &unclean);
    run_on_isa<RulesTile<T>>(static_cast<const T*>(space), stride, count, &set, outs, to);
  }

  // rows: (count,) pointers to a chunk; space: room for one tile more than a tile.
  void chunk(const T** rows, int64_t length, T* space, T* const* outs) const {
    const int64_t whole = length / lanes;
    for (int64_t v = 0; v < whole; v += vectors) {
      const int some = static_cast<int>(std::min<int64_t>(vectors, whole - v));
      tile(rows, v * lanes, some, space, outs, v * lanes);
    }
    const int64_t begin = whole * lanes, rest = length - begin;
    if (rest == 0) return;
    // The last coordinates, less than a vector: copied beside zeros.
    T* copies = space + int64_t{vectors} * stride * lanes;
    std::array<T*, kRules> results;
    for (int r = 0; r < set.rules; ++r) results[r] = copies + (set.count + r) * lanes;
    for (int i = 0; i < set.count; ++i) {
      T* copy = copies + i * lanes;
      for (int k = 0; k < lanes; ++k) copy[k] = k < rest ? rows[i][begin + k] : T{};
      rows[i] = copy;
    }
    tile(rows, 0, 1, space, results.data(), 0);
    for (int r = 0; r < set.rules; ++r) {
      for (int64_t k = 0; k < rest; ++k) outs[r][begin + k] = results[r][k];
    }
  }

  int64_t space() const {
    return (int64_t{vectors} * stride + set.count + kRules) * lanes + 64 / sizeof(T);
  }
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
    std::vector<T> room(pass.space());
    void* space = room.data();
    size_t bytes = room.size() * sizeof(T);
    std::align(64, bytes - 64, space, bytes);
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
    const bool trims = rule == static_cast<int>(Rule::kTrimmedMean) ||
                       rule == static_cast<int>(Rule::kPhocas);
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
