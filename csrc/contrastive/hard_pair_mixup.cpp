// hard_pair_mixup: features (B, D) -> mixed (3B, D), soft (3B, K), groups (3B,); and its adjoint.
//
// Every mixed row is (1 - t) f_from + t f_to: row B + i from i to perm(i), row 2B + i from
// hard_neg(i) to hard_pos(i). Backward: each input row gathers what was made of it, by lists of the
// mixed rows that start and end there, so no two threads write to one row.
#include <tuple>

#include "common/bind.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"
#include "contrastive/panels.h"

namespace dashpot::contrastive {
namespace {

// out = (1 - t) a + t b
template <class In>
struct Mix {
  template <Isa isa>
  static DASHPOT_INLINE void run(const In* a, const In* b, WorkOf<In> t, In* out, int64_t d) {
    using Work = WorkOf<In>;
    constexpr int64_t kStep = kLanes<Work, isa>;
    const Work rest = 1 - t;
    int64_t k = 0;
    for (; k + kStep <= d; k += kStep) {
      const Vec<Work, isa> sum = rest * load_as<Work, isa>(a + k) + t * load_as<Work, isa>(b + k);
      if constexpr (kIsSixteen<In>) {
        Sixteen<isa>::narrow(out + k, sum);
      } else {
        store<In, isa>(out + k, sum);
      }
    }
    for (; k < d; ++k) out[k] = convert<In>(rest * convert<Work>(a[k]) + t * convert<Work>(b[k]));
  }
};

// sum += t x
template <class In>
struct AddRow {
  template <Isa isa>
  static DASHPOT_INLINE void run(const In* x, WorkOf<In> t, WorkOf<In>* sum, int64_t d) {
    using Work = WorkOf<In>;
    constexpr int64_t kStep = kLanes<Work, isa>;
    int64_t k = 0;
    for (; k + kStep <= d; k += kStep) {
      store<Work, isa>(sum + k, load<Work, isa>(sum + k) + t * load_as<Work, isa>(x + k));
    }
    for (; k < d; ++k) sum[k] += t * convert<Work>(x[k]);
  }
};

// The mixed rows r = 0..2B-1 as a call gives them.
template <class Work>
struct Mixtures {
  int64_t b;
  const int64_t *perm, *hard_pos, *hard_neg;
  const Work *lam_neg, *lam_pos;

  Mixtures(const Tensor& perm, const Tensor& lam_neg, const Tensor& lam_pos, const Tensor& hard_pos,
           const Tensor& hard_neg)
      : b(perm.numel),
        perm(perm.as<const int64_t>()),
        hard_pos(hard_pos.as<const int64_t>()),
        hard_neg(hard_neg.as<const int64_t>()),
        lam_neg(lam_neg.as<const Work>()),
        lam_pos(lam_pos.as<const Work>()) {
    constexpr Dtype kWork = std::is_same_v<Work, double> ? Dtype::kFloat64 : Dtype::kFloat32;
    for (const Tensor* one : {&perm, &hard_pos, &hard_neg}) {
      if (one->numel != b || one->dtype != Dtype::kInt64) {
        throw std::invalid_argument("expected indices (B,) int64");
      }
      for (int64_t i = 0; i < b; ++i) {
        if (one->as<const int64_t>()[i] < 0 || one->as<const int64_t>()[i] >= b) {
          throw std::invalid_argument("expected indices of rows, 0..B-1");
        }
      }
    }
    for (const Tensor* one : {&lam_neg, &lam_pos}) {
      if (one->numel != b || one->dtype != kWork) {
        throw std::invalid_argument("expected weights (B,) in the dtype of the sums");
      }
    }
  }

