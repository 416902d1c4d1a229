"""multi_resolution_stft_loss, forward and backward, default sizes: signals (rows, samples), against
auraloss and the bare transforms of the frames."""

import functools

import torch
from dashpot._measure import Peer
from dashpot.spectral.multi_resolution_stft_loss import MULTI_RESOLUTION_STFT_LOSS

from bench import peers

OP = "multi_resolution_stft_loss"
SIZES = {
    torch.float32: [("train default", 4, 65536), ("train default", 16, 65536)],
    torch.bfloat16: [("train default", 4, 65536)],
}
GRADIENT = (0,)
FLOOR = MULTI_RESOLUTION_STFT_LOSS.floor  # both signals read, one gradient written


@functools.cache
def module():
    return peers.load("auraloss.freq").MultiResolutionSTFTLoss()


def auraloss(input, target, *_):
    return module()(input[:, None].float(), target[:, None].float())


@functools.cache
def frames(rows, samples, n_ffts, hops, device):
    made = [torch.randn(rows * (1 + samples // h), n, device=device)
            for n, h in zip(n_ffts, hops, strict=True)]  # fmt: skip
    return [(one, torch.fft.rfft(one)) for one in made]


def transforms(input, target, windows, filters, channels, n_ffts, hops, *_):
    """Of frames that lie ready: those of both signals forward, one back."""
    rows, samples = input.shape
    for frame, spectrum in frames(rows, samples, tuple(n_ffts), tuple(hops), input.device):
        torch.fft.rfft(frame)
        torch.fft.rfft(frame)
        back = torch.fft.irfft(spectrum)
    return back


PEERS = {
    "auraloss": Peer(auraloss, needs="auraloss"),
    "bare transforms": Peer(transforms, checked=False),
}


def test_multi_resolution_stft_loss(measure):
    measure()
