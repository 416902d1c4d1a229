"""The op `centered_clipping_coeffs`: centered clipping on the distances."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import check_float, check_int, check_sqdist, random_sqdist
from dashpot.aggregate.geometric_median_coeffs import distances_to, usable_distances


def _centered_clipping_coeffs_reference(sqdist: Tensor, tau: float, n_iter: int) -> Tensor:
    """v <- v + mean_i (g_i - v) min(1, tau / |g_i - v|), v = sum_i c_i g_i with sum c = 1 over p
    rows and, last, the centre v starts from: c (q,), q = p + 1."""
    clean, alive = usable_distances(sqdist)  # (q, q), (q,)
    last = torch.arange(sqdist.shape[0], device=sqdist.device) == sqdist.shape[0] - 1
    rows = alive & ~last
    count = rows.sum()
    c = last.to(sqdist.dtype)
    for _ in range(n_iter):
        distance = distances_to(clean, c)  # (q,)
        factor = torch.where(distance > tau, tau / distance, 1.0)
        step = torch.where(rows, factor, 0) / count
        c = (1 - step.sum()) * c + step
    return torch.where(alive[-1] & (count > 0), c, torch.nan)


def _centered_clipping_coeffs_inputs(size, dtype, device, seed):
    sqdist = random_sqdist(size, device, seed)
    return sqdist, 2.0, 3


def _centered_clipping_coeffs_floor(sqdist, _tau, n_iter):
    """D in, c out; a product with D each step."""
    q = sqdist.shape[0]
    return 8 * (q * q + q), 2 * n_iter * q * q


CENTERED_CLIPPING_COEFFS = declare(
    "centered_clipping_coeffs",
    forward="(Tensor sqdist, float tau, int n_iter) -> (Tensor coeffs)",
    reference=_centered_clipping_coeffs_reference,
    fake=lambda sqdist, *_: sqdist.new_empty(sqdist.shape[0]),
    inputs=_centered_clipping_coeffs_inputs,
    floor=_centered_clipping_coeffs_floor,
    sizes={"test": [(2, 9), (5, 40), (16, 300), (34, 500)], "bench": [(16, 300), (61, 700)]},
)


@public
def centered_clipping_coeffs(sqdist: Tensor, tau: float, *, n_iter: int = 1) -> Tensor:
    r"""Centered clipping from the squared distances alone.

    Steps :math:`v \leftarrow v + \frac1p \sum_i (g_i - v) \min(1, \tau / |g_i - v|)` from the last
    point; v stays an affine combination of the points, so its distances follow from theirs.

    Args:
        sqdist: (q, q) float64 or float32 squared distances of p = q - 1 rows and, last, the
            centre; symmetric. A row whose diagonal entry is not finite is dropped; otherwise the
            diagonal is not read.
        tau: clipping radius, >= 0.
        n_iter: steps, at least 0.

    Returns:
        c (q,) float64, sum 1; NaN if the centre is not finite or no row is. On CUDA nothing is
        read by the host. No gradient flows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Learning from History for Byzantine Robust Optimization, arXiv 2012.10333.
    """
    sqdist = check_sqdist(sqdist)
    if sqdist.shape[0] < 2:
        raise ValueError("sqdist: expected (q, q), q >= 2 (rows and a centre), got (1, 1)")
    check_float("tau", tau)
    check_int("n_iter", n_iter, 0)
    return CENTERED_CLIPPING_COEFFS(sqdist, float(tau), n_iter)
