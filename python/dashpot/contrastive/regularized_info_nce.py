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
    mask_cross_view: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The rows' NT-Xent losses (2B,) and KoLeo losses (2B,), each view for itself; the log-sums
    (2B,) and nearest neighbours (2B,) int64. Rows are normalised once, with 1e-12."""
    loss, lse = _nt_xent_reference(
        z1, z2, None, None, ids, None, 0, temperature, within_view, mask_cross_view
    )
    views = [unit_rows(z1), unit_rows(z2)]
    nearest = [nearest_rows(u, u, 0, 1) for u in views]  # (B, 1)
    koleo = [repulsion(u, u, n, KOLEO_EPS) for u, n in zip(views, nearest, strict=True)]
    return loss, torch.cat(koleo), lse, torch.cat(nearest).reshape(-1)


def _regularized_info_nce_backward(
    grad_loss: Tensor, grad_koleo: Tensor, z1: Tensor, z2: Tensor, ids: Tensor | None, lse: Tensor,
    nearest: Tensor, temperature: float, within_view: bool, mask_cross_view: bool,
    needs_grad: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of nt_xent and koleo_loss, added."""
    needs = [*needs_grad[:2], False, False]
    grads = _nt_xent_backward(
        grad_loss, z1, z2, None, None, ids, None, lse, 0, temperature, within_view,
        mask_cross_view, needs,
    )  # fmt: skip
    result = []
    for at, z in enumerate((z1, z2)):
        if not needs[at]:
            result.append(None)
            continue
        b, u = z.shape[0], unit_rows(z)
        part = slice(at * b, at * b + b)
        grad_u, grad_v = repulsion_backward(
            grad_koleo[part].to(u.dtype), u, u, nearest[part, None], KOLEO_EPS
        )
        result.append(grads[at] + project(grad_u + grad_v, z))
    return tuple(result)


def _regularized_info_nce_inputs(size, dtype, device, seed):
    z1, z2 = random_views(size, dtype, device, seed)
    ids = random_ids(size[0], device, seed) if size[0] % 3 else None
    return z1, z2, ids, 0.2, size[0] % 4 != 2, size[0] % 2 == 1


def _regularized_info_nce_floor(z1, z2, *_):
    return _nt_xent_floor(z1, z2, None, None)


REGULARIZED_INFO_NCE = declare(
    "regularized_info_nce",
    forward="(Tensor z1, Tensor z2, Tensor? ids, float temperature, bool within_view,"
    " bool mask_cross_view) -> (Tensor loss, Tensor koleo, Tensor lse, Tensor nearest)",
    backward="(Tensor grad_loss, Tensor grad_koleo, Tensor z1, Tensor z2, Tensor? ids, Tensor lse,"
    " Tensor nearest, float temperature, bool within_view, bool mask_cross_view,"
    " bool[] needs_grad) -> (Tensor grad_z1, Tensor grad_z2)",
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

    One sweep over the pairs serves the loss and KoLeo's search for neighbours.

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
    loss, koleo = REGULARIZED_INFO_NCE(z1, z2, ids, temperature, within_view, mask_cross_view)
    contrastive, spread = reduced(loss, "mean"), reduced(koleo, "mean")
    total = torch.add(contrastive, spread, alpha=koleo_weight)
    return (total, contrastive, spread) if return_terms else total
