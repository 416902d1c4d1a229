"""The op `geometric_median_coeffs`: Weiszfeld's steps on the distances."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import (
    check_choice,
    check_float,
    check_int,
    check_sqdist,
    random_sqdist,
)


def usable_distances(sqdist: Tensor) -> tuple[Tensor, Tensor]:
    """D (q, q) with 0 for bad rows and on the diagonal, and which rows are not bad (q,)."""
    sqdist = sqdist.detach()
    alive = torch.isfinite(sqdist.diagonal())
    usable = alive[:, None] & alive[None, :]
    usable = usable & ~torch.eye(sqdist.shape[0], dtype=torch.bool, device=sqdist.device)
    return torch.where(usable, sqdist, 0), alive


def distances_to(clean: Tensor, c: Tensor) -> Tensor:
    """|g_j - sum_i c_i g_i| for sum c = 1, (q,): the root of (D c)_j - c^T D c / 2."""
    image = clean @ c  # (q,)
    return (image - (c * image).sum() / 2).clamp(min=0).sqrt()


def _geometric_median_coeffs_reference(
    sqdist: Tensor, weights: Tensor | None, nu: float, n_iter: int, tol: float, start: str
) -> tuple[Tensor, Tensor]:
    """c_i <- a_i / max(nu, dist_i), normalised, until no c_i moves by more than tol c_i: c (q,) and
    the steps taken (). Relative, because the rows may be of any size: a far one moves the point by
    its length times the change of its small weight. start "last": from the last point, which has
    no weight of its own."""
    clean, alive = usable_distances(sqdist)  # (q, q), (q,)
    a = torch.ones_like(clean[0]) if weights is None else weights
    valid = ((a >= 0) & torch.isfinite(a) | ~alive[: a.shape[0]]).all()
    if start == "last":
        a = a[: sqdist.shape[0] - 1]
        valid = valid & alive[-1]
        a = torch.cat([a, a.new_zeros(1)])
        c = torch.zeros_like(a)
        c[-1] = 1
    a = torch.where(alive, a, 0)
    valid = valid & (a.sum() > 0)
    if start == "mean":
        c = a / a.sum()
    iters = torch.zeros((), dtype=torch.int64, device=sqdist.device)
    active = torch.ones((), dtype=torch.bool, device=sqdist.device)
    for _ in range(n_iter):
        w = a / distances_to(clean, c).clamp(min=nu)
        new = w / w.sum()
        moves = ((new - c).abs() > tol * new).any()
        c = torch.where(active, new, c)
        iters = iters + active
        active = active & moves
    return torch.where(valid, c, torch.nan), iters


def _geometric_median_coeffs_inputs(size, dtype, device, seed):
    sqdist = random_sqdist(size, device, seed)
    weights = None
    if size[0] % 2 == 0:
        weights = torch.rand(size[0], generator=torch.Generator().manual_seed(seed)).double() + 0.5
        weights = weights.to(device)
    return sqdist, weights, 1e-6, 20, 1e-10, "mean"


def _geometric_median_coeffs_floor(sqdist, _weights, _nu, n_iter, *_):
    """D in, c out; a product with D each step."""
    q = sqdist.shape[0]
    return 8 * (q * q + 2 * q), 2 * n_iter * q * q


GEOMETRIC_MEDIAN_COEFFS = declare(
    "geometric_median_coeffs",
    forward="(Tensor sqdist, Tensor? weights, float nu, int n_iter, float tol, str start)"
    " -> (Tensor coeffs, Tensor iters)",
    reference=_geometric_median_coeffs_reference,
    fake=lambda sqdist, *_: (
        sqdist.new_empty(sqdist.shape[0]),
        sqdist.new_empty((), dtype=torch.int64),
    ),
    inputs=_geometric_median_coeffs_inputs,
    floor=_geometric_median_coeffs_floor,
    sizes={"test": [(1, 9), (2, 9), (5, 40), (15, 300), (34, 500)],
           "bench": [(15, 300), (60, 700)]},
)  # fmt: skip


@public
def geometric_median_coeffs(
    sqdist: Tensor,
    *,
    nu: float = 1e-6,
    n_iter: int = 100,
    tol: float = 1e-10,
    start: Literal["mean", "last"] = "mean",
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The geometric median from the squared distances alone.

    Weiszfeld's step :math:`c_i \propto a_i / \max(\nu, |g_i - z|)` with :math:`z = \sum_i c_i g_i`;
    as :math:`\sum c = 1`, :math:`|g_j - z|^2 = (D c)_j - \frac12 c^T D c`.

    Args:
        sqdist: (q, q) float64 or float32 squared distances; symmetric. A worker whose diagonal
            entry is not finite is dropped: its coefficient is 0; otherwise the diagonal is not
            read.
        nu: distances count as at least this, > 0.
        n_iter: most steps, at least 0 (the start itself).
        tol: stop when no coefficient moves by more than this part of itself.
        start: "mean": the (weighted) mean. "last": the last of the q points, which is none of
            those whose median is sought.
        weights: (q,) float64 a_i >= 0, by default 1; of (q - 1,) with start="last".

    Returns:
        c (q,) float64, their sum 1 (c_q = 0 after the first step of start="last"), and the steps
        taken () int64. NaN if no worker is left, or a weight is negative or not finite. On CUDA
        nothing is read by the host. No gradient flows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    sqdist = check_sqdist(sqdist)
    check_geometric_median(nu, n_iter, tol)
    check_choice("start", start, ("mean", "last"))
    points = sqdist.shape[0] - (start == "last")
    weights = as_weights(weights, points, sqdist.device)
    return GEOMETRIC_MEDIAN_COEFFS(sqdist, weights, float(nu), n_iter, float(tol), start)


def check_geometric_median(nu, n_iter, tol) -> None:
    check_float("nu", nu, positive=True)
    check_int("n_iter", n_iter, 0)
    check_float("tol", tol)


def as_weights(weights, p: int, device: torch.device) -> Tensor | None:
    """(p,) float64 on the device; the values are not looked at."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a torch.Tensor, got {type(weights).__name__}")
    if weights.shape != (p,) or weights.device != device or weights.is_complex():
        raise ValueError(
            f"weights: expected ({p},) real numbers on {device}, "
            f"got {tuple(weights.shape)} {weights.dtype} on {weights.device}"
        )
    return weights.detach().double().contiguous()
