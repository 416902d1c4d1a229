"""focal_frequency_loss, forward and backward: images (N, C, H, W), against the published code and
the bare transforms."""

import functools

import torch
from dashpot._measure import Peer
from dashpot.spectral.focal_frequency_loss import FOCAL_FREQUENCY_LOSS

from bench import peers

OP = "focal_frequency_loss"
SIZES = {
    torch.float32: [("plain", 16, 3, 64, 64), ("plain", 8, 3, 256, 256)],
    torch.bfloat16: [("plain", 16, 3, 64, 64)],
}
GRADIENT = (0,)
FLOOR = FOCAL_FREQUENCY_LOSS.floor  # both images read, one gradient written


@functools.cache
def module():
    return peers.load("focal_frequency_loss").FocalFrequencyLoss()


def published(input, target, *_):
    return module()(input.float(), target.float())


def transforms(input, target, *_):
    """By linearity one there and one back suffice."""
    return torch.fft.irfft2(torch.fft.rfft2(input.detach().float()))


PEERS = {
    "published": Peer(published, needs="focal_frequency_loss"),
    "bare transforms": Peer(transforms, checked=False),
}


def test_focal_frequency_loss(measure):
    measure()
