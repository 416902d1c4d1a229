"""focal_supcon_loss: -(1 - p)^gamma log p over the positives of each row."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

F5 = [[1, 2, 0], [2, 1, 1], [0, 1, 3], [1, 0, 1], [3, 1, 0]]
Y5 = [0, 1, 0, 1, 0]


def rows_and_groups(n, d, groups, seed=0, dtype=torch.float64, device="cpu"):
    """Unit rows (n, d) and group ids (n,)."""
    generator = torch.Generator().manual_seed(seed)
    z = normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)
    ids = torch.randint(-1, groups - 1, (n,), generator=generator)
    return z.to(device, dtype), ids.to(device)


def by_pairs(z, groups, temperature, gamma, by_count):
    """The definition, pair by pair, in float64: the mean over rows with a positive."""
    z, groups = z.double(), groups.tolist()
    n, total, anchors = len(groups), 0.0, 0
    for i in range(n):
        others = [k for k in range(n) if k != i]
        positives = [j for j in others if groups[j] == groups[i]]
        if not positives:
            continue
        s = z @ z[i] / temperature
        lse = torch.logsumexp(s[others], 0)
        log_p = s[positives] - lse
        term = -((-torch.expm1(log_p)) ** gamma * log_p).sum()
        total, anchors = total + term / (len(positives) if by_count else n), anchors + 1
    return total / max(anchors, 1)


def published(z, labels, temperature=0.07):
    """The operations of the published code, in eager PyTorch: the whole matrix, masks as floats."""
    same = (labels[:, None] == labels[None, :]).to(z.dtype)
    s = z @ z.mT / temperature
    s = s - s.max(1, keepdim=True).values.detach()
    off = 1 - torch.eye(len(z), dtype=z.dtype, device=z.device)
    same = same * off
    log_p = s - (s.exp() * off).sum(1, keepdim=True).log()
    rows = -((1 - log_p.exp()) * same * log_p).mean(1)
    return rows.sum() / (same.sum(1) > 0).sum()


# --------------------------------------------------------------------------------------------
# The specification's vectors


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"temperature": 0.5, "positives_norm": "count"}, 1.1750201993364433),
        ({"temperature": 0.5}, 0.4114277482167881),
        ({"temperature": 0.5, "gamma": 2.0}, 0.33573427530042976),
        ({}, 1.4536934574490634),
    ],
)
def test_vectors(backend64, options, value):
    z = normalize(torch.tensor(F5, dtype=torch.float64)).to(backend64.device)
    loss = dashpot.focal_supcon_loss(z, torch.tensor(Y5, device=z.device), **options)
    assert loss.item() == pytest.approx(value, abs=1e-13)


def test_vector_of_the_gradient(backend64):
    z = normalize(torch.tensor(F5, dtype=torch.float64)).to(backend64.device).requires_grad_()
    groups = torch.tensor(Y5, device=z.device)
    loss = dashpot.focal_supcon_loss(z, groups, temperature=0.5, positives_norm="count")
    (grad,) = torch.autograd.grad(loss, z)
    want = torch.tensor([-0.1945812394, 0.0363539257, 0.0424963181], dtype=torch.float64)
    torch.testing.assert_close(grad[3].cpu(), want, rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------------------
# Against the definition and the published code


@given(
    n=st.integers(1, 70), groups=st.integers(1, 20), seed=st.integers(0, 99),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]), by_count=st.booleans(),
)  # fmt: skip
def test_definition(backend64, n, groups, seed, gamma, by_count):
    z, ids = rows_and_groups(n, 6, groups, seed, device=backend64.device)
    loss = dashpot.focal_supcon_loss(
        z, ids, temperature=0.2, gamma=gamma, positives_norm="count" if by_count else "batch"
    )
    want = by_pairs(z, ids, 0.2, gamma, by_count)
    torch.testing.assert_close(loss.cpu().double(), torch.as_tensor(want).cpu().double())


def test_published_code(backend64):
    z, ids = rows_and_groups(150, 16, 12, device=backend64.device)
    leaf = z.clone().requires_grad_()
    want = published(leaf, ids)
    (want_grad,) = torch.autograd.grad(want, leaf)
    loss = dashpot.focal_supcon_loss(leaf, ids)
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-13)


def test_float32_at_the_size_of_the_release(backend):
    """N = 768, temperature 0.07: within 1e-5 of float64, value and gradient."""
    z, ids = rows_and_groups(768 if backend.backend == "cpp" else 96, 128, 40)
    narrow = z.float().to(backend.device).requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    loss = dashpot.focal_supcon_loss(narrow, ids.to(backend.device))
    (grad,) = torch.autograd.grad(loss, narrow)
    with dashpot.backend("reference"):
        truth = dashpot.focal_supcon_loss(wide, ids.to(backend.device))
        (true_grad,) = torch.autograd.grad(truth, wide)
    assert abs(loss.item() - truth.item()) <= 1e-5 * truth.item()
    assert (grad - true_grad).abs().max() <= 1e-5 * true_grad.abs().max()


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_reductions(backend64, reduction):
    z, ids = rows_and_groups(40, 6, 15, device=backend64.device)
    leaf = z.clone().requires_grad_()
    rows = dashpot.focal_supcon_loss(leaf, ids, reduction="none")
    alone = torch.tensor([(ids == one).sum() == 1 for one in ids], device=z.device)
    assert rows.shape == (40,) and alone.any() and not rows[alone].any()
    assert (rows[~alone] > 0).all()
    mean = dashpot.focal_supcon_loss(leaf, ids)
    torch.testing.assert_close(rows.sum() / (~alone).sum(), mean)
    weights = torch.rand(40, dtype=z.dtype, device=z.device)
    if reduction == "none":
        got = torch.autograd.grad(rows, leaf, weights)
        with dashpot.backend("reference"):
            want = dashpot.focal_supcon_loss(leaf, ids, reduction="none")
        want = torch.autograd.grad(want, leaf, weights)
    else:
        loss = dashpot.focal_supcon_loss(leaf, ids, reduction="sum")
        torch.testing.assert_close(loss, rows.sum())
        got = torch.autograd.grad(loss, leaf)
        want = torch.autograd.grad(mean * (~alone).sum(), leaf)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_normalize(backend64):
    """As if the rows had been normalised before, gradient included."""
    z, ids = rows_and_groups(30, 6, 5, device=backend64.device)
    scale = torch.rand(30, 1, dtype=z.dtype, device=z.device) + 0.1
    leaf = (z * scale).requires_grad_()
    loss = dashpot.focal_supcon_loss(leaf, ids, normalize=True)
    torch.testing.assert_close(loss, dashpot.focal_supcon_loss(z, ids))
    (grad,) = torch.autograd.grad(loss, leaf)
    (want,) = torch.autograd.grad(dashpot.focal_supcon_loss(normalize(leaf), ids), leaf)
    torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12)
    assert (grad * leaf).sum(1).abs().max() < 1e-12


@given(seed=st.integers(0, 99))
def test_rows_have_no_order(backend64, seed):
    z, ids = rows_and_groups(33, 6, 8, seed, device=backend64.device)
    order = torch.randperm(33)
    loss = dashpot.focal_supcon_loss(z, ids)
    torch.testing.assert_close(dashpot.focal_supcon_loss(z[order], ids[order]), loss)
    torch.testing.assert_close(dashpot.focal_supcon_loss(z, ids * 1000 + 7), loss)


# --------------------------------------------------------------------------------------------
# Edges


@pytest.mark.parametrize("temperature", [0.01, 0.003])
@pytest.mark.parametrize("kind", ["random", "duplicated", "antipodal", "zero"])
def test_low_temperatures_and_special_rows(backend, temperature, kind):
    """exp(-2/temperature) leaves float32: the constant shift must give way."""
    z, ids = rows_and_groups(70, 8, 9, dtype=torch.float32)
    if kind == "duplicated":
        z[1::2] = z[0::2]
    elif kind == "antipodal":
        z[1::2] = -z[0::2]
    elif kind == "zero":
        z[::3] = 0
    z, ids = z.to(backend.device).requires_grad_(), ids.to(backend.device)
    loss = dashpot.focal_supcon_loss(z, ids, temperature=temperature)
    (grad,) = torch.autograd.grad(loss, z)
    wide = z.detach().double().requires_grad_()
    with dashpot.backend("reference"):
        truth = dashpot.focal_supcon_loss(wide, ids, temperature=temperature)
        (true_grad,) = torch.autograd.grad(truth, wide)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        grad.double(), true_grad, rtol=2e-3, atol=2e-3 * true_grad.abs().max()
    )


def test_long_rows(backend):
    """Lengths far from 1 with normalize=False: computed as they are, without overflow."""
    z, ids = rows_and_groups(40, 8, 6, dtype=torch.float32, device=backend.device)
    long = 30 * z
    loss = dashpot.focal_supcon_loss(long, ids, temperature=1.0)
    want = by_pairs(long.cpu(), ids, 1.0, 1.0, False)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("groups", [[3], [0, 1], list(range(40))])
def test_no_positive(backend, groups):
    """0, attached to the graph, with zero gradient."""
    z = normalize(torch.randn(len(groups), 4), dim=1).to(backend.device).requires_grad_()
    loss = dashpot.focal_supcon_loss(z, torch.tensor(groups, device=z.device))
    assert loss.item() == 0
    (grad,) = torch.autograd.grad(loss, z)
    assert torch.equal(grad, torch.zeros_like(z))


def test_identical_rows_of_one_class(backend64):
    """p = 1 / (N - 1)."""
    n = 67
    z = torch.full((n, 4), 0.5, dtype=torch.float64, device=backend64.device)
    ids = torch.zeros(n, dtype=torch.int64, device=z.device)
    p = 1 / (n - 1)
    want = (1 - p) * torch.log(torch.tensor(n - 1.0)).item() * (n - 1) / n
    assert dashpot.focal_supcon_loss(z, ids).item() == pytest.approx(want)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_certain_positive(backend64, gamma):
    """Two rows of one group: p = 1, so the loss is 0 and its gradient finite."""
    z = normalize(torch.randn(2, 4, dtype=torch.float64)).to(backend64.device).requires_grad_()
    loss = dashpot.focal_supcon_loss(z, torch.zeros(2, dtype=torch.int32, device=z.device),
                                     gamma=gamma)  # fmt: skip
    assert 0 <= loss.item() < 1e-15
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-6


def test_nan_shows(backend):
    z, ids = rows_and_groups(30, 5, 4, dtype=torch.float32, device=backend.device)
    z[7, 2] = torch.nan
    assert dashpot.focal_supcon_loss(z, ids).isnan()


def test_a_mixed_batch_equals_the_whole(backend64):
    """Rows that are alone, the first, the last or most of them, change only the denominators."""
    z, ids = rows_and_groups(200, 6, 7, device=backend64.device)
    ids[torch.arange(200, device=z.device) % 3 > 0] += torch.arange(133, device=z.device) + 100
    leaf = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(dashpot.focal_supcon_loss(leaf, ids), leaf)
    (want,) = torch.autograd.grad(published(leaf, ids), leaf)
    torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-13)


def test_memory(resident_growth):
    """Forward and backward of 8192 rows: a tenth of the two N x N matrices that eager PyTorch
    keeps for its backward at the least."""
    growth = resident_growth(
        "z = torch.nn.functional.normalize(torch.randn(8192, 128)).requires_grad_()",
        "groups = torch.randint(0, 200, (8192,))",
        step="dashpot.focal_supcon_loss(z, groups).backward()",
    )
    assert 0 < growth < 2 * 8192**2 * 4 / 10


# --------------------------------------------------------------------------------------------
# Errors


Z, G = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
BAD = [
    (([1.0], G), {}, TypeError, r"z: .*Tensor, got list"),
    ((Z[0], G), {}, ValueError, r"z: .*got \(3,\)"),
    ((Z.long(), G), {}, TypeError, r"z: .*float64.*got torch.int64"),
    ((Z, G.float()), {}, TypeError, r"groups: expected integers, got torch.float32"),
    ((Z, G[:3]), {}, ValueError, r"groups: expected \(4,\).*got \(3,\)"),
    ((Z, G), {"temperature": 0.0}, ValueError, r"temperature: .*> 0, got 0"),
    ((Z, G), {"temperature": "1"}, TypeError, r"temperature: .*float, got str"),
    ((Z, G), {"gamma": -1.0}, ValueError, r"gamma: .*>= 0, got -1"),
    ((Z, G), {"positives_norm": "mean"}, ValueError, r"positives_norm: .*batch, count, got 'mean'"),
    ((Z, G), {"normalize": 1}, TypeError, r"normalize: .*bool, got int"),
    ((Z, G), {"reduction": "avg"}, ValueError, r"reduction: .*mean, sum, none, got 'avg'"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=message):
        dashpot.focal_supcon_loss(*args, **options)
