"""Regularised optimal transport, also with at most k nonzeros per column (family `transport`).

    min over T >= 0, T 1 = a, T^T 1 = b of  <T, C> + sum_j Omega(t_j),   t_j column j of T (m, n)

with Omega the negative entropy, half the squared length, or half the squared length together with
the bound ||t_j||_0 <= k. Both duals are concave and cost one read of C per evaluation:

    ot_dual_value_grad        alpha (m,), beta (n,): both marginals are met at the maximum
    ot_semidual_value_grad    alpha (m,): beta is eliminated, column sums are exact always
    sparse_simplex_projection what a column of the semi-dual's plan is: a k-sparse projection
    ot_value_grad             either, also of points (the cost is never stored) and smoothed
    ot_plan                   the nonzeros of the plan that belongs to potentials

`regularized_ot` maximises either, for a batch of problems in one call; `regularized_ot_points` does
so for clouds of points.
"""

from dashpot.transport._solve import REGULARIZED_OT
from dashpot.transport.ot_dual_value_grad import OT_DUAL_VALUE_GRAD, ot_dual_value_grad
from dashpot.transport.ot_plan import OT_PLAN, ot_plan
from dashpot.transport.ot_semidual_value_grad import (
    OT_SEMIDUAL_VALUE_GRAD,
    ot_semidual_value_grad,
)
from dashpot.transport.ot_value_grad import OT_VALUE_GRAD, ot_value_grad
from dashpot.transport.plans import TopKPlan
from dashpot.transport.regularized_ot import OTResult, regularized_ot
from dashpot.transport.regularized_ot_points import regularized_ot_points
from dashpot.transport.router import Routes, SparseOTRouter
from dashpot.transport.smooth import smooth_ot_dual, smooth_ot_semi_dual
from dashpot.transport.sparse_simplex_projection import (
    SPARSE_SIMPLEX_PROJECTION,
    sparse_simplex_projection,
)

__all__ = [
    "OTResult", "Routes", "SparseOTRouter", "TopKPlan", "ot_dual_value_grad", "ot_plan",
    "ot_semidual_value_grad", "ot_value_grad", "regularized_ot", "regularized_ot_points",
    "smooth_ot_dual", "smooth_ot_semi_dual", "sparse_simplex_projection",
]  # fmt: skip
# Not functions of tensors: left out of dashpot.functional.
TOOLS = (
    "OTResult", "Routes", "SparseOTRouter", "TopKPlan", "smooth_ot_dual", "smooth_ot_semi_dual",
)  # fmt: skip

OPS = (
    SPARSE_SIMPLEX_PROJECTION,
    OT_SEMIDUAL_VALUE_GRAD,
    OT_DUAL_VALUE_GRAD,
    OT_VALUE_GRAD,
    REGULARIZED_OT,
    OT_PLAN,
)
