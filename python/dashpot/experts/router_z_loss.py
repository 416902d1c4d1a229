"""The op `router_z_loss`: keeps a learned router's logits small."""

from __future__ import annotations

from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import bytes_of
from dashpot.experts._plan import random_matrix, work_dtype
from dashpot.experts.load_balancing_loss import ROUTER_SIZES
from dashpot.experts.topk_gate import check_logits


def _router_z_loss_reference(logits: Tensor) -> Tensor:
    """mean_t lse(z_t)^2, lse(z) = log sum_e exp(z_e)."""
    lse = logits.to(work_dtype(logits.dtype)).logsumexp(1)  # (T,)
    return lse.square().sum() / max(1, logits.shape[0])


def _router_z_loss_backward(grad_loss: Tensor, logits: Tensor) -> Tensor:
    """dz_te = (2/T) lse_t p_te."""
    wide = logits.to(work_dtype(logits.dtype))
    lse = wide.logsumexp(1, keepdim=True)  # (T, 1)
    scale = grad_loss * (2 / max(1, logits.shape[0]))
    return (scale * lse * (wide - lse).exp()).to(logits.dtype)


def _router_z_loss_fake(logits):
    return logits.new_empty((), dtype=work_dtype(logits.dtype))


def _router_z_loss_inputs(size, dtype, device, seed):
    """size: (E, k, T), k unused."""
    num_experts, _, tokens = size
    return (random_matrix(tokens, num_experts, dtype=dtype, device=device, seed=seed),)


def _router_z_loss_floor(logits):
    return bytes_of([logits]) + 4, 4 * logits.numel()


ROUTER_Z_LOSS = declare(
    "router_z_loss",
    forward="(Tensor logits) -> (Tensor loss)",
    backward="(Tensor grad_loss, Tensor logits) -> (Tensor grad_logits)",
    reference=_router_z_loss_reference,
    reference_backward=_router_z_loss_backward,
    fake=_router_z_loss_fake,
    inputs=_router_z_loss_inputs,
    floor=_router_z_loss_floor,
    sizes=ROUTER_SIZES,
)


@public
def router_z_loss(logits: Tensor) -> Tensor:
    r"""The z-loss of a router, :math:`\frac1T \sum_t \mathrm{lse}(z_t)^2`.

    Args:
        logits: (T, E) router logits, float64, float32, bfloat16 or float16.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without tokens. Weight it with 1e-3.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradient :math:`dz_{te} = \frac2T \mathrm{lse}_t\, p_{te}`; differentiable twice.
    """
    return ROUTER_Z_LOSS(check_logits(logits))
