// tcm_loss: embeddings (B, D) [against ref (N, D)] -> loss, counts (2,), sums (2,); gradients.
//
//   S+ = {same label, not s > m+},  S- = {other label, not s < m-}   (NaN is in both: it must show)
//   forward   n+, n-, sum of m+ - s over S+, sum of s - m- over S-
//   backward  tile <- a on S+, b on S-, 0 elsewhere: the weights of a product with the rows
//
// Without references a tile above the diagonal stands for its mirror image: counted twice.
#include <array>
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

using Maybe = std::optional<Tensor>;
constexpr double kEps = 1e-12;

struct Hard {
  std::array<double, 2> sum{};
  std::array<int64_t, 2> count{};
};

// Which columns of a vector are in S+ and S-.
template <class Work, Isa isa>
struct Sets {
  using Int = IntVec<Work, isa>;
  Int not_pos, not_neg;  // 0 in the set

  DASHPOT_INLINE Sets(Vec<Work, isa> s, Int codes, Code<Work> row, Work margin_pos,
                      Work margin_neg) {
    const Int same = ones<Int>(codes == row);
    not_pos = ones<Int>(s > margin_pos) + 1 - same;
    not_neg = ones<Int>(s < margin_neg) + ones<Int>(codes == Code<Work>(kNoColumn)) + same;
  }
  // value in the set, else 0
  template <class Value>
  DASHPOT_INLINE Value pos(Value value) const {
    return not_pos == 0 ? value : Value{};
  }
  template <class Value>
  DASHPOT_INLINE Value neg(Value value) const {
    return not_neg == 0 ? value : Value{};
  }
};

// The pairs of a tile, each `times`.
template <class Work>
struct AddHard {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Tile<Work>* at, Work margin_pos, Work margin_neg,
                                 int64_t times, Hard* hard) {
    const IntVec<Work, isa> one = IntVec<Work, isa>{} + 1;
    const Tile<Work> tile = *at;
    for (int64_t i = 0; i < tile.rows; ++i) {
      Vec<Work, isa> pos{}, neg{};
      IntVec<Work, isa> pos_count{}, neg_count{};
      for (int64_t j = 0; j < tile.columns; j += kLanes<Work, isa>) {
        const Vec<Work, isa> s = load<Work, isa>(tile.s + i * tile.stride + j);
        const Sets<Work, isa> sets(s, load<Code<Work>, isa>(tile.column_codes + j),
                                   tile.row_codes[i], margin_pos, margin_neg);
        pos += sets.pos(margin_pos - s);
        neg += sets.neg(s - margin_neg);
        pos_count += sets.pos(one);
        neg_count += sets.neg(one);
      }
      const double times_sum = static_cast<double>(times);
      hard->sum[0] += times_sum * sum_lanes<Work, isa>(pos);
      hard->sum[1] += times_sum * sum_lanes<Work, isa>(neg);
      for (int lane = 0; lane < kLanes<Work, isa>; ++lane) {
        hard->count[0] += times * pos_count[lane];
        hard->count[1] += times * neg_count[lane];
      }
    }
  }
};

// s <- pos on S+, neg on S-, else 0.
template <class Work>
struct Mark {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Tile<Work>* at, Work margin_pos, Work margin_neg, Work pos,
                                 Work neg) {
    const Vec<Work, isa> of_pos = Vec<Work, isa>{} + pos, of_neg = Vec<Work, isa>{} + neg;
    const Tile<Work> tile = *at;
    for (int64_t i = 0; i < tile.rows; ++i) {
      for (int64_t j = 0; j < tile.columns; j += kLanes<Work, isa>) {
        Work* s = tile.s + i * tile.stride + j;
        const Sets<Work, isa> sets(load<Work, isa>(s), load<Code<Work>, isa>(tile.column_codes + j),
                                   tile.row_codes[i], margin_pos, margin_neg);
        store<Work, isa>(s, sets.pos(of_pos) + sets.neg(of_neg));  // no column is in both
      }
    }
  }
};

template <class Work>
class Sweep {
 public:
  const Panels<Work> rows;
  const std::optional<Panels<Work>> refs;
  const int64_t offset;
  const int threads;

