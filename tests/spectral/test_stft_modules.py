"""STFTLoss, MultiResolutionSTFTLoss and mel_filters: a user of auraloss swaps one import."""

from __future__ import annotations

import math
import re

import dashpot
import pytest
import torch
from torch import nn

from bench import peers

SIZES = ([16, 30], [5, 7], [12, 30])


def signals(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for _ in range(2)]  # fmt: skip


def in_float64(ours, theirs, window):
    """One window on both sides: theirs and ours are made in float32."""
    for i, one in enumerate(getattr(theirs, "stft_losses", [theirs])):
        one.window = getattr(torch, window)(one.win_length, dtype=torch.float64)
        if ours.tables["window"]:
            setattr(ours, f"window_{i}", one.window)


def assert_same(ours, theirs, x, y):
    """Values and gradients, those relative to the largest."""
    got, want = ours(x, y), theirs(x, y)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
    for one, other in zip(torch.autograd.grad(got, [x, y]), torch.autograd.grad(want, [x, y]),
                          strict=True):  # fmt: skip
        assert (one - other).abs().max() <= 1e-8 * other.abs().max()


OPTIONS = [
    {},
    {"w_lin_mag": 0.5, "mag_distance": "L2"},
    {"w_sc": 0.0, "w_lin_mag": 2.0},
    {"w_log_mag": 0.0, "window": "blackman_window", "eps": 1e-3},
    {"reduction": "sum", "w_lin_mag": 1.0},
    {"window": "hamming_window"},
    {"w_phs": 0.25},
    {"w_phs": 2.0, "window": "hamming_window"},
]


@pytest.mark.peers
@pytest.mark.tests_op("multi_resolution_stft_loss")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [(64, 16, 64), (60, 17, 41)])
def test_one_resolution_is_auraloss(backend64, options, sizes):
    """The same constructor, values and gradients; both arguments, two channels."""
    x, y = signals(2, 2, 300)
    theirs = peers.load("auraloss.freq").STFTLoss(*sizes, **options)
    ours = dashpot.STFTLoss(*sizes, **options)
    in_float64(ours, theirs, options.get("window", "hann_window"))
    assert_same(ours, theirs, x, y)


@pytest.mark.peers
@pytest.mark.tests_op("multi_resolution_stft_loss")
@pytest.mark.parametrize("options", [{}, {"w_lin_mag": 0.5}, {"w_phs": 0.5}], ids=str)
def test_default_resolutions_are_auraloss(backend64, options):
    x, y = signals(2, 1, 2600)
    theirs = peers.load("auraloss.freq").MultiResolutionSTFTLoss(**options)
    ours = dashpot.MultiResolutionSTFTLoss(**options)
    in_float64(ours, theirs, "hann_window")
    assert_same(ours, theirs, x, y)


@pytest.mark.peers
@pytest.mark.parametrize("options", [{}, {"w_phs": 0.5}], ids=str)
def test_full_output_is_auraloss(options):
    x, y = signals(2, 1, 100, dtype=torch.float32)
    options = {"output": "full", "w_lin_mag": 1.0, **options}
    got = dashpot.MultiResolutionSTFTLoss(*SIZES, **options)(x, y)
    want = peers.load("auraloss.freq").MultiResolutionSTFTLoss(*SIZES, **options)(x, y)
    torch.testing.assert_close(got[0], want[0])
    for one, other in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-6)


@pytest.mark.peers
def test_defaults_and_full_output_of_one_resolution_are_auraloss():
    x, y = signals(2, 1, 3000, dtype=torch.float32)
    want = peers.load("auraloss.freq").STFTLoss(output="full")(x, y)
    got = dashpot.STFTLoss(output="full")(x, y)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.peers
def test_scale_invariance_is_auraloss_for_one_signal():
    """auraloss' broadcast fails beyond one; here each row is fitted by itself."""
    theirs = peers.load("auraloss.freq").MultiResolutionSTFTLoss(*SIZES, scale_invariance=True)
    ours = dashpot.MultiResolutionSTFTLoss(*SIZES, scale_invariance=True)
    in_float64(ours, theirs, "hann_window")
    x, y = signals(1, 1, 100)
    assert_same(ours, theirs, x, y)
    x, y = signals(3, 2, 100)
    torch.testing.assert_close(ours(x, 7 * y), ours(x, y), rtol=1e-6, atol=0)
    each = dashpot.MultiResolutionSTFTLoss(*SIZES, scale_invariance=True, reduction="none")
    torch.testing.assert_close(each(x, y)[1:2], ours(x[1:2], y[1:2])[None])
    with pytest.raises(RuntimeError):
        theirs(x, y)


