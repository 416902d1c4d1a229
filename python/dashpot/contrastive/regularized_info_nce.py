"""The op `regularized_info_nce`: NT-Xent of two views with KoLeo of each, in one sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.contrastive._pairs import (
    PAIR_SIZES,
    check_bool,
    check_number,
    project,
    random_ids,
    random_views,
    reduced,
    unit_rows,
    wide,
)
from dashpot.contrastive.koleo_loss import nearest_rows, repulsion, repulsion_backward
from dashpot.contrastive.nt_xent import (
    _nt_xent_backward,
    _nt_xent_floor,
    _nt_xent_reference,
    check_views,
)

KOLEO_EPS = 1e-8


def _regularized_info_nce_reference(
    z1: Tensor, z2: Tensor, ids: Tensor | None, temperature: float, within_view: bool,
    mask_cross_view: bool, with_gradient: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The means of the rows' NT-Xent losses and of their KoLeo losses (each view for itself), ().
    Then, as z1's and z2's gradient is wanted, what they are by each of the two: (B, D) or (0, D).
    Rows are normalised once, with 1e-12."""
    pairs = (z1, z2, None, None, ids, None)
    options = (0, temperature, within_view, mask_cross_view)
    loss, lse = _nt_xent_reference(*pairs, *options)
    grads = [wide(z1.detach())[:0] for _ in range(4)]
    weight = torch.full_like(loss, 0.5 / max(1, z1.shape[0])).detach()  # (2B,)
    koleo = []
    wanted = [*with_gradient, False, False]
    by_loss = _nt_xent_backward(
        weight, *(wide(z.detach()) for z in (z1, z2)), None, None, ids, None, lse.detach(),
        *options, wanted,
    )  # fmt: skip
    for at, z in enumerate((z1, z2)):
        u = unit_rows(z)
        nearest = nearest_rows(u, u, 0, 1)  # (B, 1)
        koleo.append(repulsion(u, u, nearest, KOLEO_EPS))
        if with_gradient[at]:
            u = u.detach()
            own, other = repulsion_backward(weight[: z.shape[0]], u, u, nearest, KOLEO_EPS)
            grads[2 * at : 2 * at + 2] = by_loss[at], project(own + other, wide(z.detach()))
    return reduced(loss, "mean"), reduced(torch.cat(koleo), "mean"), *grads


def _regularized_info_nce_backward(
    grad_loss: Tensor, grad_koleo: Tensor, z1: Tensor, z2: Tensor, loss1: Tensor, koleo1: Tensor,
    loss2: Tensor, koleo2: Tensor, needs_grad: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """What the forward formed, times the two incoming numbers."""
    return tuple(
        (grad_loss * by_loss + grad_koleo * by_koleo).to(z.dtype) if need else None
        for z, by_loss, by_koleo, need in (
            (z1, loss1, koleo1, needs_grad[0]), (z2, loss2, koleo2, needs_grad[1])
        )
    )  # fmt: skip


def _regularized_info_nce_inputs(size, dtype, device, seed):
    z1, z2 = random_views(size, dtype, device, seed)
    ids = random_ids(size[0], device, seed) if size[0] % 3 else None
    return z1, z2, ids, 0.2, size[0] % 4 != 2, size[0] % 2 == 1, [True, True]


def _regularized_info_nce_floor(z1, z2, *_):
    return _nt_xent_floor(z1, z2, None, None)


REGULARIZED_INFO_NCE = declare(
    "regularized_info_nce",
    forward="(Tensor z1, Tensor z2, Tensor? ids, float temperature, bool within_view,"
    " bool mask_cross_view, bool[] with_gradient) -> (Tensor loss, Tensor koleo, Tensor loss1,"
    " Tensor koleo1, Tensor loss2, Tensor koleo2)",
    backward="(Tensor grad_loss, Tensor grad_koleo, Tensor z1, Tensor z2, Tensor loss1,"
    " Tensor koleo1, Tensor loss2, Tensor koleo2, bool[] needs_grad)"
    " -> (Tensor grad_z1, Tensor grad_z2)",
    reference=_regularized_info_nce_reference,
    reference_backward=_regularized_info_nce_backward,
    inputs=_regularized_info_nce_inputs,
    floor=_regularized_info_nce_floor,
    sizes=PAIR_SIZES,
    public=2,
)


@public
def regularized_info_nce(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.04,
    koleo_weight: float = 0.1,
    subject_ids: Tensor | None = None,
    within_view: bool = True,
    mask_cross_view: bool = False,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""NT-Xent of two views plus KoLeo of each: :math:`L = L_{NT} + w \frac12 (K(z_1) + K(z_2))`.

    One sweep over the pairs serves the loss and KoLeo's search for neighbours. Where a gradient is
    wanted the forward forms it, and the backward only multiplies.

    Args:
        z1: (B, D) float64, float32, bfloat16 or float16; normalised by rows, with 1e-12 for both
            terms.
        z2: (B, D) of the same dtype; from a momentum encoder: detached. KoLeo(z2) then counts in
            the value and has no gradient.
        temperature: tau > 0 (0.04: the preset of the published code).
        koleo_weight: w >= 0 (0.1: the preset).
        subject_ids: (B,) integers, as in `nt_xent`.
        within_view: as in `nt_xent`; False saves nothing here, since KoLeo looks there.
        mask_cross_view: as in `nt_xent`.
        return_terms: True also returns both terms.

    Returns:
        () float32, or float64 for float64 inputs; with return_terms (L, NT-Xent, the mean of both
        KoLeo losses), () each.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Abbaspourazad et al., arXiv 2312.05409; settings of its published code.
    """
    z1, z2, ids, temperature = check_views(
        z1, z2, temperature, subject_ids, within_view, mask_cross_view
    )
    koleo_weight = check_number(koleo_weight, "koleo_weight", strict=False)
    check_bool("return_terms", return_terms)
    with_gradient = [torch.is_grad_enabled() and z.requires_grad for z in (z1, z2)]
    loss, koleo = REGULARIZED_INFO_NCE(
        z1, z2, ids, temperature, within_view, mask_cross_view, with_gradient
    )
    total = torch.add(loss, koleo, alpha=koleo_weight)
    return (total, loss, koleo) if return_terms else total