  template <class In>
  Sweep(const In* z, const int64_t* labels, int64_t b, const In* ref, const int64_t* ref_labels,
        int64_t n, int64_t d, int64_t offset, bool normalize, int threads)
      : rows(z, b, d, normalize ? kEps : 0, threads, panel_for(std::max(b, n))),
        refs(ref ? std::optional<Panels<Work>>(std::in_place, ref, n, d, normalize ? kEps : 0,
                                               threads, rows.panel)
                 : std::nullopt),
        offset(offset),
        threads(threads),
        codes_(rows.count * rows.panel, Code<Work>(kNoColumn)) {
    std::vector<int64_t> ids(labels, labels + b);
    if (ref) ids.insert(ids.end(), ref_labels, ref_labels + n);
    const std::vector<Code<Work>> dense = dense_ids<Code<Work>>(ids);
    std::copy_n(dense.begin(), b, codes_.begin());
    if (ref) {
      ref_codes_.assign(refs->count * refs->panel, Code<Work>(kNoColumn));
      std::copy(dense.begin() + b, dense.end(), ref_codes_.begin());
    }
  }

  const Panels<Work>& keys() const { return refs ? *refs : rows; }
  const std::vector<Code<Work>>& key_codes() const { return refs ? ref_codes_ : codes_; }

  // body(i, j, tile)
  template <class Body>
  void for_tiles(const Body& body) const {
    const auto visit = [&](int64_t i, int64_t j) {
      alignas(64) Work scratch[kMaxPanel * kMaxPanel];
      products(rows, i, keys(), j, scratch);
      const Tile<Work> tile{scratch,
                            keys().panel,
                            rows.height(i),
                            keys().height(j),
                            codes_.data() + rows.begin(i),
                            key_codes().data() + keys().begin(j)};
      leave_out_self(i, j, tile);
      body(i, j, tile);
    };
    if (refs) {
      for_grid(rows.count, refs->count, threads, visit);
    } else {
      for_pairs(rows.count, threads, visit);
    }
  }

 private:
  std::vector<Code<Work>> codes_, ref_codes_;

  // The pairs (i, i + offset) become infinite: above any margin, so in no set (their labels agree).
  void leave_out_self(int64_t i, int64_t j, const Tile<Work>& tile) const {
    if (offset < 0) return;
    for (int64_t a = 0; a < tile.rows; ++a) {
      const int64_t column = rows.begin(i) + a + offset - keys().begin(j);
      if (column >= 0 && column < tile.columns) {
        tile.s[a * tile.stride + column] = std::numeric_limits<Work>::infinity();
      }
    }
  }
};

// function(sweep, In{}) with the rows of a call, without Python's lock.
template <class Function>
void with_sweep(const Tensor& embeddings, const Tensor& labels, const Maybe& ref,
                const Maybe& ref_labels, int64_t offset, bool normalize, const Function& function) {
  const int threads = num_threads();
  const int64_t b = embeddings.size(0), d = embeddings.size(1), n = ref ? ref->size(0) : 0;
  if (labels.numel != b || labels.dtype != Dtype::kInt64 ||
      ref.has_value() != ref_labels.has_value() ||
      (ref && (ref_labels->numel != n || ref_labels->dtype != Dtype::kInt64 || ref->size(1) != d ||
               ref->dtype != embeddings.dtype))) {
    throw std::invalid_argument(
        "expected int64 labels of each row, and rows of one width and dtype");
  }
  dispatch_floating(embeddings.dtype, [&](auto element) {
    using In = decltype(element);
    const py::gil_scoped_release release;
    const Sweep<WorkOf<In>> sweep(embeddings.as<const In>(), labels.as<const int64_t>(), b,
                                  ref ? ref->as<const In>() : nullptr,
                                  ref ? ref_labels->as<const int64_t>() : nullptr, n, d, offset,
                                  normalize, threads);
    function(sweep, element);
  });
}

double mean_of(double sum, int64_t count) {
  return sum / static_cast<double>(std::max<int64_t>(count, 1));
}

