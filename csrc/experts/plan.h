// The counting sort behind dispatch_plan and random_plan on the CPU.
//
// Ids are taken in blocks whose length follows from n and E alone. Pass 1 counts each block's ids,
// a scan over blocks gives every block its first slot per expert, pass 2 deals the slots out. With
// a capacity by choice or score, a pass before decides who is kept. Everything is integers, so that
// any number of threads gives the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"
#include "experts/draw.h"

namespace dashpot::experts {

inline Route route_of(const Tensor& seed, const Tensor& offset, int64_t units, int experts, int k,
                      bool replace) {
  return {static_cast<uint64_t>(*seed.as<int64_t>()),
          static_cast<uint64_t>(*offset.as<int64_t>()),
          units,
          experts,
          k,
          replace};
}

struct PlanShape {
  int64_t tokens, k, experts, align;
  std::optional<int64_t> capacity;

  int64_t n() const { return tokens * k; }
  int64_t slots() const {
    return align == 1 ? n() : (n() + experts * (align - 1) + align - 1) / align * align;
  }
};

struct Plan {
  Tensor counts, routed, offsets, order, rank;

  Plan(const Tensor& like, const PlanShape& shape)
      : counts(like.new_empty({shape.experts}, Dtype::kInt32)),
        routed(like.new_empty({shape.experts}, Dtype::kInt32)),
        offsets(like.new_empty({shape.experts}, Dtype::kInt32)),
        order(like.new_empty({shape.slots()}, Dtype::kInt32)),
        rank(like.new_empty({shape.tokens, shape.k}, Dtype::kInt32)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const {
    return {counts, routed, offsets, order, rank};
  }
};

// Ids (n,) with those that an expert has no room for replaced by -1; visit(q) is the flat index
// that comes q-th in priority.
template <class Visit>
void drop_by(const int32_t* ids, const PlanShape& shape, const Visit& visit, int32_t* kept) {
  std::vector<int64_t> seen(shape.experts);
  for (int64_t q = 0; q < shape.n(); ++q) {
    const int64_t i = visit(q);
    const uint32_t id = static_cast<uint32_t>(ids[i]);
    const bool room = id < shape.experts && seen[id]++ < *shape.capacity;
    kept[i] = room ? static_cast<int32_t>(id) : -1;
  }
}

// Flat indices by falling score, ties and NaN (last) in ascending order. An expert's own order is
// all that counts, and it is that of the whole.
template <class T>
std::vector<int32_t> by_score(const T* scores, int64_t n) {
  std::vector<int32_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  const auto value = [&](int32_t i) {
    return scores[i] == scores[i] ? scores[i] : -std::numeric_limits<T>::infinity();
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return value(a) > value(b); });
  return order;
}

// ids (n,) int32, may be plan.rank itself: an id is read before its slot is written there.
// keep_first: capacity keeps an expert's first rows in the order of the flat index; without it
// every id that is given is kept, and `routed` is the caller's.
inline void fill_plan(const int32_t* ids, const PlanShape& shape, bool keep_first, const Plan& plan,
                      int threads) {
  const int64_t n = shape.n(), experts = shape.experts;
  const int64_t length = std::max<int64_t>(16384, experts);
  const int64_t blocks = (n + length - 1) / length;
  // (blocks, E), rows a cache line apart: neighbours belong to different threads.
  const int64_t stride = (experts + 31) / 16 * 16;
  std::vector<int32_t> next(std::max<int64_t>(1, blocks) * stride);
  parallel_for(blocks, threads, [&](int64_t block) {
    int32_t* count = next.data() + block * stride;
    const int64_t end = std::min(n, (block + 1) * length);
    for (int64_t i = block * length; i < end; ++i) {
      const uint32_t id = static_cast<uint32_t>(ids[i]);
      if (id < experts) ++count[id];
    }
  });
  int32_t* const counts = plan.counts.as<int32_t>();
  int32_t* const offsets = plan.offsets.as<int32_t>();
  int32_t* const order = plan.order.as<int32_t>();
  std::vector<int64_t> last(experts);  // slots from here on are not the expert's
  int64_t start = 0;
  for (int64_t e = 0; e < experts; ++e) {
    int64_t total = start;
    for (int64_t block = 0; block < blocks; ++block) {
      const int32_t count = next[block * stride + e];
      next[block * stride + e] = static_cast<int32_t>(total);
      total += count;
    }
    int64_t kept = total - start;
    if (keep_first) {
      plan.routed.as<int32_t>()[e] = static_cast<int32_t>(kept);
      if (shape.capacity) kept = std::min(kept, *shape.capacity);
    }
    counts[e] = static_cast<int32_t>(kept);
    last[e] = start + kept;
    const int64_t stop = start + (kept + shape.align - 1) / shape.align * shape.align;
    offsets[e] = static_cast<int32_t>(stop);
    std::fill(order + last[e], order + stop, -1);
    start = stop;
  }
  std::fill(order + start, order + shape.slots(), -1);
  int32_t* const rank = plan.rank.as<int32_t>();
  parallel_for(blocks, threads, [&](int64_t block) {
    int32_t* slot = next.data() + block * stride;
    const int64_t end = std::min(n, (block + 1) * length);
    for (int64_t i = block * length; i < end; ++i) {
      const uint32_t id = static_cast<uint32_t>(ids[i]);
      int32_t place = -1;
      if (id < experts && slot[id] < last[id]) {
        place = slot[id]++;
        order[place] = static_cast<int32_t>(i);
      }
      rank[i] = place;
    }
  });
}

// The whole: ids (n,), may be plan.rank; scores of dtype float32 or float64, or null.
inline void make_plan(const int32_t* ids, const Tensor* scores, const std::string& priority,
                      const PlanShape& shape, const Plan& plan, int threads) {
  if (!shape.capacity || priority == "token") {
    fill_plan(ids, shape, true, plan, threads);
    return;
  }
  int32_t* const routed = plan.routed.as<int32_t>();
  std::fill(routed, routed + shape.experts, 0);
  for (int64_t i = 0; i < shape.n(); ++i) {
    const uint32_t id = static_cast<uint32_t>(ids[i]);
    if (id < shape.experts) ++routed[id];
  }
  std::vector<int32_t> kept(shape.n());
  if (scores == nullptr) {
    drop_by(
        ids, shape, [&](int64_t q) { return q % shape.tokens * shape.k + q / shape.tokens; },
        kept.data());
  } else {
    const std::vector<int32_t> order = scores->dtype == Dtype::kFloat64
                                           ? by_score(scores->as<double>(), shape.n())
                                           : by_score(scores->as<float>(), shape.n());
    drop_by(ids, shape, [&](int64_t q) { return order[q]; }, kept.data());
  }
  fill_plan(kept.data(), shape, false, plan, threads);
}

}  // namespace dashpot::experts
