// Rows by group: dense ids, and an order in which the pairs of one group lie side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace dashpot::contrastive {

// Places 0..n-1, ordered by ids and, within an id, as they came.
inline std::vector<int64_t> order_by_id(const int64_t* ids, int64_t n) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return ids[a] != ids[b] ? ids[a] < ids[b] : a < b; });
  return order;
}

// ids (n,) of any value -> 0, 1, ... (n,), equal where they were equal.
template <class Id>
std::vector<Id> dense_ids(const std::vector<int64_t>& ids) {
  const int64_t n = static_cast<int64_t>(ids.size());
  const std::vector<int64_t> order = order_by_id(ids.data(), n);
  std::vector<Id> dense(n);
  Id id = 0;
  for (int64_t k = 0; k < n; ++k) {
    if (k > 0 && ids[order[k]] != ids[order[k - 1]]) ++id;
    dense[order[k]] = id;
  }
  return dense;
}

// Groups of two rows or more first, each in one stretch; then the rows that are alone.
struct Groups {
  int64_t paired = 0;          // rows of the first kind
  std::vector<int64_t> row;    // (n,) which row stands at a place
  std::vector<int64_t> first;  // (n,) first place of its group
  std::vector<int64_t> last;   // (n,) one beyond its last

  Groups(const int64_t* ids, int64_t n) {
    const std::vector<int64_t> order = order_by_id(ids, n);
    std::vector<int64_t> alone;
    row.reserve(n);
    for (int64_t begin = 0, end = 0; begin < n; begin = end) {
      while (end < n && ids[order[end]] == ids[order[begin]]) ++end;
      if (end - begin == 1) {
        alone.push_back(order[begin]);
        continue;
      }
      const int64_t place = static_cast<int64_t>(row.size());
      for (int64_t k = begin; k < end; ++k) {
        row.push_back(order[k]);
        first.push_back(place);
        last.push_back(place + end - begin);
      }
    }
    paired = static_cast<int64_t>(row.size());
    for (const int64_t one : alone) {
      first.push_back(static_cast<int64_t>(row.size()));
      row.push_back(one);
      last.push_back(static_cast<int64_t>(row.size()));
    }
  }

  int64_t positives(int64_t place) const { return last[place] - first[place] - 1; }
};

}  // namespace dashpot::contrastive
