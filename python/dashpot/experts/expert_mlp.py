"""The op `expert_mlp`: permute, two grouped products with an activation between, combine."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import bytes_of, check_choice, check_tensor
from dashpot.experts._plan import (
    DispatchPlan,
    check_bool,
    check_device,
    check_like,
    check_plan,
    check_rows,
    check_weights,
    gather,
    random_matrix,
    work_dtype,
)
from dashpot.experts.dispatch_plan import dispatch_plan
from dashpot.experts.grouped_linear import (
    _grouped_linear_reference,
    grouped_outer,
    grouped_sum,
)
from dashpot.experts.permute import _permute_reference, plan_inputs, sum_choices
from dashpot.experts.unpermute import scale_of

ACTIVATIONS = ("relu", "gelu", "silu")


def _expert_mlp_reference(
    x: Tensor, order: Tensor, rank: Tensor, offsets: Tensor, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, weights: Tensor | None, activation: str, gated: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y_t = sum_j w_tj (W2_e act(W1_e x_t + b1_e) + b2_e), e the expert of choice j; w = 1/k if
    None. gated: W1 has 2h rows, act(first h) * (last h). Also the pre-activation, if save."""
    xp = _permute_reference(x, order, rank)  # (R, d)
    pre = _grouped_linear_reference(xp, w1, b1, offsets)  # (R, h) or (R, 2h)
    hidden = hidden_of(pre, activation, gated)  # (R, h)
    out = _grouped_linear_reference(hidden, w2, b2, offsets)  # (R, d)
    y = sum_choices(out, rank, _or_mean(weights, rank, x))
    return y, pre if save else pre[:0]


def _or_mean(weights: Tensor | None, rank: Tensor, like: Tensor) -> Tensor | None:
    """The weights, or 1/k each; None where they are all 1."""
    k = rank.shape[1]
    if weights is not None or k == 1:
        return weights
    return like.new_full((1, 1), 1 / k, dtype=work_dtype(like.dtype)).expand(rank.shape)


def activate(z: Tensor, activation: str) -> Tensor:
    return getattr(functional, activation)(z)


def hidden_of(pre: Tensor, activation: str, gated: bool) -> Tensor:
    wide = pre.to(work_dtype(pre.dtype))
    if not gated:
        return activate(wide, activation).to(pre.dtype)
    gate, up = wide.chunk(2, dim=1)
    return (activate(gate, activation) * up).to(pre.dtype)


def slope(z: Tensor, activation: str) -> Tensor:
    """act'(z)"""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "silu":
        s = z.sigmoid()
        return s * (1 + z * (1 - s))
    density = (-0.5 * z * z).exp() * (1 / math.sqrt(2 * math.pi))
    return 0.5 * (1 + (z * math.sqrt(0.5)).erf()) + z * density


