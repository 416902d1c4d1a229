"""The op `sparse_simplex_projection`: the nearest point of a simplex with at most k nonzeros."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.transport._problem import check_max_nz, check_tensor


def threshold(top: Tensor, total: Tensor) -> Tensor:
    """tau (..., n) with sum_i [u_i - tau]+ = total over descending values top (..., k, n).

    rho is the last position whose value exceeds the threshold of the values up to it. With total 0
    nothing does, and tau is the largest value: the limit. -inf marks values that cannot be chosen.
    """
    k = top.shape[-2]
    ranks = torch.arange(1, k + 1, device=top.device, dtype=top.dtype)[:, None]  # (k, 1)
    taus = (top.cumsum(-2) - total[..., None, :]) / ranks  # (..., k, n)
    rho = (top > taus).sum(-2, keepdim=True)  # (..., 1, n)
    tau = taus.gather(-2, (rho - 1).clamp(min=0)).squeeze(-2)
    return torch.where(rho.squeeze(-2) > 0, tau, top[..., 0, :])


def _sparse_simplex_projection_reference(
    input: Tensor, total: Tensor, max_nz: int
) -> tuple[Tensor, Tensor]:
    """x_i = [u_i - tau]+ on the k largest u_i (lowest index of equals), sum x = total; else 0.

    input (R, n), total (R,) -> x (R, n), tau (R,). Keeping the k largest and projecting those is
    the projection onto the k-sparse simplex.
    """
    work = torch.promote_types(input.dtype, torch.float32)
    values, indices = input.to(work).sort(dim=-1, descending=True, stable=True)
    values, indices = values[:, :max_nz], indices[:, :max_nz]  # (R, k)
    wide = total.to(work)
    tau = threshold(values.mT[None], wide[None])[0]  # (R,)
    kept = torch.where(values > tau[:, None], values - tau[:, None], 0)
    output = torch.zeros_like(input, dtype=work).scatter(1, indices, kept)
    return output.to(input.dtype), tau


def _sparse_simplex_projection_backward(
    grad_output: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    """On the support S, |S| = r: du = g - mean_S(g), dtotal = mean_S(g); 0 elsewhere."""
    support = output > 0  # (R, n)
    work = torch.promote_types(output.dtype, torch.float32)
    count = support.sum(1).clamp(min=1)
    mean = torch.where(support, grad_output.to(work), 0).sum(1) / count  # (R,)
    grad_input = torch.where(support, grad_output.to(work) - mean[:, None], 0)
    return grad_input.to(output.dtype), mean.to(work)


def _sparse_simplex_projection_inputs(size, dtype, device, seed):
    max_nz, rows, n = size
    generator = torch.Generator().manual_seed(seed)
    total = torch.rand(rows, generator=generator) + 0.5
    state = torch.promote_types(dtype, torch.float32)
    return (
        torch.randn(rows, n, generator=generator).to(device, dtype),
        total.to(device, state),
        min(max_nz, n),
    )


def _sparse_simplex_projection_floor(input, total, _):
    """One read, one write."""
    return 2 * input.nbytes + 2 * total.nbytes, 4 * input.numel()


SPARSE_SIMPLEX_PROJECTION = declare(
    "sparse_simplex_projection",
    forward="(Tensor input, Tensor total, int max_nz) -> (Tensor output, Tensor tau)",
    backward="(Tensor grad_output, Tensor output) -> (Tensor grad_input, Tensor grad_total)",
    reference=_sparse_simplex_projection_reference,
    reference_backward=_sparse_simplex_projection_backward,
    inputs=_sparse_simplex_projection_inputs,
    floor=_sparse_simplex_projection_floor,
    # one entry; fewer than k; k inside and beyond the registers' lists; rows no multiple of lanes
    sizes={"test": [(1, 1, 1), (2, 3, 5), (3, 17, 40), (12, 20, 70), (300, 5, 300)],
           "bench": [(2, 4096, 64), (2, 2048, 2048), (64, 2048, 2048), (2048, 2048, 2048)]},
    public=1,
)  # fmt: skip


@public
def sparse_simplex_projection(
    input: Tensor, max_nz: int, total: float | Tensor = 1.0, dim: int = -1
) -> Tensor:
    r"""Nearest point with nonnegative entries, a given sum and at most `max_nz` nonzeros.

    :math:`x = \arg\min \|x - u\|^2` over :math:`x \ge 0, \sum x = s, \|x\|_0 \le k`: keep the k
    largest entries of u and subtract a threshold, :math:`x_i = [u_i - \tau]_+`. Of equal entries
    the one with the lowest index is kept. An entry of -inf is never chosen.

    Args:
        input: (..., n, ...) float64, float32, bfloat16, float16.
        max_nz: k, at least 1; more than n means no bound (the plain projection).
        total: the sum, at least 0: a number, or a tensor (...), the shape of `input` without `dim`.
        dim: the axis that is projected.

    Returns:
        A tensor like `input`. A slice whose entries are all -inf gives 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable almost everywhere, to `input` and `total`, with the support held fixed; where
    the k-th and the next largest entry are equal it is the gradient of the choice made.

    Source: Sparsity-Constrained Optimal Transport, arXiv 2209.15466.
    """
    check_tensor(input, "input")
    if input.dim() == 0:
        raise ValueError("input: expected at least one axis, got a scalar")
    if not -input.dim() <= dim < input.dim():
        raise ValueError(f"dim: expected an axis of {tuple(input.shape)}, got {dim}")
    n = input.shape[dim]
    if n == 0:
        raise ValueError(f"input: expected at least one entry along dim, got {tuple(input.shape)}")
    max_nz = check_max_nz(max_nz, n)
    moved = input.movedim(dim, -1)
    state = torch.promote_types(input.dtype, torch.float32)
    if isinstance(total, Tensor):
        if total.shape != moved.shape[:-1] or total.device != input.device:
            raise ValueError(
                f"total: expected {tuple(moved.shape[:-1])} on {input.device}, "
                f"got {tuple(total.shape)} on {total.device}"
            )
        total = total.to(state).reshape(-1)
    elif isinstance(total, int | float) and not isinstance(total, bool):
        if not total >= 0:
            raise ValueError(f"total: expected at least 0, got {total}")
        total = input.new_full((moved.numel() // n,), total, dtype=state)
    else:
        raise TypeError(f"total: expected a number or a tensor, got {type(total).__name__}")
    rows = moved.reshape(-1, n).contiguous()
    output = SPARSE_SIMPLEX_PROJECTION(rows, total.contiguous(), max_nz)
    return output.reshape(moved.shape).movedim(-1, dim)
