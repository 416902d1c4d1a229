// Matrix products of segments of rows on the CPU: torch's own library, called through Python.
//
// What a product costs there is its arithmetic; a call adds about two microseconds. out= keeps
// autocast away (its casts are not registered for out variants) and writes where the result is
// wanted. Needs the GIL.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "common/tensor.h"
#include "experts/rows.h"

namespace dashpot::experts {

inline py::object rows_of(const Tensor& matrix, int64_t begin, int64_t count) {
  return matrix.object.attr("narrow")(0, begin, count);
}

inline py::object expert_of(const Tensor& stack, int64_t e) {
  return stack.object.attr("select")(0, e);
}

// out = a b
inline void multiply(const py::object& a, const py::object& b, const py::object& out) {
  static PyObject* const mm = PyObject_GetAttrString(names().torch, "mm");
  py::reinterpret_borrow<py::object>(mm)(a, b, py::arg("out") = out);
}

// out = a w^T + bias, bias (N,) or null
inline void linear(const py::object& a, const py::object& w, const py::object& bias,
                   const py::object& out) {
  const py::object transposed = w.attr("t")();
  if (!bias) {
    multiply(a, transposed, out);
    return;
  }
  static PyObject* const addmm = PyObject_GetAttrString(names().torch, "addmm");
  py::reinterpret_borrow<py::object>(addmm)(bias, a, transposed, py::arg("out") = out);
}

struct Segment {
  int64_t begin, count;
};

// The segments that the ends describe.
inline std::vector<Segment> segments_of(const Tensor& offsets, int64_t rows) {
  if (offsets.dtype != Dtype::kInt32) throw std::invalid_argument("offsets: expected int32");
  std::vector<Segment> segments;
  int64_t begin = 0;
  for (int64_t e = 0; e < offsets.numel; ++e) {
    const int64_t end = offsets.as<int32_t>()[e];
    if (end < begin || end > rows) {
      throw std::invalid_argument("offsets: expected ascending ends from 0 to " +
                                  std::to_string(rows) + ", got " + std::to_string(end) +
                                  " after " + std::to_string(begin));
    }
    segments.push_back({begin, end - begin});
    begin = end;
  }
  return segments;
}

inline int64_t longest(const std::vector<Segment>& segments) {
  int64_t most = 0;
  for (const Segment& segment : segments) most = std::max(most, segment.count);
  return most;
}

inline void zero(const Tensor& tensor, int64_t begin, int64_t count) {
  std::memset(tensor.as<char>() + begin * element_size(tensor.dtype), 0,
              count * element_size(tensor.dtype));
}

// out (n,) = sum of `rows` rows (rows, n): groups of 64 rows, then the groups' sums.
template <class T>
struct ColumnSums {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* from, int64_t rows, int64_t n, T* out) {
    using W = Wide<T>;
    constexpr int64_t kStep = kLanes<W, isa>, kGroup = 64;
    for (int64_t c = 0; c < n; c += kStep) {
      Vec<W, isa> total{};
      for (int64_t first = 0; first < rows; first += kGroup) {
        Vec<W, isa> sum{};
        const int64_t last = first + kGroup < rows ? first + kGroup : rows;
        for (int64_t r = first; r < last; ++r) {
          sum += load_part<isa>(from + r * n + c, n - c, W(0));
        }
        total += sum;
      }
      store_part<isa>(out + c, total, n - c);
    }
  }
};

inline void column_sums(const Tensor& from, int64_t begin, int64_t rows, int64_t n,
                        const Tensor& out, int64_t e) {
  dispatch_floating(from.dtype, [&](auto element) {
    using T = decltype(element);
    run_on_isa<ColumnSums<T>>(static_cast<const T*>(from.as<T>() + begin * n), rows, n,
                              out.as<T>() + e * n);
  });
}

}  // namespace dashpot::experts
