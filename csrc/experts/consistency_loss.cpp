// consistency_loss: CE1 + CE2 + alpha J for rows of two logits (M, V); J = 1/2 sum (p - q) D.
//
// A row at a time, in blocks of kBlock classes. Pass 1 writes e = exp(z - m) to a buffer per
// thread, with the largest logit m so far (later blocks may raise it: the factor exp(m - M)/sum is
// kept per block), so that each logit meets one exponential. Pass 2 sums the J terms and both KLs,
// in vectors within a block, float64 between blocks. If asked for (early), pass 3 writes both
// gradients at once. The row, its buffers and its gradients lie in the L2 cache: memory sees the
// logits once.
// Residuals (M, 4): lse1, lse2, KL(p||q), KL(q||p). Backward without early gradients: p and q by
// one exponential each, one read, one write.
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/bind.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "experts/lanes.h"

namespace dashpot::experts {
namespace {

constexpr int64_t kBlock = 1024;

struct Options {
  double alpha, smoothing;
  int64_t classes;
};

// What is known of a row once its sums are.
struct Row {
  double lse1, lse2, kl_pq, kl_qp;
};

// e of one logit row, with a factor for each block: p = e * factor.
template <class W>
struct Exponentials {
  std::vector<W> e;
  std::vector<double> tops;
  std::vector<W> factors;
  double lse = 0, sum_z = 0;

