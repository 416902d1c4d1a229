"""spectral_loss, forward and backward: the paper's loss on batches of gaze windows (rows, samples),
and pairs of the same; against plain PyTorch, eager and compiled, and the bare transforms, called
plainly and by autograd."""

import torch
from dashpot._measure import Peer
from dashpot.spectral.spectral_loss import SPECTRAL_LOSS

OP = "spectral_loss"
SIZES = {
    torch.float32: [
        ("train paper", 128, 2000), ("train paper", 128, 200), ("train paper", 512, 256),
        ("train paper", 1024, 1000), ("train log power", 128, 2000), ("train paper", 128, 2003),
    ],
    torch.bfloat16: [("train paper", 128, 2000)],
}  # fmt: skip
GRADIENT = (0,)
FLOOR = SPECTRAL_LOSS.floor  # both signals read, one gradient written


def plain(input, target, weight, kind, distance, batch_mean, eps, norm, *_):
    """As the official code: the full complex transform."""
    levels = []
    for signal in (input.float(), target.float()):
        a = torch.fft.fft(signal, norm=norm).abs()
        a = a.square() if kind == "log_power" else a
        levels.append(((a.mean(0) if batch_mean else a) + eps).log())
    return (levels[0] - levels[1]).square().mean()


def transforms(input, target, *_):
    """Both signals forward, one back: nothing that computes the loss by FFT can do without."""
    x, _ = torch.fft.rfft(input.detach().float()), torch.fft.rfft(target.float())
    return torch.fft.irfft(x, n=input.shape[-1])


class DifferentiableTransforms(torch.autograd.Function):
    """The bare transforms as autograd calls them: what an op of Python cannot do without."""

    @staticmethod
    def forward(ctx, input, target):
        ctx.spectrum, ctx.n = torch.fft.rfft(input.float()), input.shape[-1]
        torch.fft.rfft(target.float())
        return input.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        return torch.fft.irfft(ctx.spectrum, n=ctx.n), None


def transforms_in_autograd(input, target, *_):
    with torch.enable_grad():
        out = DifferentiableTransforms.apply(input, target)
    return torch.autograd.grad(out, input, torch.ones(()))


PEERS = {
    "torch.fft": Peer(plain),
    "torch.compile": Peer(
        torch.compile(plain), lambda size, *_: size == ("train paper", 128, 2000)
    ),
    "bare transforms": Peer(transforms, checked=False),
    "transforms in autograd": Peer(transforms_in_autograd, checked=False),
}


def test_spectral_loss(measure):
    measure()
