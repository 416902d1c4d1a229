"""The op `load_balancing_loss`: how unevenly a learned router loads its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import bytes_of
from dashpot.experts._plan import (
    check_device,
    check_ids,
    random_ids,
    random_matrix,
    work_dtype,
)
from dashpot.experts.topk_gate import check_logits


def _load_balancing_loss_reference(logits: Tensor, expert_idx: Tensor) -> tuple[Tensor, Tensor]:
    """E sum_e f_e P_e with f_e = count_e / (T k), P_e = mean_t softmax(z_t)_e; and f (E,)."""
    num_experts = logits.shape[1]
    work = work_dtype(logits.dtype)
    ids = expert_idx.reshape(-1).long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, ids, torch.ones_like(ids))[:-1]
    share = counts.to(work) / max(1, ids.shape[0])  # (E,)
    mean = logits.to(work).softmax(1).sum(0) / max(1, logits.shape[0])  # (E,)
    return num_experts * (share * mean).sum(), share


def _load_balancing_loss_backward(grad_loss: Tensor, logits: Tensor, share: Tensor) -> Tensor:
    """dz_te = (E/T) p_te (f_e - sum_i f_i p_ti)."""
    p = logits.to(share.dtype).softmax(1)  # (T, E)
    scale = grad_loss * (logits.shape[1] / max(1, logits.shape[0]))
    return (scale * p * (share - (p * share).sum(1, keepdim=True))).to(logits.dtype)


def _load_balancing_loss_fake(logits, expert_idx):
    work = work_dtype(logits.dtype)
    return logits.new_empty((), dtype=work), logits.new_empty((logits.shape[1],), dtype=work)


def _load_balancing_loss_inputs(size, dtype, device, seed):
    """size: (E, k, T)."""
    num_experts, k, tokens = size
    logits = random_matrix(tokens, num_experts, dtype=dtype, device=device, seed=seed)
    return logits, random_ids(tokens, k, num_experts, seed, device)


def _load_balancing_loss_floor(logits, expert_idx):
    return bytes_of([logits, expert_idx]) + 4 * logits.shape[1], 4 * logits.numel()


ROUTER_SIZES = {
    # one expert; a SIMD width and a tail; blocks of rows and a tail; no token
    "test": [
        (1, 1, 3),
        (4, 2, 5),
        (5, 5, 33),
        (17, 2, 300),
        (64, 2, 1100),
        (130, 1, 40),
        (4, 2, 0),
    ],
    "bench": [(8, 2, 65_536), (64, 2, 65_536)],
}

LOAD_BALANCING_LOSS = declare(
    "load_balancing_loss",
    forward="(Tensor logits, Tensor expert_idx) -> (Tensor loss, Tensor share)",
    backward="(Tensor grad_loss, Tensor logits, Tensor share) -> (Tensor grad_logits)",
    reference=_load_balancing_loss_reference,
    reference_backward=_load_balancing_loss_backward,
    fake=_load_balancing_loss_fake,
    inputs=_load_balancing_loss_inputs,
    floor=_load_balancing_loss_floor,
    sizes=ROUTER_SIZES,
    public=1,
)


@public
def load_balancing_loss(logits: Tensor, expert_idx: Tensor) -> Tensor:
    r"""The balance loss :math:`E \sum_e f_e P_e`: 1 where tokens are spread evenly, its minimum.

    :math:`f_e` is the share of the T*k choices that went to e (before any dropping, no gradient),
    :math:`P_e` the mean probability of e.

    Args:
        logits: (T, E) router logits, float64, float32, bfloat16 or float16.
        expert_idx: (T, k) or (T,) int32 or int64 ids; an id outside [0, E) is not counted.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without tokens. Weight it with 1e-2
        (Switch's value). f is divided by T*k, as in megablocks: Tutel counts first choices alone,
        and some models of Hugging Face do not divide by k.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradient :math:`dz_{te} = \frac{E}{T} p_{te} (f_e - \sum_i f_i p_{ti})`.
    """
    logits = check_logits(logits)
    ids = check_ids(expert_idx)
    if ids.shape[0] != logits.shape[0]:
        raise ValueError(
            f"expert_idx: expected {logits.shape[0]} tokens as logits, got {ids.shape[0]}"
        )
    check_device("expert_idx", ids, logits)
    if ids.dtype == torch.int64:
        ids = torch.where((ids >= 0) & (ids < logits.shape[1]), ids, -1).int()
    return LOAD_BALANCING_LOSS(logits, ids)
