// opis: embeddings (N, D), classes (N,) -> genuine, impostor (C, T) int64 pairs within each
// threshold, grid (T,) float64.
//
// Rows are ordered by class, so a panel of rows meets few classes. A sweep over the tiles on and
// above the diagonal puts each pair into the interval between two thresholds: the interval is
// guessed from the distance and then compared with the cosines at its ends, so counts at thresholds
// are exact. A tile counts into a table of its own (classes of its two panels by T), which then
// goes to the common one by integer atomics: sums of integers have no order.
//
// The range by ranks: the cosines of impostors among kSample rows show between which two cosines a
// rank should lie; one sweep counts the impostors on either side and lists those in between, and
// the rank is selected from the list. Where the sample misled, or the lists would be long, 16 bits
// of the cosines' ordered representation are found at a time: each sweep counts what the next 16
// bits of those are that agree so far.
#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "common/math.h"
#include "common/schedule.h"
#include "contrastive/groups.h"
#include "contrastive/logits.h"
#include "contrastive/panels.h"

namespace dashpot::contrastive {
namespace {

// Cosines as unsigned numbers that grow as they fall: the smallest distance first.
template <class Work>
struct Key {
  using Bits = std::conditional_t<sizeof(Work) == 4, uint32_t, uint64_t>;
  static constexpr int kBits = 8 * sizeof(Bits);

  static Bits of(Work s) {
    Bits bits;
    s += Work(0);  // -0 as 0
    std::memcpy(&bits, &s, sizeof bits);
    const Bits sign = Bits{1} << (kBits - 1);
    return ~(bits & sign ? ~bits : bits | sign);
  }
  static Work cosine(Bits key) {
    const Bits sign = Bits{1} << (kBits - 1);
    Bits bits = ~key;
    bits = bits & sign ? bits ^ sign : ~bits;
    Work s;
    std::memcpy(&s, &bits, sizeof s);
    return s;
  }
};

std::vector<int64_t> every(const std::vector<int64_t>& rows, int64_t step) {
  std::vector<int64_t> some;
  for (size_t k = 0; k < rows.size(); k += step) some.push_back(rows[k]);
  return some;
}

// Rows by class, or every step-th of them.
template <class Work>
class Sweep {
 public:
  const std::vector<int64_t> order;
  const Panels<Work> rows;
  const int64_t num_classes;
  const int threads;
  std::vector<int32_t> classes;  // (N,) in this order; num_classes for rows without a class

  template <class In>
  Sweep(const In* z, const int64_t* ids, std::vector<int64_t> by_class, int64_t d,
        int64_t num_classes, int threads)
      : order(std::move(by_class)),
        rows(z, size(), d, 1e-12, threads, panel_for(size()), order.data()),
        num_classes(num_classes),
        threads(threads) {
    classes.reserve(size());
    for (const int64_t i : order) {
      if (ids[i] < 0 || ids[i] > num_classes) {
        throw std::invalid_argument("classes: expected 0..num_classes");
      }
      classes.push_back(static_cast<int32_t>(ids[i]));
    }
  }

  int64_t size() const { return static_cast<int64_t>(order.size()); }

  // body(i, j, tile, first): rows of panels i <= j; the pairs of row a are the columns from
  // first(a) on. Panels are square.
  template <class Body>
  void for_tiles(const Body& body) const {
    for_pairs(rows.count, threads, [&](int64_t i, int64_t j) {
      alignas(64) Work scratch[kMaxPanel * kMaxPanel];
      products(rows, i, rows, j, scratch);
      body(i, j, scratch, [&](int64_t a) { return i == j ? a + 1 : int64_t{0}; });
    });
  }

  int64_t impostor_pairs() const {
    int64_t pairs = size() * (size() - 1) / 2;
    for (int64_t begin = 0, end = 0; begin < size() && classes[begin] < num_classes; begin = end) {
      while (end < size() && classes[end] == classes[begin]) ++end;
      pairs -= (end - begin) * (end - begin - 1) / 2;
    }
    return pairs;
  }

  // Sets all of a tile that is no impostor pair to -inf; for_tiles' arguments.
  template <class First>
  void keep_impostors(int64_t i, int64_t j, Work* s, const First& first) const {
    constexpr Work kNone = -std::numeric_limits<Work>::infinity();
    const int32_t* column = classes.data() + rows.begin(j);
    const int64_t columns = rows.height(j);
    for (int64_t a = 0; a < rows.height(i); ++a, s += rows.panel) {
      const auto [same, beyond] =
          alike_columns(classes[rows.begin(i) + a], column, first(a), columns);
      std::fill(s, s + first(a), kNone);
      std::fill(s + same, s + beyond, kNone);
      std::fill(s + columns, s + rows.panel, kNone);
    }
  }

