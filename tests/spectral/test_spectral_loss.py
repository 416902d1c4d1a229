"""spectral_loss: spectra of batches and of pairs."""

from __future__ import annotations

import functools
import math
import re
import warnings
from pathlib import Path

import dashpot
import numpy as np
import pytest
import torch
from dashpot import _measure
from dashpot.spectral.spectral_loss import KINDS
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

X = [[1, 2, 0, -1, 0.5], [0.5, -0.5, 1, 3, -2]]
Y = [[0, 1, 1, -1, 2], [2, -1, 0.5, 0, 1]]


@pytest.fixture
def loss_of(backend):
    """spectral_loss on the backend, or, where it declines the call, on the next one."""

    def run(*args, **options):
        with dashpot.backend(backend.and_others):
            return dashpot.spectral_loss(*args, **options)

    return run


def signals(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
            for _ in range(2)]  # fmt: skip


def official(fake, real):
    """The published loss: full FFT, batch averages of the magnitudes, their logarithms squared."""
    fake = torch.log(torch.fft.fft(fake, dim=-1).abs().mean(0) + 1e-8)
    real = torch.log(torch.fft.fft(real, dim=-1).abs().mean(0) + 1e-8)
    return ((fake - real) ** 2).mean()


@pytest.mark.parametrize(
    ("options", "value", "grad_x"),
    [
        ({"batch_mean": True}, 0.2313751571123205,
         [0.0554342109, 0.0519693269, -0.0411063023, -0.1043116831, -0.0511725274]),
        ({"kind": "magnitude", "distance": "l1"}, 1.6358745359597409,
         [0.2574072119, -0.0897289643, -0.1034236786, -0.2282655468, -0.3359890222]),
        ({"kind": "power"}, 94.375, [28.5, 10, -7, -24.5, -20.75]),
        ({"kind": "complex"}, 13.0, None),
        ({"kind": "complex", "norm": "ortho"}, 2.6, None),
        ({"spectrum": "onesided"}, 0.5021216005094266, None),
        ({"kind": "log_power", "distance": "l1", "batch_mean": True}, 0.6939487780269777, None),
    ],
)  # fmt: skip
def test_vectors(options, value, grad_x):
    x = torch.tensor(X, dtype=torch.float64, requires_grad=True)
    y = torch.tensor(Y, dtype=torch.float64, requires_grad=True)
    loss = dashpot.spectral_loss(x, y, **options)
    assert loss.item() == pytest.approx(value, rel=1e-13)
    got, of_target = torch.autograd.grad(loss, [x, y])
    if grad_x is not None:
        torch.testing.assert_close(
            got[0], torch.tensor(grad_x, dtype=torch.float64), rtol=0, atol=2e-8
        )
    if options == {"batch_mean": True}:
        want = [-0.1684041286, -0.0821116951, 0.1365931395, 0.1827131073, 0.0041807383]
        torch.testing.assert_close(
            of_target[0], torch.tensor(want, dtype=torch.float64), rtol=0, atol=2e-8
        )


@pytest.mark.parametrize("shape", [(5, 200), (3, 7), (17, 48)])
def test_is_the_official_formula(loss_of, shape):
    x, y = (one.requires_grad_() for one in signals(*shape))
    got, want = loss_of(x, y, batch_mean=True), official(x, y)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(got, [x, y]), torch.autograd.grad(want, [x, y]),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@given(rows=st.integers(1, 20), n=st.integers(1, 70), seed=st.integers(0, 99))
def test_parseval(loss_of, rows, n, seed):
    """complex, l2, ortho is the mean squared error."""
    x, y = signals(rows, n, seed=seed)
    x.requires_grad_()
    got = loss_of(x, y, kind="complex", norm="ortho")
    torch.testing.assert_close(got, (x - y).square().mean(), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(got, x)
    torch.testing.assert_close(grad, 2 * (x - y).detach() / x.numel(), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "complex"])