  explicit Exponentials(int64_t classes)
      : e((classes + 15) / 16 * 16 + 16),
        tops((classes + kBlock - 1) / kBlock),
        factors(tops.size()) {}
};

// Body(c, left) for the whole vectors of [first, last), and for what is left.
template <class W, Isa isa, class Body>
DASHPOT_INLINE void for_vectors(int64_t first, int64_t last, const Body& body) {
  constexpr int64_t kStep = kLanes<W, isa>;
  int64_t c = first;
  for (; c + kStep <= last; c += kStep) body(c, kStep);
  if (c < last) body(c, last - c);
}

// e^x for x <= 0, 0 below 2^-126; NaN stays.
template <class W, Isa isa>
DASHPOT_INLINE Vec<W, isa> decay(Vec<W, isa> x) {
  constexpr W kLeast = -(FloatLayout<W>::kBias - 1);
  const Vec<W, isa> y = x * W(1.4426950408889634);
  const Vec<W, isa> power = exp2_bounded<W, isa>(y < kLeast ? Vec<W, isa>{} + kLeast : y);
  return y >= kLeast ? power : y < kLeast ? Vec<W, isa>{} : y;
}

template <Isa isa, class T>
DASHPOT_INLINE void exponentials(const T* z, int64_t n, bool with_sum, Exponentials<Wide<T>>* out) {
  using W = Wide<T>;
  constexpr W kLow = -std::numeric_limits<W>::infinity();
  W top = kLow;
  double sum = 0, sum_z = 0;
  W* const e = out->e.data();
  for (int64_t first = 0, block = 0; first < n; first += kBlock, ++block) {
    const int64_t last = first + kBlock < n ? first + kBlock : n;
    Vec<W, isa> most = Vec<W, isa>{} + kLow, total_z{};
    for_vectors<W, isa>(first, last, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
      const Vec<W, isa> value = load_part<isa>(z + c, left, kLow);
      most = most < value ? value : most;
      store<W, isa>(e + c, value);
      if (with_sum) total_z += load_part<isa>(z + c, left, W(0));
    });
    const W high = max_lane<W, isa>(most);
    if (high > top) {
      sum *= std::exp(static_cast<double>(top) - static_cast<double>(high));
      top = high;
    }
    const W shift = top == kLow ? W(0) : top;
    Vec<W, isa> total{};
    constexpr int64_t kStep = kLanes<W, isa>;
    for (int64_t c = first; c < last; c += kStep) {  // e is padded: lanes beyond are e^-inf = 0
      const Vec<W, isa> value = decay<W, isa>(load<W, isa>(e + c) - shift);
      store<W, isa>(e + c, value);
      total += value;
    }
    sum += sum_lanes<W, isa>(total);
    if (with_sum) sum_z += sum_lanes<W, isa>(total_z);
    out->tops[block] = shift;
  }
  const double shift = top == kLow ? 0 : static_cast<double>(top);
  out->lse = shift + std::log(sum);
  out->sum_z = sum_z;
  for (size_t block = 0; block < out->tops.size(); ++block) {
    out->factors[block] = static_cast<W>(std::exp(out->tops[block] - shift) / sum);
  }
}

// D = (z1 - z2) - (lse1 - lse2), 0 where neither has a probability.
template <Isa isa, class W>
DASHPOT_INLINE Vec<W, isa> gap(Vec<W, isa> z1, Vec<W, isa> z2, W shift, Vec<W, isa> p,
                               Vec<W, isa> q) {
  const Vec<W, isa> d = (z1 - z2) - shift;
  return p + q == W(0) ? Vec<W, isa>{} : d;
}

// What a row's gradients are made with: scale (p - share + alpha/2 (p (D - KL(p||q)) + p - q)) =
// own p + cross (p (D - KL) - q) - rest, and its mirror image.
template <class W>
struct Coefficients {
  W own, cross, rest, kl_pq, kl_qp;
  Coefficients(const Row& row, const Options& options, double scale)
      : own(static_cast<W>(scale * (1 + options.alpha / 2))),
        cross(static_cast<W>(scale * options.alpha / 2)),
        rest(static_cast<W>(scale * options.smoothing / options.classes)),
        kl_pq(static_cast<W>(row.kl_pq)),
        kl_qp(static_cast<W>(row.kl_qp)) {}
};

template <Isa isa, class T>
DASHPOT_INLINE void write_gradients(Vec<Wide<T>, isa> p, Vec<Wide<T>, isa> q, Vec<Wide<T>, isa> d,
                                    const Coefficients<Wide<T>>& use, int64_t left, T* grad1,
                                    T* grad2) {
  const Vec<Wide<T>, isa> first = p * (d - use.kl_pq) - q, second = q * (-d - use.kl_qp) - p;
  store_part<isa>(grad1, use.own * p + (use.cross * first - use.rest), left);
  store_part<isa>(grad2, use.own * q + (use.cross * second - use.rest), left);
}

// The label's own entry, whose share is larger by 1 - s.
template <class T>
void fix_label(const T* z1, const T* z2, int64_t label, const Row& row, const Options& options,
               double scale, T* grad1, T* grad2) {
  using W = Wide<T>;
  const double a = convert<double>(z1[label]), b = convert<double>(z2[label]);
  const double p = std::exp(a - row.lse1), q = std::exp(b - row.lse2);
  const double d = p == 0 && q == 0 ? 0 : (a - b) - (row.lse1 - row.lse2);
  const double share = 1 - options.smoothing + options.smoothing / options.classes;
  const double half = options.alpha / 2;
  const double pd = p == 0 ? 0 : p * (d - row.kl_pq), qd = q == 0 ? 0 : q * (d + row.kl_qp);
  grad1[label] = convert<T>(static_cast<W>((p - share + half * (pd + p - q)) * scale));
  grad2[label] = convert<T>(static_cast<W>((q - share + half * (q - p - qd)) * scale));
}

// The loss of a row, its statistics, and with grad1 its gradients times scale.
template <class T>
struct ForwardRow {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* z1, const T* z2, int64_t label, const Options* options,
                                 double scale, Exponentials<Wide<T>>* one,
                                 Exponentials<Wide<T>>* two, double* loss, Row* row, T* grad1,
                                 T* grad2) {
    using W = Wide<T>;
    const int64_t n = options->classes;
    const bool smooth = options->smoothing != 0;
    exponentials<isa>(z1, n, smooth, one);
    exponentials<isa>(z2, n, smooth, two);
    const W shift = static_cast<W>(one->lse - two->lse);
    double jeffreys = 0, kl_pq = 0, kl_qp = 0;
    for (int64_t first = 0, block = 0; first < n; first += kBlock, ++block) {
      const int64_t last = first + kBlock < n ? first + kBlock : n;
      const W f = one->factors[block], g = two->factors[block];
      Vec<W, isa> sum_j{}, sum_p{}, sum_q{};
      for_vectors<W, isa>(first, last, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
        const Vec<W, isa> p = load<W, isa>(one->e.data() + c) * f;
        const Vec<W, isa> q = load<W, isa>(two->e.data() + c) * g;
        const Vec<W, isa> d = gap<isa, W>(load_part<isa>(z1 + c, left, W(0)),
                                          load_part<isa>(z2 + c, left, W(0)), shift, p, q);
        sum_j += (p - q) * d;
        sum_p += p == W(0) ? Vec<W, isa>{} : p * d;
        sum_q += q == W(0) ? Vec<W, isa>{} : q * d;
      });
      jeffreys += sum_lanes<W, isa>(sum_j);
      kl_pq += sum_lanes<W, isa>(sum_p);
      kl_qp -= sum_lanes<W, isa>(sum_q);
    }
    *row = {one->lse, two->lse, kl_pq, kl_qp};
    const double s = options->smoothing;
    const double picked = convert<double>(z1[label]) + convert<double>(z2[label]);
    double value = options->alpha * 0.5 * jeffreys - (1 - s) * (picked - one->lse - two->lse);
    if (smooth) value -= s * ((one->sum_z + two->sum_z) / n - one->lse - two->lse);
    *loss = value;
    if (grad1 == nullptr) return;
    const Coefficients<W> use(*row, *options, scale);
    for (int64_t first = 0, block = 0; first < n; first += kBlock, ++block) {
      const int64_t last = first + kBlock < n ? first + kBlock : n;
      const W f = one->factors[block], g = two->factors[block];
      for_vectors<W, isa>(first, last, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
        const Vec<W, isa> p = load<W, isa>(one->e.data() + c) * f;
        const Vec<W, isa> q = load<W, isa>(two->e.data() + c) * g;
        const Vec<W, isa> d = gap<isa, W>(load_part<isa>(z1 + c, left, W(0)),
                                          load_part<isa>(z2 + c, left, W(0)), shift, p, q);
        write_gradients<isa>(p, q, d, use, left, grad1 + c, grad2 + c);
      });
    }
    fix_label(z1, z2, label, *row, *options, scale, grad1, grad2);
  }
};