def _expert_mlp_backward(
    grad_y: Tensor, x: Tensor, order: Tensor, rank: Tensor, offsets: Tensor, w1: Tensor,
    b1: Tensor | None, w2: Tensor, b2: Tensor | None, weights: Tensor | None, pre: Tensor,
    activation: str, gated: bool, needs_grad: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """With a = act(z) of the saved z, slot r of choice tj, u_r = W2^T dy_t: da = w u, dw = <a, u> +
    <b2, dy>, dW2 = sum (w dy) a^T, dz = da act'(z), dW1 = sum dz x^T, dx_t = sum_j W1^T dz."""
    work = work_dtype(x.dtype)
    wide = pre.to(work)
    hidden = hidden_of(wide, activation, gated)  # (R, h)
    dy = gather(grad_y, order.div(rank.shape[1], rounding_mode="floor")).to(work)  # (R, d)
    u = _grouped_linear_reference(dy, w2.to(work).mT, None, offsets)  # (R, h)
    used = _or_mean(weights, rank, x)
    scale = 1.0 if used is None else scale_of(used.to(work), order)  # (R, 1)
    da = scale * u
    if gated:
        gate, up = wide.chunk(2, dim=1)
        dz = torch.cat([da * up * slope(gate, activation), da * activate(gate, activation)], dim=1)
    else:
        dz = da * slope(wide, activation)  # (R, h)
    grads = dict.fromkeys(("x", "w1", "b1", "w2", "b2", "weights"))
    if needs_grad[0]:
        dxp = _grouped_linear_reference(dz, w1.to(work).mT, None, offsets)  # (R, d)
        grads["x"] = sum_choices(dxp, rank, None).to(x.dtype)
    if needs_grad[4]:
        xp = _permute_reference(x, order, rank).to(work)
        grads["w1"] = grouped_outer(dz, xp, offsets).to(w1.dtype)
    if needs_grad[5] and b1 is not None:
        grads["b1"] = grouped_sum(dz, offsets).to(b1.dtype)
    if needs_grad[6]:
        grads["w2"] = grouped_outer(scale * dy, hidden, offsets).to(w2.dtype)
    if needs_grad[7] and b2 is not None:
        grads["b2"] = grouped_sum(scale * dy, offsets).to(b2.dtype)
    if needs_grad[8] and weights is not None:
        dots = (hidden * u).sum(1, keepdim=True)  # (R, 1)
        if b2 is not None:
            ones = _grouped_linear_reference(
                torch.zeros_like(hidden), torch.zeros_like(w2, dtype=work), b2.to(work), offsets
            )  # (R, d), b2 of each slot's expert
            dots = dots + (ones * dy).sum(1, keepdim=True)
        grads["weights"] = (
            gather(dots, rank.reshape(-1)).reshape(rank.shape).to(weights.dtype)
        )  # (T, k)
    return tuple(grads.values())


def _expert_mlp_fake(x, order, rank, offsets, w1, b1, w2, b2, weights, activation, gated, save):
    slots = order.shape[0] if save else 0
    return torch.empty_like(x), x.new_empty((slots, w1.shape[1]))


def _expert_mlp_inputs(size, dtype, device, seed):
    """size: (T, k, E, align, activation, gated, h, d). No bias for E = 3, weights for k = 2."""
    tokens, k, num_experts, align, activation, gated, hidden, d = size
    plan = plan_inputs((tokens, k, num_experts, align, d), device, seed)

    def make(number, *shape, scale=1.0):
        matrix = random_matrix(*shape, dtype=torch.float32, device=device, seed=10 * seed + number)
        return (matrix * scale).to(dtype)

    rows = 2 * hidden if gated else hidden
    biased = num_experts != 3
    return (
        make(0, tokens, d), plan.order, plan.rank, plan.offsets,
        make(1, num_experts, rows, d, scale=d**-0.5),
        make(2, num_experts, rows) if biased else None,
        make(3, num_experts, d, hidden, scale=hidden**-0.5),
        make(4, num_experts, d) if biased else None,
        make(5, tokens, k).sigmoid() if k == 2 else None,
        activation, bool(gated), True,
    )  # fmt: skip


def _expert_mlp_floor(x, order, rank, offsets, w1, b1, w2, b2, weights, activation, gated, save):
    """Rows and weights in, rows out (and the pre-activation where it is kept); two products."""
    slots = order.shape[0]
    tensors = [x, x, order, w1, w2, *(t for t in (b1, b2, weights) if t is not None)]
    kept = slots * w1.shape[1] * x.element_size() if save else 0
    return bytes_of(tensors) + kept, 2 * slots * x.shape[1] * (w1.shape[1] + w2.shape[2])


EXPERT_MLP = declare(
    "expert_mlp",
    forward="(Tensor x, Tensor order, Tensor rank, Tensor offsets, Tensor w1, Tensor? b1,"
    " Tensor w2, Tensor? b2, Tensor? weights, str activation, bool gated, bool save)"
    " -> (Tensor y, Tensor pre)",
    backward="(Tensor grad_y, Tensor x, Tensor order, Tensor rank, Tensor offsets, Tensor w1,"
    " Tensor? b1, Tensor w2, Tensor? b2, Tensor? weights, Tensor pre, str activation, bool gated,"
    " bool[] needs_grad) -> (Tensor grad_x, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2,"
    " Tensor grad_b2, Tensor grad_weights)",
    reference=_expert_mlp_reference,
    reference_backward=_expert_mlp_backward,
    fake=_expert_mlp_fake,
    torch_products=True,
    inputs=_expert_mlp_inputs,
    floor=_expert_mlp_floor,
    public=1,
    # one token; each activation, gated and not; no bias; padding; tiles of the kernels and tails;
    # k = 3 without weights; no token
    sizes={"test": [(1, 1, 1, 1, "relu", 0, 24, 8), (9, 2, 2, 1, "gelu", 0, 13, 12),
                    (20, 1, 3, 8, "silu", 1, 16, 8), (21, 3, 4, 1, "gelu", 1, 7, 9),
                    (70, 2, 5, 4, "silu", 0, 33, 17), (150, 2, 3, 1, "relu", 1, 40, 72),
                    (130, 1, 4, 1, "relu", 0, 72, 36), (0, 2, 2, 1, "relu", 0, 16, 9)],
           "bench": [(4096, 1, 8, 1, "relu", 0, 1024, 256)]},
)  # fmt: skip


@public
def expert_mlp(
    x: Tensor,
    expert_idx: Tensor | DispatchPlan,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    weights: Tensor | None = None,
    activation: Literal["relu", "gelu", "silu"] = "relu",
    gated: bool = False,
    capacity: int | None = None,
    priority: Literal["choice", "token", "score"] = "choice",
    scores: Tensor | None = None,
) -> Tensor:
    r"""Each token through its k experts' two-layer networks, and only those.

    .. math:: y_t = \sum_j w_{tj} \left( W_2^{e_{tj}}\,\mathrm{act}(W_1^{e_{tj}} x_t + b_1^{e_{tj}})
        + b_2^{e_{tj}} \right)

    Args:
        x: (T, d) float64, float32, bfloat16 or float16.
        expert_idx: (T, k) or (T,) int32 ids, or a `DispatchPlan` of them.
        w1: (E, h, d) in the dtype of x; (E, 2h, d) if gated.
        b1: (E, h) or (E, 2h) likewise, or None.
        w2: (E, d, h) in the dtype of x.
        b2: (E, d) in the dtype of x, or None.
        weights: (T, k) in the dtype of x or float32; None is 1/k: random routing has no gate.
        activation: "relu" (the published model's), "gelu" (exact), "silu".
        gated: act(first h rows) times the last h rows, before w2.
        capacity, priority: as in `dispatch_plan`; not with a plan.
        scores: (T, k), as in `dispatch_plan`; not with a plan.

    Returns:
        y (T, d) in the dtype of x; a token whose choices are all dropped gets 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients to x, the weights of the layers and `weights`; only the pre-activation (T*k, h) is
    kept for them, and nothing where none is wanted. An expert without tokens gets zeros.

    Source: arXiv 2110.04260; biases and ReLU as in its published code, which at inference runs
    every expert on every token.
    """
    check_tensor(x, "x")
    check_tensor(w1, "w1")
    check_choice("activation", activation, ACTIVATIONS)
    check_bool("gated", gated)
    if w1.dim() != 3 or w1.shape[0] == 0 or (gated and w1.shape[1] % 2):
        form = "(E, 2h, d)" if gated else "(E, h, d)"
        raise ValueError(f"w1: expected {form}, E >= 1, got {tuple(w1.shape)}")
    num_experts, rows, d = w1.shape
    hidden = rows // 2 if gated else rows
    x = check_rows("x", x, None, "(T, d)")
    if x.shape[1] != d:
        raise ValueError(f"x: expected (T, {d}) as w1 has it, got {tuple(x.shape)}")
    w1 = check_like("w1", w1, tuple(w1.shape), x)
    w2 = check_like("w2", w2, (num_experts, d, hidden), x)
    b1 = None if b1 is None else check_like("b1", b1, (num_experts, rows), x)
    b2 = None if b2 is None else check_like("b2", b2, (num_experts, d), x)
    plan = _plan_of(expert_idx, num_experts, capacity, priority, scores)
    if plan.rank.shape[0] != x.shape[0]:
        raise ValueError(f"expert_idx: expected {x.shape[0]} tokens, got {plan.rank.shape[0]}")
    check_device("expert_idx", plan.order, x)
    weights = check_weights(weights, plan.rank, x)
    save = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, w1, b1, w2, b2, weights)
    )
    return EXPERT_MLP(
        x, plan.order, plan.rank, plan.offsets, w1, b1, w2, b2, weights, activation, gated, save
    )


def _plan_of(expert_idx, num_experts, capacity, priority, scores) -> DispatchPlan:
    if not isinstance(expert_idx, DispatchPlan):
        return dispatch_plan(
            expert_idx, num_experts, capacity=capacity, priority=priority, scores=scores
        )
    plan = check_plan(expert_idx)
    if capacity is not None or scores is not None or priority != "choice":
        raise ValueError("expert_idx: expected ids where capacity, priority or scores are given")
    if plan.offsets.shape != (num_experts,):
        raise ValueError(
            f"expert_idx: expected a plan of {num_experts} experts, got {plan.offsets.shape[0]}"
        )
    return plan