  // Which of the columns begin..end have the class `own`: they lie side by side.
  std::pair<int64_t, int64_t> alike_columns(int32_t own, const int32_t* column, int64_t begin,
                                            int64_t end) const {
    if (own >= num_classes) return {end, end};
    const auto [low, high] = std::equal_range(column + begin, column + end, own);
    return {low - column, high - column};
  }
};

// Cosines between which the one of a rank is looked for: near > far.
template <class Work>
struct Bracket {
  Work near, far;
};

using Counts = std::array<std::array<int64_t, 3>, 2>;  // of cosines > near, >= near and >= far

// Counts for both brackets, and writes the cosines in between (and a few next to them) to `end`.
template <class Work>
struct CountBrackets {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Work* s, int64_t n, const Bracket<Work>* bracket,
                                 Counts* counts, Work** end) {
    using Int = IntVec<Work, isa>;
    for (int k = 0; k < 2; ++k) {
      const Work near = bracket[k].near, far = bracket[k].far;
      Int sums[3] = {};
      for (int64_t j = 0; j < n; j += kLanes<Work, isa>) {
        const Vec<Work, isa> x = load<Work, isa>(s + j);
        sums[0] -= x > near;
        sums[1] -= x >= near;
        sums[2] -= x >= far;
      }
      for (int which = 0; which < 3; ++which) {
        for (int lane = 0; lane < kLanes<Work, isa>; ++lane)
          (*counts)[k][which] += sums[which][lane];
      }
      // Written without branches: which ones are inside cannot be predicted. One comparison; that
      // the sum is rounded lets a few more in.
      const Work middle = near / 2 + far / 2;
      const Work reach = (near - middle) + 8 * std::numeric_limits<Work>::epsilon();
      Work* to = end[k];
      for (int64_t j = 0; j < n; ++j) {
        *to = s[j];
        to += std::abs(s[j] - middle) < reach;
      }
      end[k] = to;
    }
  }
};

constexpr int64_t kSample = 1024;              // rows
constexpr int64_t kListed = int64_t{1} << 22;  // cosines in a thread's list

// The threads' lists as one.
template <class Work>
std::vector<Work> joined(std::vector<std::vector<Work>>& parts) {
  std::vector<Work> all = std::move(parts.front());
  for (size_t k = 1; k < parts.size(); ++k) {
    all.insert(all.end(), parts[k].begin(), parts[k].end());
    parts[k] = {};
  }
  return all;
}

// The brackets that the impostors of a sample of the rows suggest, none if they would hold too
// much. The share p of pairs within a distance deviates by 2 sqrt(p (1 - p) / rows) at most, by a
// fraction of that unless each row has all others near or none: that much to either side.
template <class Work>
std::optional<std::array<Bracket<Work>, 2>> brackets_of(const Sweep<Work>& sample, int64_t pairs,
                                                        const std::vector<int64_t>& ranks) {
  std::vector<std::vector<Work>> all(sample.threads);
  sample.for_tiles([&](int64_t i, int64_t j, Work* s, auto first) {
    sample.keep_impostors(i, j, s, first);
    const int64_t size = sample.rows.height(i) * sample.rows.panel;
    std::copy_if(s, s + size, std::back_inserter(all[omp_get_thread_num()]),
                 [](Work x) { return x > -std::numeric_limits<Work>::infinity(); });
  });
  std::vector<Work> found = joined(all);
  const double count = static_cast<double>(found.size());
  std::array<Bracket<Work>, 2> brackets;
  for (int k = 0; k < 2; ++k) {
    const double p = std::min(static_cast<double>(ranks[k]) / static_cast<double>(pairs), 1.0);
    const double margin = 2 * std::sqrt(p * (1 - p) / static_cast<double>(sample.size()));
    if (2 * margin * static_cast<double>(pairs) > static_cast<double>(kListed)) return {};
    const auto at = [&](double share, Work beyond) {
      const auto place = static_cast<int64_t>(std::floor(share * count));
      if (place < 0 || place >= static_cast<int64_t>(found.size())) return beyond;
      std::nth_element(found.begin(), found.begin() + place, found.end(), std::greater<Work>());
      return found[place];
    };
    brackets[k] = {at(p - margin, Work(2)), at(p + margin, Work(-2))};  // 2: beyond all cosines
  }
  return brackets;
}

// The impostor cosines of two ranks by one sweep, if they lie where they are looked for.
template <class Work>
std::optional<std::array<double, 2>> cosines_in(const Sweep<Work>& sweep,
                                                const std::array<Bracket<Work>, 2>& brackets,
                                                const std::vector<int64_t>& ranks) {
  std::vector<Counts> counts(sweep.threads, Counts{});
  std::array<std::vector<std::vector<Work>>, 2> inside;  // by bracket and thread
  std::array<std::vector<int64_t>, 2> lengths;
  for (int k = 0; k < 2; ++k) {
    inside[k].resize(sweep.threads);
    lengths[k].resize(sweep.threads);
  }
  std::atomic<bool> too_long{false};
  const int64_t tile = sweep.rows.panel * sweep.rows.panel;
  sweep.for_tiles([&](int64_t i, int64_t j, Work* s, auto first) {
    if (too_long) return;
    sweep.keep_impostors(i, j, s, first);
    const int thread = omp_get_thread_num();
    std::array<Work*, 2> end;
    for (int k = 0; k < 2; ++k) {
      std::vector<Work>& list = inside[k][thread];
      const int64_t length = lengths[k][thread];
      if (static_cast<int64_t>(list.size()) < length + tile) list.resize(length * 5 / 4 + tile);
      end[k] = list.data() + length;
    }
    run_on_isa<CountBrackets<Work>>(static_cast<const Work*>(s),
                                    sweep.rows.height(i) * sweep.rows.panel, brackets.data(),
                                    &counts[thread], end.data());
    for (int k = 0; k < 2; ++k) {
      lengths[k][thread] = end[k] - inside[k][thread].data();
      if (lengths[k][thread] > kListed) too_long = true;
    }
  });
  if (too_long) return {};
  std::array<double, 2> result;
  for (int k = 0; k < 2; ++k) {
    const auto [near, far] = brackets[k];
    std::array<int64_t, 3> count{};
    for (int thread = 0; thread < sweep.threads; ++thread) {
      for (int which = 0; which < 3; ++which) count[which] += counts[thread][k][which];
      std::vector<Work>& list = inside[k][thread];
      list.resize(lengths[k][thread]);
      const auto outside = [near = near, far = far](Work x) { return !(x < near && x > far); };
      list.erase(std::remove_if(list.begin(), list.end(), outside), list.end());
    }
    std::vector<Work> list = joined(inside[k]);
    if (ranks[k] <= count[0] || ranks[k] > count[2]) return {};
    const int64_t place = ranks[k] - count[1] - 1;  // in the list
    if (place < 0) {
      result[k] = near;
    } else if (place < static_cast<int64_t>(list.size())) {
      std::nth_element(list.begin(), list.begin() + place, list.end(), std::greater<Work>());
      result[k] = list[place];
    } else {
      result[k] = far;
    }
  }
  return result;
}

// The impostor cosines of two ranks, counted from 1 by growing distance: 16 bits at a time.
template <class Work>
std::array<double, 2> cosines_by_digits(const Sweep<Work>& sweep,
                                        const std::vector<int64_t>& ranks) {
  using Bits = typename Key<Work>::Bits;
  constexpr int kDigit = 16;
  constexpr int64_t kBins = int64_t{1} << kDigit;
  std::array<Bits, 2> found{};
  std::array<int64_t, 2> left{ranks.at(0), ranks.at(1)};
  for (int done = 0; done < Key<Work>::kBits; done += kDigit) {
    const int shift = Key<Work>::kBits - done - kDigit;
    const int tables = found[0] == found[1] ? 1 : 2;          // both may agree so far
    std::vector<std::vector<int64_t>> counts(sweep.threads);  // integers: any split adds up alike
    for (auto& one : counts) one.assign(tables * kBins, 0);
    sweep.for_tiles([&](int64_t i, int64_t j, Work* s, auto first) {
      int64_t* table = counts[omp_get_thread_num()].data();
      const int32_t* column = sweep.classes.data() + sweep.rows.begin(j);
      for (int64_t a = 0; a < sweep.rows.height(i); ++a) {
        const Work* cosines = s + a * sweep.rows.panel;
        const auto count = [&](int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; ++b) {
            const Bits key = Key<Work>::of(cosines[b]);
            const Bits digit = (key >> shift) & (kBins - 1);
            if (done == 0) {
              ++table[digit];
              continue;
            }
            for (int t = 0; t < tables; ++t) {
              if (key >> (shift + kDigit) == found[t]) ++table[t * kBins + digit];
            }
          }
        };
        const int64_t columns = sweep.rows.height(j);
        const auto [same, beyond] =
            sweep.alike_columns(sweep.classes[sweep.rows.begin(i) + a], column, first(a), columns);
        count(first(a), same);
        count(beyond, columns);
      }
    });
    std::array<Bits, 2> longer{};
    for (int k = 0; k < 2; ++k) {
      const int64_t base = tables == 2 ? k * kBins : 0;
      int64_t digit = 0;
      for (;; ++digit) {
        int64_t here = 0;
        for (const auto& one : counts) here += one[base + digit];
        if (left[k] <= here) break;
        left[k] -= here;
        if (digit + 1 == kBins) throw std::invalid_argument("ranks: beyond the impostor pairs");
      }
      longer[k] = (done == 0 ? Bits{0} : static_cast<Bits>(found[k] << (kDigit - 1) << 1)) |
                  static_cast<Bits>(digit);
    }
    found = longer;
  }
  return {Key<Work>::cosine(found[0]), Key<Work>::cosine(found[1])};
}

