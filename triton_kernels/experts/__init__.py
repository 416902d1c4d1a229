"""Triton kernels of the family `experts`.

routes    Philox, ids drawn from it, and the plan of ids
rows      slots and tokens moved through a plan
products  grouped matrix products, rows gathered and scattered by the kernels themselves
router    a router's gate and losses, rows of E logits in registers
loss      the two-pass consistency loss, a row a program
"""

from dashpot.triton_kernels.experts.loss import (
    consistency_loss_backward,
    consistency_loss_forward,
)
from dashpot.triton_kernels.experts.products import (
    expert_mlp_backward,
    expert_mlp_forward,
    expert_mlp_supports,
    grouped_linear_backward,
    grouped_linear_forward,
    grouped_linear_supports,
)
from dashpot.triton_kernels.experts.router import (
    load_balancing_loss_backward,
    load_balancing_loss_forward,
    load_balancing_loss_supports,
    router_z_loss_backward,
    router_z_loss_forward,
    router_z_loss_supports,
    topk_gate_backward,
    topk_gate_forward,
    topk_gate_supports,
)
from dashpot.triton_kernels.experts.routes import (
    dispatch_plan_forward,
    dispatch_plan_supports,
    random_plan_forward,
    random_plan_supports,
    route_balanced_forward,
    route_random_forward,
    route_random_supports,
)
from dashpot.triton_kernels.experts.rows import (
    permute_backward,
    permute_forward,
    unpermute_backward,
    unpermute_forward,
)

__all__ = [
    "consistency_loss_backward",
    "consistency_loss_forward",
    "dispatch_plan_forward",
    "dispatch_plan_supports",
    "expert_mlp_backward",
    "expert_mlp_forward",
    "expert_mlp_supports",
    "grouped_linear_backward",
    "grouped_linear_forward",
    "grouped_linear_supports",
    "load_balancing_loss_backward",
    "load_balancing_loss_forward",
    "load_balancing_loss_supports",
    "permute_backward",
    "permute_forward",
    "random_plan_forward",
    "random_plan_supports",
    "route_balanced_forward",
    "route_random_forward",
    "route_random_supports",
    "router_z_loss_backward",
    "router_z_loss_forward",
    "router_z_loss_supports",
    "topk_gate_backward",
    "topk_gate_forward",
    "topk_gate_supports",
    "unpermute_backward",
    "unpermute_forward",
]
