"""info_nce: InfoNCE in one direction or both; also over the ranks of a group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional


def test_vector(backend64, spec_views):
    z1, z2 = spec_views(backend64.device)
    loss = dashpot.info_nce(z1, z2, temperature=0.1)
    assert loss.item() == pytest.approx(0.4036821464794529, abs=1e-14)


def test_vector_of_both_directions(backend64, spec_views):
    z1, z2 = spec_views(backend64.device)
    scale = torch.tensor(2.0, dtype=torch.float64, device=z1.device, requires_grad=True)
    loss = dashpot.info_nce(z1, z2, logit_scale=scale, symmetric=True)
    assert loss.item() == pytest.approx(0.7943220948310025, abs=1e-14)
    assert dashpot.info_nce(z1, z2, temperature=0.5, symmetric=True).item() == loss.item()
    grads = torch.autograd.grad(loss, (z1, z2, scale))
    assert grads[0][0].tolist() == pytest.approx(
        [0.0374431167, -0.0344564614, -0.0187215583], abs=1e-10
    )
    assert grads[1][0].tolist() == pytest.approx(
        [0.0314061089, 0.0871507336, -0.0499876505], abs=1e-10
    )
    assert grads[2].item() == pytest.approx(-0.15251688497268637, abs=1e-14)


@given(b=st.integers(1, 70), d=st.integers(1, 40), seed=st.integers(0, 9))
def test_properties(backend64, views, b, d, seed):
    """Row scaling and joint permutations change nothing, g.z = 0, the loss is not negative."""
    z1, z2 = views(b, d, seed, device=backend64.device)
    loss = dashpot.info_nce(z1, z2, temperature=0.2)
    assert loss >= -1e-12
    scaled = dashpot.info_nce(3 * z1, z2 / 7, temperature=0.2)
    torch.testing.assert_close(scaled, loss, rtol=1e-12, atol=1e-12)
    order = torch.randperm(b, device=z1.device)
    moved = dashpot.info_nce(z1[order], z2[order], temperature=0.2)
    torch.testing.assert_close(moved, loss, rtol=1e-12, atol=1e-12)
    for grad, z in zip(torch.autograd.grad(loss, (z1, z2)), (z1, z2), strict=True):
        assert ((grad * z).sum(1).abs() <= 1e-12).all()


@pytest.mark.parametrize("temperature", [0.04, 0.01, 0.001])
def test_low_temperature(backend, views, temperature):
    """Where exp(1 / temperature) overflows float32, values and gradients stay those of float64."""
    z1, z2 = views(130, 16, dtype=torch.float32, device=backend.device)
    got = dashpot.info_nce(z1, z2, temperature=temperature, symmetric=True)
    wide = [z.detach().double().requires_grad_() for z in (z1, z2)]
    logits = functional.normalize(wide[0]) @ functional.normalize(wide[1]).T / temperature
    target = torch.arange(130, device=z1.device)
    want = (
        functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    ) / 2
    assert got.item() == pytest.approx(want.item(), rel=2e-5)
    grads = torch.autograd.grad(got, (z1, z2))
    for grad, right in zip(grads, torch.autograd.grad(want, wide), strict=True):
        assert (grad - right).abs().max() <= 2e-4 * right.abs().max()


def test_error_in_float32(backend, views):
    """At most 2e-5 of the loss at 0.04 from float64."""
    z1, _ = views(300, 64, dtype=torch.float32, device=backend.device)
    z2, _ = views(300, 64, 1, dtype=torch.float32, device=backend.device)
    with dashpot.backend("reference"):
        want = dashpot.info_nce(z1.double(), z2.double())
    assert dashpot.info_nce(z1, z2).item() == pytest.approx(want.item(), rel=2e-5)


def test_positives_may_repeat(backend64, views):
    z1, z2 = views(5, 7, device=backend64.device)
    positives = torch.tensor([3, 3, 0, 1, 3], device=z1.device, dtype=torch.int32)
    got = dashpot.info_nce(z1, z2, positives=positives, temperature=0.3, reduction="none")
    logits = functional.normalize(z1) @ functional.normalize(z2).T / 0.3
    want = functional.cross_entropy(logits, positives.long(), reduction="none")
    torch.testing.assert_close(got, want)
    weight = torch.arange(1.0, 6, dtype=torch.float64, device=z1.device)
    grads = torch.autograd.grad(got, (z1, z2), weight)
    torch.testing.assert_close(grads, torch.autograd.grad(want, (z1, z2), weight))


def test_more_keys_than_queries(backend64, views):
    z1, _ = views(3, 9, device=backend64.device)
    _, keys = views(200, 9, 1, device=backend64.device)
    logits = functional.normalize(z1) @ functional.normalize(keys).T / 0.1
    want = functional.cross_entropy(logits, torch.arange(3, device=z1.device), reduction="sum")
    got = dashpot.info_nce(z1, keys, temperature=0.1, reduction="sum")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (z1, keys)), torch.autograd.grad(want, (z1, keys))
    )


@pytest.mark.parametrize("scale", [0.0, -3.0, 100.0])
@pytest.mark.parametrize("length", [1.0, 30.0])
def test_rows_as_they_are(backend64, views, scale, length):
    """normalize=False: any norms, any factor."""
    z1, z2 = views(70, 9, device=backend64.device)
    z1, z2 = ((length * z).detach().requires_grad_() for z in (z1, z2))
    c = torch.tensor([scale], dtype=torch.float64, device=z1.device, requires_grad=True)
    got = dashpot.info_nce(z1, z2, logit_scale=c, normalize=False)
    want = functional.cross_entropy(c * (z1 @ z2.T), torch.arange(70, device=z1.device))
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got, (z1, z2, c))
    torch.testing.assert_close(grads, torch.autograd.grad(want, (z1, z2, c)), rtol=1e-6, atol=1e-9)


def test_one_row_zero_rows_and_duplicates(backend, views):
    z1, z2 = views(1, 4, dtype=torch.float32, device=backend.device)
    loss = dashpot.info_nce(z1, z2)
    assert loss.item() == pytest.approx(0, abs=1e-5)  # of logits of 25
    assert all(g.abs().max() < 1e-3 for g in torch.autograd.grad(loss, (z1, z2)))
    z1, z2 = (z.detach().clone() for z in views(6, 4, dtype=torch.float32, device=backend.device))
    z1[2] = 0
    z1[4], z2[1] = z1[0], -z2[0]
    z1.requires_grad_()
    rows = dashpot.info_nce(z1, z2, reduction="none")
    assert rows[2].item() == pytest.approx(torch.tensor(6.0).log().item())
    grad = torch.autograd.grad(rows.sum(), z1)[0]
    assert grad.isfinite().all() and grad[2].abs().max() > 1e9  # divided by 1e-12, as in torch


def test_a_row_that_is_not_a_number_shows(backend, views):
    z1, z2 = (z.detach().clone() for z in views(5, 4, dtype=torch.float32, device=backend.device))
    z2[3, 1] = torch.nan
    assert dashpot.info_nce(z1, z2).isnan()


def test_no_rows(backend):
    z = torch.zeros(0, 5, device=backend.device, requires_grad=True)
    loss = dashpot.info_nce(z, z)
    assert loss.item() == 0
    loss.backward()
    assert z.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(backend, views, dtype):
    """Statistics in float32: the loss is that of the same numbers in float32."""
    z1, z2 = views(40, 24, dtype=dtype, device=backend.device)
    loss = dashpot.info_nce(z1, z2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dashpot.info_nce(z1.float(), z2.float()).item(), rel=1e-5)
    assert all(g.dtype == dtype for g in torch.autograd.grad(loss, (z1, z2)))


@pytest.mark.peers
def test_open_clip(peers, views):
    loss = peers.load("open_clip.loss").ClipLoss()
    z1, z2 = views(33, 20)
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    unit = [functional.normalize(z) for z in (z1, z2)]
    want = loss(*unit, scale)
    for got in (
        dashpot.contrastive.ClipLoss()(*unit, scale),
        dashpot.info_nce(z1, z2, logit_scale=scale, symmetric=True),
    ):
        torch.testing.assert_close(got, want)
        grads = torch.autograd.grad(got, (z1, z2, scale), retain_graph=True)
        right = torch.autograd.grad(want, (z1, z2, scale), retain_graph=True)
        torch.testing.assert_close(grads, right)


# --------------------------------------------------------------------------------------------
# Memory


PEAK = """
import resource, sys, torch, dashpot
torch.set_num_threads(1)
b = int(sys.argv[1]) if len(sys.argv) > 1 else {b}
z1, z2 = torch.randn(b, 128).requires_grad_(), torch.randn(b, 128)
{loss}(z1[:64], z2[:64]).backward()  # what is loaded once
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
def now():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
before = now()
{loss}(z1, z2).backward()
print(peak() - before)
"""


@pytest.mark.parametrize("loss", ["info_nce", "nt_xent", "regularized_info_nce"])
def test_memory_stays_far_below_the_matrix_of_logits(in_process, loss):
    """B = 3000, D = 128: a float32 matrix (B, B) takes 36 MB, eager PyTorch needs ten or more."""
    kilobytes = int(in_process(PEAK.format(b=3000, loss=f"dashpot.{loss}")))
    limit = (
        60_000 if loss == "regularized_info_nce" else 25_000
    )  # that one may keep 48 MiB of tiles
    assert 0 < kilobytes < limit


# --------------------------------------------------------------------------------------------
# Over ranks


def test_over_ranks(tmp_path):
    """4 processes, and a group of 2 of them: gathered and ring forms of every loss."""
    script = Path(__file__).with_name("ranks.py")
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), "4", str(tmp_path / "store")],
                         stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]  # fmt: skip
    try:
        for rank in ranks:
            _, error = rank.communicate(timeout=240)
            assert rank.returncode == 0, error
    finally:
        for rank in ranks:
            rank.kill()


# --------------------------------------------------------------------------------------------
# Errors: the argument, what was expected, what came


Z = torch.ones(3, 4)
BAD = [
    (lambda: dashpot.info_nce([1.0], Z), TypeError, r"query: .*Tensor.*got list"),
    (lambda: dashpot.info_nce(Z[0], Z), ValueError, r"query: .*\(B, D\).*\(4,\)"),
    (lambda: dashpot.info_nce(Z.int(), Z), TypeError, r"query: .*float64.*got torch.int32"),
    (lambda: dashpot.info_nce(Z, Z[:, :3]), ValueError, r"key: .*\(N, 4\).*got \(3, 3\)"),
    (lambda: dashpot.info_nce(Z, Z.double()), ValueError, r"key: .*float32.*got .*float64"),
    (lambda: dashpot.info_nce(Z, Z[:2]), ValueError, r"key: .*at least 3 rows.*got 2"),
    (lambda: dashpot.info_nce(Z, Z[:2], symmetric=True), ValueError, r"key: .*\(3, D\).*\(2, 4\)"),
    (lambda: dashpot.info_nce(Z, Z, temperature=0), ValueError, r"temperature: .*> 0, got 0"),
    (lambda: dashpot.info_nce(Z, Z, temperature="1"), TypeError, r"temperature: .*float.*str"),
    (lambda: dashpot.info_nce(Z, Z, symmetric=1), TypeError, r"symmetric: .*bool.*got int"),
    (lambda: dashpot.info_nce(Z, Z, normalize=None), TypeError, r"normalize: .*bool"),
    (lambda: dashpot.info_nce(Z, Z, reduction="max"), ValueError, r"reduction: .*mean.*'max'"),
    (lambda: dashpot.info_nce(Z, Z, logit_scale=2.0), TypeError, r"logit_scale: .*got float"),
    (lambda: dashpot.info_nce(Z, Z, logit_scale=Z), ValueError, r"logit_scale: .*\(\) or \(1,\)"),
    (lambda: dashpot.info_nce(Z, Z, positives=Z[:, 0]), TypeError, r"positives: .*integers"),
    (lambda: dashpot.info_nce(Z, Z, positives=torch.arange(2)), ValueError,
     r"positives: .*\(3,\).*\(2,\)"),
    (lambda: dashpot.info_nce(Z, Z, positives=torch.tensor([0, 1, 3])), ValueError,
     r"positives: .*from 0 to 2, got 3"),
    (lambda: dashpot.info_nce(Z, Z, positives=torch.tensor([0, -1, 2])), ValueError,
     r"positives: .*from 0 to 2, got -1"),
    (lambda: dashpot.info_nce(Z, Z, positives=torch.arange(3), symmetric=True), ValueError,
     r"positives: .*None with symmetric"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
