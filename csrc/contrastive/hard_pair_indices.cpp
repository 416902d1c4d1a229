// hard_pair_indices: features (B, D), labels (B,) -> hard_pos (B,), hard_neg (B,) int64.
//
//   hard_pos = argmin over j != i of i's label of c_ij, hard_neg = argmax over j of another label
//
// Tiles of cosines on and above the diagonal, each searched by rows and by columns; a row keeps the
// best value and place of both kinds. Tiles come in no order of columns, so on equal values the
// lower place wins by comparison. Official form: pairs left out have cosine 0 instead.
#include <limits>
#include <tuple>

#include "common/bind.h"
#include "common/math.h"
#include "common/schedule.h"
#include "contrastive/groups.h"
#include "contrastive/logits.h"
#include "contrastive/panels.h"

namespace dashpot::contrastive {
namespace {

// Least value met by each row and its place; the place is the number of rows while there is none.
template <class Work>
struct Least {
  std::vector<Work> value;
  std::vector<Code<Work>> place;

  Least(int64_t padded, int64_t n)
      : value(padded, std::numeric_limits<Work>::infinity()),
        place(padded, static_cast<Code<Work>>(n)) {}

  void offer(int64_t row, Work candidate, Code<Work> at) {
    if (candidate < value[row] || (candidate == value[row] && at < place[row])) {
      value[row] = candidate;
      place[row] = at;
    }
  }
};

template <class Work, Isa isa>
struct LeastVec {
  Vec<Work, isa> value;
  IntVec<Work, isa> place;

  DASHPOT_INLINE void offer(Vec<Work, isa> candidate, IntVec<Work, isa> at) {
    const IntVec<Work, isa> lower = at < place ? at : place;
    const IntVec<Work, isa> if_equal = candidate == value ? lower : place;
    place = candidate < value ? at : if_equal;
    value = candidate < value ? candidate : value;
  }
};

// The kinds of a pair: its cosine where it is of the kind, else `out`.
template <class Work>
struct Search {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Tile<Work>* tile, Code<Work> row_begin,
                                 Code<Work> column_begin, bool diagonal, Work out, int64_t n,
                                 Least<Work>* pos, Least<Work>* neg) {
    constexpr int kStep = kLanes<Work, isa>;
    const Tile<Work> at = *tile;
    const Vec<Work, isa> none = Vec<Work, isa>{} + out;
    IntVec<Work, isa> lanes{};
    for (int i = 0; i < kStep; ++i) lanes[i] = i;
    for (int64_t i = 0; i < at.rows; ++i) {
      LeastVec<Work, isa> row_pos{Vec<Work, isa>{} + std::numeric_limits<Work>::infinity(),
                                  IntVec<Work, isa>{} + static_cast<Code<Work>>(n)};
      LeastVec<Work, isa> row_neg = row_pos;
      const Code<Work> row = row_begin + static_cast<Code<Work>>(i);
      for (int64_t j = 0; j < at.columns; j += kStep) {
        const Vec<Work, isa> c = load<Work, isa>(at.s + i * at.stride + j);
        const IntVec<Work, isa> codes = load<Code<Work>, isa>(at.column_codes + j);
        const IntVec<Work, isa> place = lanes + (column_begin + static_cast<Code<Work>>(j));
        const Code<Work> own = at.row_codes[i], padding = Code<Work>(kNoColumn);
        const Vec<Work, isa> nothing = Vec<Work, isa>{} + std::numeric_limits<Work>::infinity();
        const IntVec<Work, isa> not_pos =
            ones<IntVec<Work, isa>>(place == row) + ones<IntVec<Work, isa>>(codes != own);
        Vec<Work, isa> if_pos = not_pos == 0 ? c : none, if_neg = codes == own ? none : -c;
        if_pos = codes == padding ? nothing : if_pos;
        if_neg = codes == padding ? nothing : if_neg;
        row_pos.offer(if_pos, place);
        row_neg.offer(if_neg, place);
        if (diagonal) continue;
        for (auto [least, candidate] : {std::pair{pos, if_pos}, std::pair{neg, if_neg}}) {
          LeastVec<Work, isa> column{load<Work, isa>(least->value.data() + column_begin + j),
                                     load<Code<Work>, isa>(least->place.data() + column_begin + j)};
          column.offer(candidate, IntVec<Work, isa>{} + row);
          store<Work, isa>(least->value.data() + column_begin + j, column.value);
          store<Code<Work>, isa>(least->place.data() + column_begin + j, column.place);
        }
      }
      for (int lane = 0; lane < kStep; ++lane) {
        pos->offer(row, row_pos.value[lane], row_pos.place[lane]);
        neg->offer(row, row_neg.value[lane], row_neg.place[lane]);
      }
    }
  }
};

std::tuple<Tensor, Tensor> hard_pair_indices_forward(const Tensor& features, const Tensor& labels,
                                                     bool official) {
  const int threads = num_threads();
  const int64_t n = features.size(0), d = features.size(1);
  if (labels.numel != n || labels.dtype != Dtype::kInt64) {
    throw std::invalid_argument("labels: expected (B,) int64");
  }
  const Tensor hard_pos = features.new_empty({n}, Dtype::kInt64);
  const Tensor hard_neg = features.new_empty({n}, Dtype::kInt64);
  dispatch_floating(features.dtype, [&](auto element) {
    using In = decltype(element);
    using Work = WorkOf<In>;
    const py::gil_scoped_release release;
    const Panels<Work> rows(features.as<const In>(), n, d, 1e-12, threads, panel_for(n));
    std::vector<Code<Work>> codes = dense_ids<Code<Work>>(
        std::vector<int64_t>(labels.as<const int64_t>(), labels.as<const int64_t>() + n));
    codes.resize(rows.count * rows.panel, Code<Work>(kNoColumn));
    Least<Work> pos(rows.count * rows.panel, n), neg(rows.count * rows.panel, n);
    const Work out = official ? Work(0) : std::numeric_limits<Work>::infinity();
    for_pairs(rows.count, threads, [&](int64_t i, int64_t j) {
      alignas(64) Work scratch[kMaxPanel * kMaxPanel];
      products(rows, i, rows, j, scratch);
      const Tile<Work> tile{scratch,
                            rows.panel,
                            rows.height(i),
                            rows.height(j),
                            codes.data() + rows.begin(i),
                            codes.data() + rows.begin(j)};
      run_on_isa<Search<Work>>(&tile, static_cast<Code<Work>>(rows.begin(i)),
                               static_cast<Code<Work>>(rows.begin(j)), i == j, out, n, &pos, &neg);
    });
    for (int64_t i = 0; i < n; ++i) {
      const bool none = pos.value[i] == std::numeric_limits<Work>::infinity();
      int64_t first = none ? i : pos.place[i];
      if (official && first == 0) first = i;
      const bool alone = neg.value[i] == std::numeric_limits<Work>::infinity();
      hard_pos.as<int64_t>()[i] = first;
      hard_neg.as<int64_t>()[i] = alone ? i : neg.place[i];
    }
  });
  return {hard_pos, hard_neg};
}

}  // namespace

DASHPOT_BIND(m) { m.def("hard_pair_indices_forward", &hard_pair_indices_forward); }

}  // namespace dashpot::contrastive
