"""The op `combine`: a weighted sum of the workers' rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import (
    ROW_SIZES,
    Grads,
    Rows,
    as_rows,
    bytes_of,
    check_tensor,
    coordinates,
    random_rows,
    segments,
    spread,
)


def _combine_reference(grads: list[Tensor], coeffs: Tensor, p: int) -> list[Tensor]:
    """u = sum_i c_i g_i per segment (n,); a row with c_i = 0 is left out: 0 * NaN must not leak."""
    outs = []
    for rows in segments(grads, p):  # (p, n)
        rows = torch.where((coeffs != 0)[:, None], rows, 0)
        work = rows if rows.dtype == torch.float64 else rows.float()
        outs.append((coeffs.to(work.dtype) @ work).to(rows.dtype))
    return outs


def _combine_fake(grads: list[Tensor], coeffs: Tensor, p: int) -> list[Tensor]:
    if len(grads) == 1:
        return [grads[0].new_empty((grads[0].numel() // p,))]
    return [grads[s].new_empty((grads[s].numel(),)) for s in range(0, len(grads), p)]


def _combine_backward(
    grad_update: list[Tensor], grads: list[Tensor], coeffs: Tensor, p: int, needs_grad: list[bool]
) -> tuple[list[Tensor] | None, Tensor | None]:
    """dg_i = c_i du; dc_i = <g_i, du>."""
    grad_grads = grad_coeffs = None
    if needs_grad[0]:
        mixed = []
        for du in grad_update:  # (n,)
            work = du if du.dtype == torch.float64 else du.float()
            mixed.append(torch.outer(coeffs.to(work.dtype), work).to(du.dtype))  # (p, n)
        grad_grads = spread(mixed, grads, p)
    if needs_grad[1]:
        grad_coeffs = sum(
            (rows.double() @ du.double()).to(coeffs.dtype)
            for rows, du in zip(segments(grads, p), grad_update, strict=True)
        )
    return grad_grads, grad_coeffs


def _combine_inputs(size, dtype, device, seed):
    grads, p = random_rows(size, dtype, device, seed)
    coeffs = torch.rand(p, generator=torch.Generator().manual_seed(seed + 1)) + 0.1
    return grads, (coeffs / coeffs.sum()).double().to(device), p


def _combine_floor(grads, coeffs, p):
    """One read of the rows, one write of an update, a multiply-add per entry."""
    read = bytes_of(grads)
    return read + read // p + 8 * p, 2 * p * coordinates(grads, p)


COMBINE = declare(
    "combine",
    forward="(Tensor[] grads, Tensor coeffs, int p) -> (Tensor[] update)",
    backward="(Tensor[] grad_update, Tensor[] grads, Tensor coeffs, int p, bool[] needs_grad)"
    " -> (Tensor[] grad_grads, Tensor grad_coeffs)",
    reference=_combine_reference,
    reference_backward=_combine_backward,
    fake=_combine_fake,
    inputs=_combine_inputs,
    floor=_combine_floor,
    sizes=ROW_SIZES,
    prefer="cuda",  # bench/aggregate/bench_combine.py: as fast as Triton's, quicker to launch
)


@public
def combine(
    grads: Grads, coeffs: Tensor, *, out: Tensor | list[Tensor] | None = None
) -> Tensor | list[Tensor]:
    r"""The combination :math:`u = \sum_i c_i g_i` of the workers' rows, in one read and one write.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        coeffs: (p,) float64 (float32 is converted). A row whose coefficient is 0 is not read, so
            its NaN or inf does not leak.
        out: where to write: a contiguous tensor, or S of them for parameter lists, of one
            worker's shapes, dtype and device; no gradient flows through it.

    Returns:
        u (...), or a list of S tensors, in the dtype of `grads`; sums in float32 at least.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: `out` given while a gradient is wanted.

    Differentiable twice, in `grads` (:math:`dg_i = c_i\,du`) and `coeffs`
    (:math:`dc_i = \langle g_i, du\rangle`).
    """
    rows = as_rows(grads)
    device = rows.groups[0][0].device
    if not isinstance(coeffs, Tensor):
        raise TypeError(f"coeffs: expected a torch.Tensor, got {type(coeffs).__name__}")
    if coeffs.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"coeffs: expected float64 or float32, got {coeffs.dtype}")
    if coeffs.shape != (rows.p,) or coeffs.device != device:
        raise ValueError(
            f"coeffs: expected ({rows.p},) on {device}, "
            f"got {tuple(coeffs.shape)} on {coeffs.device}"
        )
    if coeffs.dtype != torch.float64 or not coeffs.is_contiguous():
        coeffs = coeffs.double().contiguous()
    return _combine(grads, rows, coeffs, out)


def _combine(grads: Grads, rows: Rows, coeffs: Tensor, out) -> Tensor | list[Tensor]:
    if out is None:
        return rows.rebuild([COMBINE(group, coeffs, rows.p) for group in rows.groups], grads)
    like = grads[0] if rows.form == "lists" else [grads[0]]
    targets = out if rows.form == "lists" else [out]
    _check_out(targets, like)
    for group, order in zip(rows.groups, rows.order, strict=True):
        COMBINE.into([targets[s].view(-1) for s in order], group, coeffs, rows.p)
    return out


def _check_out(targets, like: Sequence[Tensor]) -> None:
    if not isinstance(targets, list | tuple) or len(targets) != len(like):
        raise TypeError(
            f"out: expected a list of {len(like)} tensors, got {type(targets).__name__}"
        )
    for target, model in zip(targets, like, strict=True):
        check_tensor(target, "out")
        want = (model.shape, model.dtype, model.device)
        if (target.shape, target.dtype, target.device) != want or not target.is_contiguous():
            raise ValueError(
                f"out: expected a contiguous {tuple(model.shape)} {model.dtype} on {model.device}, "
                f"got {tuple(target.shape)} {target.dtype} on {target.device}"
                f"{'' if target.is_contiguous() else ', not contiguous'}"
            )
