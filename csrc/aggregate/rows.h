// The workers' rows as kernels see them: p rows of d coordinates, cut into segments.
//
// A stacked tensor (p, d) is one segment; S parameters of p workers are S segments whose rows lie
// anywhere. Nothing is copied: a kernel gets pointers, segment by segment, and works on chunks, so
// that work is divided by d alone: the same chunks, and the same bits, for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "common/dtype.h"

namespace dashpot::aggregate {

struct Chunk {
  int64_t segment, begin, length;
};

struct Rows {
  int64_t p = 0;
  int64_t d = 0;  // all segments together
  Dtype dtype = Dtype::kFloat32;
  std::vector<const void*> pointers;  // (S, p)
  std::vector<int64_t> lengths;       // (S,)

  // grads: one tensor (p, ...), or S * p tensors, segment by segment. A template, so that `.cu`
  // files need not parse pybind11.
  template <class Tensor>
  Rows(const std::vector<Tensor>& grads, int64_t workers) : p(workers) {
    if (p < 1 || grads.empty() || (grads.size() > 1 && grads.size() % p != 0)) {
      throw std::invalid_argument("expected one tensor, or p of them per segment");
    }
    dtype = grads[0].dtype;
    const bool stacked = grads.size() == 1;
    const int64_t segments = stacked ? 1 : static_cast<int64_t>(grads.size()) / p;
    pointers.reserve(segments * p);
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t n = stacked ? grads[0].numel / p : grads[s * p].numel;
      for (int64_t i = 0; i < p; ++i) {
        const auto& row = stacked ? grads[0] : grads[s * p + i];
        if (row.dtype != dtype || (!stacked && row.numel != n)) {
          throw std::invalid_argument("expected rows of one dtype and one length per segment");
        }
        const char* base = static_cast<const char*>(row.data);
        pointers.push_back(stacked ? base + i * n * element_size(dtype) : base);
      }
      lengths.push_back(n);
      d += n;
    }
  }

  int64_t segments() const { return static_cast<int64_t>(lengths.size()); }

  // Cut into chunks of at most `length` coordinates, none across a segment's end.
  std::vector<Chunk> chunks(int64_t length) const {
    std::vector<Chunk> all;
    all.reserve(d / length + segments());
    for (int64_t s = 0; s < segments(); ++s) {
      for (int64_t begin = 0; begin < lengths[s]; begin += length) {
        all.push_back({s, begin, std::min(length, lengths[s] - begin)});
      }
    }
    return all;
  }

  // Row i of a chunk.
  template <class T>
  const T* row(const Chunk& chunk, int64_t i) const {
    return static_cast<const T*>(pointers[chunk.segment * p + i]) + chunk.begin;
  }
};

}  // namespace dashpot::aggregate
