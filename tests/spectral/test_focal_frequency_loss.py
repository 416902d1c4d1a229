"""focal_frequency_loss: images' spectra, weighted by their own distance."""

from __future__ import annotations

import itertools
import math
import re

import dashpot
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import peers


def images(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for _ in range(2)]  # fmt: skip


@pytest.fixture
def loss_of(backend):
    """The op on the backend, or, where it declines the call, on the next one."""

    def run(*args, **options):
        with dashpot.backend(backend.and_others):
            return dashpot.focal_frequency_loss(*args, **options)

    return run


def test_vector():
    x = torch.tensor([[1.0, 2, 0], [0, -1, 3]]).double()[None, None].requires_grad_()
    y = torch.tensor([[0.0, 1, 1], [2, -1, 0]]).double()[None, None]
    loss = dashpot.focal_frequency_loss(x, y)
    assert loss.item() == pytest.approx(2.3670070847387485, rel=1e-13)
    want = [
        [0.4179009028, 0.2257873271, -0.5369361274],
        [-0.5820990972, -0.1075460062, 0.7963972059],
    ]
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(
        grad[0, 0], torch.tensor(want, dtype=torch.float64), rtol=0, atol=3e-8
    )


@pytest.mark.peers
@pytest.mark.parametrize(
    "options",
    [
        {}, {"alpha": 2.0}, {"alpha": 0.5, "log_matrix": True}, {"batch_matrix": True},
        {"ave_spectrum": True}, {"patch_factor": 2, "log_matrix": True, "batch_matrix": True},
        {"loss_weight": 3.0, "patch_factor": 2},
    ],
    ids=str,
)  # fmt: skip
def test_module_is_the_published_code(backend64, options):
    x, y = images(3, 2, 12, 20)
    with dashpot.backend(backend64.and_others):
        got = dashpot.FocalFrequencyLoss(**options)(x, y)
        grads = torch.autograd.grad(got, [x, y])
    want = peers.load("focal_frequency_loss").FocalFrequencyLoss(**options)(x, y)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, torch.autograd.grad(want, [x, y]), rtol=1e-9, atol=1e-13)


@pytest.mark.peers
def test_given_weights_are_the_published_code():
    x, y = images(2, 2, 6, 8)
    matrix = torch.rand(2, 1, 2, 6, 8, dtype=torch.float64)
    want = peers.load("focal_frequency_loss").FocalFrequencyLoss()(x, y, matrix)
    got = dashpot.FocalFrequencyLoss()(x, y, matrix)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


@given(h=st.integers(1, 18), w=st.integers(1, 18), seed=st.integers(0, 99))
def test_alpha_zero_is_the_mean_squared_error(loss_of, h, w, seed):
    x, y = images(2, 1, h, w, seed=seed)
    loss = loss_of(x, y, alpha=0.0)
    torch.testing.assert_close(loss, (x - y).square().mean(), rtol=1e-12, atol=0)
    want = 2 * (x - y).detach() / x.numel()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (22, 13), (17, 64), (256, 140)])
