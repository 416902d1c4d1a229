"""ema_update_: 25 million parameters in 25 tensors, 6.5 million in 400, averages in float32,
against torch's foreach functions and the loop over tensors that momentum encoders carry.

The op's own rows allocate their outputs; "in place" is the public function, which does not. That
and the peers write where they read, so they are not compared here (tests/contrastive does).
"""

import torch
from dashpot._measure import Peer
from dashpot.contrastive import ema_update_

OP = "ema_update_"
SIZES = {dtype: [(25, 1_000_000), (400, 16_384)] for dtype in (torch.float32, torch.bfloat16)}


def in_place(targets, onlines, weight):
    ema_update_(targets, onlines, 1 - weight.item())
    return targets


def foreach_lerp(targets, onlines, weight):
    torch._foreach_lerp_(targets, onlines, weight.item())
    return targets


def foreach_mul_add(targets, onlines, weight):
    """What takes mixed dtypes."""
    torch._foreach_mul_(targets, 1 - weight.item())
    torch._foreach_add_(targets, onlines, alpha=weight.item())
    return targets


def loop(targets, onlines, weight):
    """Tensor by tensor; lightly and timm convert by hand or not at all."""
    for target, online in zip(targets, onlines, strict=True):
        target.lerp_(online.to(target.dtype), weight.item())
    return targets


PEERS = {
    "in place": Peer(in_place, checked=False),
    "foreach lerp_": Peer(
        foreach_lerp, lambda size, dtype, *_: dtype == torch.float32, checked=False
    ),
    "foreach mul_, add_": Peer(foreach_mul_add, checked=False),
    "loop": Peer(loop, checked=False),
}


def test_ema_update_(measure):
    measure()
