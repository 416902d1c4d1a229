"""The op `regularized_ot`: a whole solve of every problem of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._dispatch import declare
from dashpot.transport import _reference_solve as solvers
from dashpot.transport._problem import cost_floor, points_cost, random_points, random_problem
from dashpot.transport._reference_solve import CONVERGED, INFEASIBLE, MAX_ITER, STALLED, Function
from dashpot.transport.ot_value_grad import OT_VALUE_GRAD, _ot_value_grad_reference

CHUNK = 1 << 24  # entries of the cost that a report looks at together


def _has_kernels(tensor: Tensor) -> bool:
    """Where evaluations are the op, hence kernels: on a GPU. Elsewhere they are plain PyTorch,
    which is what kernels are judged by."""
    return tensor.is_cuda


class _Problem:
    """What the solvers ask of a batch: a (B, m), b (B, n), cost (B, m, n), or x (B, m, d) in its
    place with y (B, n, d): points whose cost no kernel stores."""

    def __init__(self, cost, a, b, reg, gamma, k, y=None, metric=""):
        self.kernels = _has_kernels(cost)
        if y is not None and not self.kernels:
            cost, y, metric = points_cost(cost, y, metric), None, ""
        self.cost, self.y, self.metric = cost.contiguous() if self.kernels else cost, y, metric
        self.a, self.b, self.reg, self.gamma, self.k = a, b, reg, gamma, k
        self.m = a.shape[1]
        # Newton's method here is dense: (B, m, m), and the cost of points stored
        self.holds_a_matrix = self.y is None and self.m <= 4096
        self.mass = a.sum(1).clamp(min=1e-300 if a.dtype == torch.float64 else 1e-37)  # (B,)
        self.noise = 1e-14 if a.dtype == torch.float64 else 1e-7

    def _call(self, alpha, beta, cost, y, smoothing, level, reg, gamma, k):
        call = OT_VALUE_GRAD.forward_op if self.kernels else _ot_value_grad_reference
        return call(
            alpha.contiguous(), beta if beta is None else beta.contiguous(), cost, y, self.a,
            self.b, smoothing, level, self.metric, reg, gamma, k,
        )  # fmt: skip

    def _evaluate(self, alpha, beta, smoothing=None, level=None):
        return self._call(
            alpha, beta, self.cost, self.y, smoothing, level, self.reg, self.gamma, self.k
        )

    def semi_dual(self, alpha):
        return self._evaluate(alpha, None)[:3]

    def dual(self, alpha, beta):
        return self._evaluate(alpha, beta)[:3]

    def columns(self):
        """(the first column, the cost of it and its neighbours (B, m, c)) until all were seen."""
        n = self.b.shape[1]
        width = max(1, CHUNK // max(1, self.a.numel()))
        for first in range(0, n, width):
            end = min(n, first + width)
            if self.y is None:
                cost = self.cost[:, :, first:end]
            else:
                cost = points_cost(self.cost, self.y[:, first:end], self.metric)
            yield first, cost.to(self.a.dtype)

    def split(self, x):
        return x[:, : self.m], x[:, self.m :]

    def negated_semi_dual(self, alpha):
        value, grad, _ = self.semi_dual(alpha)
        return -value, -grad

    def negated_dual(self, x):
        value, *grads = self.dual(*self.split(x))
        return -value, -torch.cat(grads, 1)

    def negated_smoothed(self, mu):
        """A function of x for mu (B,): each search for a level starts at the last one's."""
        last = [None]

        def evaluate(x):
            value, rows, columns, last[0] = self._evaluate(*self.split(x), mu, last[0])
            return -value, -torch.cat([rows, columns], 1)

        return evaluate

    def error(self, g):
        rows, columns = self.split(g.abs())
        return torch.maximum(rows.sum(1), columns.sum(1)) / self.mass

    def function(self, evaluate) -> Function:
        per_mass = (self.mass / self.m)[:, None] if self.reg == "negentropy" else 1.0
        scale = self.gamma / per_mass
        scale = scale[:, 0] if isinstance(scale, Tensor) else scale
        return Function(evaluate, self.error, scale, self.noise)

    def _scaled(self, strength):
        """The problem's cost over strength (B,), as itself or by points."""
        if self.y is None:
            return self.cost.to(self.a.dtype) / strength[:, None, None], None
        unit = strength if self.metric == "euclidean" else strength.sqrt()
        return self.cost / unit[:, None, None], self.y / unit[:, None, None]

    def _l2(self, alpha, beta, strength):
        """The l2 dual, or without beta the semi-dual, at a gamma of each problem's own (B,): that
        of potentials and cost over it at gamma 1. Value / strength, gradients, or beta over it."""
        cost, y = self._scaled(strength)
        unit = strength[:, None]
        beta = beta if beta is None else beta / unit
        return self._call(alpha / unit, beta, cost, y, None, None, "l2", 1.0, self.m)[:3]

    def negated_l2(self, x, strength):
        value, *grads = self._l2(*self.split(x), strength)
        return -value * strength, -torch.cat(grads, 1)

    def eliminate_l2(self, alpha, strength):
        beta = self._l2(alpha, None, strength)[2] * strength[:, None]
        return torch.cat([alpha, torch.where(beta.isfinite(), beta, 0)], 1)

    def newton_direction(self, x, g, strength, aim, damping):
        """d (B, m + n) of csrc/transport/newton.h, by dense algebra."""
        alpha, beta = self.split(x)
        cost = torch.cat([cost for _, cost in self.columns()], 2)
        w = (alpha[:, :, None] + beta[:, None] - cost > 0).to(self.a.dtype)  # (B, m, n)
        rows, count = w.sum(2), w.sum(1)  # (B, m), (B, n)
        p, q = (
            (aim - strength)[:, None] * mass - strength[:, None] * off
            for mass, off in zip((self.a, self.b), self.split(g), strict=True)
        )
        q = torch.where(count > 0, q / count.clamp(min=1), 0)
        h = torch.diag_embed(rows) - w / count.clamp(min=1)[:, None] @ w.mT
        delta = damping * rows.amax(1).clamp(min=1e-300)
        h = h + torch.diag_embed(delta[:, None].expand_as(rows))
        d = torch.linalg.solve(h, p - (w @ q[:, :, None])[:, :, 0])
        q = q - (d[:, None] @ w)[:, 0] / count.clamp(min=1)
        return torch.cat([d, q], 1)

    def newton(self, alpha, max_iter, tol):
        ends = [
            (torch.where(c.isfinite(), c, -torch.inf).amax((1, 2)), c.amin(2))
            for _, c in self.columns()
        ]
        # (chunks, B) and (chunks, B, m)
        high, low = (torch.stack(end) for end in zip(*ends, strict=True))
        low = low.amin(0)  # (B, m)
        spread = (high.amax(0) - low.amin(1)).clamp(min=0)  # (B,)
        least = torch.where(low.isfinite(), low, 0).to(alpha.dtype)
        wide = spread / 2048 * self.m * self.b.shape[1] / self.mass
        wide = torch.where(self.a.sum(1) > 0, wide, 0)
        run = solvers.newton(
            self.negated_l2, self.eliminate_l2, self.newton_direction, self.error, alpha, least,
            self.gamma, wide, self.noise, max_iter, tol,
        )  # fmt: skip
        alpha = run.x[:, : self.m]
        strength = torch.full_like(wide, self.gamma)
        error = self.error(self._l2(alpha, None, strength)[1])  # the semi-dual's: what counts
        settled = (run.status == STALLED) & (error <= tol)
        return run._replace(x=alpha, status=torch.where(settled, CONVERGED, run.status).int())