// Both gradients of a row from its statistics.
template <class T>
struct BackwardRow {
  template <Isa isa>
  static DASHPOT_INLINE void run(const T* z1, const T* z2, int64_t label, const Options* options,
                                 double scale, const Row* row, T* grad1, T* grad2) {
    using W = Wide<T>;
    const int64_t n = options->classes;
    const W lse1 = static_cast<W>(row->lse1), lse2 = static_cast<W>(row->lse2);
    const W shift = static_cast<W>(row->lse1 - row->lse2);
    const Coefficients<W> use(*row, *options, scale);
    for_vectors<W, isa>(0, n, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
      const Vec<W, isa> a = load_part<isa>(z1 + c, left, W(0));
      const Vec<W, isa> b = load_part<isa>(z2 + c, left, W(0));
      const Vec<W, isa> p = decay<W, isa>(a - lse1), q = decay<W, isa>(b - lse2);
      write_gradients<isa>(p, q, gap<isa, W>(a, b, shift, p, q), use, left, grad1 + c, grad2 + c);
    });
    fix_label(z1, z2, label, *row, *options, scale, grad1, grad2);
  }
};

// Rows that count; throws for a class out of range.
int64_t kept_rows(const int64_t* target, int64_t rows, int64_t classes, int64_t ignore) {
  int64_t kept = 0;
  for (int64_t m = 0; m < rows; ++m) {
    if (target[m] == ignore) continue;
    if (target[m] < 0 || target[m] >= classes) {
      throw std::invalid_argument("target: expected classes in [0, " + std::to_string(classes) +
                                  ") or ignore_index, got " + std::to_string(target[m]));
    }
    ++kept;
  }
  return kept;
}

