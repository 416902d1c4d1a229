"""PyTorch's own grouped product, `torch.nn.functional.grouped_mm`, under `grouped_linear` and
`expert_mlp`: the backend "torch", chosen by hand.

It takes no bias, leaves rows past the last end undefined, wants strides of 16 bytes and, on some
devices, gives a segment without rows a gradient that is not zero; what it lacks is added here. Rows
are gathered and combined by whichever kernel the dispatcher has for permute and unpermute.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dashpot._backends import backend
from dashpot.experts.expert_mlp import _or_mean, activate, hidden_of, slope
from dashpot.experts.grouped_linear import segment_of
from dashpot.experts.permute import PERMUTE
from dashpot.experts.unpermute import UNPERMUTE, gather_dots, scale_of

_BYTES = 16  # that strides are multiples of
_CAPABILITY = (8, 0)  # of GPUs that have a kernel; elsewhere the ends would be read by the host
_CPU = (torch.float32, torch.bfloat16, torch.float16)


def _declines(rows: Tensor, count: int, *widths: int) -> str | None:
    if not hasattr(functional, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if rows.is_cuda:
        if rows.dtype != torch.bfloat16:
            return (
                f"F.grouped_mm takes bfloat16 on a GPU without reading the ends, not {rows.dtype}"
            )
        if torch.cuda.get_device_capability(rows.device) < _CAPABILITY:
            return "F.grouped_mm needs a GPU of compute capability 8.0 or more"
    elif rows.dtype not in _CPU:
        return f"F.grouped_mm does not take {rows.dtype}"
    if count == 0:
        return "F.grouped_mm takes at least one row"
    lanes = _BYTES // rows.element_size()
    if any(width == 0 or width % lanes for width in widths):
        sizes = ", ".join(map(str, widths))
        return f"F.grouped_mm takes widths that are multiples of {lanes}, got {sizes}"
    return None


def grouped_linear_supports(xp, weight, bias, offsets) -> str | None:
    return _declines(xp, xp.shape[0], *weight.shape[1:])


def grouped_linear_forward(
    xp: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """(R, K) -> (R, N)"""
    y = functional.grouped_mm(xp, weight.mT, offs=offsets)  # (R, N)
    owner = segment_of(offsets, xp.shape[0])  # (R,)
    if bias is not None:
        y = y + bias[owner.clamp(max=weight.shape[0] - 1)]
    return _kept(y, owner, offsets)


def grouped_linear_backward(
    grad_y: Tensor, xp: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, needs_grad
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(R, N) -> (R, K), (E, N, K), (E, N)"""
    grad_xp = grad_weight = grad_bias = None
    if needs_grad[0]:
        grad_xp = functional.grouped_mm(grad_y, weight, offs=offsets)
        grad_xp = _kept(grad_xp, segment_of(offsets, xp.shape[0]), offsets)
    if needs_grad[1]:
        grad_weight = _outer(grad_y, xp, offsets)
    if needs_grad[2] and bias is not None:
        grad_bias = _sums(grad_y, offsets)
    return grad_xp, grad_weight, grad_bias


def _kept(rows: Tensor, owner: Tensor, offsets: Tensor) -> Tensor:
    """Zeros past the last end, where there may be anything."""
    return torch.where((owner < offsets.shape[0])[:, None], rows, 0)


def _outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """A_e^T B_e of each segment's rows: (R, N), (R, K) -> (E, N, K)."""
    product = functional.grouped_mm(a.mT, b, offs=offsets)
    counts = offsets.diff(prepend=offsets.new_zeros(1))  # (E,)
    return torch.where((counts > 0)[:, None, None], product, 0)


def _sums(a: Tensor, offsets: Tensor) -> Tensor:
    """The sum of each segment's rows (R, N) -> (E, N), in float32: a product with ones."""
    ones = a.new_ones((a.shape[0], _BYTES // a.element_size()))
    return _outer(a, ones, offsets)[..., 0]


# --------------------------------------------------------------------------------------------
# expert_mlp


def expert_mlp_supports(
    x, order, rank, offsets, w1, b1, w2, b2, weights, activation, gated, save
) -> str | None:
    return _declines(x, order.shape[0], *w1.shape[1:], w2.shape[2])


def _gathered(x: Tensor, order: Tensor, rank: Tensor) -> Tensor:
    with backend(None):
        return PERMUTE(x, order, rank)


def _combined(h: Tensor, order: Tensor, rank: Tensor, weights: Tensor | None) -> Tensor:
    with backend(None):
        return UNPERMUTE(h, order, rank, weights)


def expert_mlp_forward(
    x: Tensor, order: Tensor, rank: Tensor, offsets: Tensor, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, weights: Tensor | None, activation: str, gated: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(T, d) -> (T, d), and the pre-activation (R, h) or (R, 2h) if save"""
    xp = _gathered(x, order, rank)  # (R, d)
    pre = grouped_linear_forward(xp, w1, b1, offsets)
    hidden = hidden_of(pre, activation, gated)  # (R, h)
    out = grouped_linear_forward(hidden, w2, b2, offsets)  # (R, d)
    return _combined(out, order, rank, _weights(weights, rank, x)), pre if save else pre[:0]


def _weights(weights: Tensor | None, rank: Tensor, like: Tensor) -> Tensor | None:
    used = _or_mean(weights, rank, like)
    return None if used is None else used.contiguous()


def expert_mlp_backward(
    grad_y: Tensor, x: Tensor, order: Tensor, rank: Tensor, offsets: Tensor, w1: Tensor,
    b1: Tensor | None, w2: Tensor, b2: Tensor | None, weights: Tensor | None, pre: Tensor,
    activation: str, gated: bool, needs_grad: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As the reference's; products in the dtype of x, what is between them in float32."""
    used = _or_mean(weights, rank, x)
    scale = 1.0 if used is None else scale_of(used.float(), order)  # (R, 1)
    dy = _gathered(grad_y, order, rank)  # (R, d)
    wide = pre.float()
    hidden = hidden_of(wide, activation, gated)  # (R, h)
    u = functional.grouped_mm(dy, w2, offs=offsets)  # (R, h), W2^T dy
    u = _kept(u, segment_of(offsets, dy.shape[0]), offsets).float()
    da = scale * u
    if gated:
        gate, up = wide.chunk(2, dim=1)
        dz = torch.cat([da * up * slope(gate, activation), da * activate(gate, activation)], dim=1)
    else:
        dz = da * slope(wide, activation)
    dz, scaled = dz.to(x.dtype), (scale * dy.float()).to(x.dtype)
    grads = dict.fromkeys(("x", "w1", "b1", "w2", "b2", "weights"))
    if needs_grad[0]:
        dxp = _kept(
            functional.grouped_mm(dz, w1, offs=offsets), segment_of(offsets, dz.shape[0]), offsets
        )  # (R, d)
        grads["x"] = _combined(dxp, order, rank, None)
    if needs_grad[4]:
        grads["w1"] = _outer(dz, _gathered(x, order, rank), offsets)
    if needs_grad[5] and b1 is not None:
        grads["b1"] = _sums(dz, offsets)
    if needs_grad[6]:
        grads["w2"] = _outer(scaled, hidden.to(x.dtype), offsets)
    if needs_grad[7] and b2 is not None:
        grads["b2"] = _sums(scaled, offsets)
    if needs_grad[8] and weights is not None:
        out = grouped_linear_forward(hidden.to(x.dtype), w2, b2, offsets)
        grads["weights"] = gather_dots(out, grad_y, rank).to(weights.dtype)
    return tuple(grads.values())
