"""Stochastic and learned experts: routing, dispatch, grouped products, losses (family `experts`).

A token goes to k of E experts. Everything rests on one plan, a stable counting sort of the T*k
(token, choice) pairs by expert, and on rows that are gathered through it:

    route_random, route_balanced    seed, offset -> ids (T, k)       counter-based, no state
    topk_gate                       router logits (T, E) -> ids, weights (T, k)
    dispatch_plan, random_plan      ids -> DispatchPlan              which row goes where
    permute, unpermute              rows (T, d) <-> rows by expert (R, d)
    grouped_linear, expert_mlp      one matrix product for each expert's rows
    load_balancing_loss, router_z_loss, consistency_loss

Layers made of them, and what goes with those, are in this module alone:

    StochasticExperts, TopKExperts, SwitchExperts      in place of a feed-forward block
    convert, restore                                   a model's feed-forward blocks <-> experts
    two_pass_loss, auxiliary_loss, advance             in a training step
    shard_experts                                      experts split over ranks

Shapes: T tokens, k choices, E experts, d features, h hidden units, R = T*k slots (and padding).
"""

from dashpot.experts._plan import DispatchPlan
from dashpot.experts.consistency_loss import CONSISTENCY_LOSS, consistency_loss
from dashpot.experts.convert import convert, restore
from dashpot.experts.dispatch_plan import DISPATCH_PLAN, dispatch_plan
from dashpot.experts.expert_mlp import EXPERT_MLP, expert_mlp
from dashpot.experts.grouped_linear import GROUPED_LINEAR, grouped_linear
from dashpot.experts.learned import SwitchExperts, TopKExperts
from dashpot.experts.load_balancing_loss import LOAD_BALANCING_LOSS, load_balancing_loss
from dashpot.experts.parallel import shard_experts
from dashpot.experts.permute import PERMUTE, permute
from dashpot.experts.random_plan import RANDOM_PLAN, random_plan
from dashpot.experts.route_balanced import ROUTE_BALANCED, route_balanced
from dashpot.experts.route_random import ROUTE_RANDOM, route_random
from dashpot.experts.router_z_loss import ROUTER_Z_LOSS, router_z_loss
from dashpot.experts.stochastic import StochasticExperts
from dashpot.experts.topk_gate import TOPK_GATE, topk_gate
from dashpot.experts.training import TwoPasses, advance, auxiliary_loss, two_pass_loss
from dashpot.experts.unpermute import UNPERMUTE, unpermute

__all__ = [
    "DispatchPlan",
    "StochasticExperts",
    "SwitchExperts",
    "TopKExperts",
    "TwoPasses",
    "advance",
    "auxiliary_loss",
    "consistency_loss",
    "convert",
    "dispatch_plan",
    "expert_mlp",
    "grouped_linear",
    "load_balancing_loss",
    "permute",
    "random_plan",
    "restore",
    "route_balanced",
    "route_random",
    "router_z_loss",
    "shard_experts",
    "topk_gate",
    "two_pass_loss",
    "unpermute",
]

# Public too, but no functions of tensors: dashpot.functional does not have them.
TOOLS = (
    "StochasticExperts", "SwitchExperts", "TopKExperts", "TwoPasses", "advance", "auxiliary_loss",
    "convert", "restore", "shard_experts", "two_pass_loss",
)  # fmt: skip

OPS = (
    ROUTE_RANDOM, ROUTE_BALANCED, DISPATCH_PLAN, RANDOM_PLAN, PERMUTE, UNPERMUTE, GROUPED_LINEAR,
    EXPERT_MLP, TOPK_GATE, LOAD_BALANCING_LOSS, ROUTER_Z_LOSS, CONSISTENCY_LOSS,
)  # fmt: skip
