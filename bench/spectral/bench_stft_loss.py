"""stft_loss, forward and backward: signals (rows, samples) at one resolution, against auraloss."""

import functools

import torch
from dashpot._measure import Peer
from dashpot.spectral.stft_loss import STFT_LOSS

from bench import peers

OP = "stft_loss"
SIZES = {torch.float32: [(4, 1024, 256, 1024, 65536)]}  # rows, n_fft, hop, window, samples
GRADIENT = (0,)
FLOOR = STFT_LOSS.floor  # both signals read, one gradient written


@functools.cache
def module(*sizes):
    return peers.load("auraloss.freq").STFTLoss(*sizes)


def auraloss(input, target, *sizes):
    return module(*sizes)(input[:, None], target[:, None])


PEERS = {"auraloss": Peer(auraloss, needs="auraloss")}


def test_stft_loss(measure):
    measure()
