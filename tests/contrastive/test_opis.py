"""opis: how much the classes' utility curves differ, without the N x N matrix."""

from __future__ import annotations

import math

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

E6 = [[1, 0, 0.5], [0.8, 0.6, 0], [0, 1, 0.3], [0.5, 0.9, -0.2], [0.2, 0.1, 1], [-0.3, 0.4, 0.9]]
Y6 = [0, 0, 1, 1, 2, 2]


def spec(device):
    return torch.tensor(E6, dtype=torch.float64, device=device), torch.tensor(Y6, device=device)


def batch(n, d, classes, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return rows.to(device), torch.randint(-1, classes - 1, (n,), generator=generator).to(device)


def brute_force(rows, labels, grid, beta, metric):
    """Class by class and threshold by threshold, from the whole matrix of distances."""
    s = normalize(rows.cpu().double(), dim=1)
    s = s @ s.mT
    distance = (2 - 2 * s).clamp(min=0).sqrt() if metric == "euclidean" else 1 - s
    labels, curves = labels.cpu(), []
    for c in labels.unique():
        inside = labels == c
        if inside.sum() < 2:
            continue
        genuine = distance[inside][:, inside]
        genuine = genuine[~torch.eye(len(genuine), dtype=torch.bool)]
        impostor = distance[inside][:, ~inside].flatten()
        phi = torch.stack([(impostor > d).double().mean() for d in grid])
        psi = torch.stack([(genuine <= d).double().mean() for d in grid])
        bottom = beta**2 * phi + psi
        curves.append(
            torch.where(bottom > 0, (1 + beta**2) * phi * psi / bottom.where(bottom > 0, 1), 0)
        )
    utility = torch.stack(curves)
    spread = (utility - utility.mean(0)).square().mean(0)
    return torch.trapezoid(spread, grid) / (grid[-1] - grid[0]), utility


def test_utilities_of_the_specification(backend64):
    e, y = spec(backend64.device)
    score, curves = dashpot.opis(e, y, d_range=(0.4, 1.2), num_thresholds=5, return_curves=True)
    torch.testing.assert_close(
        curves.thresholds.cpu(), torch.tensor([0.4, 0.6, 0.8, 1, 1.2], dtype=torch.float64)
    )
    want = torch.tensor([
        [0, 0, 0.9333333333, 0.7692307692, 0.6666666667],
        [0, 0, 0.9333333333, 0.7692307692, 0.5454545455],
        [0, 1, 1, 0.8571428571, 0.7692307692],
    ], dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(curves.utility.cpu(), want, rtol=0, atol=1e-10)
    assert curves.classes.tolist() == [0, 1, 2]
    assert score.item() == pytest.approx(0.057277492921848576, abs=1e-14)


@pytest.mark.parametrize(
    ("options", "value"),
    [({"num_thresholds": 5, "beta": 2.0}, 0.056138250696369095), ({}, 0.051080176073849036)],
)
def test_scores_of_the_specification(backend64, options, value):
    e, y = spec(backend64.device)
    assert dashpot.opis(e, y, d_range=(0.4, 1.2), **options).item() == pytest.approx(
        value, abs=1e-14
    )


def test_range_of_the_specification(backend64):
    e, y = spec(backend64.device)
    _, curves = dashpot.opis(e, y, far_range=(0.1, 0.5), return_curves=True)
    ends = curves.thresholds[[0, -1]].tolist()
    assert ends == pytest.approx([0.8679671690591156, 1.1479362820566508], abs=1e-14)


@given(n=st.integers(8, 150), classes=st.integers(3, 30), seed=st.integers(0, 99),
       metric=st.sampled_from(["euclidean", "cosine"]), found=st.booleans())  # fmt: skip
def test_definition(backend64, n, classes, seed, metric, found):
    """Also where classes of one row take part, and where the range is found."""
    rows, labels = batch(n, 4, classes, seed, backend64.device)
    labels[:2], labels[2:4] = 90, 91
    options = {} if found else {"d_range": (0.5, 1.4)}
    score, curves = dashpot.opis(rows, labels, metric=metric, num_thresholds=17, beta=1.5,
                                 return_curves=True, **options)  # fmt: skip
    # Next to a threshold that is a pair's own distance the rounding of the distance decides.
    grid = curves.thresholds.cpu().clone()
    grid[[0, -1]] += 1e-12
    want, utility = brute_force(rows, labels, grid, 1.5, metric)
    torch.testing.assert_close(curves.utility.cpu(), utility, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(score.cpu(), want, rtol=1e-9, atol=1e-12)


@given(n=st.integers(6, 140), seed=st.integers(0, 99), low=st.floats(0.001, 0.4),
       width=st.floats(0.01, 0.6))  # fmt: skip
def test_range_is_where_the_rate_is_reached(backend64, n, seed, low, width):
    """An exact order statistic of the impostor distances: FAR(d0) >= low, and below just before."""
    rows, labels = batch(n, 4, 6, seed, backend64.device)
    labels[:2] = 77
    _, curves = dashpot.opis(rows, labels, far_range=(low, low + width), return_curves=True)
    u = normalize(rows.cpu(), dim=1)
    first, second = torch.triu_indices(n, n, 1)
    distance = (2 - 2 * (u @ u.mT)).clamp(min=0).sqrt()[first, second]
    impostor = distance[(labels[first] != labels[second]).cpu()].sort().values
    for d, rate in zip(curves.thresholds[[0, -1]].tolist(), (low, low + width), strict=True):
        assert (impostor <= d + 1e-9).double().mean() >= rate
        assert (impostor < d - 1e-9).double().mean() < rate


@given(seed=st.integers(0, 99))
def test_rows_have_no_order(backend64, seed):
    rows, labels = batch(70, 5, 8, seed, backend64.device)
    order = torch.randperm(70)
    score = dashpot.opis(rows, labels, d_range=(0.6, 1.3))
    torch.testing.assert_close(
        dashpot.opis(rows[order] * 3, labels[order], d_range=(0.6, 1.3)), score
    )


def test_alike_classes_score_zero(backend64):
    """Three orthogonal pairs: every class has the same curve."""
    rows = torch.eye(3, dtype=torch.float64, device=backend64.device).repeat_interleave(2, 0)
    labels = torch.arange(6, device=rows.device) // 2
    score, curves = dashpot.opis(rows, labels, d_range=(0.1, 1.0), return_curves=True)
    assert score.item() == 0 and (curves.utility == 1).all()


def test_float32_and_nan(backend):
    rows, labels = batch(90, 16, 8, device="cpu")
    want = dashpot.opis(rows, labels, d_range=(0.8, 1.5))
    narrow = rows.float().to(backend.device)
    score = dashpot.opis(narrow, labels.to(backend.device), d_range=(0.8, 1.5))
    assert score.item() == pytest.approx(want.item(), rel=1e-2)
    assert not score.requires_grad
    narrow[3, 3] = torch.nan
    assert dashpot.opis(narrow, labels.to(backend.device)).isnan()


def exact_range(rows, labels, far_range):
    """From all impostor distances."""
    u = normalize(rows, dim=1)
    apart = (labels[:, None] != labels[None, :]).triu(1)
    s = (u @ u.mT)[apart].sort(descending=True).values.double()
    ranks = [max(1, math.ceil(rate * s.numel())) for rate in far_range]
    return [math.sqrt(max(0, 2 - 2 * s[rank - 1].item())) for rank in ranks]


@pytest.mark.parametrize("kind", ["clusters", "misleading", "equal"])
def test_range_of_many_rows(backend, kind):
    """1025 rows and more: a sample shows where the range lies (every second row, by class). It
    misleads where those rows are alike and the others are not; all distances are one where the
    rows of a class are equal and classes orthogonal."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(1100) // 4
    rows = torch.randn(1100, 12, generator=generator)
    if kind == "clusters":
        rows += torch.randn(275, 12, generator=generator)[labels]
    elif kind == "misleading":
        rows[::2] = torch.eye(12)[0] + 1e-2 * rows[::2]
    else:
        labels = labels % 12
        rows = torch.eye(12)[labels]
    rates = (0.02, 0.3)
    _, curves = dashpot.opis(rows.to(backend.device), labels.to(backend.device), far_range=rates,
                             return_curves=True)  # fmt: skip
    want = exact_range(rows, labels, rates)
    assert curves.thresholds[[0, -1]].tolist() == pytest.approx(want, rel=1e-5)


def test_memory(resident_growth):
    """8192 rows: a tenth of one matrix of distances."""
    growth = resident_growth(
        "z, labels = torch.randn(8192, 32), torch.randint(0, 800, (8192,))",
        step="dashpot.opis(z, labels)",
    )
    assert 0 < growth < 8192**2 * 4 / 10


E, Y = spec("cpu")
BAD = [
    ((E[0], Y), {}, ValueError, r"embeddings: .*got \(3,\)"),
    ((E, Y[:3]), {}, ValueError, r"labels: expected \(6,\).*got \(3,\)"),
    ((E, torch.arange(6)), {}, ValueError, r"labels: expected two classes, and two rows"),
    ((E, 0 * Y), {}, ValueError, r"labels: expected two classes"),
    ((E, Y), {"d_range": (1.0, 0.5)}, ValueError, r"d_range: expected low < high"),
    ((E, Y), {"d_range": 1.0}, TypeError, r"d_range: expected two floats, got 1.0"),
    ((E, Y), {"far_range": (0.0, 0.5)}, ValueError, r"far_range: expected 0 < low < high <= 1"),
    ((E, Y), {"far_range": (0.5, 1.5)}, ValueError, r"far_range: expected 0 < low < high <= 1"),
    ((E, Y), {"num_thresholds": 1}, ValueError, r"num_thresholds: expected at least 2, got 1"),
    ((E, Y), {"num_thresholds": 5.0}, TypeError, r"num_thresholds: .*int, got float"),
    ((E, Y), {"beta": 0.0}, ValueError, r"beta: .*> 0, got 0"),
    ((E, Y), {"metric": "l1"}, ValueError, r"metric: .*euclidean, cosine, got 'l1'"),
    ((E, Y), {"return_curves": 1}, TypeError, r"return_curves: .*bool, got int"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=message):
        dashpot.opis(*args, **options)
