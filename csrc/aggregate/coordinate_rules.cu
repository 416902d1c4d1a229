// coordinate_rules: rows (p, d), of which `count` take part -> R updates (d,), one streaming pass.
//
// A thread owns one coordinate; neighbouring threads read neighbouring elements of each row. Values
// become integers of the same order (NaN the largest), are sorted in registers up to kSortBlock of
// them, and lie in shared memory from there: a column per thread, so that the rules may index it
// and no two threads of a warp meet in a bank. More than kSortBlock values are blocks of
// kSortBlock, sorted in registers and merged there two by two (sorting.h); shared memory bounds how
// many workers and threads a block has. A table's pointers are the p rows of a segment and its R
// outputs.
#include "aggregate/cuda.h"
#include "aggregate/rows.cuh"

namespace dashpot::aggregate {
namespace {

constexpr int kThreads = 128;

template <class T>
struct Element {  // of 16-bit floats too
  using Value = float;
  using Key = int32_t;
  static constexpr Key kLast = 0x7fffffff;
  static __device__ Key bits(Value value) { return __float_as_int(value); }
  static __device__ Value value(Key bits) { return __int_as_float(bits); }
};
template <>
struct Element<double> {
  using Value = double;
  using Key = long long;
  static constexpr Key kLast = 0x7fffffffffffffffLL;
  static __device__ Key bits(Value value) { return __double_as_longlong(value); }
  static __device__ Value value(Key bits) { return __longlong_as_double(bits); }
};

// Bits of a float to an integer of the same order, and back.
template <class T>
__device__ __forceinline__ typename Element<T>::Key turn(typename Element<T>::Key bits) {
  return bits < 0 ? bits ^ Element<T>::kLast : bits;
}

template <class T>
__device__ __forceinline__ typename Element<T>::Key key_of(T element) {
  const auto value = device_cast<typename Element<T>::Value>(element);
  return value == value ? turn<T>(Element<T>::bits(value)) : Element<T>::kLast;
}

// Value i of a thread's coordinate.
template <class T, class As>
struct Column {
  const typename Element<T>::Key* keys;
  int stride;
  As scalar;
  __device__ __forceinline__ As operator()(int i) const {
    return static_cast<As>(Element<T>::value(turn<T>(keys[i * stride])));
  }
};

template <class T>
__device__ typename Element<T>::Value apply_rule(const typename Element<T>::Key* keys, int stride,
                                                 const RuleSet& set, Rule rule) {
  using Value = typename Element<T>::Value;
  const Column<T, Value> get{keys, stride, 0};
  const Column<T, double> wide{keys, stride, 0};
  const int count = set.count;
  if (rule == Rule::kMedian) return median_of<Value>(get, count);
  if (rule == Rule::kLowerMedian) return get((count - 1) / 2);
  if (rule == Rule::kTrimmedMean) {
    return core_sum<Value>(get, count, set.f) / static_cast<Value>(count - 2 * set.f);
  }
  if constexpr (sizeof(Value) == 4) {
    Value unsure;
    const Value mean = fast_window(get, set, rule, unsure);
    if (unsure == 0) return mean;
  }
  return static_cast<Value>(exact_window<double>(wide, set, rule));
}

// P: values held in registers, count <= P; or 0 for more than kSortBlock.
template <class T, int P>
__global__ void __launch_bounds__(P ? kThreads : 64, 1)
    coordinate_rules_kernel(const __grid_constant__ Table table, const bool* mask,
                            const __grid_constant__ RuleSet set, int64_t chunks) {
  using Key = typename Element<T>::Key;
  using Value = typename Element<T>::Value;
  constexpr int kHeld = P ? P : kSortBlock;
  DASHPOT_DYNAMIC_SHARED(Key, shared);  // (count in whole kHeld, threads)
  __shared__ int live[kMaxWorkers];     // the rows that take part
  __shared__ int total;
  const int stride = blockDim.x, count = set.count, p = table.p - set.rules;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p; i += stride) {
    if (mask && !mask[i]) continue;
    int place = 0;
    for (int j = 0; j < i; ++j) place += !mask || mask[j];
    live[place] = i;
    atomicMax(&total, place + 1);
  }
  __syncthreads();
  const Span span = span_of(table, chunks - 1 - blockIdx.x);
  if (threadIdx.x >= span.length) return;
  const int64_t k = span.begin + threadIdx.x;
  const void* const* rows = table.row + span.segment * table.p;
  Key* keys = shared + threadIdx.x;
  if (total == count) {
    for (int first = 0; first < count; first += kHeld) {
      Key x[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        x[i] = Element<T>::kLast;
        if (first + i < count) x[i] = key_of(static_cast<const T*>(rows[live[first + i]])[k]);
      }
      sort_registers<kHeld>(x);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) keys[(first + i) * stride] = x[i];
    }
    if constexpr (P == 0) {
      merge_exchange((count + kSortBlock - 1) / kSortBlock, [=](int i, int j) {
        merge_blocks(keys + i * kSortBlock * stride, keys + j * kSortBlock * stride, stride);
      });
    }
  }
  for (int r = 0; r < set.rules; ++r) {
    const Value value = total == count ? apply_rule<T>(keys, stride, set, set.rule[r])
                                       : Element<T>::value(Element<T>::kLast);  // NaN
    static_cast<T*>(const_cast<void*>(rows[p + r]))[k] = device_cast<T>(value);
  }
}

template <class T, int P>
void run(const Rows& tables, const bool* mask, const RuleSet& set, cudaStream_t stream) {
  constexpr int kHeld = P ? P : kSortBlock;
  const int held = (set.count + kHeld - 1) / kHeld * kHeld;
  const int64_t column = held * static_cast<int64_t>(sizeof(typename Element<T>::Key));
  const int threads = P ? kThreads : column <= 512 ? 64 : 32;
  for_each_table(tables, threads, {}, [&](const Table& table, int64_t chunks) {
    launch(&coordinate_rules_kernel<T, P>, dim3(static_cast<unsigned>(chunks)), dim3(threads),
           column * threads, stream, table, mask, set, chunks);
  });
}

}  // namespace

void coordinate_rules_cuda(const Rows& rows, const bool* mask, const RuleSet& set,
                           const std::vector<void*>& out, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  Rows tables = rows;
  tables.p += set.rules;
  tables.pointers.clear();
  for (int64_t s = 0; s < rows.segments(); ++s) {
    const auto first = rows.pointers.begin() + s * rows.p;
    tables.pointers.insert(tables.pointers.end(), first, first + rows.p);
    for (int r = 0; r < set.rules; ++r) tables.pointers.push_back(out[r * rows.segments() + s]);
  }
  dispatch_device(rows.dtype, [&](auto element) {
    using T = decltype(element);
    if (set.count <= 4) {
      run<T, 4>(tables, mask, set, on);
    } else if (set.count <= 8) {
      run<T, 8>(tables, mask, set, on);
    } else if (set.count <= kSortBlock) {
      run<T, kSortBlock>(tables, mask, set, on);
    } else {
      run<T, 0>(tables, mask, set, on);
    }
  });
}

}  // namespace dashpot::aggregate