@pytest.mark.peers
def test_perceptual_weighting_is_auraloss():
    options = {"perceptual_weighting": True, "sample_rate": 16000}
    theirs = peers.load("auraloss.freq").MultiResolutionSTFTLoss(*SIZES, **options)
    ours = dashpot.MultiResolutionSTFTLoss(*SIZES, **options)
    for one in theirs.stft_losses:
        torch.testing.assert_close(ours.taps, one.prefilter.fir.weight.data)
    x, y = signals(2, 2, 200, dtype=torch.float32)
    got, want = ours(x, y), theirs(x, y)
    torch.testing.assert_close(got, want)
    (one,), (other,) = torch.autograd.grad(got, x), torch.autograd.grad(want, x)
    assert (one - other).abs().max() <= 1e-3 * other.abs().max()
    assert ours(x.bfloat16()[:, 0], y.bfloat16()[:, 0]).dtype == torch.float32


@pytest.mark.peers
def test_mel_scale_is_auraloss_with_these_filters():
    """auraloss takes its filters from librosa; given ours, it computes the same."""
    ours = dashpot.MultiResolutionSTFTLoss(*SIZES, scale="mel", sample_rate=8000, n_bins=4)
    theirs = peers.load("auraloss.freq").MultiResolutionSTFTLoss(*SIZES)
    in_float64(ours, theirs, "hann_window")
    for i, one in enumerate(theirs.stft_losses):
        one.scale, one.fb = "mel", getattr(ours, f"filters_{i}").double()[None]
    assert_same(ours, theirs, *signals(3, 2, 100))


def test_mel_filters():
    """Triangles with corners as Slaney's scale has them (linear to 1,000 Hz, then a constant ratio)
    and of area 1."""
    filters = dashpot.spectral.mel_filters(16000, 512, 40).double()
    assert filters.shape == (40, 257) and filters.dtype == torch.float64
    assert bool((filters >= 0).all()) and not filters[:, 0].any() and not filters[:, -1].any()
    spacing = 16000 / 512
    top = 15 + 27 * math.log(8) / math.log(6.4)  # 8,000 Hz in mel
    step = top / 41 * 200 / 3  # Hz, in the linear part
    peak = 2 / (2 * step)
    want = torch.tensor([max(0.0, peak * (1 - abs(k * spacing - step) / step)) for k in range(9)])
    torch.testing.assert_close(filters[0, :9], want.double(), rtol=1e-5, atol=1e-9)
    wide = dashpot.spectral.mel_filters(16000, 8192, 40).double()
    torch.testing.assert_close(
        wide.sum(1) * (16000 / 8192), torch.ones(40).double(), rtol=5e-3, atol=0
    )
    peaks = wide.argmax(1).double() * (16000 / 8192)
    ratio = math.exp(math.log(6.4) / 27 * top / 41)  # of neighbours beyond 1,000 Hz
    torch.testing.assert_close(
        peaks[20:] / peaks[19:-1], torch.full((20,), ratio).double(), rtol=3e-3, atol=0
    )


def test_windows_and_filters_follow_the_module():
    module = dashpot.MultiResolutionSTFTLoss(
        [16], [4], [12], window="hamming_window", scale="mel", sample_rate=8000, n_bins=3
    ).double()
    assert module.window_0.dtype == module.filters_0.dtype == torch.float64
    assert not module.state_dict()
    x, y = signals(2, 1, 60)
    want = dashpot.stft_loss(x, y, 16, 4, 12, torch.hamming_window(12).double(),
                             filters=dashpot.spectral.mel_filters(8000, 16, 3))  # fmt: skip
    torch.testing.assert_close(module(x, y), want)
    assert isinstance(nn.Sequential(module).to("meta")[0].window_0, torch.Tensor)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": "chroma"}, "scale: expected None or 'mel', got 'chroma'"),
        ({"scale": "mel", "n_bins": 4}, "sample_rate: expected a number"),
        ({"scale": "mel", "sample_rate": 8000}, "n_bins: expected an int with scale"),
        ({"perceptual_weighting": True}, "sample_rate: expected a number"),
        ({"window": "boxcar"}, "window: expected a window of torch"),
        ({"output": "terms"}, "output: expected one of loss, full"),
        ({"mag_distance": "l1"}, "mag_distance: expected one of L1, L2"),
        ({"reduction": "all"}, "reduction: expected one of mean, sum, none"),
        ({"w_phs": math.inf}, "w_phs: expected a finite number"),
    ],
)
def test_errors(options, words):
    for module in (dashpot.STFTLoss, dashpot.MultiResolutionSTFTLoss):
        with pytest.raises(ValueError, match=re.escape(words)):
            module(**options)


def test_mel_filters_errors():
    with pytest.raises(ValueError, match="sample_rate: expected a finite number > 0, got 0"):
        dashpot.spectral.mel_filters(0, 16)
    with pytest.raises(TypeError, match="n_fft: expected an int, got float"):
        dashpot.spectral.mel_filters(8000, 16.0)
    with pytest.raises(ValueError, match="n_mels: expected a positive int, got 0"):
        dashpot.spectral.mel_filters(8000, 16, 0)
