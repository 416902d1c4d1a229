// regularized_info_nce: NT-Xent of two views and KoLeo of each, from one sweep.
//
// A tile within a view is a tile of NT-Xent's logits and of KoLeo's cosines: its exponentials are
// added, then its nearest neighbours are looked for. Where a gradient is wanted it is formed at
// once: both losses are numbers, so their gradients only wait for a factor, rows are normalised
// once, and the tiles of a small batch (up to kKeptTiles) are still there.
#include <optional>
#include <tuple>

#include "common/bind.h"
#include "contrastive/nearest.h"
#include "contrastive/views.h"

namespace dashpot::contrastive {
namespace {

constexpr double kKoleoEps = 1e-8;

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs regularized_info_nce_forward(const Tensor& z1, const Tensor& z2, const Maybe& ids,
                                     double temperature, bool within_view, bool mask_cross_view,
                                     const std::vector<bool>& needs_grad) {
  const int64_t b = z1.size(0), d = z1.size(1);
  const Dtype dtype = work_dtype(z1);
  const Tensor loss = z1.new_empty({}, dtype), koleo = z1.new_empty({}, dtype);
  Tensor grads[4];  // of the loss and of KoLeo by each view, (B, D) or none
  for (int64_t at = 0; at < 4; ++at) {
    grads[at] = z1.new_empty({needs_grad[at / 2] ? b : 0, d}, dtype);
  }
  const Maybe none;
  on_views({z1, z2, none, none, ids, none, 0, temperature, within_view, mask_cross_view},
           [&](auto& views, auto) {
             using Work = typename std::decay_t<decltype(views)>::Work;
             Problem<Work>& problem = views.problem;
             problem.look_within = true;
             const bool gradient = (needs_grad[0] || needs_grad[1]) && b > 0;
             const int64_t room = problem.tiles_size() * static_cast<int64_t>(sizeof(Work));
             if (gradient && room <= kKeptTiles)
               problem.tiles.reset(new Work[problem.tiles_size()]);
             LogSums<Work> sums(problem.rows, start_of(problem));
             std::vector<Best<Work>> best(2, Best<Work>(b, 1));
             add_log_sums(problem, sums, sums, [&](const Site& at, const Tile<Work>& tile) {
               if (at.row_view != at.key_view) return;
               const Panels<Work>& view = views.rows[at.row_view];
               offer_tile(tile, view.begin(at.row_panel), view.begin(at.key_panel), 0,
                          best[at.row_view], at.diagonal ? nullptr : &best[at.row_view]);
             });
             views.add_positives(sums);
             std::vector<Work> losses(2 * b), lse(2 * b), spread(2 * b);
             std::vector<int64_t> nearest(2 * b);
             views.losses(sums, losses.data(), lse.data());
             for (int64_t view = 0; view < 2; ++view) {
               for (int64_t i = 0; i < b; ++i) nearest[view * b + i] = best[view].index(i, 0);
               koleo_losses<Work>(views.rows[view], views.rows[view], nearest.data() + view * b, 1,
                                  kKoleoEps, problem.threads, spread.data() + view * b);
             }
             *loss.as<Work>() = static_cast<Work>(mean({losses.begin(), losses.end()}));
             *koleo.as<Work>() = static_cast<Work>(mean({spread.begin(), spread.end()}));
             if (!gradient) return;
             problem.ready = problem.tiles != nullptr;
             problem.look_within = false;
             const std::vector<Work> weight(2 * b, static_cast<Work>(0.5 / static_cast<double>(b)));
             const Grads<Work> rows(problem.rows, {needs_grad[0], needs_grad[1]});
             const Grads<Work> pulls(problem.rows, {needs_grad[0], needs_grad[1]});
             views.add_gradients_of(weight.data(), lse.data(), rows, rows);
             for (int64_t at = 0; at < 2; ++at) {
               if (!needs_grad[at]) continue;
               const Panels<Work>& view = views.rows[at];
               view.project(rows.of(at), static_cast<Work>(problem.c),
                            grads[2 * at].template as<Work>(), problem.threads);
               add_koleo_gradients(view, view, nearest.data() + at * b, 1, kKoleoEps, weight.data(),
                                   pulls.of(at), pulls.of(at));
               view.project(pulls.of(at), Work(1), grads[2 * at + 1].template as<Work>(),
                            problem.threads);
             }
           });
  return {loss, koleo, grads[0], grads[1], grads[2], grads[3]};
}

// to = a x + b y, in float32 at least
template <class Out, class Work>
struct Combine {
  template <Isa isa>
  static DASHPOT_INLINE void run(const Work* x, Work a, const Work* y, Work b, Out* to, int64_t n) {
    constexpr int64_t kBlock = 256;
    Work sum[kBlock];
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t count = n - first < kBlock ? n - first : kBlock;
      for (int64_t k = 0; k < count; ++k) sum[k] = a * x[first + k] + b * y[first + k];
      ConvertBlock<Out, Work>::template run<isa>(to + first, sum, count);
    }
  }
};

std::tuple<Maybe, Maybe> regularized_info_nce_backward(const Tensor& grad_loss,
                                                       const Tensor& grad_koleo, const Tensor& z1,
                                                       const Tensor& z2, const Tensor& loss1,
                                                       const Tensor& koleo1, const Tensor& loss2,
                                                       const Tensor& koleo2,
                                                       const std::vector<bool>& needs_grad) {
  const Maybe grads[2] = {like(z1, needs_grad[0]), like(z2, needs_grad[1])};
  const Tensor* const parts[4] = {&loss1, &koleo1, &loss2, &koleo2};
  const py::gil_scoped_release release;
  dispatch_floating(z1.dtype, [&](auto element) {
    using In = decltype(element);
    using Work = WorkOf<In>;
    for (int64_t at = 0; at < 2; ++at) {
      if (!grads[at]) continue;
      if (parts[2 * at]->numel != z1.numel) throw std::invalid_argument("no gradient was formed");
      run_on_isa<Combine<In, Work>>(parts[2 * at]->as<const Work>(), *grad_loss.as<const Work>(),
                                    parts[2 * at + 1]->as<const Work>(),
                                    *grad_koleo.as<const Work>(), grads[at]->template as<In>(),
                                    z1.numel);
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
