"""centered_clipping: a step from the origin, against byzfl and the definition in PyTorch."""

from dashpot._measure import Peer

from bench import peers
from bench.aggregate import sizes

OP = "centered_clipping"
SIZES = sizes.FLOAT32


def definition(grads, tau):
    """From the origin the clipped rows' mean is all there is."""
    factor = (tau / grads.norm(dim=1)).clamp(max=1)  # (p,)
    return (factor / len(grads)) @ grads


def byzfl(grads, tau):
    return peers.load("byzfl").CenteredClipping(tau=tau)(grads).to(grads.dtype)


PEERS = {"torch": Peer(definition), "byzfl": Peer(byzfl, sizes.up_to_a_million, needs="byzfl")}


def test_centered_clipping(measure):
    measure()