  Work share(int64_t r) const { return r < b ? lam_neg[r] : lam_pos[r - b]; }
  int64_t from(int64_t r) const { return r < b ? r : hard_neg[r - b]; }
  int64_t to(int64_t r) const { return r < b ? perm[r] : hard_pos[r - b]; }
};

std::tuple<Tensor, Tensor, Tensor> hard_pair_mixup_forward(
    const Tensor& features, const Tensor& labels, const Tensor& perm, const Tensor& lam_neg,
    const Tensor& lam_pos, const Tensor& hard_pos, const Tensor& hard_neg, int64_t num_classes,
    double neg_clip, bool) {
  const int threads = num_threads();
  const int64_t b = features.size(0), d = features.size(1), k = num_classes;
  if (labels.numel != b || labels.dtype != Dtype::kInt64 || perm.numel != b) {
    throw std::invalid_argument("labels, perm: expected (B,) int64");
  }
  const Tensor mixed = features.new_empty({3 * b, d}, features.dtype);
  const Tensor soft = features.new_empty({3 * b, k}, features.dtype);
  const Tensor groups = labels.new_empty({3 * b}, Dtype::kInt64);
  dispatch_floating(features.dtype, [&](auto element) {
    using In = decltype(element);
    using Work = WorkOf<In>;
    const Mixtures<Work> mixtures(perm, lam_neg, lam_pos, hard_pos, hard_neg);
    const In* f = features.as<const In>();
    const int64_t* y = labels.as<const int64_t>();
    for (int64_t i = 0; i < b; ++i) {
      if (y[i] < 0 || y[i] >= k) throw std::invalid_argument("labels: expected 0..K-1");
    }
    const py::gil_scoped_release release;
    parallel_for(3 * b, d * b < 65536 ? 1 : threads, [&](int64_t row) {
      In* to = mixed.as<In>() + row * d;
      In* hot = soft.as<In>() + row * k;
      int64_t* group = groups.as<int64_t>() + row;
      std::fill(hot, hot + k, convert<In>(Work(0)));
      if (row < b) {
        std::copy_n(f + row * d, d, to);
        hot[y[row]] = convert<In>(Work(1));
        *group = y[row];
        return;
      }
      const int64_t r = row - b, start = mixtures.from(r), end = mixtures.to(r);
      const Work t = mixtures.share(r);
      run_on_isa<Mix<In>>(f + start * d, f + end * d, t, to, d);
      const int64_t first = y[start], last = y[end];
      if (first == last) {
        hot[first] = convert<In>((1 - t) + t);
      } else {
        hot[first] = convert<In>(1 - t);
        hot[last] = convert<In>(t);
      }
      // Random mixtures of two classes whose weight was raised to the clip are alike.
      const bool clipped = r < b && t == static_cast<Work>(neg_clip);
      const int64_t pair = clipped ? k * (1 + first) + last : k * (1 + k) + r;
      *group = t == 0 ? first : t == 1 || first == last ? last : pair;
    });
  });
  return {mixed, soft, groups};
}

Tensor hard_pair_mixup_backward(const Tensor& grad_mixed, const Tensor& perm, const Tensor& lam_neg,
                                const Tensor& lam_pos, const Tensor& hard_pos,
                                const Tensor& hard_neg, bool detach_first) {
  const int threads = num_threads();
  const int64_t b = perm.numel, d = grad_mixed.size(1);
  if (grad_mixed.size(0) != 3 * b) {
    throw std::invalid_argument("grad_mixed: expected (3B, D)");
  }
  const Tensor out = grad_mixed.new_empty({b, d}, grad_mixed.dtype);
  dispatch_floating(grad_mixed.dtype, [&](auto element) {
    using In = decltype(element);
    using Work = WorkOf<In>;
    const Mixtures<Work> mixtures(perm, lam_neg, lam_pos, hard_pos, hard_neg);
    const In* g = grad_mixed.as<const In>();
    const py::gil_scoped_release release;
    // What was made of row i: entries begin[i]..begin[i + 1], 2 r for a start and 2 r + 1 for an
    // end.
    std::vector<int64_t> begin(b + 1, 0), made(4 * b);
    for (int64_t r = 0; r < 2 * b; ++r) {
      ++begin[mixtures.from(r) + 1];
      ++begin[mixtures.to(r) + 1];
    }
    for (int64_t i = 0; i < b; ++i) begin[i + 1] += begin[i];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t r = 0; r < 2 * b; ++r) {
      made[next[mixtures.from(r)]++] = 2 * r;
      made[next[mixtures.to(r)]++] = 2 * r + 1;
    }
    parallel_for(b, d * b < 65536 ? 1 : threads, [&](int64_t i) {
      std::vector<Work> sum(d, Work(0));
      if (!detach_first) run_on_isa<AddRow<In>>(g + i * d, Work(1), sum.data(), d);
      for (int64_t e = begin[i]; e < begin[i + 1]; ++e) {
        const int64_t r = made[e] / 2;
        const Work t = mixtures.share(r);
        run_on_isa<AddRow<In>>(g + (b + r) * d, made[e] % 2 ? t : 1 - t, sum.data(), d);
      }
      run_on_isa<ConvertBlock<In, Work>>(out.as<In>() + i * d, const_cast<const Work*>(sum.data()),
                                         d);
    });
  });
  return out;
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("hard_pair_mixup_forward", &hard_pair_mixup_forward);
  m.def("hard_pair_mixup_backward", &hard_pair_mixup_backward);
}

}  // namespace dashpot::contrastive