@pytest.mark.parametrize("n", [60, 61])
def test_a_circular_shift_changes_no_magnitude(loss_of, kind, n):
    x, y = signals(5, n)
    want = loss_of(x, y, kind=kind)
    torch.testing.assert_close(loss_of(x.roll(7, -1), y.roll(-3, -1), kind=kind), want)


@pytest.mark.parametrize(("kind", "power"), [("complex", 2), ("magnitude", 2), ("power", 4)])
def test_scaling(loss_of, kind, power):
    x, y = signals(4, 40)
    want = 3.0**power * loss_of(x, y, kind=kind)
    torch.testing.assert_close(loss_of(3 * x, 3 * y, kind=kind), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "factor"), [("log_magnitude", 1), ("log_power", 2)])
def test_logarithms_compare_levels(loss_of, kind, factor):
    x, _ = signals(4, 40)
    got = loss_of(math.e * x, x, kind=kind, eps=0.0)
    torch.testing.assert_close(got, torch.tensor(factor**2).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_equal_signals(loss_of, kind, distance):
    x, _ = signals(3, 24)
    x.requires_grad_()
    loss = loss_of(x, x.detach().clone(), kind=kind, distance=distance)
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_mean", [False, True])
def test_silence_has_no_nan(loss_of, kind, batch_mean):
    """Magnitudes of 0 have the gradient 0, as torch.abs."""
    x = torch.zeros(3, 16, dtype=torch.float64, requires_grad=True)
    y, _ = signals(3, 16)
    for distance in ("l1", "l2"):
        loss = loss_of(x, y, kind=kind, distance=distance, batch_mean=batch_mean)
        (grad,) = torch.autograd.grad(loss, x)
        assert loss > 0 and bool(grad.isfinite().all())


def test_magnitudes_beyond_the_range_of_their_squares(loss_of):
    for scale in (1e25, 1e-25):
        x, y = (scale * one.float() for one in signals(4, 32))
        x.requires_grad_()
        loss = loss_of(x, y, kind="magnitude", distance="l1")
        wide = x.detach().double().requires_grad_()
        with dashpot.backend("reference"):
            want = dashpot.spectral_loss(wide, y.double(), kind="magnitude", distance="l1")
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(loss, x)[0].double(), torch.autograd.grad(want, wide)[0],
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 7, 8, 200, 1000, 1021, 2000, 2048])
@pytest.mark.parametrize("kind", ["log_magnitude", "power"])
def test_float32_against_float64(loss_of, n, kind):
    """Relative to the truth: loss 1e-5, gradient 1e-5 of its largest entry, also for signals 10,000
    times apart. A logarithm has 1 / |X|, up to 1e4 here, in its gradient: 1e-4."""
    limit = 1e-4 if kind.startswith("log") else 1e-5
    x, y = signals(5, n)
    for scale in (1.0, 1e4):
        values = [one.detach().requires_grad_() for one in (scale * x, y)]
        narrow = [one.detach().float().requires_grad_() for one in values]
        want, got = (loss_of(a, b, kind=kind, norm="ortho") for a, b in (values, narrow))
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        for one, other in zip(
            torch.autograd.grad(got, narrow), torch.autograd.grad(want, values), strict=True
        ):
            assert (one - other).abs().max() <= limit * other.abs().max()


@pytest.mark.parametrize("spectrum", ["full", "onesided"])
@pytest.mark.parametrize("n", [12, 9])
def test_weights(loss_of, spectrum, n):
    """Per frequency, not normalised: weights add up, and one frequency's is that bin alone."""
    x, y = signals(4, n)
    size = n // 2 + 1
    one = [loss_of(x, y, kind="magnitude", spectrum=spectrum,
                   weight=torch.eye(size)[k].double()) for k in range(size)]  # fmt: skip
    total = loss_of(x, y, kind="magnitude", spectrum=spectrum)
    torch.testing.assert_close(sum(one), total, rtol=1e-12, atol=0)
    gap = (torch.fft.fft(x).abs() - torch.fft.fft(y).abs()).square().mean(0)[1]  # bins 1 and n - 1
    want = 2 * gap / n if spectrum == "full" else gap / size
    torch.testing.assert_close(one[1], want, rtol=1e-12, atol=0)


