// info_nce_queue: loss_i = log(exp(c u_i.v_i) + sum_m exp(c u_i.n_m)) - c u_i.v_i; a sweep over the
// queue, to which each row adds its own key.
#include <tuple>

#include "common/bind.h"
#include "contrastive/sweep.h"

namespace dashpot::contrastive {
namespace {

template <class In>
struct QueueCall {
  using Work = WorkOf<In>;
  Panels<Work> query, key, queue;
  Problem<Work> problem;

  QueueCall(const Tensor& queries, const Tensor& keys, const Tensor& negatives, double temperature,
            bool normalize, int64_t b, int64_t m, int64_t d, int threads)
      : query(queries.as<const In>(), b, d, normalize ? 1e-12 : 0, threads, panel_for(b)),
        key(keys.as<const In>(), b, d, normalize ? 1e-12 : 0, threads, panel_for(b)),
        queue(negatives.as<const In>(), m, d, normalize ? 1e-12 : 0, threads, panel_for(b)) {
    problem.rows = {&query};
    problem.keys = {&queue};
    problem.key_codes = PerRow<Code<Work>, Work>(problem.keys, Code<Work>(kNoColumn));
    std::fill(problem.key_codes.of(0), problem.key_codes.of(0) + m, Code<Work>(0));
    problem.c = 1 / temperature;
    problem.threads = threads;
  }

  double own_logit(int64_t i) const { return problem.c * dot(query.row(i), key.row(i)); }
};

template <class Function>
void on_call(const Tensor& query, const Tensor& key, const Tensor& queue, double temperature,
             bool normalize, const Function& function) {
  const int64_t b = query.size(0), d = query.size(1), m = queue.size(0);
  if (key.numel != b * d || queue.numel != m * d || key.dtype != query.dtype ||
      queue.dtype != query.dtype) {
    throw std::invalid_argument("expected queries, keys and a queue of one width and dtype");
  }
  const int threads = num_threads();
  dispatch_floating(query.dtype, [&](auto element) {
    const py::gil_scoped_release release;
    function(
        QueueCall<decltype(element)>(query, key, queue, temperature, normalize, b, m, d, threads),
        element);
  });
}

std::tuple<Tensor, Tensor> info_nce_queue_forward(const Tensor& query, const Tensor& key,
                                                  const Tensor& queue, double temperature,
                                                  bool normalize) {
  const Tensor loss = query.new_empty({query.size(0)}, work_dtype(query));  // (B,)
  const Tensor lse = query.new_empty({query.size(0)}, work_dtype(query));   // (B,)
  on_call(query, key, queue, temperature, normalize, [&](const auto& call, auto element) {
    using Work = WorkOf<decltype(element)>;
    LogSums<Work> sums(call.problem.rows, start_of(call.problem));
    add_log_sums(call.problem, sums, sums, [](const Site&, const Tile<Work>&) {});
    for (int64_t i = 0; i < call.query.rows; ++i) {
      const double own = call.own_logit(i);
      sums.add(0, i, own);
      const double sum = sums.log_sum(0, i);
      lse.as<Work>()[i] = static_cast<Work>(sum);
      loss.as<Work>()[i] = static_cast<Work>(sum - own);
    }
  });
  return {loss, lse};
}

std::tuple<Maybe, Maybe> info_nce_queue_backward(const Tensor& grad_loss, const Tensor& query,
                                                 const Tensor& key, const Tensor& queue,
                                                 const Tensor& lse, double temperature,
                                                 bool normalize,
                                                 const std::vector<bool>& needs_grad) {
  const Maybe grad_query = like(query, needs_grad[0]), grad_key = like(key, needs_grad[1]);
  on_call(query, key, queue, temperature, normalize, [&](const auto& call, auto element) {
    using In = decltype(element);
    using Work = WorkOf<In>;
    const Problem<Work>& problem = call.problem;
    const Work* g = grad_loss.as<const Work>();
    Weights<Work> weights(problem.rows);
    for (int64_t i = 0; i < call.query.rows; ++i) {
      weights.set(0, i, g[i], lse.as<const Work>()[i], problem.bound());
    }
    const Grads<Work> rows(problem.rows, {grad_query.has_value()});
    const Grads<Work> own({&call.key}, {grad_key.has_value()}), none(problem.keys, {false});
    add_gradients(problem, weights, weights, rows, none, [](const Site&, const Tile<Work>&) {});
    for (int64_t i = 0; i < call.query.rows; ++i) {
      const double weight = g[i] * (std::exp(call.own_logit(i) - lse.as<const Work>()[i]) - 1);
      if (grad_query) add_scaled(call.query.row_of(rows.of(0), i), call.key.row(i), weight);
      if (grad_key) add_scaled(call.key.row_of(own.of(0), i), call.query.row(i), weight);
    }
    const Work c = static_cast<Work>(problem.c);
    if (grad_query) {
      call.query.project(rows.of(0), c, grad_query->template as<In>(), problem.threads);
    }
    if (grad_key) call.key.project(own.of(0), c, grad_key->template as<In>(), problem.threads);
  });
  return {grad_query, grad_key};
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("info_nce_queue_forward", &info_nce_queue_forward);
  m.def("info_nce_queue_backward", &info_nce_queue_backward);
}

}  // namespace dashpot::contrastive