@pytest.mark.parametrize("batch_matrix", [False, True])
def test_every_size_has_a_kernel(backend64, shape, batch_matrix):
    """Odd, prime, and larger than a block: PyTorch's FFT and one pass."""
    x, y = images(2, 2, *shape)
    options = {"batch_matrix": batch_matrix, "alpha": 0.5}
    with dashpot.backend("reference"):
        want = dashpot.focal_frequency_loss(x, y, **options)
        want_grads = torch.autograd.grad(want, [x, y])
    with dashpot.backend(backend64.backend):
        got = dashpot.focal_frequency_loss(x, y, **options)
        grads = torch.autograd.grad(got, [x, y])
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
    for one, other in zip(grads, want_grads, strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max()


def test_only_the_difference_counts(loss_of):
    x, y = images(2, 3, 8, 10)
    x_grad, y_grad = torch.autograd.grad(loss_of(x, y), [x, y])
    assert torch.equal(x_grad, -y_grad)
    torch.testing.assert_close(loss_of(x - y, torch.zeros_like(x)), loss_of(x, y))
    torch.testing.assert_close(loss_of(3 * x, 3 * y), 9 * loss_of(x, y))  # w is a ratio


@pytest.mark.parametrize(
    ("log_matrix", "batch_matrix", "alpha"),
    list(itertools.product([False, True], [False, True], [0.0, 0.5, 1.0, 2.0])),
)
def test_equal_images(loss_of, log_matrix, batch_matrix, alpha):
    """0 / 0 in the weights counts as 0; one equal plane among others is left alone."""
    x, y = images(2, 2, 6, 8)
    y = y.detach()
    y[0, 1] = x[0, 1].detach()
    options = {"log_matrix": log_matrix, "batch_matrix": batch_matrix, "alpha": alpha}
    loss = loss_of(x, y, **options, reduction="none")
    assert loss[0, 1] == 0 and bool((loss.flatten()[[0, 2, 3]] > 0).all())
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert bool(grad.isfinite().all()) and not grad[0, 1].any()
    same = loss_of(x, x.detach().clone(), **options)
    assert same == 0 and not torch.autograd.grad(same, x)[0].any()


def test_none_is_one_loss_per_image_and_channel(loss_of):
    x, y = images(3, 2, 8, 12)
    losses = loss_of(x, y, reduction="none", patch_factor=2)
    assert losses.shape == (3, 2)
    torch.testing.assert_close(losses.mean(), loss_of(x, y, patch_factor=2))
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(3, 2)
    (grad,) = torch.autograd.grad((losses * weights).sum(), x)
    alone = loss_of(x[1:2, 1:], y[1:2, 1:], patch_factor=2) * weights[1, 1]
    torch.testing.assert_close(grad[1:2, 1:], torch.autograd.grad(alone, x)[0][1:2, 1:])


def test_average_spectrum_takes_two_batch_sizes():
    x, y = images(4, 2, 6, 8)
    want = dashpot.focal_frequency_loss(x, y, ave_spectrum=True)
    got = dashpot.focal_frequency_loss(x, y.repeat(2, 1, 1, 1), ave_spectrum=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(loss_of, dtype):
    x, y = images(2, 2, 16, 16, dtype=dtype)
    loss = loss_of(x, y)
    wide = x.detach().float().requires_grad_()
    want = loss_of(wide, y.detach().float())
    torch.testing.assert_close(loss, want)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.dtype == dtype
    torch.testing.assert_close(
        grad, torch.autograd.grad(want, wide)[0].to(dtype), rtol=1e-2, atol=1e-6
    )


def test_float32_against_float64(loss_of):
    x, y = images(2, 3, 64, 64)
    narrow = x.detach().float().requires_grad_()
    got, want = loss_of(narrow, y.detach().float()), loss_of(x, y)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    (one,), (other,) = torch.autograd.grad(got, narrow), torch.autograd.grad(want, x)
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_second_derivative_holds_the_weights_fixed(loss_of):
    x, y = images(1, 1, 4, 6)
    (grad,) = torch.autograd.grad(loss_of(x, y), x, create_graph=True)
    (got,) = torch.autograd.grad(grad.square().sum(), x)
    spectrum = torch.fft.fft2((x - y).detach(), norm="ortho")
    w = spectrum.abs() / spectrum.abs().max()
    twice = torch.fft.ifft2(w**2 * spectrum, norm="ortho").real
    torch.testing.assert_close(got, 8 * twice / x.numel() ** 2)


def test_compiles_with_the_checks():
    x, y = images(2, 2, 8, 8, dtype=torch.float32)
    torch._dynamo.reset()
    run = torch.compile(dashpot.focal_frequency_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x, y), dashpot.focal_frequency_loss(x, y))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input": torch.zeros(3, 8)}, ValueError, "input: expected (N, C, H, W) with"),
        ({"target": torch.zeros(2, 3, 4, 5)}, ValueError, "target: expected (2, 3, 4, 6), got"),
        ({"target": torch.zeros(2, 3, 4, 5), "ave_spectrum": True}, ValueError,
         "target: expected (any, 3, 4, 6), got (2, 3, 4, 5)"),
        ({"alpha": -1}, ValueError, "alpha: expected a finite number >= 0, got -1"),
        ({"patch_factor": 4}, ValueError, "patch_factor: expected a divisor of H and W = (4, 6)"),
        ({"patch_factor": 2.0}, TypeError, "patch_factor: expected an int, got float"),
        ({"weight": torch.ones(5, 6)}, ValueError, "weight: expected (2, 1, 3, 4, 6) or less"),
        ({"reduction": "sum"}, ValueError, "reduction: expected one of mean, none"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    arguments = {"input": torch.zeros(2, 3, 4, 6), "target": torch.zeros(2, 3, 4, 6), **change}
    with pytest.raises(error, match=re.escape(words)):
        dashpot.focal_frequency_loss(**arguments)


@pytest.mark.backends("native")
def test_offsets_beyond_32_bits(backend):
    """2^15 + 1 images of 256 x 256: the last lies past element 2^31. Only its pages are ever
    written; the rest reads as zero."""
    shape = (2**15 + 1, 1, 256, 256)
    x, y = (torch.from_numpy(np.zeros(math.prod(shape), np.int16)).view(torch.bfloat16).view(shape)
            for _ in range(2))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for images_of in (x, y):
        images_of[-1].normal_(generator=generator)
    x, y = x.to(backend.device), y.to(backend.device)
    torch.set_num_threads(2)
    losses = dashpot.focal_frequency_loss(x, y, reduction="none")
    torch.set_num_threads(1)
    assert torch.equal(
        losses[-1], dashpot.focal_frequency_loss(x[-1:], y[-1:], reduction="none")[0]
    )
    assert losses[-1] > 0 and not losses[:-1].any()
