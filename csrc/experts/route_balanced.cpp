// route_balanced: seed, offset -> ids (U,) int32 with equal counts.
//
// Units sorted by (key, unit): a stable radix sort, four passes of 8 bits over (key, unit) pairs,
// then the order is cut into E parts.
#include <vector>

#include "common/bind.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "experts/philox.h"

namespace dashpot::experts {
namespace {

struct Entry {
  uint32_t key, unit;
};

Tensor route_balanced_forward(const Tensor& seed, const Tensor& offset, int64_t units,
                              int64_t experts) {
  const Tensor ids = seed.new_empty({units}, Dtype::kInt32);
  const uint64_t key = static_cast<uint64_t>(*seed.as<int64_t>());
  const uint64_t at = static_cast<uint64_t>(*offset.as<int64_t>());
  const int threads = num_threads();
  const py::gil_scoped_release release;
  std::vector<Entry> entries(units), sorted(units);
  constexpr int64_t kBlock = 4096;
  parallel_for((units + kBlock - 1) / kBlock, threads, [&](int64_t block) {
    const int64_t end = std::min(units, (block + 1) * kBlock);
    for (int64_t u = block * kBlock; u < end; ++u) {
      const uint32_t unit = static_cast<uint32_t>(u);
      entries[u] = {philox(key, at, unit, kBalancedBlock).word[0], unit};
    }
  });
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t next[257] = {};
    for (const Entry& entry : entries) ++next[((entry.key >> shift) & 255) + 1];
    for (int digit = 0; digit < 256; ++digit) next[digit + 1] += next[digit];
    for (const Entry& entry : entries) sorted[next[(entry.key >> shift) & 255]++] = entry;
    entries.swap(sorted);
  }
  for (int64_t position = 0; position < units; ++position) {
    ids.as<int32_t>()[entries[position].unit] = static_cast<int32_t>(position * experts / units);
  }
  return ids;
}

}  // namespace

DASHPOT_BIND(m) { m.def("route_balanced_forward", &route_balanced_forward); }

}  // namespace dashpot::experts