struct Grid {
  std::vector<double> distance, cosine;  // (T,)
  bool euclidean;
};

double distance_of(double s, bool euclidean) {
  return euclidean ? std::sqrt(std::max(2 - 2 * s, 0.0)) : 1 - s;
}

Grid grid_of(std::array<double, 2> ends, int64_t count, bool euclidean,
             const std::array<double, 2>* exact) {
  Grid grid{std::vector<double>(count), std::vector<double>(count), euclidean};
  for (int64_t k = 0; k < count; ++k) {
    const double step = (ends[1] - ends[0]) / static_cast<double>(count - 1);
    const double d = ends[0] + static_cast<double>(k) * step;
    grid.distance[k] = d;
    grid.cosine[k] = euclidean ? 1 - d * d / 2 : 1 - d;
  }
  if (exact) {  // a pair that lies on an end counts
    grid.distance.back() = ends[1];
    grid.cosine.front() = (*exact)[0];
    grid.cosine.back() = (*exact)[1];
  }
  return grid;
}

// Pairs by class and interval, (C, T) each: most pairs lie beyond the last threshold, and only the
// others are looked at one by one. Their list is written without branches: which pairs are on it
// cannot be predicted.
template <class Work>
void count_pairs(const Sweep<Work>& sweep, const Grid& grid, int64_t* genuine, int64_t* impostor) {
  const int64_t width = static_cast<int64_t>(grid.cosine.size());
  // bound[k] > s >= bound[k + 1]: interval k. In Work, so that comparing is exact: a cosine in Work
  // is at least a threshold iff it is at least the next number of Work above it.
  std::vector<Work> bound(width + 1);
  bound.front() = std::numeric_limits<Work>::infinity();
  for (int64_t k = 0; k < width; ++k) {
    Work at = static_cast<Work>(grid.cosine[k]);
    if (static_cast<double>(at) < grid.cosine[k]) {
      at = std::nextafter(at, std::numeric_limits<Work>::infinity());
    }
    bound[k + 1] = at;
  }
  const double span = grid.distance.back() - grid.distance.front();
  const Work start = static_cast<Work>(grid.distance.front());
  const Work scale = static_cast<Work>(span > 0 ? static_cast<double>(width - 1) / span : 0.0);
  // The number of thresholds that are nearer, up to a few too many or too few.
  const auto guess = [&](Work cosine) {
    Work d = Work(1) - cosine;
    if (grid.euclidean) d = std::sqrt(std::max(d + d, Work(0)));
    const Work at = (d - start) * scale;
    return static_cast<int64_t>(std::min(std::max(at, Work(0)), static_cast<Work>(width - 1)));
  };
  sweep.for_tiles([&](int64_t i, int64_t j, Work* s, auto first) {
    const int32_t* row = sweep.classes.data() + sweep.rows.begin(i);
    const int32_t* column = sweep.classes.data() + sweep.rows.begin(j);
    const int64_t height = sweep.rows.height(i), columns = sweep.rows.height(j);
    const int32_t row_class = row[0], column_class = column[0];
    const int64_t row_classes = row[height - 1] - row_class + 1;
    const int64_t column_classes = column[columns - 1] - column_class + 1;
    // Of both panels: impostors by the row's class, by the column's, and genuine pairs.
    std::vector<int32_t> table((2 * row_classes + column_classes) * width, 0);
    int32_t* by_row = table.data();
    int32_t* inside = by_row + row_classes * width;
    int32_t* by_column = inside + row_classes * width;
    int32_t near[kMaxPanel];
    for (int64_t a = 0; a < height; ++a) {
      const Work* cosines = s + a * sweep.rows.panel;
      int64_t listed = 0;
      for (int64_t b = first(a); b < columns; ++b) {
        near[listed] = static_cast<int32_t>(b);
        listed += cosines[b] >= bound[width];
      }
      const auto [same, beyond] = sweep.alike_columns(row[a], column, first(a), columns);
      int32_t* own_row = by_row + (row[a] - row_class) * width;
      int32_t* own_inside = inside + (row[a] - row_class) * width;
      for (int64_t at = 0; at < listed; ++at) {
        const int64_t b = near[at];
        int64_t k = guess(cosines[b]);
        while (cosines[b] >= bound[k]) --k;
        while (cosines[b] < bound[k + 1]) ++k;
        if (b >= same && b < beyond) {
          ++own_inside[k];
        } else {
          ++own_row[k];
          ++by_column[(column[b] - column_class) * width + k];
        }
      }
    }
    const auto flush = [&](const int32_t* from, int64_t begin, int64_t classes, int64_t* to) {
      const int64_t live = std::min(classes, sweep.num_classes - begin) * width;
      for (int64_t k = 0; k < live; ++k) {
        if (from[k] != 0) {
          __atomic_fetch_add(to + begin * width + k, int64_t{from[k]}, __ATOMIC_RELAXED);
        }
      }
    };
    flush(by_row, row_class, row_classes, impostor);
    flush(inside, row_class, row_classes, genuine);
    flush(by_column, column_class, column_classes, impostor);
  });
}

