"""The op `flag_coeffs`: the Flag Aggregator's solve on the Gram matrix."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import (
    check_choice,
    check_tensor,
    random_rows,
)
from dashpot.aggregate.gram import _gram_reference


class FlagInfo(NamedTuple):
    """What the solve found, tensors on the device of K (nothing is read by the host).

    v: (p,) float64 in [0, 1], each worker's explained variance, 0 for dropped workers.
    objective: () float64, sum of sqrt(1 - v) over the workers that were kept.
    iters: () int64, reweighting steps taken.
    """

    v: Tensor
    objective: Tensor
    iters: Tensor


def _flag_coeffs_reference(
    k: Tensor, m: int | None, n_iter: int, lam: float, eps: float, power: float, pair: str,
    output: str, tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Flag-median IRLS on the Gram matrix; no branch on data, so no host synchronisation.

    x_i = g_i / max(|g_i|, 1e-12), Kh = X X^T = Q L Q^T, F = L^{1/2} Q^T (columns f_i = x_i in an
    orthonormal basis of the rows' span). One step: weights w from the last fit, the m leading
    eigenvectors Y of S = F M F^T with M = diag(w) + Laplacian(w_ij), then v_i = |Y^T f_i|^2.
    c = N^-1 Q L^{-1/2} Y Y^T F t.
    """
    p = k.shape[0]
    k = k.detach().double()
    alive = torch.isfinite(k.diagonal())  # (p,) a worker with a NaN or inf is dropped
    both = alive[:, None] & alive[None, :]
    k = torch.where(both, k, 0)
    count = alive.sum().double()  # ()
    rank = (count + 1) // 2 if m is None else torch.full_like(count, m)
    norm = k.diagonal().clamp(min=0).sqrt()  # (p,)
    inverse = torch.where(alive, 1 / norm.clamp(min=1e-12), 0)
    kh = inverse[:, None] * k * inverse[None, :]
    values, q = torch.linalg.eigh(kh)  # ascending
    kept = values > 1e-12 * values[-1]
    root = torch.where(kept, values.clamp(min=0).sqrt(), 0)
    inverse_root = torch.where(kept, 1 / root.where(kept, 1), 0)
    f = root[:, None] * q.mT  # (r, p), column i is x_i
    # A pair is x_i - x_j ("official") or (g_i - g_j) / |g_i - g_j| ("objective").
    size = norm if pair == "objective" else torch.ones_like(norm)  # (p,)
    gap = _square_gaps(f * size)  # (p, p)
    squares = (f * size).square().sum(0)  # (p,)
    apart = gap > 1e-12 * (squares[:, None] + squares[None, :])  # below: the same row, rounded

    off = both & ~torch.eye(p, dtype=torch.bool, device=k.device)
    leading = torch.arange(p, 0, -1, device=k.device).double() <= rank  # ascending order: the last
    v, fit, proj = torch.zeros_like(norm), torch.zeros_like(kh), torch.zeros_like(kh)
    best = count
    iters = torch.zeros((), dtype=torch.int64, device=k.device)
    active = torch.ones((), dtype=torch.bool, device=k.device)
    for _ in range(n_iter):
        w = torch.where(alive, (1 - v + eps) ** -power, 0)
        if lam:
            scale = lam / (count * (count - 1)).clamp(min=1)
            if pair == "official":
                w_pair = 2 * scale**2 * ((1 - fit).abs() + eps) ** -0.5
            else:
                length = gap.where(apart, 1)
                share = (fit / length).clamp(0, 1)
                w_pair = torch.where(apart, 2 * scale * (1 - share + eps) ** -power / length, 0)
            w_pair = torch.where(off, w_pair, 0)  # (p, p)
            laplacian = torch.diag(w_pair.sum(1)) - w_pair
            weights = torch.diag(w) + size[:, None] * laplacian * size[None, :]
        else:
            weights = torch.diag(w)
        y = torch.linalg.eigh(f @ weights @ f.mT)[1] * leading  # (r, p), the m leading columns
        z = y.mT @ f  # (p, p)
        new_v = torch.where(alive, z.square().sum(0), 0)
        new_v = torch.where(new_v > 1 - 1e-14, 1, new_v)  # 1 - v below that is rounding
        new = torch.where(alive, (1 - new_v).sqrt(), 0).sum()
        accept = active & (new <= best)
        v = torch.where(accept, new_v, v)
        fit = torch.where(accept, _square_gaps(z * size), fit)
        proj = torch.where(accept, y @ z, proj)
        iters = iters + active
        active = accept & (best - new > tol) & (new > tol)
        best = torch.where(accept, new, best)

    if output == "official":
        t = torch.ones_like(norm) / rank
    elif output == "paper":
        t = norm / count
    else:  # rescaled: median length of the live workers, mean of the middle two if even
        ordered = norm.where(alive, torch.inf).sort().values
        low, high = ((count - 1) // 2).clamp(min=0).long(), (count // 2).long()
        t = (ordered.gather(0, low[None]) + ordered.gather(0, high[None])) / (2 * count) * alive
    c = inverse * (q @ (inverse_root * (proj @ t)))
    c = torch.where(count > 0, c, torch.nan)
    return c, v, best, iters


def _square_gaps(columns: Tensor) -> Tensor:
    """Squared distances between the columns of (r, p), from differences: (p, p)."""
    return (columns[:, :, None] - columns[:, None, :]).square().sum(0)


def _flag_coeffs_fake(k, *_):
    return (
        k.new_empty((k.shape[0],)), k.new_empty((k.shape[0],)), k.new_empty(()),
        k.new_empty((), dtype=torch.int64),
    )  # fmt: skip


def _flag_coeffs_inputs(size, dtype, device, seed):
    """A Gram matrix with a gapped spectrum: a projector onto a subspace needs one."""
    grads, p = random_rows(size, torch.float64, device, seed)
    lam = 0.0 if p % 2 else 8.0
    return (
        _gram_reference(grads, None, p, "fp64"),
        None,
        3,
        lam,
        1e-7,
        0.5,
        "official",
        "rescaled",
        1e-10,
    )


def _flag_coeffs_floor(k, *_):
    """K in, c and v out; one eigenproblem of order p: about 9 p^3 operations."""
    p = k.shape[0]
    return 8 * (p * p + 2 * p + 2), 9 * p**3


FLAG_COEFFS = declare(
    "flag_coeffs",
    forward="(Tensor k, int? m, int n_iter, float lam, float eps, float power, str pair,"
    " str output, float tol) -> (Tensor coeffs, Tensor v, Tensor objective, Tensor iters)",
    reference=_flag_coeffs_reference,
    fake=_flag_coeffs_fake,
    inputs=_flag_coeffs_inputs,
    floor=_flag_coeffs_floor,
    sizes={"test": [(1, 4), (2, 9), (5, 40), (15, 300), (16, 300), (33, 700)],
           "bench": [(7, 300), (15, 300), (60, 700)]},
)  # fmt: skip


@public
def flag_coeffs(
    K: Tensor,
    m: int | None = None,
    *,
    n_iter: int = 1,
    lam: float = 0.0,
    eps: float = 1e-7,
    power: float = 0.5,
    pair: Literal["official", "objective"] = "official",
    output: Literal["official", "paper", "rescaled"] = "official",
    tol: float = 1e-10,
) -> tuple[Tensor, FlagInfo]:
    r"""Coefficients of the Flag Aggregator from the Gram matrix alone.

    With unit rows :math:`x_i`, find an m-dimensional subspace Y that minimises
    :math:`\sum_i \sqrt{1 - v_i} + \lambda R(Y)`, :math:`v_i = \|Y^T x_i\|^2`, by iteratively
    reweighted least squares started from equal weights; the update is :math:`Y Y^T` applied to a
    sum of the rows, hence a combination :math:`c^T G` of them.

    Args:
        K: (p, p) float64 or float32 Gram matrix; symmetric. A worker whose diagonal entry is not
            finite is dropped: its coefficient is 0 and p shrinks.
        m: dimension of the subspace, 1 <= m <= p. Default (p + 1) // 2 of the workers kept
            (official code: 8 for p = 15).
        n_iter: reweighting steps, at least 1 (official: 1).
        lam: weight of the pairwise term, >= 0 (official sweep: 0 to 64).
        eps: added to 1 - v before the power, > 0 (official: 1e-7).
        power: weight exponent: 0.5 flag median, 0 flag mean (one eigenproblem), 1 likelihood.
        pair: "official": differences of unit rows, weight :math:`2(\lambda/(p(p-1)))^2
            (|1-q_{ij}|+\epsilon)^{-1/2}`; "objective": differences of the rows themselves divided
            by their length, weight :math:`2\lambda/(p(p-1)) (1-q_{ij}+\epsilon)^{-power}`.
        output: "official" :math:`\frac1m YY^T\sum x_i`; "paper" :math:`\frac1p YY^T\sum g_i`,
            NOT bounded under attack; "rescaled" (median norm / p) :math:`YY^T\sum x_i`, bounded
            and on the gradients' scale.
        tol: stop when the objective falls by no more; a step that raises it is taken back.

    Returns:
        c (p,) float64 and `FlagInfo`; NaN if no worker is finite. No gradient flows to K. On CUDA
        nothing is read by the host, except where only the reference can run (`torch.linalg.eigh`).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Flag Aggregator (arXiv 2302.05865) and its published code, in Gram space.
    """
    check_tensor(K, "K")
    if K.dim() != 2 or K.shape[0] != K.shape[1] or K.shape[0] == 0:
        raise ValueError(f"K: expected a square matrix (p, p), p >= 1, got {tuple(K.shape)}")
    if K.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"K: expected float64 or float32, got {K.dtype}")
    _check_flag(K.shape[0], m, n_iter, lam, eps, power, pair, output, tol)
    c, *info = FLAG_COEFFS(
        K.double().contiguous(), m, n_iter, float(lam), float(eps), float(power), pair, output,
        float(tol),
    )  # fmt: skip
    return c, FlagInfo(*info)


def _check_flag(p, m, n_iter, lam, eps, power, pair, output, tol) -> None:
    """p: None if it is not known yet."""
    if m is not None:
        if not isinstance(m, int) or isinstance(m, bool):
            raise TypeError(f"m: expected an int or None, got {type(m).__name__}")
        if m < 1 or (p is not None and m > p):
            bound = "1 <= m" if p is None else f"1 <= m <= p = {p}"
            raise ValueError(f"m: expected {bound}, got {m}")
    if not isinstance(n_iter, int) or isinstance(n_iter, bool):
        raise TypeError(f"n_iter: expected an int, got {type(n_iter).__name__}")
    if n_iter < 1:
        raise ValueError(f"n_iter: expected at least 1, got {n_iter}")
    for name, value in (("lam", lam), ("eps", eps), ("power", power), ("tol", tol)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
        if not 0 <= value < float("inf") or (name == "eps" and value == 0):
            bound = "a finite number > 0" if name == "eps" else "a finite number >= 0"
            raise ValueError(f"{name}: expected {bound}, got {value}")
    check_choice("pair", pair, ("official", "objective"))
    check_choice("output", output, ("official", "paper", "rescaled"))