double weight_of(const std::string& reduction, int64_t kept) {
  return reduction == "mean" ? 1.0 / static_cast<double>(std::max<int64_t>(1, kept)) : 1.0;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs consistency_loss_forward(const Tensor& logits1, const Tensor& logits2, const Tensor& target,
                                 double alpha, double smoothing, int64_t ignore,
                                 const std::string& reduction, bool early) {
  const int64_t rows = logits1.size(0), classes = logits1.size(1);
  const Dtype type = logits1.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const bool each = reduction == "none";
  const int64_t made = early ? rows : 0;
  const Outputs out{each ? logits1.new_empty({rows}, type) : logits1.new_empty({}, type),
                    logits1.new_empty({rows, 4}, type),
                    logits1.new_empty({made, classes}, logits1.dtype),
                    logits1.new_empty({made, classes}, logits1.dtype)};
  const auto& [loss, stats, early1, early2] = out;
  const int64_t* label = target.as<int64_t>();
  const int threads = num_threads();
  const int64_t kept = kept_rows(label, rows, classes, ignore);
  const py::gil_scoped_release release;
  const double weight = weight_of(reduction, kept);
  const Options options{alpha, smoothing, classes};
  dispatch_floating(logits1.dtype, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    std::vector<double> losses(rows);
    parallel_for(rows, threads, [&](int64_t m) {
      thread_local std::optional<Exponentials<W>> one, two;
      const size_t room = (classes + 15) / 16 * 16 + 16;
      if (!one || one->e.size() != room) {
        one.emplace(classes);
        two.emplace(classes);
      }
      W* const stat = stats.as<W>() + m * 4;
      T* const grad1 = early ? early1.as<T>() + m * classes : nullptr;
      T* const grad2 = early ? early2.as<T>() + m * classes : nullptr;
      if (label[m] == ignore) {
        std::fill(stat, stat + 4, W(0));
        if (early) {
          std::fill(grad1, grad1 + classes, convert<T>(W(0)));
          std::fill(grad2, grad2 + classes, convert<T>(W(0)));
        }
        return;
      }
      Row row;
      run_on_isa<ForwardRow<T>>(static_cast<const T*>(logits1.as<T>() + m * classes),
                                static_cast<const T*>(logits2.as<T>() + m * classes), label[m],
                                &options, weight, &*one, &*two, &losses[m], &row, grad1, grad2);
      const double values[] = {row.lse1, row.lse2, row.kl_pq, row.kl_qp};
      for (int i = 0; i < 4; ++i) stat[i] = static_cast<W>(values[i]);
    });
    double total = 0;
    for (int64_t m = 0; m < rows; ++m) {
      if (each) loss.as<W>()[m] = static_cast<W>(losses[m]);
      total += losses[m];
    }
    if (!each) *loss.as<W>() = static_cast<W>(total * weight);
  });
  return out;
}

std::tuple<Tensor, Tensor> consistency_loss_backward(const Tensor& grad_loss, const Tensor& logits1,
                                                     const Tensor& logits2, const Tensor& target,
                                                     const Tensor& stats, const Tensor& early1,
                                                     const Tensor& early2, double alpha,
                                                     double smoothing, int64_t ignore,
                                                     const std::string& reduction, bool early) {
  const int64_t rows = logits1.size(0), classes = logits1.size(1);
  const std::tuple<Tensor, Tensor> grads{logits1.new_empty({rows, classes}, logits1.dtype),
                                         logits1.new_empty({rows, classes}, logits1.dtype)};
  const auto& [grad1, grad2] = grads;
  const int64_t* label = target.as<int64_t>();
  const int threads = num_threads();
  const int64_t kept = kept_rows(label, rows, classes, ignore);
  const py::gil_scoped_release release;
  const double weight = weight_of(reduction, kept);
  const Options options{alpha, smoothing, classes};
  dispatch_floating(logits1.dtype, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    parallel_for(rows, threads, [&](int64_t m) {
      T* const to1 = grad1.as<T>() + m * classes;
      T* const to2 = grad2.as<T>() + m * classes;
      const double incoming = grad_loss.as<W>()[reduction == "none" ? m : 0];
      if (label[m] == ignore || incoming == 0) {
        std::fill(to1, to1 + classes, convert<T>(W(0)));
        std::fill(to2, to2 + classes, convert<T>(W(0)));
        return;
      }
      if (early) {
        const T* from1 = early1.as<T>() + m * classes;
        const T* from2 = early2.as<T>() + m * classes;
        const W scale = static_cast<W>(incoming);
        for (int64_t c = 0; c < classes; ++c) {
          to1[c] = convert<T>(convert<W>(from1[c]) * scale);
          to2[c] = convert<T>(convert<W>(from2[c]) * scale);
        }
        return;
      }
      const W* stat = stats.as<W>() + m * 4;
      const Row row{stat[0], stat[1], stat[2], stat[3]};
      run_on_isa<BackwardRow<T>>(static_cast<const T*>(logits1.as<T>() + m * classes),
                                 static_cast<const T*>(logits2.as<T>() + m * classes), label[m],
                                 &options, incoming * weight, &row, to1, to2);
    });
  });
  return grads;
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("consistency_loss_forward", &consistency_loss_forward);
  m.def("consistency_loss_backward", &consistency_loss_backward);
}

}  // namespace dashpot::experts
