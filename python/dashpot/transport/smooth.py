"""POT's `ot.smooth` on dashpot's solver: the same names, arguments and results.

    from ot.smooth import smooth_ot_semi_dual                  # before
    from dashpot.transport.smooth import smooth_ot_semi_dual   # after

Arrays (NumPy, and whatever else has `__dlpack__`) in, the same kind out; torch tensors likewise, on
their device. As there, everything is computed in float64. What POT 0.9.7 refuses works here:
max_nz of the length of a column and beyond, columns and rows without mass, torch tensors in the
semi-dual. `regularized_ot` is the function behind: it has batches, sparse plans and gradients.

Both functions climb the semi-dual, in which the columns' potentials are eliminated: its value is
the dual's at (alpha, beta(alpha)), so its maximum is the dual's; and it is better conditioned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot.aggregate._rows import check_choice
from dashpot.transport._problem import check_tensor
from dashpot.transport.regularized_ot import regularized_ot

# reg_type as POT spells it, in any case -> reg.
NAMES = {
    "l2": "l2", "squaredl2": "l2", "entropic": "negentropy", "negentropy": "negentropy",
    "kl": "negentropy", "sparsity_constrained": "sparse", "sparsity-constrained": "sparse",
}  # fmt: skip
# "L-BFGS-B" with a bound on the columns is L-BFGS, then what passes the kinks it stops at.
SOLVERS = {"L-BFGS-B": "lbfgs", "auto": "auto", "newton": "newton", "sinkhorn": "sinkhorn"}
STATUS = {0: "converged", 1: "numItermax reached", 2: "no further ascent", 3: "infeasible"}


class SmoothResult(NamedTuple):
    """``log["res"]``: what users read of scipy's OptimizeResult, under its names. x: the potentials
    (one after the other in the dual); fun: minus the objective, which scipy minimises."""

    x: Tensor
    fun: float
    nit: int
    nfev: int
    success: bool
    status: int
    message: str
    row_error: float
    col_error: float


@public
def smooth_ot_dual(
    a: Tensor,
    b: Tensor,
    M: Tensor,
    reg: float,
    reg_type: str = "l2",
    method: str = "L-BFGS-B",
    stopThr: float = 1e-9,
    numItermax: int = 500,
    verbose: bool = False,
    log: bool = False,
    max_nz: int | None = None,
) -> Tensor | tuple[Tensor, dict]:
    r"""Plan of regularised transport by the dual; takes the place of `ot.smooth.smooth_ot_dual`.

    Args:
        a: (m,) masses of the rows.
        b: (n,) masses of the columns.
        M: (m, n) cost; +inf forbids a pair.
        reg: strength of the regulariser, > 0.
        reg_type: "l2" ("squaredl2"), "kl" ("entropic", "negentropy") or "sparsity_constrained".
        method: "L-BFGS-B" (dashpot's own L-BFGS; with a bound the solver "auto"), or one of
            `regularized_ot`: "auto", "newton", "sinkhorn".
        stopThr: marginal error per unit of mass at which to stop.
        numItermax: most iterations.
        verbose: prints a line at the end.
        log: whether to return the dictionary too.
        max_nz: k for "sparsity_constrained"; more than m means no bound.

    Returns:
        The plan (m, n) in the dtype of M; with `log` also {"alpha" (m,), "beta" (n,), "res":
        `SmoothResult`}. No gradient flows, as in POT.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    return _smooth(True, a, b, M, reg, reg_type, method, stopThr, numItermax, verbose, log, max_nz)


@public
def smooth_ot_semi_dual(
    a: Tensor,
    b: Tensor,
    M: Tensor,
    reg: float,
    reg_type: str = "l2",
    max_nz: int | None = None,
    method: str = "L-BFGS-B",
    stopThr: float = 1e-9,
    numItermax: int = 500,
    verbose: bool = False,
    log: bool = False,
) -> Tensor | tuple[Tensor, dict]:
    r"""Plan of regularised transport by the semi-dual, whose column sums are exact; takes the place
    of `ot.smooth.smooth_ot_semi_dual`.

    Args:
        a: (m,) masses of the rows.
        b: (n,) masses of the columns.
        M: (m, n) cost; +inf forbids a pair.
        reg: strength of the regulariser, > 0.
        reg_type: "l2" ("squaredl2"), "kl" ("entropic", "negentropy") or "sparsity_constrained".
        max_nz: k for "sparsity_constrained"; more than m means no bound.
        method: "L-BFGS-B" (dashpot's own L-BFGS; with a bound the solver "auto"), or one of
            `regularized_ot`: "auto", "newton", "sinkhorn".
        stopThr: marginal error per unit of mass at which to stop.
        numItermax: most iterations.
        verbose: prints a line at the end.
        log: whether to return the dictionary too.

    Returns:
        The plan (m, n) in the dtype of M; with `log` also {"alpha" (m,), "res": `SmoothResult`}.
        No gradient flows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    return _smooth(False, a, b, M, reg, reg_type, method, stopThr, numItermax, verbose, log, max_nz)


def _smooth(dual, a, b, M, reg, reg_type, method, stopThr, numItermax, verbose, log, max_nz):
    for name, value, axes in (("a", a, 1), ("b", b, 1), ("M", M, 2)):
        check_tensor(value, name)
        if value.dim() != axes:
            want = "(m, n)" if axes == 2 else "one axis"
            raise ValueError(f"{name}: expected {want}, got {tuple(value.shape)}")
    if not isinstance(reg_type, str) or reg_type.lower() not in NAMES:
        raise ValueError(f"reg_type: expected one of {', '.join(NAMES)}, got {reg_type!r}")
    check_choice("method", method, tuple(SOLVERS))
    kind = NAMES[reg_type.lower()]
    solver = "auto" if kind == "sparse" and method == "L-BFGS-B" else SOLVERS[method]
    wide = [value.detach().to(torch.float64) for value in (M, a, b)]
    result = regularized_ot(
        *wide, reg=kind, gamma=reg, max_nz=max_nz if kind == "sparse" else None,
        solver=solver, max_iter=numItermax, tol=stopThr, plan="dense", differentiable=None,
    )  # fmt: skip
    plan = result.plan.to(M.dtype)
    if not (log or verbose):
        return plan
    alpha, beta = result.alpha.to(a.dtype), result.beta.to(b.dtype)
    status = int(result.status)
    found = SmoothResult(
        torch.cat([alpha, beta]) if dual else alpha, -float(result.value),
        int(result.n_iter), int(result.n_eval), status == 0, status, STATUS[status],
        float(result.row_error[0]), float(result.col_error[0]),
    )  # fmt: skip
    if verbose:
        print(
            f"{found.message}: {found.nit} iterations, {found.nfev} evaluations, objective "
            f"{-found.fun:.10g}, L1 error of rows {found.row_error:.3g}, "
            f"of columns {found.col_error:.3g}"
        )
    if not log:
        return plan
    potentials = {"alpha": alpha, "beta": beta} if dual else {"alpha": alpha}
    return plan, {**potentials, "res": found}