def _continuation(problem, start, formulation, max_iter, tol, smoothing):
    """The smoothed dual, mu falling by tenths: -> potentials of the best dual seen, progress."""
    alpha, beta = problem.split(start)
    _, _, eliminated = problem.semi_dual(alpha)
    beta = beta if formulation == "dual" else torch.where(eliminated.isfinite(), eliminated, 0)
    own = problem.negated_dual if formulation == "dual" else problem.negated_semi_dual
    width = start.shape[1]
    y = torch.cat([alpha, beta], 1)
    best, found = y, own(y[:, :width])[0]
    # gamma t^2 / 2 of an entry of an even column: mu starts at a tenth of it.
    share = problem.b.mean(1) / problem.k  # (B,)
    energy = problem.gamma / 2 * share.square()  # (B,)
    steps = torch.zeros_like(found, dtype=torch.int32)
    calls, status = steps + 1, torch.full_like(steps, -1)
    for stage in range(5 if smoothing == 0 else 16):
        floor = torch.full_like(energy, smoothing) if smoothing > 0 else 2e-5 * energy
        mu = torch.maximum(energy * 0.1 ** (stage + 1), floor)  # (B,)
        limit = torch.clamp(1e-2 * mu / energy, min=tol)
        function = problem.function(problem.negated_smoothed(mu))
        function = function._replace(error=lambda g, c=limit: problem.error(g) * (tol / c))
        going = status < 0
        if solvers.over(~going):
            break
        run = solvers.lbfgs(function, y, max_iter, 2 * max_iter + 20, tol, 1e-3 * tol)
        y = torch.where(going[:, None], run.x, y)
        steps = steps + torch.where(going, run.iterations, 0)
        calls = calls + torch.where(going, run.evaluations + 1, 0)
        value, grad = own(y[:, :width])
        better = (value < found) | (smoothing > 0)
        settled = (value < found) & (found - value <= 1e-2 * tol * found.abs().clamp(min=1))
        best = torch.where((going & better)[:, None], y, best)
        found = torch.where(going & better, value, found)
        last = mu <= floor
        status = torch.where(going & (last | settled), STALLED, status)
        status = torch.where(going & (steps >= max_iter), MAX_ITER, status)
        status = torch.where(going & (problem.error(grad) <= tol), CONVERGED, status)
    return solvers.Progress(
        best[:, :width], steps, calls, torch.where(status < 0, MAX_ITER, status).int()
    )