def test_none_is_one_loss_per_signal(loss_of):
    x, y = signals(3, 5, 30)
    x.requires_grad_()
    losses = loss_of(x, y, reduction="none")
    assert losses.shape == (3, 5)
    torch.testing.assert_close(losses.mean(), loss_of(x, y))
    want = torch.stack([loss_of(a, b) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1),
                                                      strict=True)])  # fmt: skip
    torch.testing.assert_close(losses.flatten(), want)
    scales = torch.linspace(-1, 2, 15, dtype=torch.float64).reshape(3, 5)
    (got,) = torch.autograd.grad((losses * scales).sum(), x, retain_graph=True)
    (other,) = torch.autograd.grad((want * scales.flatten()).sum(), x)
    torch.testing.assert_close(got, other)


def test_batches_of_two_sizes(loss_of):
    """The average comes first, so a doubled batch changes nothing."""
    x, y = signals(18, 2, 20)
    want = loss_of(x, y, batch_mean=True)
    torch.testing.assert_close(loss_of(x, y.repeat(2, 1, 1), batch_mean=True), want)
    torch.testing.assert_close(loss_of(x[:5], y, batch_mean=True),
                               loss_of(x[:5].repeat(3, 1, 1), y, batch_mean=True))  # fmt: skip


def test_the_batch_average_is_not_the_average_of_pairs():
    x, y = signals(6, 20)
    pairs, batch = (dashpot.spectral_loss(x, y, batch_mean=b).item() for b in (False, True))
    assert abs(pairs - batch) > 0.1 * pairs


