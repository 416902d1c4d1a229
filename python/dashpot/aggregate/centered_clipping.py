"""`centered_clipping`: steps towards the workers, none longer than tau."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._mixing import Geometry
from dashpot.aggregate._rows import Grads, Rows, check_float, check_int, check_tensor, random_grads
from dashpot.aggregate._rules import Rule, Update, rule
from dashpot.aggregate.centered_clipping_coeffs import CENTERED_CLIPPING_COEFFS
from dashpot.aggregate.combine import COMBINE, _combine
from dashpot.aggregate.multi_krum import SELECTION_SIZES, selection_floor
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST


@rule("centered_clipping")
class CenteredClipping(Rule):
    """A centre is one more row, read where it lies; without one it is the origin, whose distances
    are the norms. Its coefficient is the last of p + 1, or left out."""

    tau: float
    center: Tensor | list[Tensor] | None = None
    n_iter: int = 1

    def check(self) -> None:
        check_float("tau", self.tau)
        check_int("n_iter", self.n_iter, 0)

    def measure(self, rows: Rows) -> Tensor:
        return super().measure(_with_center(rows, self.center))

    def coeffs(self, geometry: Geometry, p: int) -> Tensor:
        origin = self.center is None
        sqdist = geometry.bordered() if origin else geometry.sqdist
        c = CENTERED_CLIPPING_COEFFS(sqdist, float(self.tau), self.n_iter)  # (p + 1,)
        return c[:p] if origin else c

    def unmix(self, mixing: Tensor, solution: Tensor) -> Tensor:
        p = mixing.shape[0]
        return torch.cat([super().unmix(mixing, solution[:p]), solution[p:]])

    def apply(self, grads: Grads, rows: Rows, solution: Any) -> Update:
        return _combine(grads, _with_center(rows, self.center), solution, None)


def _with_center(rows: Rows, center) -> Rows:
    """The rows and, as the last, the centre; a stacked tensor becomes a list of its rows."""
    if center is None:
        return rows
    parts = center if rows.form == "lists" else [center]
    count = sum(len(order) for order in rows.order)
    if not isinstance(parts, list | tuple) or len(parts) != count:
        got = f"{len(parts)} tensors" if isinstance(parts, list | tuple) else type(parts).__name__
        raise ValueError(f"center: expected a list of {count} tensors, as a worker's, got {got}")
    groups = []
    for group, order in zip(rows.groups, rows.order, strict=True):
        tensors = list(group[0].unbind(0)) if rows.form == "tensor" else group
        extended = []
        for at, s in enumerate(order):
            own = tensors[at * rows.p : (at + 1) * rows.p]
            extended += [*own, _check_part(parts[s], own[0]).contiguous()]
        groups.append(extended)
    return rows._replace(p=rows.p + 1, groups=groups)


def _check_part(part, like: Tensor) -> Tensor:
    check_tensor(part, "center")
    if (part.shape, part.dtype, part.device) != (like.shape, like.dtype, like.device):
        raise ValueError(
            f"center: expected {tuple(like.shape)} {like.dtype} on {like.device} as a worker's, "
            f"got {tuple(part.shape)} {part.dtype} on {part.device}"
        )
    return part


@public
def centered_clipping(
    grads: Grads,
    tau: float,
    *,
    center: Tensor | list[Tensor] | None = None,
    n_iter: int = 1,
    nonfinite: Literal["drop", "raise"] = "drop",
) -> Tensor | list[Tensor]:
    r"""Centered clipping, :math:`v \leftarrow v + \frac1p\sum_i (g_i - v)\min(1, \tau/|g_i - v|)`:
    two reads of the rows (and of the centre) and one write, however many steps.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        tau: clipping radius, >= 0.
        center: (...) where v starts, shaped as one worker's gradients: a tensor, or a list of S;
            by default the origin. Usually the last update. It is read where it lies.
        n_iter: steps, at least 0.
        nonfinite: "drop" leaves out a row with NaN or inf, as if it had not come; "raise" raises
            instead, and reads flags on the host.

    Returns:
        v (...), or a list of S tensors, in the dtype of `grads`; NaN if no row is left, or the
        centre has NaN or inf.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients flow to `grads` and `center` with the coefficients held fixed, which is exact where no
    row is clipped; the clipping factors' own derivative is not given.

    Source: Learning from History for Byzantine Robust Optimization, arXiv 2012.10333.
    """
    return CenteredClipping(tau=tau, center=center, n_iter=n_iter, nonfinite=nonfinite)(grads)


def _centered_clipping_inputs(size, dtype, device, seed):
    return random_grads(size, dtype, device, seed), 4.0


CENTERED_CLIPPING = chain(
    "centered_clipping",
    centered_clipping,
    (PAIRWISE_SQDIST, CENTERED_CLIPPING_COEFFS, COMBINE),
    inputs=_centered_clipping_inputs,
    floor=lambda grads, _tau: selection_floor(grads, len(grads)),
    sizes=SELECTION_SIZES,
)
