"""multi_resolution_stft_loss: STFT magnitudes at several resolutions."""

from __future__ import annotations

import re

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

SMALL = {"n_ffts": (16, 30, 8), "hop_lengths": (5, 7, 3), "win_lengths": (12, 30, 8)}


def signals(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for _ in range(2)]  # fmt: skip


@given(rows=st.integers(1, 3), t=st.integers(16, 90), seed=st.integers(0, 99))
def test_is_the_mean_of_its_resolutions(backend64, rows, t, seed):
    x, y = signals(rows, t, seed=seed)
    got = dashpot.multi_resolution_stft_loss(x, y, **SMALL, w_lin=0.5)
    each = [
        dashpot.stft_loss(x, y, *sizes, w_lin=0.5) for sizes in zip(*SMALL.values(), strict=True)
    ]
    want = sum(each) / 3
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(got, [x, y]), torch.autograd.grad(want, [x, y]),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


BANKS = [torch.rand(m, n // 2 + 1, generator=torch.Generator().manual_seed(m))
         for m, n in ((3, 16), (7, 30), (1, 8))]  # fmt: skip


def test_filters():
    """Magnitudes through a filter bank, each resolution with its own number of bands."""
    x, y = signals(2, 90)
    got = dashpot.multi_resolution_stft_loss(x, y, **SMALL, filters=BANKS)
    want = 0.0
    for n_fft, hop, length, bank in zip(*SMALL.values(), BANKS, strict=True):
        window = torch.hann_window(length, dtype=torch.float64)
        m_x, m_y = (
            bank.double()
            @ torch.stft(s, n_fft, hop, length, window, return_complex=True).abs()
            .square().clamp(min=1e-8).sqrt()
            for s in (x, y)
        )  # fmt: skip
        want = want + (m_y - m_x).norm() / m_y.norm() + (m_x.log() - m_y.log()).abs().mean()
    torch.testing.assert_close(got, want / 3)
    torch.testing.assert_close(torch.autograd.grad(got, [x, y], retain_graph=True),
                               torch.autograd.grad(want / 3, [x, y]))  # fmt: skip
    plain = dashpot.multi_resolution_stft_loss(
        x, y, **SMALL, filters=[torch.eye(n // 2 + 1) for n in SMALL["n_ffts"]]
    )
    torch.testing.assert_close(plain, dashpot.multi_resolution_stft_loss(x, y, **SMALL))


def test_an_empty_filter_is_equal_to_itself():
    """A band of no bins is 0 for both signals: no difference, and no NaN."""
    x, y = signals(2, 60)
    bank = torch.tensor([[1.0] * 9, [0.0] * 9])
    loss = dashpot.stft_loss(x, y, 16, 5, 12, filters=bank, w_sc=0.0)
    want = dashpot.stft_loss(x, y, 16, 5, 12, filters=bank[:1], w_sc=0.0) / 2
    torch.testing.assert_close(loss, want)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_scale_invariance():
    x, y = signals(3, 90)
    got = dashpot.multi_resolution_stft_loss(x, y, **SMALL, scale_invariance=True)
    torch.testing.assert_close(
        dashpot.multi_resolution_stft_loss(x, 5 * y, **SMALL, scale_invariance=True), got,
        rtol=1e-6, atol=0,
    )  # fmt: skip
    assert got < dashpot.multi_resolution_stft_loss(x, 5 * y, **SMALL)


def test_per_example(backend64):
    """reduction="none": each example as if it were alone, channels together."""
    x, y = signals(3, 2, 90)
    losses = dashpot.multi_resolution_stft_loss(x, y, **SMALL, reduction="none")
    assert losses.shape == (3,)
    alone = [dashpot.multi_resolution_stft_loss(x[i : i + 1], y[i : i + 1], **SMALL)
             for i in range(3)]  # fmt: skip
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-12, atol=0)
    weights = torch.tensor([1.0, -2.0, 0.5]).double()
    got = torch.autograd.grad((losses * weights).sum(), [x, y])
    want = torch.autograd.grad((torch.stack(alone) * weights).sum(), [x, y])
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)
    mean = dashpot.multi_resolution_stft_loss(x, y, **SMALL, sc_reduction="example")
    torch.testing.assert_close(mean, losses.mean(), rtol=1e-12, atol=0)
    batch = dashpot.multi_resolution_stft_loss(x, y, **SMALL)
    assert abs(batch - mean) > 1e-6


def test_terms(backend64):
    x, y = signals(3, 90)
    options = {**SMALL, "w_sc": 0.5, "w_log": 2.0, "w_lin": 1.5, "mag_distance": "l2"}
    loss, *terms = dashpot.multi_resolution_stft_loss(x, y, **options, return_terms=True)
    want = dashpot.multi_resolution_stft_loss(x, y, **options)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert all(term.shape == (3,) for term in terms)
    total = 0.5 * terms[0] + 2.0 * terms[1] + 1.5 * terms[2]
    torch.testing.assert_close(total.mean(), want, rtol=1e-12, atol=0)
    for value in (loss, total.mean()):
        for one, other in zip(torch.autograd.grad(value, [x, y], retain_graph=True),
                              torch.autograd.grad(want, [x, y], retain_graph=True),
                              strict=True):  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)
    each = dashpot.multi_resolution_stft_loss(x, y, **options, reduction="none", return_terms=True)
    assert [tuple(one.shape) for one in each] == [(3,), (3, 3), (3, 3), (3, 3)]


