"""The op `info_nce_queue`: each query with a key of its own and a queue of negatives for all."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.contrastive._pairs import (
    PAIR_SIZES,
    bytes_of,
    check_bool,
    check_number,
    check_rows,
    project,
    random_rows,
    random_views,
    reduced,
    unit_rows,
    wide,
)


def _rows(z: Tensor, normalize: bool) -> Tensor:
    return unit_rows(z) if normalize else wide(z)


def _info_nce_queue_reference(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """lse_i = log(e^{s_i} + sum_m e^{u_i.n_m / tau}), s_i = u_i.v_i / tau; loss_i = lse_i - s_i."""
    u, v = _rows(query, normalize), _rows(key, normalize)  # (B, D)
    n = _rows(queue, normalize).detach()  # (M, D)
    own = (u * v).sum(1) / temperature  # (B,)
    logits = torch.cat([own[:, None], (u @ n.mT) / temperature], 1)  # (B, 1 + M)
    lse = torch.logsumexp(logits, 1)
    return lse - own, lse


def _info_nce_queue_backward(
    grad_loss: Tensor, query: Tensor, key: Tensor, queue: Tensor, lse: Tensor, temperature: float,
    normalize: bool, needs_grad: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """du_i = g_i (sum_m P_im n_m + (P_ii - 1) v_i) / tau, dv_i = g_i (P_ii - 1) u_i / tau."""
    u, v, n = (_rows(z, normalize) for z in (query, key, queue))
    g = grad_loss.to(u.dtype)[:, None] / temperature  # (B, 1)
    share = torch.exp((u @ n.mT) / temperature - lse[:, None])  # (B, M)
    own = torch.exp((u * v).sum(1) / temperature - lse)[:, None] - 1  # (B, 1)
    grads = g * (share @ n + own * v), g * own * u  # (B, D) each

    def back(grad: Tensor, rows: Tensor) -> Tensor:
        return project(grad, rows) if normalize else grad.to(rows.dtype)

    return tuple(
        back(grad, z) if need else None
        for grad, z, need in zip(grads, (query, key), needs_grad[:2], strict=True)
    )


def _info_nce_queue_inputs(size, dtype, device, seed):
    query, key = random_views(size, dtype, device, seed)
    queue = random_rows(3 * size[0], size[1], dtype, device, seed + 2)
    return query, key, queue, 0.2, True


def _info_nce_queue_floor(query, key, queue, *_):
    """One read of all rows, a number per query; the products with the queue."""
    b, d = query.shape
    return bytes_of(query, key, queue) + 4 * b + 4, 2 * b * (queue.shape[0] + 1) * d


INFO_NCE_QUEUE = declare(
    "info_nce_queue",
    forward="(Tensor query, Tensor key, Tensor queue, float temperature, bool normalize)"
    " -> (Tensor loss, Tensor lse)",
    backward="(Tensor grad_loss, Tensor query, Tensor key, Tensor queue, Tensor lse,"
    " float temperature, bool normalize, bool[] needs_grad)"
    " -> (Tensor grad_query, Tensor grad_key)",
    reference=_info_nce_queue_reference,
    reference_backward=_info_nce_queue_backward,
    inputs=_info_nce_queue_inputs,
    floor=_info_nce_queue_floor,
    sizes=PAIR_SIZES,
    public=1,
)


@public
def info_nce_queue(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float = 0.04,
    normalize: bool = True,
) -> Tensor:
    r"""InfoNCE with a queue of negatives (MoCo), without the matrix of logits.

    .. math:: L = \frac1B \sum_i \log\Big(e^{s_i} + \sum_m e^{u_i \cdot n_m / \tau}\Big) - s_i,
        \qquad s_i = u_i \cdot v_i / \tau

    Args:
        query: (B, D) float64, float32, bfloat16 or float16; u are its normalised rows.
        key: (B, D), the positives; v are its normalised rows.
        queue: (M, D), negatives of all queries; n are its normalised rows. It has no gradient.
        temperature: tau > 0 (0.04, as `info_nce`).
        normalize: False takes all rows as they are.

    Returns:
        () float32, or float64 for float64 inputs; 0 without rows, and with an empty queue.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: He et al., arXiv 1911.05722.
    """
    check_rows(query, "query")
    check_rows(key, "key", query, same_count=True)
    check_rows(queue, "queue", query)
    check_bool("normalize", normalize)
    temperature = check_number(temperature, "temperature")
    rows = INFO_NCE_QUEUE(
        query.contiguous(), key.contiguous(), queue.detach().contiguous(), temperature, normalize
    )
    return reduced(rows, "mean")