def _regularized_ot_reference(
    cost: Tensor, a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor, by_rows: bool, reg: str,
    gamma: float, max_nz: int, formulation: str, solver: str, max_iter: int, tol: float,
    smoothing: float, lr: float, y: Tensor | None, metric: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Maximise the dual or semi-dual from (alpha, beta).

    cost (B, m, n), with by_rows (B, n, m), or x (B, m, d) with y (B, n, d) and a metric; a, alpha
    (B, m), b, beta (B, n) -> alpha (B, m), beta (B, n), value (B,), row_error, col_error (B, 2): L1
    and Linf, gap (B,) = primal(T) - dual, counts (B, 4) int32: iterations, evaluations, tied
    columns, status.
    """
    cost = cost.mT if by_rows else cost
    problem = _Problem(cost, a, b, reg, gamma, max_nz, y, metric)
    dual = formulation == "dual"
    x = torch.cat([alpha, beta], 1) if dual else alpha
    function = problem.function(problem.negated_dual if dual else problem.negated_semi_dual)
    if solver == "adam":
        run = solvers.adam(function, x, max_iter, tol, lr)
    elif solver == "sinkhorn":
        run = solvers.sinkhorn(function, x, a, gamma, max_iter, tol)
    elif solver == "newton":
        run = problem.newton(x, max_iter, tol)
    elif smoothing > 0:
        run = _continuation(problem, x, formulation, max_iter, tol, smoothing)
    elif solver == "auto":
        run = _automatic(problem, function, x, formulation, max_iter, tol)
    else:
        run = _lbfgs(function, x, max_iter, tol)
    return _report(problem, run, dual, tol)


def _lbfgs(function, x, max_iter, tol):
    return solvers.lbfgs(function, x, max_iter, 2 * max_iter + 20, tol, 1e-3 * tol)


def _automatic(problem, function, x, formulation, max_iter, tol):
    """As climb() of the compiled solvers: Newton without the bound, L-BFGS, at a kink the smoothed
    dual, and L-BFGS for what that leaves."""
    bounded = problem.reg == "sparse" and problem.k < problem.m
    few_columns = 4 * problem.b.shape[1] <= problem.m
    stages = []  # and whether what converged there is the solution
    quadratic = problem.reg != "negentropy" and formulation == "semi_dual"
    if quadratic and problem.holds_a_matrix and not (bounded and few_columns):
        stages.append((lambda x: problem.newton(x, max_iter, tol), not bounded))
    if not (bounded and few_columns):
        stages.append((lambda x: _lbfgs(function, x, max_iter, tol), True))
    if bounded:
        stages += [
            (lambda x: _continuation(problem, x, formulation, max_iter, tol, 0.0), True),
            (lambda x: _lbfgs(function, x, max_iter, tol), True),
        ]
    (stage, exact), *rest = stages
    run = stage(x)
    for stage, is_exact in rest:
        goes_on = (run.iterations < max_iter) & ~((run.status == CONVERGED) & exact)
        if solvers.over(~goes_on):
            break
        run, exact = _then(run, stage(run.x), goes_on), is_exact
    return run


def _then(first: solvers.Progress, second: solvers.Progress, goes_on: Tensor) -> solvers.Progress:
    """`second` after `first` in the problems that go on (B,)."""
    return solvers.Progress(
        torch.where(goes_on[:, None], second.x, first.x),
        first.iterations + torch.where(goes_on, second.iterations, 0),
        first.evaluations + torch.where(goes_on, second.evaluations, 0),
        torch.where(goes_on, second.status, first.status),
    )


def _tied(problem: _Problem, alpha, beta, dual: bool, tol: float) -> Tensor:
    """Columns (B, n) whose k-th and next score tie, this one above the threshold."""
    if problem.reg != "sparse" or problem.k >= problem.m:
        return torch.zeros_like(problem.b, dtype=torch.bool)
    found = []
    for first, cost in problem.columns():
        here = beta[:, first : first + cost.shape[2]]  # (B, c)
        s = alpha[:, :, None] + (here[:, None] if dual else 0) - cost
        top = s.topk(problem.k + 1, dim=1).values[:, -2:]  # (B, 2, c)
        reach = tol * top[:, 0].abs().clamp(min=1)
        found.append((top[:, 1] > (0 if dual else -here)) & (top[:, 0] - top[:, 1] <= reach))
    return torch.cat(found, 1)


def _report(problem: _Problem, run: solvers.Progress, dual: bool, tol: float):
    """What is true of the potentials, whichever way they were found."""
    alpha, beta = problem.split(run.x)
    a, b = problem.a, problem.b
    if dual:
        value, rows, columns = problem.dual(alpha, beta)
        lost = torch.zeros_like(b, dtype=torch.bool)
        gap = -(alpha * rows).sum(1) - (beta * columns).sum(1)
    else:
        value, rows, beta = problem.semi_dual(alpha)
        lost = ~beta.isfinite() & (b > 0)  # no row can be chosen; the mass stays away
        columns = torch.where(lost, b, 0)
        gap = -(alpha * rows).sum(1)
    tied = _tied(problem, alpha, beta, dual, tol)
    blocked = (a > 0).sum(1) > b.shape[1] * problem.k  # (B,)
    if problem.y is None:
        blocked = blocked | ((a > 0) & ~problem.cost.isfinite().any(2)).any(1)
    status = torch.where(lost.any(1) | blocked, INFEASIBLE, run.status)
    counts = torch.stack([run.iterations, run.evaluations + 1, tied.sum(1), status], 1).int()
    errors = [torch.stack([e.abs().sum(1), e.abs().amax(1)], 1) for e in (rows, columns)]
    return alpha.clone(), beta, value, *errors, gap, counts


def _regularized_ot_fake(cost, a, b, *_):
    batch = a.shape[0]
    return (
        torch.empty_like(a), torch.empty_like(b), a.new_empty(batch), a.new_empty(batch, 2),
        a.new_empty(batch, 2), a.new_empty(batch), a.new_empty(batch, 4, dtype=torch.int32),
    )  # fmt: skip


def _regularized_ot_inputs(size, dtype, device, seed):
    """size (B, k or a regulariser's name, solver, formulation, max_iter, m, n), or of points with
    metric and d before m."""
    batch, k, solver, formulation, max_iter, *metric, m, n = size
    how = formulation, solver, max_iter, 1e-6, 0.0, 1e-2
    if metric:
        metric, d = metric
        x, y, a, b, alpha, beta, reg, k = random_points((batch, k, d, m, n), dtype, device, seed)
        b = b + 0.5 / n  # a column without mass belongs to the tests of the file
        b = b / b.sum(1, keepdim=True)
        return x, a, b, 0.1 * alpha, 0.1 * beta, False, reg, 0.5, k, *how, y, metric
    cost, a, b, alpha, beta, reg, k = random_problem((batch, k, m, n), dtype, device, seed)
    # A row that no column may take, or a column without mass, belong to the tests of the file.
    cost = torch.where(cost.isinf(), 1.0, cost.float()).to(dtype)
    b = b + 0.5 / b.shape[1]
    b = b / b.sum(1, keepdim=True)
    return cost, a, b, 0.1 * alpha, 0.1 * beta, False, reg, 0.5, k, *how, None, ""


def _regularized_ot_floor(cost, a, b, *rest):
    """The cost or the points read once: what a solver that kept them on the chip would do."""
    flops, read = cost_floor(cost, b, rest[-2])
    return read + 3 * (a.nbytes + b.nbytes), flops


REGULARIZED_OT = declare(
    "regularized_ot",
    forward="(Tensor cost, Tensor a, Tensor b, Tensor alpha, Tensor beta, bool by_rows, str reg,"
    " float gamma, int max_nz, str formulation, str solver, int max_iter, float tol,"
    " float smoothing, float lr, Tensor? y, str metric) -> (Tensor alpha_out, Tensor beta_out,"
    " Tensor value, Tensor row_error, Tensor col_error, Tensor gap, Tensor counts)",
    reference=_regularized_ot_reference,
    fake=_regularized_ot_fake,
    inputs=_regularized_ot_inputs,
    floor=_regularized_ot_floor,
    # the solvers whose path does not amplify rounding; the others are tested by what they reach
    sizes={"test": [(1, 1, "adam", "semi_dual", 2, 1, 1), (2, "l2", "adam", "semi_dual", 5, 12, 9),
                    (3, "negentropy", "sinkhorn", "semi_dual", 10, 33, 17),
                    (3, 3, "adam", "dual", 5, 40, 21),
                    (2, 3, "adam", "semi_dual", 5, "sqeuclidean", 3, 40, 21)],
           "bench": [(1, 32, "adam", "semi_dual", 20, 256, 16),
                     (64, 32, "adam", "semi_dual", 20, 256, 16)]},
)  # fmt: skip
