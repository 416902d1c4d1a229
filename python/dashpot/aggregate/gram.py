"""The op `gram`: Gram matrix of the workers' rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import (
    CHUNK,
    ROW_SIZES,
    Grads,
    as_rows,
    bytes_of,
    check_choice,
    check_mask,
    coordinates,
    masked,
    mix,
    random_rows,
    segments,
    square,
    total,
)


def _gram_reference(grads: list[Tensor], mask: Tensor | None, p: int, accum: str) -> Tensor:
    """K_ij = sum_k g_ik g_jk, (p, p) float64; rows with mask False do not count and give 0."""
    k = grads[0].new_zeros((p, p), dtype=torch.float64)
    for rows in segments(grads, p):  # (p, n)
        if mask is not None:
            rows = torch.where(mask[:, None], rows, 0)
        for part in rows.split(CHUNK, dim=1):  # (p, <= chunk)
            wide = part.double() if accum == "fp64" or part.dtype == torch.float64 else part.float()
            k = k + (wide @ wide.mT).double()
    return k


def _gram_backward(
    grad_k: Tensor, grads: list[Tensor], mask: Tensor | None, p: int
) -> list[Tensor]:
    """dG = (dK + dK^T) G, rows with mask False 0."""
    weights, grads = masked(grad_k + grad_k.mT, grads, mask, p)  # (p, p)
    return mix(grads, weights, p)


def _gram_inputs(size, dtype, device, seed):
    grads, p = random_rows(size, dtype, device, seed)
    return grads, None, p, "fp32"


def _gram_floor(grads, _mask, p, _accum):
    """One read of the rows, p(p+1)/2 multiply-adds per coordinate."""
    return bytes_of(grads) + 8 * p * p, p * (p + 1) * coordinates(grads, p)


GRAM = declare(
    "gram",
    forward="(Tensor[] grads, Tensor? mask, int p, str accum) -> (Tensor k)",
    backward="(Tensor grad_k, Tensor[] grads, Tensor? mask, int p) -> (Tensor[] grad_grads)",
    reference=_gram_reference,
    reference_backward=_gram_backward,
    fake=square,
    inputs=_gram_inputs,
    floor=_gram_floor,
    sizes=ROW_SIZES,
    prefer="cuda",  # bench/aggregate/bench_gram.py: operands go from memory to registers
)


@public
def gram(
    grads: Grads, *, accum: Literal["fp64", "fp32"] = "fp64", mask: Tensor | None = None
) -> Tensor:
    r"""Gram matrix of the workers' rows, :math:`K_{ij} = \sum_k g_{ik} g_{jk}`, in one read.

    Args:
        grads: tensor (p, ...), list of p tensors (...), or p lists of S tensors (their rows are
            the concatenation); float64, float32, bfloat16 or float16.
        accum: "fp64": every product and sum in float64, exact to its rounding. "fp32": products
            in float32 (CUDA: three TF32 products), sums in float32 over at most 2,048 coordinates
            and in float64 from there; if squares leave float32's range, all is summed again in
            float64. The reference leaves "fp32" to `torch.matmul`.
        mask: (p,) bool; rows with False do not count, and their entries of K are 0.

    Returns:
        K (p, p) float64. A row that holds NaN or inf has non-finite entries, the others have not.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice: :math:`dG = (dK + dK^T) G`.
    """
    check_choice("accum", accum, ("fp64", "fp32"))
    rows = as_rows(grads)
    mask = check_mask(mask, rows)
    return total([GRAM(group, mask, rows.p, accum) for group in rows.groups])
