"""stft_loss: one resolution."""

from __future__ import annotations

import re

import dashpot
import numpy as np
import pytest
import torch

from bench import peers

X = [1, 0, -1, 2, 3, -2, 0.5, 1.5, -0.5, 0.25, 1, -1]
Y = [0.5, 1, -1, 1, 2, -1, 0, 1, 0.5, -0.25, 2, -2]


def signals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(2)]  # fmt: skip


def test_vector(backend64):
    x = torch.tensor([X], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([Y], dtype=torch.float64)
    loss, sc, log, lin = dashpot.stft_loss(x, y, 8, 3, 6, return_terms=True)
    assert sc.item() == pytest.approx(0.609827471810527, rel=1e-13)
    assert log.item() == pytest.approx(1.2260548574513346, rel=1e-13)
    assert lin.item() == 0
    assert loss.item() == pytest.approx(1.8358823292618616, rel=1e-13)
    for value in (loss, dashpot.stft_loss(x, y, 8, 3, 6)):
        (grad,) = torch.autograd.grad(value, x)
        want = [-0.1656435856, -0.1013273514, -0.1209377695]
        torch.testing.assert_close(
            grad[0, :3], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-10
        )
        assert grad[0, -1].item() == pytest.approx(0.0346281509, abs=1e-10)


@pytest.mark.peers
def test_own_window_to_rounding(backend64):
    """With one window on both sides they agree to float64's rounding."""
    x, y = signals(3, 200)
    window = torch.linspace(0.1, 1, 32, dtype=torch.float64)
    theirs = peers.load("auraloss.freq").STFTLoss(64, 20, 32, w_lin_mag=0.5)
    theirs.window = window
    got = dashpot.stft_loss(x, y, 64, 20, 32, window, w_lin=0.5)
    want = theirs(x[:, None], y[:, None])
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    for one, other in zip(torch.autograd.grad(got, [x, y]), torch.autograd.grad(want, [x, y]),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


def test_terms_carry_gradients(backend64):
    """ParallelWaveGAN's use: the terms weighted by the caller."""
    x, y = signals(2, 120)
    _, sc, log, lin = dashpot.stft_loss(x, y, 16, 5, 12, w_lin=1.0, return_terms=True)
    got = torch.autograd.grad(2 * sc + 3 * log + 5 * lin, [x, y])
    loss = dashpot.stft_loss(x, y, 16, 5, 12, w_sc=2.0, w_log=3.0, w_lin=5.0)
    torch.testing.assert_close(got, torch.autograd.grad(loss, [x, y]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input": torch.zeros(40), "target": torch.zeros(40)}, ValueError,
         "input: expected (B, T) or (B, C, T), not empty, got (40,)"),
        ({"target": torch.zeros(2, 41)}, ValueError, "target: expected (2, 40), got (2, 41)"),
        ({"n_fft": 80}, ValueError, "n_fft: expected n_fft // 2 < T = 40"),
        ({"n_fft": 0}, ValueError, "n_fft: expected a positive int, got 0"),
        ({"n_fft": 16.0}, TypeError, "n_fft: expected an int, got float"),
        ({"hop_length": -1}, ValueError, "hop_length: expected a positive int"),
        ({"win_length": 17}, ValueError, "win_length: expected at most n_fft = 16, got 17"),
        ({"window": torch.ones(9)}, ValueError, "window: expected (12,), got (9,)"),
        ({"window": torch.ones(12, requires_grad=True)}, ValueError, "without requires_grad"),
        ({"filters": torch.ones(2, 8)}, ValueError, "filters: expected (M, 9) with"),
        ({"filters": torch.ones(2, 9, requires_grad=True)}, ValueError, "filters: expected"),
        ({"power_floor": 0.0}, ValueError, "power_floor: expected a finite number > 0, got 0.0"),
        ({"mag_distance": "L1"}, ValueError, "mag_distance: expected one of l1, l2, got 'L1'"),
        ({"sc_reduction": "mean"}, ValueError, "sc_reduction: expected one of batch, example"),
        ({"reduction": "all"}, ValueError, "reduction: expected one of mean, sum, none"),
        ({"w_log": "1"}, TypeError, "w_log: expected a number, got str"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    arguments = {"input": torch.zeros(2, 40), "target": torch.zeros(2, 40), "n_fft": 16,
                 "hop_length": 4, "win_length": 12, **change}  # fmt: skip
    with pytest.raises(error, match=re.escape(words)):
        dashpot.stft_loss(**arguments)


@pytest.mark.tests_op("multi_resolution_stft_loss")
@pytest.mark.backends("native")
@pytest.mark.parametrize("n_fft", [512, 511])  # by a kernel's transform, by PyTorch's
def test_offsets_beyond_32_bits(backend, n_fft):
    """A signal of 2^31 + 2^17 samples of which one frame, about sample 2^31, is not silent. Only
    its pages are ever written; the rest reads as zero."""
    hop, noise = 2**16, torch.randn(n_fft, generator=torch.Generator().manual_seed(0))

    def loss(frames: int, at: int) -> torch.Tensor:
        x, y = (torch.from_numpy(np.zeros(frames * hop, np.int16)).view(torch.bfloat16)[None]
                for _ in range(2))  # fmt: skip
        x[0, at - n_fft // 2 : at + n_fft - n_fft // 2] = noise
        x, y = x.to(backend.device), y.to(backend.device)
        return dashpot.stft_loss(x, y, n_fft, hop, n_fft, w_sc=0.0, w_log=0.0, w_lin=1.0,
                                 reduction="sum")  # fmt: skip

    want = loss(4, 2 * hop)
    assert want > 100
    torch.testing.assert_close(loss(2**15 + 2, 2**31), want, rtol=1e-6, atol=0)
