// route_balanced: seed, offset -> ids (U,) int32 with equal counts.
//
// Units sorted by (key, unit): a stable radix sort, three passes of 11 bits over (key, unit) pairs
// whose counts are all taken at once, then the order is cut into E parts.
#include <utility>
#include <vector>

#include "common/bind.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "experts/cuda.h"
#include "experts/draw.h"

namespace dashpot::experts {
namespace {

struct Entry {
  uint32_t key, unit;
};

constexpr int kPasses = 3, kBits = 11, kDigits = 1 << kBits;

int64_t digit(uint32_t key, int pass) { return (key >> (pass * kBits)) & (kDigits - 1); }

Tensor route_balanced_forward(const Tensor& seed, const Tensor& offset, int64_t units,
                              int64_t experts) {
  const Tensor ids = seed.new_empty({units}, Dtype::kInt32);
  const uint64_t key = static_cast<uint64_t>(*seed.as<int64_t>());
  const uint64_t at = static_cast<uint64_t>(*offset.as<int64_t>());
  const int threads = num_threads();
  const py::gil_scoped_release release;
  std::vector<uint32_t> keys(units);
  constexpr int64_t kBlock = 4096;
  parallel_for((units + kBlock - 1) / kBlock, threads, [&](int64_t block) {
    run_on_isa<BalancedKeys>(key, at, block * kBlock, std::min(units, (block + 1) * kBlock),
                             keys.data());
  });
  std::vector<int64_t> next(kPasses * kDigits);
  for (const uint32_t one : keys) {
    for (int pass = 0; pass < kPasses; ++pass) ++next[pass * kDigits + digit(one, pass)];
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    int64_t before = 0;
    for (int64_t d = pass * kDigits; d < (pass + 1) * kDigits; ++d) {
      before += std::exchange(next[d], before);
    }
  }
  std::vector<Entry> entries(units), sorted(units);
  for (int64_t u = 0; u < units; ++u) {
    entries[next[digit(keys[u], 0)]++] = {keys[u], static_cast<uint32_t>(u)};
  }
  for (const Entry& entry : entries) sorted[next[kDigits + digit(entry.key, 1)]++] = entry;
  for (const Entry& entry : sorted) {
    const int64_t position = next[2 * kDigits + digit(entry.key, 2)]++;
    ids.as<int32_t>()[entry.unit] = static_cast<int32_t>(position * experts / units);
  }
  return ids;
}

#ifdef DASHPOT_CUDA
Tensor route_balanced_forward_cuda(const Tensor& seed, const Tensor& offset, int64_t units,
                                   int64_t experts) {
  const Tensor ids = seed.new_empty({units}, Dtype::kInt32);
  const Tensor pairs = seed.new_empty({units}, Dtype::kInt64);
  const Tensor counts = seed.new_empty({balanced_buckets(units)}, Dtype::kInt32);
  const Place place = place_of(seed);
  route_balanced_cuda({seed.as<int64_t>(), offset.as<int64_t>(), units, experts},
                      counts.as<int32_t>(), pairs.as<int64_t>(), ids.as<int32_t>(), place.device,
                      place.stream);
  return ids;
}
#endif

}  // namespace

DASHPOT_BIND(m) {
  m.def("route_balanced_forward", &route_balanced_forward);
#ifdef DASHPOT_CUDA
  m.def("route_balanced_forward_cuda", &route_balanced_forward_cuda);
#endif
}

}  // namespace dashpot::experts
