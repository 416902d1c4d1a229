"""hard_pair_indices: the least similar row of one's label, the most similar of another."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

F5 = [[1, 2, 0], [2, 1, 1], [0, 1, 3], [1, 0, 1], [3, 1, 0]]


def brute_force(features, labels):
    """Row by row, pair by pair; the lowest index on ties, the row itself if there is none."""
    cosine = normalize(features.double(), dim=1)
    cosine = (cosine @ cosine.mT).tolist()
    labels, found = labels.tolist(), ([], [])
    for i in range(len(labels)):
        same = [j for j in range(len(labels)) if j != i and labels[j] == labels[i]]
        other = [j for j in range(len(labels)) if labels[j] != labels[i]]
        found[0].append(min(same, key=lambda j, i=i: cosine[i][j], default=i))
        found[1].append(max(other, key=lambda j, i=i: cosine[i][j], default=i))
    return [torch.tensor(one) for one in found]


def official(features, labels):
    """The published code's steps: masks of 0 and 1 times the cosines, argmin and argmax, and the
    row itself where the positive came out as 0."""
    u = normalize(features, dim=1)
    cosine = u @ u.mT
    same = (labels[:, None] == labels[None, :]).to(u.dtype)
    positive = (cosine * same * (1 - torch.eye(len(u), dtype=u.dtype))).argmin(1)
    index = torch.arange(len(u))
    return torch.where(positive == 0, index, positive), (cosine * (1 - same)).argmax(1)


def features_and_labels(n, d, classes, seed, positive, device):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, classes - 1, (n,), generator=generator)
    return (features.abs() if positive else features).to(device), labels.to(device)


def test_vectors(backend64):
    f = torch.tensor(F5, dtype=torch.float64, device=backend64.device)
    y = torch.tensor([0, 1, 0, 1, 0], device=f.device)
    hard_pos, hard_neg = dashpot.hard_pair_indices(f, y)
    assert hard_pos.tolist() == [2, 3, 4, 1, 2] and hard_neg.tolist() == [1, 4, 3, 2, 1]
    assert dashpot.hard_pair_indices(f, y, mode="official")[0].tolist() == [0, 1, 1, 3, 1]


@given(
    n=st.integers(1, 140), classes=st.integers(1, 9), seed=st.integers(0, 99),
    positive=st.booleans(),
)  # fmt: skip
def test_paper_mode_is_brute_force(backend64, n, classes, seed, positive):
    features, labels = features_and_labels(n, 5, classes, seed, positive, backend64.device)
    found = dashpot.hard_pair_indices(features, labels)
    assert all(
        torch.equal(a.cpu(), b) for a, b in zip(found, brute_force(features, labels), strict=True)
    )


@given(
    n=st.integers(1, 140), classes=st.integers(1, 9), seed=st.integers(0, 99),
    positive=st.booleans(),
)  # fmt: skip
def test_official_mode_is_the_release(backend64, n, classes, seed, positive):
    features, labels = features_and_labels(n, 5, classes, seed, positive, backend64.device)
    found = dashpot.hard_pair_indices(features, labels, mode="official")
    want = official(features.cpu(), labels.cpu())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, want, strict=True))


def test_official_positives_of_non_negative_features_are_none(backend64):
    """What the default repairs: 12 rows without negative entries, and not one positive found."""
    features, labels = features_and_labels(12, 5, 3, 0, True, backend64.device)
    wrong, _ = dashpot.hard_pair_indices(features, labels, mode="official")
    index = torch.arange(12, device=features.device)
    assert not ((labels[wrong] == labels) & (wrong != index)).any()
    right, _ = dashpot.hard_pair_indices(features, labels)
    assert (labels[right] == labels).all()


def test_length_does_not_matter(backend64):
    features, labels = features_and_labels(70, 6, 5, 0, False, backend64.device)
    scale = torch.rand(70, 1, dtype=torch.float64, device=features.device) + 0.1
    a, b = (dashpot.hard_pair_indices(f, labels) for f in (features, features * scale))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_lowest_index_of_equal_rows(backend):
    """200 rows that are only two different ones: several panels, the first of each kind wins."""
    rows = torch.eye(2, 8)[torch.arange(200) % 2].to(backend.device)
    labels = torch.arange(200, device=rows.device) // 2 % 2
    hard_pos, hard_neg = dashpot.hard_pair_indices(rows, labels)
    assert hard_pos[:4].tolist() == [1, 0, 3, 2] and hard_neg[:4].tolist() == [2, 3, 0, 1]
    assert (hard_neg < 4).all() and (hard_pos < 4).all()


def test_no_candidate(backend):
    features = torch.randn(5, 3, device=backend.device)
    index = torch.arange(5, device=backend.device)
    assert torch.equal(dashpot.hard_pair_indices(features, index)[0], index)
    assert torch.equal(dashpot.hard_pair_indices(features, 0 * index)[1], index)


def test_a_row_with_nan_is_chosen_by_none(backend):
    features, labels = features_and_labels(80, 6, 4, 0, False, backend.device)
    features = features.float()
    features[7, 2] = torch.nan
    kept = torch.arange(80, device=features.device) != 7
    for found in dashpot.hard_pair_indices(features, labels):
        assert (found[kept] != 7).all()
        assert found[7] == 7


BAD = [
    ((torch.ones(3), torch.zeros(3).long()), {}, ValueError, r"features: .*got \(3,\)"),
    ((torch.ones(3, 2), torch.zeros(2).long()), {}, ValueError, r"labels: expected \(3,\)"),
    ((torch.ones(3, 2), torch.zeros(3)), {}, TypeError, r"labels: expected integers"),
    ((torch.ones(3, 2), torch.zeros(3).long()), {"mode": "x"}, ValueError, r"mode: .*got 'x'"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=message):
        dashpot.hard_pair_indices(*args, **options)
