"""`regularized_ot_points`: the solver for a cost that is made from two clouds of points."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.transport._problem import (
    METRICS,
    as_problem_of_points,
    check_tensor,
    cost_floor,
    points_cost,
    random_points,
    state_dtype,
)
from dashpot.transport._reference_solve import may_ask
from dashpot.transport._solve import REGULARIZED_OT
from dashpot.transport.ot_plan import OT_PLAN
from dashpot.transport.regularized_ot import (
    OTResult,
    Refuse,
    Source,
    check_options,
    entry_gradients,
    mass_gradients,
    plan_of,
    solve,
)

CHUNK = 1 << 20  # numbers that a tile of a gradient holds


class _Attach(torch.autograd.Function):
    """Gradients of a finished solve to its points: x (B, m, d), y (B, n, d), a (B, m), b (B, n);
    value (B,); values, rows (B, k, n) where the plan's values have one, else None."""

    @staticmethod
    def forward(ctx, x, y, a, b, value, values, alpha, beta, rows, metric, reg, gamma, k, form):
        ctx.save_for_backward(x, y, a, b, values, alpha, beta, rows)
        ctx.options = metric, reg, gamma, k, form
        return value.clone(), None if values is None else values.clone()

    @staticmethod
    def backward(ctx, grad_value, grad_values):
        x, y, a, b, values, alpha, beta, rows = ctx.saved_tensors
        metric, reg, gamma, k, form = ctx.options
        with torch.no_grad():
            if values is None:
                grad_a, grad_b = mass_gradients(alpha, beta, grad_value)
            else:
                entries, grad_a, grad_b = entry_gradients(
                    values, rows, alpha, beta, grad_value, grad_values, reg, gamma
                )
            grad_x, grad_y = torch.zeros_like(x), torch.empty_like(y)
            dense = k == x.shape[1]
            # A place of a dense plan is a number; one of a sparse plan a pair of points.
            width = max(1, CHUNK // (len(x) * k * (1 if dense else x.shape[2])))
            for first in range(0, y.shape[1], width):
                part = slice(first, first + width)
                if values is None:
                    source = Source(x, False, y[:, part].contiguous(), metric)
                    here, plan = plan_of(
                        source, b[:, part].contiguous(), alpha, beta[:, part].contiguous(), reg,
                        gamma, k, form,
                    )  # fmt: skip
                    weight = grad_value[:, None, None] * plan
                else:
                    here, weight = rows[:, :, part], entries[:, :, part]
                pairs = _dense_pairs if dense else _sparse_pairs
                grad_y[:, part] = pairs(grad_x, x, y[:, part], here, weight, metric)
        grads = grad_x, grad_y, grad_a, grad_b
        if torch.is_grad_enabled():  # create_graph=True
            grads = Refuse.apply(*grads, x, y, a, b)
        return (*grads, *[None] * 10)


def _sparse_pairs(grad_x, x, y, rows, weight, metric) -> Tensor:
    """dL/dC = weight (B, k, c) at `rows` of x (B, m, d) and y (B, c, d): adds to grad_x (B, m, d),
    returns that of y."""
    batch, m, d = x.shape
    where = rows.clamp(min=0).long().flatten(1)  # (B, k c); weight is 0 where there is no row
    where = (where + m * torch.arange(batch, device=x.device)[:, None]).flatten()
    picked = x.reshape(-1, d)[where].view(*weight.shape, d)  # (B, k, c, d)
    weight = weight[..., None]
    if metric == "inner":
        of_x, of_y = -weight * y[:, None], -weight * picked
    else:
        gap = picked - y[:, None]
        scale = 2.0
        if metric == "euclidean":  # where points meet: 0, the middle of the subgradients
            length = gap.norm(dim=-1, keepdim=True)
            scale = torch.where(length > 0, 1 / length, 0)
        of_x = weight * scale * gap
        of_y = -of_x
    flat, added = grad_x.view(-1, d), of_x.reshape(-1, d)
    if x.device.type == "cpu":
        flat.index_add_(0, where, added)
    else:  # index_add would use atomics; this sorts the indices first
        flat.index_put_((where,), added, accumulate=True)
    return of_y.sum(1)


def _dense_pairs(grad_x, x, y, rows, weight, metric) -> Tensor:
    """The same where every row has a place: matrix products."""
    where = rows.clamp(min=0).long()
    full = torch.zeros_like(weight).scatter_add_(1, where, weight)  # (B, m, c)
    if metric == "inner":
        grad_x -= full @ y
        return -(full.mT @ x)
    if metric == "sqeuclidean":
        full = 2 * full
    else:
        length = points_cost(x, y, metric)
        full = torch.where(length > 0, full / length, 0)
    # sum_j H_ij (x_i - y_j), the points moved to their mean: less cancels
    middle = x.mean(1, keepdim=True)
    x, y = x - middle, y - middle
    grad_x += full.sum(2)[..., None] * x - full @ y
    return full.sum(1)[..., None] * y - full.mT @ x


def _check_points(x: Tensor, y: Tensor, metric: str) -> None:
    """On the CPU; on a GPU it would wait for the device, in a compiled graph it would break it."""
    for name, points in (("x", x), ("y", y)):
        if not may_ask(points):
            return
        if not bool(points.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or an infinity")
        if metric == "cosine" and bool((points == 0).all(-1).any()):
            raise ValueError(f'{name}: expected no point 0 for metric="cosine", got one')


def _half_unit(points: Tensor) -> Tensor:
    """Points whose squared distance is 1 - cos: x / |x| / sqrt(2)."""
    points = points.to(state_dtype(points))
    return points / (2**0.5 * points.norm(dim=-1, keepdim=True))


@public
def regularized_ot_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    metric: Literal["sqeuclidean", "euclidean", "cosine", "inner"] = "sqeuclidean",
    reg: Literal["negentropy", "l2", "sparse"] = "sparse",
    gamma: float = 1.0,
    max_nz: int | None = None,
    sparse_dim: int = -2,
    formulation: Literal["semi_dual", "dual"] = "semi_dual",
    solver: Literal["auto", "adam", "lbfgs", "newton", "sinkhorn"] = "auto",
    max_iter: int = 500,
    tol: float = 1e-6,
    init: Tensor | tuple[Tensor, Tensor] | None = None,
    smoothing: float = 0.0,
    plan: Literal["topk", "csc", "coo", "dense"] | None = "topk",
    differentiable: Literal["envelope", "plan"] | None = "envelope",
    lr: float = 1e-2,
) -> OTResult:
    r"""`regularized_ot` between two clouds of points, whose cost is made on the fly, never stored.

    :math:`\min_{T \ge 0} \langle T, C\rangle + \sum_j \Omega(t_j)` over :math:`T\mathbf 1 = a,
    T^T\mathbf 1 = b` with :math:`C_{ij} = c(x_i, y_j)`: memory is that of the points, of one tile
    of costs per thread, and of the plan that is asked for.

    Args:
        x: (..., m, d) points of the rows: float64, float32, bfloat16, float16; costs and state are
            float64 for float64, else float32.
        y: (..., n, d) points of the columns, in the dtype of x.
        a: (..., m) row masses, of any total; None: uniform, sum 1.
        b: (..., n) column masses, of the same total; None: uniform, sum 1.
        metric: c as SciPy's and POT's names have it: "sqeuclidean" :math:`|x - y|^2`, "euclidean"
            :math:`|x - y|`, "cosine" :math:`1 - x\cdot y / (|x||y|)`; "inner" :math:`-x\cdot y`.
        reg, gamma, max_nz, sparse_dim, formulation, solver, max_iter, tol, smoothing, lr: as in
            `regularized_ot`. On a GPU "newton" stores the cost of problems too large for a block.
        init: alpha (..., m), or for the dual (alpha, beta (..., n)), where to start.
        plan: as in `regularized_ot`; that of "l2" and "negentropy" has m * n places, None has none.
        differentiable: "envelope": the value's gradients to x, y, a and b, from tiles of the plan
            that are made again: with plan=None nothing of m * n numbers is ever stored; "plan": the
            plan's values too, exact where nothing ties; None: no gradient.

    Returns:
        `OTResult`, as `regularized_ot`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Masses, NaN and
        infinities are looked at on the CPU only, outside compiled graphs.

    Distances are sums of squared differences, which do not cancel: as accurate as the points.
    "cosine" is half the squared distance of unit vectors. Where points meet, the gradient of
    "euclidean" is 0.

    Source: Sparsity-Constrained Optimal Transport, arXiv 2209.15466.
    """
    if metric not in (*METRICS, "cosine"):
        names = ", ".join((*METRICS, "cosine"))
        raise ValueError(f"metric: expected one of {names}, got {metric!r}")
    check_options(sparse_dim, formulation, plan, differentiable, max_iter, tol, smoothing, lr)
    for name, points in (("x", x), ("y", y)):
        check_tensor(points, name)
    _check_points(x, y, metric)
    wants_grad = any(one is not None and one.requires_grad for one in (x, y, a, b))
    if metric == "cosine":
        x, y = (_half_unit(points) if points.dim() > 1 else points for points in (x, y))
        metric = "sqeuclidean"
    problem, columns = as_problem_of_points(x, y, a, b, reg, gamma, max_nz, along=sparse_dim)
    rows, shape = problem.cost, (x.shape[-2], y.shape[-2])
    if sparse_dim == -1:  # the rows are what max_nz bounds, hence the columns of the ops
        rows, columns = columns, rows

    def attach(free, bound, value, values, alpha, beta, places):
        through = differentiable == "plan"
        return _Attach.apply(
            rows, columns, free, bound, value, values if through else None, alpha, beta,
            places if through else None, metric, reg, problem.gamma, problem.k, formulation,
        )  # fmt: skip

    source = Source(rows.detach(), False, columns.detach(), metric)
    return solve(
        problem, source, shape, reg, sparse_dim, formulation, solver, max_iter, tol, init,
        smoothing, plan, differentiable if wants_grad else None, lr, attach,
    )  # fmt: skip


def _value_and_plan(x, y, a, b, metric, reg, gamma, k, solver, max_iter):
    """The public function as a function of tensors: alpha, value, and the plan's values."""
    out = regularized_ot_points(
        x, y, a, b, metric=metric, reg=reg, gamma=gamma, max_nz=k, solver=solver,
        max_iter=max_iter, differentiable=None,
    )  # fmt: skip
    return out.alpha, out.value, out.plan.values


def _inputs(size, dtype, device, seed):
    """size (B, k or a regulariser's name, metric, solver, max_iter, d, m, n)."""
    batch, k, metric, solver, max_iter, d, m, n = size
    x, y, a, b, _, _, reg, k = random_points((batch, k, d, m, n), dtype, device, seed)
    b = b + 0.5 / n
    b = b / b.sum(1, keepdim=True)
    k = k if reg == "sparse" else None
    return x, y, a, b, metric, reg, 0.5, k, solver, max_iter


def _floor(x, y, a, b, metric, reg, gamma, k, solver, max_iter):
    """The points read once, the cost made once per step."""
    flops, read = cost_floor(x, b, y)
    return read + 3 * (a.nbytes + b.nbytes), flops * max_iter


REGULARIZED_OT_POINTS = chain(
    "regularized_ot_points",
    _value_and_plan,
    (REGULARIZED_OT, OT_PLAN),
    inputs=_inputs,
    floor=_floor,
    # few steps: their path does not amplify rounding
    sizes={"test": [(1, 2, "sqeuclidean", "adam", 3, 2, 6, 5),
                    (2, 3, "euclidean", "adam", 3, 17, 40, 21),
                    (2, "negentropy", "sqeuclidean", "sinkhorn", 4, 3, 19, 33)],
           "bench": [(1, 8, "sqeuclidean", "lbfgs", 20, 3, 512, 512)]},
    differentiable=False,
)  # fmt: skip