def test_length_one_axis_is_warned_of():
    """The official code's mistake: (B, T, 1) has no spectrum in its last axis."""
    x, y = (one[..., None] for one in signals(4, 20))
    with pytest.warns(UserWarning, match=r"last axis of \(4, 20, 1\) has length 1"):
        loss = dashpot.spectral_loss(x, y, batch_mean=True)
    level = [torch.log(one.abs().mean(0) + 1e-8) for one in (x, y)]
    torch.testing.assert_close(loss, (level[0] - level[1]).square().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dashpot.spectral_loss(x.mT, y.mT, batch_mean=True)
        dashpot.spectral_loss(x[:, :1, 0], y[:, :1, 0], batch_mean=True)


def test_empty_batch_is_nan():
    x = torch.zeros(0, 8)
    assert (
        dashpot.spectral_loss(x, x).isnan() and dashpot.spectral_loss(x, x, batch_mean=True).isnan()
    )
    assert dashpot.spectral_loss(x, x, reduction="none").shape == (0,)


def test_two_dtypes_become_the_wider(loss_of):
    x, y = signals(3, 20)
    got = loss_of(x.bfloat16().requires_grad_(), y.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss_of(x.bfloat16().float(), y.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(loss_of, dtype):
    x, y = signals(3, 50, dtype=dtype)
    x.requires_grad_()
    loss = loss_of(x, y)
    (grad,) = torch.autograd.grad(loss, x)
    wide = x.detach().float().requires_grad_()
    want = loss_of(wide, y.float())
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(
        grad, torch.autograd.grad(want, wide)[0].to(dtype), rtol=1e-2, atol=1e-6
    )


def test_gradient_penalty(loss_of):
    """A second derivative: the norm of the gradient, differentiated."""
    x, y = (one.requires_grad_() for one in signals(4, 24))
    with dashpot.backend("reference"):
        (want,) = torch.autograd.grad(dashpot.spectral_loss(x, y), x, create_graph=True)
        want = torch.autograd.grad(want.square().sum(), [x, y])
    (got,) = torch.autograd.grad(loss_of(x, y), x, create_graph=True)
    got = torch.autograd.grad(got.square().sum(), [x, y])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_no_slope_where_no_gradient_is_wanted(poison):
    """A forward alone makes nothing of the signals' size."""
    x, y = (one.float().requires_grad_() for one in signals(256, 64))
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        dashpot.spectral_loss(x, y)
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert sizes and max(sizes) < 4 * x.numel()


LENGTHS = [7, 1021, 1458, 6000, 32771]  # odd; prime; in lanes or few rows; long; long and prime


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("batch_mean", [False, True])
def test_every_length_has_a_kernel(backend64, n, batch_mean):
    """What no transform of ours takes goes through PyTorch's FFT and one pass; nothing declines."""
    for kind in KINDS:
        x, y = (one.requires_grad_() for one in signals(3, 2, n, seed=n))
        options = {"kind": kind, "batch_mean": batch_mean, "distance": "l1", "spectrum": "onesided"}
        with dashpot.backend("reference"):
            want = dashpot.spectral_loss(x, y, **options)
            want_grads = torch.autograd.grad(want, [x, y])
        with dashpot.backend(backend64.backend):
            got = dashpot.spectral_loss(x, y, **options)
            grads = torch.autograd.grad(got, [x, y])
        torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
        for one, other in zip(grads, want_grads, strict=True):
            assert (one - other).abs().max() <= 1e-8 * other.abs().max()


def test_complex_batch_mean_compares_the_mean_spectra(loss_of):
    x, y = signals(5, 2, 20)
    x = x[:3].requires_grad_()
    got = loss_of(x, y, kind="complex", batch_mean=True)
    gap = torch.fft.fft(x).mean(0) - torch.fft.fft(y).mean(0)
    want = gap.abs().square().mean()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


@pytest.mark.parametrize("size", [1e-22, 1e22])
def test_squares_beyond_float32(loss_of, size):
    """Magnitudes and their gradients where |X|^2 leaves float32's range."""
    x, y = (size * one for one in signals(4, 20))
    want = loss_of(x.requires_grad_(), y, kind="magnitude", distance="l1")
    narrow = x.detach().float().requires_grad_()
    got = loss_of(narrow, y.float(), kind="magnitude", distance="l1")
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    (one,), (other,) = torch.autograd.grad(got, narrow), torch.autograd.grad(want, x)
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.backends("native")
def test_offsets_beyond_32_bits(backend):
    """2^19 + 8 rows of 4,096: the last lies past element 2^31. Only a few pages are ever written;
    the rest reads as zero."""
    rows, n = 2**19 + 8, 4096
    x, y = (torch.from_numpy(np.zeros(rows * n, np.int16)).view(torch.bfloat16).view(rows, n)
            for _ in range(2))  # fmt: skip
    x[-1, :2], y[0, 5] = 3, 2
    x, y = x.to(backend.device), y.to(backend.device)
    torch.set_num_threads(2)
    losses = dashpot.spectral_loss(x, y, kind="complex", norm="ortho", reduction="none")
    torch.set_num_threads(1)
    assert losses[0].item() == pytest.approx(4 / n) and losses[-1].item() == pytest.approx(18 / n)
    assert not losses[1:-1].any()


@pytest.mark.backends("cpp")
def test_scratch_is_counted(backend):
    """All memory of a call comes from torch's allocator: 5 rows in lanes of which there are more,
    so that spectra are kept beside the slopes."""
    x, y = (one.float() for one in signals(5, 2048))
    x.requires_grad_()
    run = functools.partial(dashpot.spectral_loss, batch_mean=True)
    alone = _measure.peak_memory(run, (x.detach(), y), "cpu")

    def step(x, y):
        with torch.enable_grad():
            return torch.autograd.grad(run(x, y), x)

    assert (
        alone >= 4 * 5 * 2048 and _measure.peak_memory(step, (x, y), "cpu") >= alone + 8 * 5 * 2048
    )


def test_no_grid_axis_has_a_limit():
    """Any number of rows and channels: CUDA's first grid axis takes 2^31 - 1 blocks, the others
    65,535; no kernel of the family uses those."""
    sources = list((Path(__file__).parents[2] / "csrc/spectral").glob("*.cu"))
    assert len(sources) == 3
    for source in sources:
        assert not re.search(r"blockIdx\.[yz]|gridDim\.[yz]", source.read_text()), source.name


def test_module():
    x, y = signals(5, 40)
    module = dashpot.SpectralLoss(batch_mean=True, loss_weight=12.0)
    torch.testing.assert_close(module(x, y), 12 * official(x, y))
    weighted = dashpot.SpectralLoss(kind="power", weight=torch.ones(21))
    torch.testing.assert_close(weighted(x, y), dashpot.spectral_loss(x, y, kind="power"))
    assert isinstance(nn.Sequential(module).double(), nn.Module) and not module.state_dict()


def test_compiles_with_the_checks():
    x, y = (one.float() for one in signals(5, 40))
    x.requires_grad_()
    torch._dynamo.reset()
    run = torch.compile(dashpot.spectral_loss, fullgraph=True, backend="aot_eager")
    loss = run(x, y, batch_mean=True)
    torch.testing.assert_close(loss, dashpot.spectral_loss(x, y, batch_mean=True))
    want = torch.autograd.grad(dashpot.spectral_loss(x, y, batch_mean=True), x)
    torch.testing.assert_close(torch.autograd.grad(loss, x), want)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input": "x"}, TypeError, "input: expected a torch.Tensor, got str"),
        ({"input": torch.zeros(3, 8, dtype=torch.int64)}, TypeError, "input: expected float64"),
        ({"input": torch.tensor(1.0)}, ValueError, "input: expected (..., T) with T >= 1, got ()"),
        ({"input": torch.zeros(3, 0)}, ValueError, "with T >= 1, got (3, 0)"),
        ({"target": torch.zeros(3, 9)}, ValueError, "target: expected (3, 8), got (3, 9)"),
        ({"target": torch.zeros(3, 8, device="meta")}, ValueError, "target: expected a tensor on"),
        ({"target": torch.zeros(3, 9), "batch_mean": True}, ValueError, "expected (any, 8), got"),
        ({"input": torch.zeros(8), "target": torch.zeros(8), "batch_mean": True}, ValueError,
         "input: expected (B, ..., T) with batch_mean, got (8,)"),
        ({"kind": "phase"}, ValueError, "kind: expected one of complex, magnitude"),
        ({"distance": "l3"}, ValueError, "distance: expected one of l1, l2, got 'l3'"),
        ({"norm": "none"}, ValueError, "norm: expected one of"),
        ({"spectrum": "half"}, ValueError, "spectrum: expected one of full, onesided"),
        ({"reduction": "sum"}, ValueError, "reduction: expected one of mean, none"),
        ({"reduction": "none", "batch_mean": True}, ValueError, 'expected "mean" with batch_mean'),
        ({"eps": -1.0}, ValueError, "eps: expected a finite number >= 0, got -1.0"),
        ({"eps": "small"}, TypeError, "eps: expected a number, got str"),
        ({"weight": torch.ones(8)}, ValueError, "weight: expected (5,), got (8,)"),
        ({"weight": torch.ones(5, requires_grad=True)}, ValueError, "without requires_grad"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    arguments = {"input": torch.zeros(3, 8), "target": torch.zeros(3, 8), **change}
    with pytest.raises(error, match=re.escape(words)):
        dashpot.spectral_loss(**arguments)


def test_a_slope_that_was_not_asked_for_is_formed_late(backend64):
    """Whoever calls the registered op with `wants` False still gets the gradient."""
    from dashpot.spectral.spectral_loss import SPECTRAL_LOSS

    args = [*SPECTRAL_LOSS.inputs(("log", 4, 16), torch.float64, backend64.device, 0)]
    args[:2] = [one.requires_grad_() for one in args[:2]]
    want = torch.autograd.grad(SPECTRAL_LOSS(*args).sum(), args[:2])
    for wants in ([False, False], [True, False]):
        got = torch.autograd.grad(SPECTRAL_LOSS(*args[:-1], wants).sum(), args[:2])
        torch.testing.assert_close(got, want)
