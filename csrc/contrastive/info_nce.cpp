// info_nce: loss_i = log sum_j exp(c u_i.v_j) - c u_i.v_pos(i); the sweeps are in sweep.h.
//
// The positive's logit is a product of its own, of a row with a row: no tile has to find it, and in
// the backward its weight -g_i is added to the rows after the sweep.
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "contrastive/sweep.h"

namespace dashpot::contrastive {
namespace {

double factor_of(const Maybe& logit_scale, double temperature) {
  if (!logit_scale) return 1 / temperature;
  double factor = 0;
  dispatch_floating(logit_scale->dtype, [&](auto element) {
    factor = convert<double>(logit_scale->as<const decltype(element)>()[0]);
  });
  return factor;
}

// The call's rows and keys, and the problem made of them.
template <class Work>
struct Call {
  Panels<Work> query, key;
  Problem<Work> problem;
  const int64_t* positives;

  template <class In>
  Call(const In* queries, const In* keys, int64_t b, int64_t n, int64_t d, const Maybe& positives,
       double c, bool symmetric, bool normalize, int threads)
      : query(queries, b, d, normalize ? 1e-12 : 0, threads, panel_for(std::max(b, n))),
        key(keys, n, d, normalize ? 1e-12 : 0, threads, panel_for(std::max(b, n))),
        positives(positives ? positives->as<const int64_t>() : nullptr) {
    problem.rows = {&query};
    problem.keys = {&key};
    problem.columns = symmetric;
    problem.key_codes = PerRow<Code<Work>, Work>(problem.keys, Code<Work>(kNoColumn));
    std::fill(problem.key_codes.of(0), problem.key_codes.of(0) + n, Code<Work>(0));
    problem.c = c;
    problem.threads = threads;
  }

