"""The op `topk_gate`: a learned router's k experts and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import bytes_of, check_tensor
from dashpot.experts._plan import check_bool, check_int, random_matrix, work_dtype


def _topk_gate_reference(logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties to the lower id, and p = softmax(z) there; normalize: softmax
    over the k alone. (T, k) int32, (T, k) float32."""
    wide = logits.to(work_dtype(logits.dtype))  # (T, E)
    idx = torch.where(wide.isnan(), torch.inf, wide).argsort(dim=1, descending=True, stable=True)
    idx = idx[:, :k]
    if normalize:
        return idx.int(), wide.gather(1, idx).softmax(1)
    return idx.int(), wide.softmax(1).gather(1, idx)


def _topk_gate_backward(
    grad_weights: Tensor, logits: Tensor, idx: Tensor, normalize: bool
) -> Tensor:
    """dz_i = p_i (dp_i - sum_j p_j dp_j), over all E or over the k chosen."""
    wide, idx = logits.to(work_dtype(logits.dtype)), idx.long()
    grad = torch.zeros_like(wide)
    if normalize:
        p = wide.gather(1, idx).softmax(1)  # (T, k)
        grad = grad.scatter(1, idx, _softmax_backward(p, grad_weights))
    else:
        grad = _softmax_backward(wide.softmax(1), grad.scatter(1, idx, grad_weights))
    return grad.to(logits.dtype)


def _softmax_backward(p: Tensor, grad: Tensor) -> Tensor:
    return p * (grad - (p * grad).sum(1, keepdim=True))


def _topk_gate_fake(logits, k, normalize):
    shape = (logits.shape[0], k)
    return (
        logits.new_empty(shape, dtype=torch.int32),
        logits.new_empty(shape, dtype=work_dtype(logits.dtype)),
    )


def _topk_gate_inputs(size, dtype, device, seed):
    """size: (E, k, normalize, T)."""
    num_experts, k, normalize, tokens = size
    return (
        random_matrix(tokens, num_experts, dtype=dtype, device=device, seed=seed),
        k,
        bool(normalize),
    )


def _topk_gate_floor(logits, k, normalize):
    """Logits in, ids and weights out; an exponential and k comparisons for each logit."""
    return bytes_of([logits]) + 8 * logits.shape[0] * k + 4, logits.numel() * (k + 2)


TOPK_GATE = declare(
    "topk_gate",
    forward="(Tensor logits, int k, bool normalize) -> (Tensor idx, Tensor weights)",
    backward="(Tensor grad_weights, Tensor logits, Tensor idx, bool normalize)"
    " -> (Tensor grad_logits)",
    reference=_topk_gate_reference,
    reference_backward=_topk_gate_backward,
    fake=_topk_gate_fake,
    inputs=_topk_gate_inputs,
    floor=_topk_gate_floor,
    # one expert; k = E; both weights; a SIMD width and a tail; blocks of rows; no token
    sizes={"test": [(1, 1, 0, 3), (4, 4, 0, 5), (5, 2, 1, 9), (17, 3, 0, 40), (64, 8, 1, 300),
                    (130, 6, 0, 33), (4, 2, 0, 0)],
           "bench": [(8, 2, 1, 65_536), (64, 8, 0, 65_536)]},
)  # fmt: skip


def check_logits(logits) -> Tensor:
    check_tensor(logits, "logits")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected (T, E), E >= 1, got {tuple(logits.shape)}")
    return logits.contiguous()


@public
def topk_gate(logits: Tensor, k: int, *, normalize: bool = False) -> tuple[Tensor, Tensor]:
    r"""The k most probable experts of each token and :math:`p = \mathrm{softmax}(z)` there.

    Args:
        logits: (T, E) float64, float32, bfloat16 or float16.
        k: 1 <= k <= E.
        normalize: divide the weights by their sum, which is the softmax over the k chosen logits.

    Returns:
        ids (T, k) int32, by falling probability, ties to the lower id (NaN counts as the largest);
        weights (T, k) float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients flow through the weights.
    """
    logits = check_logits(logits)
    check_int("k", k, 1, logits.shape[1])
    check_bool("normalize", normalize)
    return TOPK_GATE(logits, k, normalize)
