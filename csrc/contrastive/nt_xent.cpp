// nt_xent: two views against each other and themselves; the loss is in views.h.
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "contrastive/views.h"

namespace dashpot::contrastive {
namespace {

std::tuple<Tensor, Tensor> nt_xent_forward(const Tensor& z1, const Tensor& z2, const Maybe& key1,
                                           const Maybe& key2, const Maybe& ids,
                                           const Maybe& key_ids, int64_t offset, double temperature,
                                           bool within_view, bool mask_cross_view) {
  const Tensor loss = z1.new_empty({2 * z1.size(0)}, work_dtype(z1));  // (2B,)
  const Tensor lse = z1.new_empty({2 * z1.size(0)}, work_dtype(z1));   // (2B,)
  on_views({z1, z2, key1, key2, ids, key_ids, offset, temperature, within_view, mask_cross_view},
           [&](const auto& views, auto) {
             using Work = typename std::decay_t<decltype(views)>::Work;
             LogSums<Work> sums(views.problem.rows, start_of(views.problem));
             add_log_sums(views.problem, sums, sums, [](const Site&, const Tile<Work>&) {});
             views.add_positives(sums);
             views.losses(sums, loss.template as<Work>(), lse.template as<Work>());
           });
  return {loss, lse};
}

std::tuple<Maybe, Maybe, Maybe, Maybe> nt_xent_backward(const Tensor& grad_loss, const Tensor& z1,
                                                        const Tensor& z2, const Maybe& key1,
                                                        const Maybe& key2, const Maybe& ids,
                                                        const Maybe& key_ids, const Tensor& lse,
                                                        int64_t offset, double temperature,
                                                        bool within_view, bool mask_cross_view,
                                                        const std::vector<bool>& needs_grad) {
  const Maybe grads[4] = {like(z1, needs_grad[0]), like(z2, needs_grad[1]),
                          key1 ? like(*key1, needs_grad[2]) : Maybe(),
                          key2 ? like(*key2, needs_grad[3]) : Maybe()};
  on_views({z1, z2, key1, key2, ids, key_ids, offset, temperature, within_view, mask_cross_view},
           [&](const auto& views, auto element) {
             using In = decltype(element);
             using Work = typename std::decay_t<decltype(views)>::Work;
             const Problem<Work>& problem = views.problem;
             const Grads<Work> rows(problem.rows, {grads[0].has_value(), grads[1].has_value()});
             const Grads<Work> keys(problem.keys, {grads[2].has_value(), grads[3].has_value()});
             views.add_gradients_of(grad_loss.as<const Work>(), lse.as<const Work>(), rows,
                                    problem.same ? rows : keys);
             for (int64_t at = 0; at < 4; ++at) {
               if (!grads[at]) continue;
               const auto& view = at < 2 ? views.rows[at] : views.keys[at - 2];
               view.project((at < 2 ? rows : keys).of(at % 2), static_cast<Work>(problem.c),
                            grads[at]->template as<In>(), problem.threads);
             }
           });
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("nt_xent_forward", &nt_xent_forward);
  m.def("nt_xent_backward", &nt_xent_backward);
}

}  // namespace dashpot::contrastive
