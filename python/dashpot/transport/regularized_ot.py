"""`regularized_ot`: the solver that a user calls, its result, and the gradients through it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot.transport._problem import as_problem, check_tensor
from dashpot.transport._reference_solve import may_ask
from dashpot.transport._solve import REGULARIZED_OT
from dashpot.transport.ot_plan import OT_PLAN
from dashpot.transport.plans import TopKPlan

SOLVERS = ("auto", "adam", "lbfgs", "newton", "sinkhorn")
PLANS = ("topk", "csc", "coo", "dense", None)
CG_STEPS = 500


class OTResult(NamedTuple):
    """What `regularized_ot` returns: tensors on the cost's device, one entry per problem (...).

    Feasibility is reported, not promised: with "sparse" active the plan of a kink misses rows.
    """

    value: Tensor  # (...) the (semi-)dual's value, a lower bound of the transport problem's
    alpha: Tensor  # (..., m)
    beta: Tensor  # (..., n)
    plan: TopKPlan | Tensor | None
    n_iter: Tensor  # (...) int32
    n_eval: Tensor  # (...) int32, reads of the whole cost
    row_error: Tensor  # (..., 2) |T 1 - a| in L1 and Linf
    col_error: Tensor  # (..., 2) |T^T 1 - b|
    gap: Tensor  # (...) <T, C> + Omega(T) - value, of a plan that may be infeasible
    tied: Tensor  # (...) int32, columns whose k-th and next score tie within tol
    status: Tensor  # (...) int32: 0 converged, 1 max_iter, 2 no further progress, 3 infeasible


def _solver_of(solver: str, reg: str, formulation: str, active: bool) -> str:
    """auto: Sinkhorn for negative entropy, L-BFGS for the duals that are smooth, else what
    regularized_ot calls "auto"."""
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    if solver == "sinkhorn" and (reg != "negentropy" or formulation != "semi_dual"):
        raise ValueError(
            'solver: "sinkhorn" is for reg="negentropy", formulation="semi_dual", '
            f"got reg={reg!r}, formulation={formulation!r}"
        )
    if solver == "newton" and (reg == "negentropy" or active or formulation != "semi_dual"):
        raise ValueError(
            'solver: "newton" is for formulation="semi_dual" and reg="l2", or "sparse" with '
            f"max_nz of a whole column, got reg={reg!r}, formulation={formulation!r}"
        )
    if solver != "auto":
        return solver
    if reg == "negentropy":
        return "sinkhorn" if formulation == "semi_dual" else "lbfgs"
    return "auto" if active or formulation == "semi_dual" else "lbfgs"


def _check_masses(problem) -> None:
    """On the CPU; on a GPU it would wait for the device, in a compiled graph it would break it, and
    row_error tells."""
    if not may_ask(problem.cost):
        return
    for name, mass in (("a", problem.a), ("b", problem.b)):
        least = mass.min().item() if mass.numel() else 0.0
        if not least >= 0:
            raise ValueError(f"{name}: expected masses of at least 0, got {least}")
    rows, columns = problem.a.sum(1).tolist(), problem.b.sum(1).tolist()
    if any(abs(one - other) > 1e-4 * other for one, other in zip(rows, columns, strict=True)):
        raise ValueError(f"b: expected the total of a, {rows}, got {columns}")


def _start(init, problem, batch, m, n):
    """init: None, alpha, or (alpha, beta) -> (B, m), (B, n) contiguous."""
    alpha, beta = init if isinstance(init, tuple) else (init, None)
    found = []
    for name, value, length, mass in (("alpha", alpha, m, problem.a), ("beta", beta, n, problem.b)):
        if value is None:
            found.append(torch.zeros_like(mass))
            continue
        check_tensor(value, f"init ({name})")
        if value.shape != (*batch, length):
            raise ValueError(f"init: expected {name} {(*batch, length)}, got {tuple(value.shape)}")
        found.append(value.detach().reshape(-1, length).to(mass).contiguous())
    return found, beta is not None


class Refuse(torch.autograd.Function):
    """(*gradients, *inputs) -> gradients that depend on the inputs in a way that is not derived."""

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(tensor.clone() for tensor in tensors[: len(tensors) // 2])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("regularized_ot has no second derivative")


class _Attach(torch.autograd.Function):
    """Gradients of a finished solve: of its value by the envelope, of its plan implicitly.

    cost (B, m, n), a (B, m), b (B, n), value (B,), values (B, k, n), potentials; rows (B, k, n).
    """

    @staticmethod
    def forward(ctx, cost, a, b, value, values, alpha, beta, rows, reg, gamma):
        ctx.save_for_backward(values, alpha, beta, rows, cost, a, b)
        ctx.reg, ctx.gamma, ctx.shape, ctx.dtype = reg, gamma, cost.shape, cost.dtype
        return value.clone(), values.clone()

    @staticmethod
    def backward(ctx, grad_value, grad_values):
        values, alpha, beta, rows, *inputs = ctx.saved_tensors
        entries, grad_a, grad_b = entry_gradients(
            values, rows, alpha, beta, grad_value, grad_values, ctx.reg, ctx.gamma
        )
        grad_cost = values.new_zeros(ctx.shape).scatter_add_(1, rows.clamp(min=0).long(), entries)
        grads = grad_cost.to(ctx.dtype), grad_a, grad_b
        if torch.is_grad_enabled():  # create_graph=True
            grads = Refuse.apply(*grads, *inputs)
        return (*grads, *[None] * 7)


def mass_gradients(alpha, beta, grad_value) -> tuple[Tensor, Tensor]:
    """Of the value: dV/da = alpha (B, m), dV/db = beta (B, n)."""
    return tuple((grad_value[:, None] * x).nan_to_num(0, 0, 0) for x in (alpha, beta))


def entry_gradients(values, rows, alpha, beta, grad_value, grad_values, reg, gamma):
    """dL/dC at the plan's places (B, k, n), dL/da (B, m), dL/db (B, n): of the value by the
    envelope, of the plan's values through the linear system on its support."""
    entries = grad_value[:, None, None] * values  # (B, k, n)
    grad_a, grad_b = mass_gradients(alpha, beta, grad_value)
    weight = values if reg == "negentropy" else (values > 0).to(values.dtype)
    u, v = _laplacian_solve(weight, rows, weight * grad_values, alpha.shape[1])
    z = weight * (grad_values - _at_rows(u, rows) - v[:, None])
    return entries - z / gamma, grad_a + u, grad_b + v