std::tuple<Tensor, Tensor, Tensor> tcm_loss_forward(const Tensor& embeddings, const Tensor& labels,
                                                    const Maybe& ref, const Maybe& ref_labels,
                                                    int64_t offset, double margin_pos,
                                                    double margin_neg, double weight_pos,
                                                    double weight_neg, bool normalize) {
  const Dtype dtype = embeddings.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const Tensor loss = embeddings.new_empty({}, dtype), sums = embeddings.new_empty({2}, dtype);
  const Tensor counts = embeddings.new_empty({2}, Dtype::kInt64);
  with_sweep(embeddings, labels, ref, ref_labels, offset, normalize,
             [&](const auto& sweep, auto element) {
               using Work = WorkOf<decltype(element)>;
               std::vector<Hard> parts(sweep.rows.count);
               sweep.for_tiles([&](int64_t i, int64_t j, const Tile<Work>& tile) {
                 const int64_t times = !sweep.refs && i != j ? 2 : 1;
                 run_on_isa<AddHard<Work>>(&tile, static_cast<Work>(margin_pos),
                                           static_cast<Work>(margin_neg), times, &parts[i]);
               });
               Hard all;
               for (const Hard& part : parts) {
                 for (int k = 0; k < 2; ++k) {
                   all.sum[k] += part.sum[k];
                   all.count[k] += part.count[k];
                 }
               }
               for (int k = 0; k < 2; ++k) {
                 counts.template as<int64_t>()[k] = all.count[k];
                 sums.template as<Work>()[k] = static_cast<Work>(all.sum[k]);
               }
               loss.template as<Work>()[0] =
                   static_cast<Work>(weight_pos * mean_of(all.sum[0], all.count[0]) +
                                     weight_neg * mean_of(all.sum[1], all.count[1]));
             });
  return {loss, counts, sums};
}

std::tuple<Maybe, Maybe> tcm_loss_backward(const Tensor& grad_loss, const Tensor& embeddings,
                                           const Tensor& labels, const Maybe& ref,
                                           const Maybe& ref_labels, const Tensor& counts,
                                           int64_t offset, double margin_pos, double margin_neg,
                                           double weight_pos, double weight_neg, bool normalize,
                                           const std::vector<bool>& needs_grad) {
  Maybe grad, grad_ref;
  const int64_t d = embeddings.size(1);
  if (needs_grad[0]) grad = embeddings.new_empty({embeddings.size(0), d}, embeddings.dtype);
  if (ref && needs_grad[2]) grad_ref = ref->new_empty({ref->size(0), d}, ref->dtype);
  with_sweep(
      embeddings, labels, ref, ref_labels, offset, normalize, [&](const auto& sweep, auto element) {
        using In = decltype(element);
        using Work = WorkOf<In>;
        const auto sums = [](const Panels<Work>& of, bool wanted) {
          return std::unique_ptr<Work[]>(wanted ? new Work[of.count * of.row_size()]() : nullptr);
        };
        const auto rows = sums(sweep.rows, grad.has_value());
        const auto refs = sums(sweep.keys(), grad_ref.has_value());
        // Without references a pair and its mirror image add up, in both rows.
        const double g = (sweep.refs ? 1.0 : 2.0) * grad_loss.as<const Work>()[0];
        const int64_t* count = counts.as<const int64_t>();
        const Work pos = static_cast<Work>(-weight_pos * mean_of(g, count[0]));
        const Work neg = static_cast<Work>(weight_neg * mean_of(g, count[1]));
        Work* const other = sweep.refs ? refs.get() : rows.get();
        sweep.for_tiles([&](int64_t i, int64_t j, const Tile<Work>& tile) {
          run_on_isa<Mark<Work>>(&tile, static_cast<Work>(margin_pos),
                                 static_cast<Work>(margin_neg), pos, neg);
          if (rows) add_rows<Work>(tile.s, sweep.rows, i, sweep.keys(), j, rows.get());
          if (other && (sweep.refs || i != j)) {
            add_columns<Work>(tile.s, sweep.rows, i, sweep.keys(), j, other);
          }
        });
        if (grad) {
          sweep.rows.project(rows.get(), Work(1), grad->template as<In>(), sweep.threads);
        }
        if (grad_ref) {
          sweep.refs->project(refs.get(), Work(1), grad_ref->template as<In>(), sweep.threads);
        }
      });
  return {grad, grad_ref};
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("tcm_loss_forward", &tcm_loss_forward);
  m.def("tcm_loss_backward", &tcm_loss_backward);
}

}  // namespace dashpot::contrastive