std::tuple<Tensor, Tensor, Tensor> opis_forward(const Tensor& embeddings, const Tensor& classes,
                                                int64_t num_classes,
                                                const std::vector<double>& d_range,
                                                const std::vector<int64_t>& ranks, int64_t count,
                                                bool euclidean) {
  const int threads = num_threads();
  const int64_t n = embeddings.size(0), d = embeddings.size(1);
  if (classes.numel != n || classes.dtype != Dtype::kInt64 || n >= int64_t{1} << 31 || count < 2 ||
      (d_range.size() != 2 && ranks.size() != 2)) {
    throw std::invalid_argument("expected classes (N,) int64, a range or two ranks, T >= 2");
  }
  const Tensor genuine = classes.new_empty({num_classes, count}, Dtype::kInt64);
  const Tensor impostor = classes.new_empty({num_classes, count}, Dtype::kInt64);
  const Tensor out = embeddings.new_empty({count}, Dtype::kFloat64);
  dispatch_floating(embeddings.dtype, [&](auto element) {
    using In = decltype(element);
    using Work = WorkOf<In>;
    const py::gil_scoped_release release;
    const int64_t* ids = classes.as<const int64_t>();
    const auto sweep_of = [&](std::vector<int64_t> rows) {
      return Sweep<Work>(embeddings.as<const In>(), ids, std::move(rows), d, num_classes, threads);
    };
    const Sweep<Work> sweep = sweep_of(order_by_id(ids, n));
    Grid grid;
    if (d_range.size() == 2) {
      grid = grid_of({d_range[0], d_range[1]}, count, euclidean, nullptr);
    } else {
      std::optional<std::array<double, 2>> chosen;
      if (n > kSample) {
        const Sweep<Work> sample = sweep_of(every(sweep.order, (n + kSample - 1) / kSample));
        const auto brackets = brackets_of(sample, sweep.impostor_pairs(), ranks);
        if (brackets) chosen = cosines_in(sweep, *brackets, ranks);
      }
      const std::array<double, 2> exact = chosen ? *chosen : cosines_by_digits(sweep, ranks);
      grid = grid_of({distance_of(exact[0], euclidean), distance_of(exact[1], euclidean)}, count,
                     euclidean, &exact);
    }
    std::vector<int64_t> inside(num_classes * count, 0), across(inside);
    count_pairs(sweep, grid, inside.data(), across.data());
    std::copy(grid.distance.begin(), grid.distance.end(), out.as<double>());
    for (int64_t c = 0; c < num_classes; ++c) {
      int64_t within = 0, strangers = 0;
      for (int64_t k = 0; k < count; ++k) {
        genuine.as<int64_t>()[c * count + k] = within += inside[c * count + k];
        impostor.as<int64_t>()[c * count + k] = strangers += across[c * count + k];
      }
    }
  });
  return {genuine, impostor, out};
}

}  // namespace

DASHPOT_BIND(m) { m.def("opis_forward", &opis_forward); }

}  // namespace dashpot::contrastive