def _at_rows(u: Tensor, rows: Tensor) -> Tensor:
    """u (B, m) at rows (B, k, n) -> (B, k, n)."""
    return u.gather(1, rows.clamp(min=0).long().flatten(1)).view(rows.shape)


def _row_sums(entries: Tensor, rows: Tensor, m: int) -> Tensor:
    """Sums (B, m) of entries (B, k, n), in a fixed order on every device."""
    where = rows.clamp(min=0).long().flatten(1)  # (B, k n)
    sums = entries.new_zeros(entries.shape[0], m)
    if entries.device.type == "cpu":
        return sums.scatter_add_(1, where, entries.flatten(1))
    # An accumulating index_put sorts the indices first; scatter_add would use atomics.
    problem = torch.arange(len(sums), device=sums.device)[:, None].expand_as(where)
    return sums.index_put_((problem, where), entries.flatten(1), accumulate=True)


def _laplacian_solve(weight: Tensor, rows: Tensor, rhs: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """u, v of sum_j W_ij (u_i + v_j) = sum_j R_ij and its transpose, by conjugate gradients with
    Jacobi's scaling from 0; singular once per connected part, where it takes the least solution.
    """
    # One vector: the rows' unknowns, then the columns'.
    degree = torch.cat([_row_sums(weight, rows, m), weight.sum(1)], 1)  # (B, m + n)
    inverse = torch.where(degree > 0, 1 / degree, 0)

    def apply(x):
        u, v = x[:, :m], x[:, m:]
        across = torch.cat(
            [_row_sums(weight * v[:, None], rows, m), (weight * _at_rows(u, rows)).sum(1)], 1
        )
        return degree * x + across

    residual = torch.cat([_row_sums(rhs, rows, m), rhs.sum(1)], 1)
    x = torch.zeros_like(residual)
    scaled = inverse * residual
    direction, norm = scaled, (residual * scaled).sum(1)  # (B,)
    end = norm * torch.finfo(norm.dtype).eps ** 2
    for _ in range(min(CG_STEPS, 2 * residual.shape[1])):
        if may_ask(norm) and bool((norm <= end).all()):
            break
        image = apply(direction)
        bend = (direction * image).sum(1)
        open_ = (norm > end) & (bend > 0)
        step = torch.where(open_, norm / torch.where(open_, bend, 1), 0)[:, None]
        x, residual = x + step * direction, residual - step * image
        scaled = inverse * residual
        fresh = (residual * scaled).sum(1)
        ratio = torch.where(open_, fresh / torch.where(open_, norm, 1), 0)[:, None]
        direction, norm = scaled + ratio * direction, torch.where(open_, fresh, norm)
    return x[:, :m], x[:, m:]


@public
def regularized_ot(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
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
    r"""Optimal transport with a regulariser, also with at most `max_nz` nonzeros per column.

    :math:`\min_{T \ge 0} \langle T, C\rangle + \sum_j \Omega(t_j)` over :math:`T\mathbf 1 = a,
    T^T\mathbf 1 = b`, through its dual or semi-dual (see `ot_dual_value_grad`,
    `ot_semidual_value_grad`), for every problem of a batch on its own.

    Args:
        cost: (..., m, n) float64, float32, bfloat16, float16; +inf forbids a pair.
        a: (..., m) row masses, of any total; None: uniform, sum 1.
        b: (..., n) column masses, of the same total; None: uniform, sum 1.
        reg: "negentropy", "l2", or "sparse": l2 with at most `max_nz` entries per column.
        gamma: strength of the regulariser, > 0.
        max_nz: k of "sparse", at least 1; more than a column has means no bound.
        sparse_dim: -2: `max_nz` (and the semi-dual's exact sums) are of columns; -1: of rows. The
            cost is read as it lies, not transposed.
        formulation: "semi_dual": the marginals along `sparse_dim` are exact; "dual": neither is
            until the end.
        solver: "adam" (the router's recipe, `lr`), "lbfgs", "newton" (l2 or no bound),
            "sinkhorn" (negentropy), "auto": sinkhorn; l2: newton; for a bound newton without it
            (the solution where no column exceeds it), lbfgs from there and, where that stands
            still at a kink, the smoothed dual with falling smoothing (that from the start where
            columns are few, as in a router). Problems that are too large for one block of a GPU
            hold an (m, m) matrix per problem under "newton"; "auto" avoids it above m = 4096.
        max_iter: steps at most, 500 as in POT.
        tol: marginal error per mass (L1) at which a problem stops, and the distance of `tied`.
        init: alpha, or for the dual (alpha, beta), where to start; None: 0 (the dual: alpha 0 and
            the semi-dual's beta, for its gradient vanishes at 0). Newton takes zeros for no start:
            it begins at each row's least cost and a larger gamma, which falls.
        smoothing: mu > 0: maximise the dual whose choice of k entries is smoothed by mu, falling
            to it from above; value and plan returned are still those of `formulation`.
        plan: "topk" (`TopKPlan`), "coo" or "csc" (`torch.sparse`; wait for the device), "dense",
            or None.
        differentiable: "envelope": the value's gradients (T, alpha, beta); "plan": the plan's
            values too, exact where nothing ties; None: no gradient.
        lr: step of "adam", 1e-2 in the official router.

    Returns:
        `OTResult`. Where `status` is 3 no plan meets the marginals (a row or column without an
        admissible pair, or n * max_nz less than the rows with mass).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Masses and NaN
        are looked at on the CPU only, outside compiled graphs: elsewhere that would wait for the
        device.

    Nothing here waits for a GPU but "coo" and "csc"; on the CPU loops end with the last problem.

    Source: Sparsity-Constrained Optimal Transport, arXiv 2209.15466; POT's `ot.smooth`.
    """
    check_options(sparse_dim, formulation, plan, differentiable, max_iter, tol, smoothing, lr)
    by_rows = sparse_dim == -1
    problem = as_problem(cost, a, b, reg, gamma, max_nz, along=sparse_dim)
    if may_ask(problem.cost) and problem.cost.numel() and math.isnan(problem.cost.amax().item()):
        raise ValueError("cost: expected numbers or +inf, got NaN")

    def attach(free, bound, value, values, alpha, beta, rows):
        turned = problem.cost.mT if by_rows else problem.cost
        return _Attach.apply(
            turned, free, bound, value, values, alpha, beta, rows, reg, problem.gamma
        )

    wants_grad = any(x is not None and x.requires_grad for x in (cost, a, b))
    return solve(
        problem, Source(problem.cost.detach(), by_rows), cost.shape[-2:], reg, sparse_dim,
        formulation, solver, max_iter, tol, init, smoothing, plan,
        differentiable if wants_grad else None, lr, attach,
    )  # fmt: skip


def check_options(
    sparse_dim, formulation, plan, differentiable, max_iter, tol, smoothing, lr
) -> None:
    if sparse_dim not in (-2, -1):
        raise ValueError(f"sparse_dim: expected -2 or -1, got {sparse_dim}")
    if formulation not in ("semi_dual", "dual"):
        raise ValueError(f'formulation: expected "semi_dual" or "dual", got {formulation!r}')
    if plan not in PLANS:
        raise ValueError(f"plan: expected one of {PLANS}, got {plan!r}")
    if differentiable not in ("envelope", "plan", None):
        raise ValueError(
            f'differentiable: expected "envelope", "plan" or None, got {differentiable!r}'
        )
    if not isinstance(max_iter, int) or isinstance(max_iter, bool) or max_iter < 1:
        raise ValueError(f"max_iter: expected an int of at least 1, got {max_iter!r}")
    for name, value, least in (("tol", tol, 0), ("smoothing", smoothing, 0), ("lr", lr, 0)):
        if not isinstance(value, int | float) or not value >= least:
            raise ValueError(f"{name}: expected a number of at least {least}, got {value!r}")


class Source(NamedTuple):
    """What the ops make costs from, without a gradient: cost (B, m, n), with by_rows (B, n, m); or
    x (B, m, d) in its place with y (B, n, d) and a metric."""

    cost: Tensor
    by_rows: bool
    y: Tensor | None = None
    metric: str = ""


def solve(
    problem, source: Source, shape, reg, sparse_dim, formulation, solver, max_iter, tol, init,
    smoothing, plan, differentiable, lr, attach,
) -> OTResult:  # fmt: skip
    """A solve after the checks. shape: (m, n) as the caller sees them; attach(free, bound, value,
    values, alpha, beta, rows): value and values with their gradients, where differentiable."""
    by_rows = sparse_dim == -1
    if smoothing > 0 and reg != "sparse":
        raise ValueError(f"smoothing: expected 0 for reg={reg!r}, got {smoothing}")
    with torch.no_grad():
        _check_masses(problem)
        m, n = shape
        # From here on "columns" are what max_nz bounds: with sparse_dim=-1 the rows.
        free, bound = (problem.b, problem.a) if by_rows else (problem.a, problem.b)
        (alpha, beta), has_beta = _start(
            init[::-1] if by_rows and isinstance(init, tuple) else init,
            problem._replace(a=free, b=bound), problem.batch, free.shape[1], bound.shape[1],
        )  # fmt: skip
        how = _solver_of(solver, reg, formulation, reg == "sparse" and problem.k < free.shape[1])
        if formulation == "dual" and not has_beta:
            beta = _eliminated(source, free, bound, alpha, reg, problem)
        alpha, beta, value, free_error, bound_error, gap, counts = REGULARIZED_OT(
            source.cost, free, bound, alpha, beta, source.by_rows, reg,
            problem.gamma, problem.k, formulation, how, max_iter, float(tol), float(smoothing),
            float(lr), source.y, source.metric,
        )  # fmt: skip
        rows = values = None
        # Of points the envelope's gradient is made from tiles of the plan, when it is asked for.
        by_tiles = source.y is not None and differentiable == "envelope"
        if plan is not None or (differentiable is not None and not by_tiles):
            rows, values = plan_of(
                source, bound, alpha, beta, reg, problem.gamma, problem.k, formulation
            )
    if differentiable is not None and torch.is_grad_enabled():
        value, kept = attach(free, bound, value, values, alpha, beta, rows)
        values = kept if differentiable == "plan" else values

    batch = problem.batch
    row_error, col_error = (bound_error, free_error) if by_rows else (free_error, bound_error)
    potentials = (beta, alpha) if by_rows else (alpha, beta)
    value, *potentials, row_error, col_error, gap, counts = (
        _per_problem(one, batch) for one in (value, *potentials, row_error, col_error, gap, counts)
    )
    iterations, evaluations, tied, status = counts.unbind(-1)
    return OTResult(
        value, *potentials, _deliver(plan, rows, values, batch, m, n, sparse_dim), iterations,
        evaluations, row_error, col_error, gap, tied, status,
    )  # fmt: skip


def _per_problem(flat: Tensor, batch: torch.Size) -> Tensor:
    """(B, ...) -> (*batch, ...)."""
    if len(batch) < 2:
        return flat if batch else flat[0]
    return flat.reshape(*batch, *flat.shape[1:])


def plan_of(source: Source, b, alpha, beta, reg, gamma, k, formulation):
    """Rows int32 and values (B, k, n) of the plan at alpha (B, m), beta (B, n)."""
    return OT_PLAN(
        source.cost, b, alpha, beta, source.by_rows, reg, gamma, k, formulation, source.y,
        source.metric,
    )  # fmt: skip


def _eliminated(source: Source, a, b, alpha, reg, problem) -> Tensor:
    """beta of the semi-dual at alpha, where the dual starts: one step of nothing."""
    found = REGULARIZED_OT(
        source.cost, a.detach(), b.detach(), alpha, torch.zeros_like(b), source.by_rows, reg,
        problem.gamma, problem.k, "semi_dual", "adam", 0, 0.0, 0.0, 0.0, source.y, source.metric,
    )  # fmt: skip
    beta = found[1]
    closed = torch.where(beta > 0, 0.0, -1e30).to(beta)  # +inf: infeasible, -inf: without mass
    return torch.where(beta.isfinite(), beta, closed)


def _deliver(plan, rows, values, batch, m, n, sparse_dim):
    if plan is None:
        return None
    if sparse_dim == -1:
        rows, values = rows.mT, values.mT
    found = TopKPlan(_per_problem(rows, batch), _per_problem(values, batch), m, n, sparse_dim)
    if plan == "topk":
        return found
    return found.to_dense() if plan == "dense" else found.to_torch_sparse(plan)
