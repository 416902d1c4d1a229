// What the CPU's and the device's code of the family both speak of.
#pragma once

#include <cstdint>

namespace dashpot::transport {

enum class Reg { kNegentropy, kL2, kSparse };
enum class Metric { kSqeuclidean, kEuclidean, kInner };  // of a cost made from points

inline constexpr int64_t kMaxRows = 1 << 24;  // counts are kept in float32

struct Options {
  int64_t m, n, k;
  double gamma;
  Reg reg;
  bool dual;
  double smoothing = 0;  // mu of the smoothed dual; 0: the dual itself
  double tie = -1;       // relative distance at which the k-th and next score count as tied
};

}  // namespace dashpot::transport