def test_floor_has_no_gradient_below(backend64):
    """A signal whose every power lies below the floor: the loss is there, the gradient is 0."""
    x, y = signals(2, 60)
    quiet = (1e-6 * x).detach().requires_grad_()
    loss = dashpot.multi_resolution_stft_loss(quiet, y, **SMALL, power_floor=1e-3)
    assert loss > 0.5
    assert torch.equal(torch.autograd.grad(loss, quiet)[0], torch.zeros_like(quiet))


def test_equal_and_silent_signals(backend64):
    x, _ = signals(2, 60)
    for one, other in ((x, x.detach().clone()), (torch.zeros_like(x).requires_grad_(), x * 0)):
        loss = dashpot.multi_resolution_stft_loss(one, other.detach(), **SMALL)
        assert loss.item() == 0
        assert torch.equal(torch.autograd.grad(loss, one)[0], torch.zeros_like(one))


def test_float32_against_float64(backend):
    x, y = signals(3, 900)
    got = dashpot.multi_resolution_stft_loss(
        *(narrow := [one.detach().float().requires_grad_() for one in (x, y)]), **SMALL
    )
    with dashpot.backend("reference"):
        want = dashpot.multi_resolution_stft_loss(x, y, **SMALL)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    for one, other in zip(torch.autograd.grad(got, narrow), torch.autograd.grad(want, [x, y]),
                          strict=True):  # fmt: skip
        # A bin near the floor has 1 / m in its gradient; eager PyTorch is no closer.
        assert (one - other).abs().max() <= 1e-3 * other.abs().max()


def test_float32_error_comes_from_small_magnitudes(backend):
    """The logarithm's gradient is X / |X|^2: bins near 0 lose digits in float32, in PyTorch as
    well. With a floor above them, and without the logarithm, the error is that of rounding."""
    x, y = signals(2, 8192)

    def errors(options, name):
        narrow = x.detach().float().requires_grad_()
        with dashpot.backend("reference"):
            loss = dashpot.multi_resolution_stft_loss(x, y, **options)
            (want,) = torch.autograd.grad(loss, x)
        with dashpot.backend(name):
            loss = dashpot.multi_resolution_stft_loss(narrow, y.detach().float(), **options)
            (got,) = torch.autograd.grad(loss, narrow)
        return ((got - want).norm() / want.norm()).item()

    assert errors({}, backend.and_others) <= 4 * errors({}, "reference")
    assert errors({"power_floor": 1.0}, backend.and_others) <= 1e-4
    assert errors({"w_log": 0.0}, backend.and_others) <= 1e-5


@pytest.mark.parametrize(
    ("n_fft", "hop", "length", "t"),
    [
        (1, 1, 1, 9),  # one bin
        (4099, 50, 3000, 16000),  # prime; more segments than fit a block of them
        (20002, 4000, 20002, 60000),  # longer than what a kernel transforms: segments of few frames
    ],
)
def test_any_length(backend64, n_fft, hop, length, t):
    x, y = signals(2, t)
    window = torch.linspace(0.5, 1.5, length, dtype=torch.float64)

    def run():
        loss = dashpot.stft_loss(x, y, n_fft, hop, length, window, w_lin=0.1)
        return loss, *torch.autograd.grad(loss, [x, y])

    got = run()
    with dashpot.backend("reference"):
        want = run()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9 * other.abs().max().item())


def test_compiles_with_the_checks():
    x, y = signals(2, 90, dtype=torch.float32)
    torch._dynamo.reset()
    run = torch.compile(
        lambda a, b: dashpot.multi_resolution_stft_loss(a, b, **SMALL),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    torch.testing.assert_close(run(x, y), dashpot.multi_resolution_stft_loss(x, y, **SMALL))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_ffts": ()}, "n_ffts: expected a sequence, of n_ffts' length, got 0"),
        ({"hop_lengths": (5, 7)}, "hop_lengths: expected a sequence, of n_ffts' length, got 2"),
        ({"win_lengths": 12}, "win_lengths: expected a sequence, of n_ffts' length, got int"),
        ({"windows": [torch.ones(12)]}, "windows: expected 3 tensors, got 1"),
        ({"filters": [torch.ones(2, 9)]}, "filters: expected 3 tensors, got 1"),
        ({"input": torch.zeros(0, 60), "target": torch.zeros(0, 60)}, "not empty, got (0, 60)"),
    ],
)
def test_errors(change, words):
    x = torch.zeros(2, 60)
    with pytest.raises(ValueError, match=re.escape(words)):
        dashpot.multi_resolution_stft_loss(**{"input": x, "target": x, **SMALL, **change})