  // The key of row i, or -1 where it is not among the keys.
  int64_t positive(int64_t i) const {
    const int64_t at = positives ? positives[i] : i;
    return at < key.rows ? at : -1;
  }
};

template <class Function>
void on_rows(const Tensor& query, const Tensor& key, const Function& function) {
  const int64_t b = query.size(0), n = key.size(0), d = query.size(1);
  if (key.size(1) != d || key.dtype != query.dtype) {
    throw std::invalid_argument("expected queries and keys of one width and dtype");
  }
  dispatch_floating(query.dtype, [&](auto element) {
    using In = decltype(element);
    function(query.as<const In>(), key.as<const In>(), b, n, d);
  });
}

std::tuple<Tensor, Tensor, Tensor> info_nce_forward(const Tensor& query, const Tensor& key,
                                                    const Maybe& positives,
                                                    const Maybe& logit_scale, double temperature,
                                                    bool symmetric, bool normalize) {
  const int threads = num_threads();
  const int64_t rows = query.size(0), keys = symmetric ? key.size(0) : 0;
  const Tensor loss = query.new_empty({rows}, work_dtype(query));     // (B,)
  const Tensor lse = query.new_empty({rows}, work_dtype(query));      // (B,)
  const Tensor lse_key = query.new_empty({keys}, work_dtype(query));  // (N,) if symmetric
  on_rows(query, key, [&](auto* q, auto* k, int64_t b, int64_t n, int64_t d) {
    using Work = WorkOf<std::remove_const_t<std::remove_pointer_t<decltype(q)>>>;
    const py::gil_scoped_release release;
    const double c = factor_of(logit_scale, temperature);
    const Call<Work> call(q, k, b, n, d, positives, c, symmetric, normalize, threads);
    const Problem<Work>& problem = call.problem;
    LogSums<Work> row_sums(problem.rows, start_of(problem));
    LogSums<Work> key_sums(problem.keys, start_of(problem));
    add_log_sums(problem, row_sums, key_sums, [](const Site&, const Tile<Work>&) {});
    for (int64_t j = 0; j < keys; ++j) {
      lse_key.as<Work>()[j] = static_cast<Work>(key_sums.log_sum(0, j));
    }
    for (int64_t i = 0; i < b; ++i) {
      const int64_t at = call.positive(i);
      const double row = row_sums.log_sum(0, i);
      const double both = symmetric ? 0.5 * (row + key_sums.log_sum(0, i)) : row;
      const double logit = at < 0 ? 0 : c * dot(call.query.row(i), call.key.row(at));
      lse.as<Work>()[i] = static_cast<Work>(row);
      loss.as<Work>()[i] = static_cast<Work>(both - logit);
    }
  });
  return {loss, lse, lse_key};
}

std::tuple<Maybe, Maybe, Maybe> info_nce_backward(const Tensor& grad_loss, const Tensor& query,
                                                  const Tensor& key, const Maybe& positives,
                                                  const Maybe& logit_scale, const Tensor& lse,
                                                  const Tensor& lse_key, double temperature,
                                                  bool symmetric, bool normalize,
                                                  const std::vector<bool>& needs_grad) {
  const int threads = num_threads();
  const bool for_scale = logit_scale && needs_grad[3];
  const Maybe grad_query = like(query, needs_grad[0]), grad_key = like(key, needs_grad[1]);
  Maybe grad_scale;
  if (for_scale) {
    grad_scale = logit_scale->dim() ? logit_scale->new_empty({1}, logit_scale->dtype)
                                    : logit_scale->new_empty({}, logit_scale->dtype);
  }
  on_rows(query, key, [&](auto* q, auto* k, int64_t b, int64_t n, int64_t d) {
    using In = std::remove_const_t<std::remove_pointer_t<decltype(q)>>;
    using Work = WorkOf<In>;
    const py::gil_scoped_release release;
    const double c = factor_of(logit_scale, temperature);
    const Call<Work> call(q, k, b, n, d, positives, c, symmetric, normalize, threads);
    const Problem<Work>& problem = call.problem;
    const double shift = problem.bound(), part = symmetric ? 0.5 : 1;
    const Work* g = grad_loss.as<const Work>();
    Weights<Work> row_weights(problem.rows), key_weights(problem.keys);
    for (int64_t i = 0; i < b; ++i) {
      row_weights.set(0, i, part * g[i], lse.as<const Work>()[i], shift);
      if (symmetric) key_weights.set(0, i, part * g[i], lse_key.as<const Work>()[i], shift);
    }
    // Sums before the factor c: the scale's gradient is sum_i u_i . (sum_j W_ij v_j).
    const Grads<Work> rows(problem.rows, {grad_query.has_value() || for_scale});
    const Grads<Work> keys(problem.keys, {grad_key.has_value()});
    add_gradients(problem, row_weights, key_weights, rows, keys,
                  [](const Site&, const Tile<Work>&) {});
    double total = 0;
    for (int64_t i = 0; i < b; ++i) {
      const int64_t at = call.positive(i);
      if (at >= 0 && rows.of(0)) {
        add_scaled(call.query.row_of(rows.of(0), i), call.key.row(at), -g[i]);
      }
      if (at >= 0 && keys.of(0)) {
        add_scaled(call.key.row_of(keys.of(0), at), call.query.row(i), -g[i]);
      }
      if (for_scale) total += dot<Work>(call.query.row(i), call.query.row_of(rows.of(0), i));
    }
    const Work factor = static_cast<Work>(c);
    if (grad_query) call.query.project(rows.of(0), factor, grad_query->template as<In>(), threads);
    if (grad_key) call.key.project(keys.of(0), factor, grad_key->template as<In>(), threads);
    if (for_scale) {
      dispatch_floating(logit_scale->dtype, [&](auto element) {
        using Scale = decltype(element);
        grad_scale->as<Scale>()[0] = convert<Scale>(static_cast<WorkOf<Scale>>(total));
      });
    }
  });
  return {grad_query, grad_key, grad_scale};
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("info_nce_forward", &info_nce_forward);
  m.def("info_nce_backward", &info_nce_backward);
}

}  // namespace dashpot::contrastive
