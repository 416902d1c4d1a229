// koleo_loss: loss_i = -(1/K) sum_k log(|u_i - v_n_k(i) + eps| + eps); nearest.h holds the parts.
//
// The sweep only looks for neighbours: rows against themselves (tiles above the diagonal serve both
// sides), or against keys of which row i is key offset + i.
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "contrastive/nearest.h"

namespace dashpot::contrastive {
namespace {

template <class Function>
void on_rows(const Tensor& z, const Maybe& keys, double eps, bool normalize,
             const Function& function) {
  const int64_t b = z.size(0), d = z.size(1), n = keys ? keys->size(0) : b;
  if (keys && (keys->size(1) != d || keys->dtype != z.dtype)) {
    throw std::invalid_argument("expected rows and keys of one width and dtype");
  }
  const int threads = num_threads();
  dispatch_floating(z.dtype, [&](auto element) {
    using In = decltype(element);
    using Work = WorkOf<In>;
    const py::gil_scoped_release release;
    const int64_t panel = panel_for(std::max(b, n));
    const double least = normalize ? eps : 0;
    const Panels<Work> rows(z.as<const In>(), b, d, least, threads, panel);
    std::optional<Panels<Work>> other;
    if (keys) other.emplace(keys->as<const In>(), n, d, least, threads, panel);
    function(rows, other ? *other : rows, element, threads);
  });
}

template <class Work>
void find_nearest(const Panels<Work>& rows, const Panels<Work>& keys, int64_t offset, int64_t k,
                  int threads, int64_t* nearest) {
  Problem<Work> problem;
  problem.rows = {&rows};
  problem.keys = {&keys};
  problem.same = &rows == &keys;
  problem.threads = threads;
  Best<Work> best(rows.rows, k);
  for_tiles(problem, [&](const Site& at, Work* scratch) {
    products(rows, at.row_panel, keys, at.key_panel, scratch);
    const Tile<Work> tile{scratch, keys.panel, rows.height(at.row_panel), keys.height(at.key_panel),
                          nullptr, nullptr};
    offer_tile(tile, rows.begin(at.row_panel), keys.begin(at.key_panel), offset, best,
               problem.same && !at.diagonal ? &best : nullptr);
  });
  for (int64_t i = 0; i < rows.rows; ++i) {
    for (int64_t a = 0; a < k; ++a) nearest[i * k + a] = best.index(i, a);
  }
}

std::tuple<Tensor, Tensor> koleo_loss_forward(const Tensor& z, const Maybe& keys, int64_t offset,
                                              int64_t topk, double eps, bool normalize) {
  const Tensor loss = z.new_empty({z.size(0)}, work_dtype(z));           // (B,)
  const Tensor nearest = z.new_empty({z.size(0), topk}, Dtype::kInt64);  // (B, K)
  on_rows(z, keys, eps, normalize,
          [&](const auto& rows, const auto& others, auto element, int threads) {
            using Work = WorkOf<decltype(element)>;
            find_nearest(rows, others, offset, topk, threads, nearest.as<int64_t>());
            koleo_losses(rows, others, nearest.as<const int64_t>(), topk, eps, threads,
                         loss.as<Work>());
          });
  return {loss, nearest};
}

std::tuple<Maybe, Maybe> koleo_loss_backward(const Tensor& grad_loss, const Tensor& z,
                                             const Maybe& keys, const Tensor& nearest, int64_t topk,
                                             double eps, bool normalize,
                                             const std::vector<bool>& needs_grad) {
  const Maybe grad_z = like(z, needs_grad[0]);
  const Maybe grad_keys = keys ? like(*keys, needs_grad[1]) : Maybe();
  on_rows(z, keys, eps, normalize,
          [&](const auto& rows, const auto& others, auto element, int threads) {
            using In = decltype(element);
            using Work = WorkOf<In>;
            const Grads<Work> row_grads({&rows}, {true}), key_grads({&others}, {keys.has_value()});
            add_koleo_gradients(rows, others, nearest.as<const int64_t>(), topk, eps,
                                grad_loss.as<const Work>(), row_grads.of(0),
                                keys ? key_grads.of(0) : row_grads.of(0));
            if (grad_z) rows.project(row_grads.of(0), Work(1), grad_z->template as<In>(), threads);
            if (grad_keys)
              others.project(key_grads.of(0), Work(1), grad_keys->template as<In>(), threads);
          });
  return {grad_z, grad_keys};
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("koleo_loss_forward", &koleo_loss_forward);
  m.def("koleo_loss_backward", &koleo_loss_backward);
}

}  // namespace dashpot::contrastive
