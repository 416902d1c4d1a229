// regularized_info_nce: NT-Xent of two views and KoLeo of each, from one sweep.
//
// A tile within a view is a tile of NT-Xent's logits and of KoLeo's cosines: its exponentials are
// added, then its nearest neighbours are looked for. The backward adds KoLeo's pulls to the sums of
// the logits' sweep before the one projection.
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "contrastive/nearest.h"
#include "contrastive/views.h"

namespace dashpot::contrastive {
namespace {

constexpr double kKoleoEps = 1e-8;

std::tuple<Tensor, Tensor, Tensor, Tensor> regularized_info_nce_forward(
    const Tensor& z1, const Tensor& z2, const Maybe& ids, double temperature, bool within_view,
    bool mask_cross_view) {
  const int64_t b = z1.size(0);
  const Tensor loss = z1.new_empty({2 * b}, work_dtype(z1));    // (2B,)
  const Tensor koleo = z1.new_empty({2 * b}, work_dtype(z1));   // (2B,)
  const Tensor lse = z1.new_empty({2 * b}, work_dtype(z1));     // (2B,)
  const Tensor nearest = z1.new_empty({2 * b}, Dtype::kInt64);  // (2B,) within the view
  const Maybe none;
  on_views({z1, z2, none, none, ids, none, 0, temperature, within_view, mask_cross_view},
           [&](auto& views, auto) {
             using Work = typename std::decay_t<decltype(views)>::Work;
             views.problem.look_within = true;
             const Problem<Work>& problem = views.problem;
             LogSums<Work> sums(problem.rows, start_of(problem));
             std::vector<Best<Work>> best(2, Best<Work>(b, 1));
             add_log_sums(problem, sums, sums, [&](const Site& at, const Tile<Work>& tile) {
               if (at.row_view != at.key_view) return;
               const Panels<Work>& view = views.rows[at.row_view];
               offer_tile(tile, view.begin(at.row_panel), view.begin(at.key_panel), 0,
                          best[at.row_view], at.diagonal ? nullptr : &best[at.row_view]);
             });
             views.add_positives(sums);
             views.losses(sums, loss.as<Work>(), lse.as<Work>());
             for (int64_t view = 0; view < 2; ++view) {
               int64_t* found = nearest.as<int64_t>() + view * b;
               for (int64_t i = 0; i < b; ++i) found[i] = best[view].index(i, 0);
               koleo_losses<Work>(views.rows[view], views.rows[view], found, 1, kKoleoEps,
                                  problem.threads, koleo.as<Work>() + view * b);
             }
           });
  return {loss, koleo, lse, nearest};
}

std::tuple<Maybe, Maybe> regularized_info_nce_backward(
    const Tensor& grad_loss, const Tensor& grad_koleo, const Tensor& z1, const Tensor& z2,
    const Maybe& ids, const Tensor& lse, const Tensor& nearest, double temperature,
    bool within_view, bool mask_cross_view, const std::vector<bool>& needs_grad) {
  const int64_t b = z1.size(0);
  const Maybe none, grads[2] = {like(z1, needs_grad[0]), like(z2, needs_grad[1])};
  on_views({z1, z2, none, none, ids, none, 0, temperature, within_view, mask_cross_view},
           [&](const auto& views, auto element) {
             using In = decltype(element);
             using Work = typename std::decay_t<decltype(views)>::Work;
             const Problem<Work>& problem = views.problem;
             const Grads<Work> rows(problem.rows, {grads[0].has_value(), grads[1].has_value()});
             views.add_gradients_of(grad_loss.as<const Work>(), lse.as<const Work>(), rows, rows);
             for (int64_t at = 0; at < 2; ++at) {
               if (!grads[at]) continue;
               const Panels<Work>& view = views.rows[at];
               // The projection multiplies by c, which only the logits' gradients wait for.
               std::vector<Work> weight(b);
               for (int64_t i = 0; i < b; ++i) {
                 weight[i] = grad_koleo.as<const Work>()[at * b + i] / static_cast<Work>(problem.c);
               }
               add_koleo_gradients(view, view, nearest.as<const int64_t>() + at * b, 1, kKoleoEps,
                                   weight.data(), rows.of(at), rows.of(at));
               view.project(rows.of(at), static_cast<Work>(problem.c), grads[at]->template as<In>(),
                            problem.threads);
             }
           });
  return {grads[0], grads[1]};
}

}  // namespace

DASHPOT_BIND(m) {
  m.def("regularized_info_nce_forward", &regularized_info_nce_forward);
  m.def("regularized_info_nce_backward", &regularized_info_nce_backward);
}

}  // namespace dashpot::contrastive
