"""sparse_simplex_projection: the nearest k-sparse point of a simplex."""

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.tests_op("sparse_simplex_projection")

VECTOR = [0.9, 0.5, 0.45, -0.2, 0.1]


@pytest.mark.parametrize(
    ("max_nz", "total", "want"),
    [
        (1, 1.0, [1, 0, 0, 0, 0]),
        (2, 1.0, [0.7, 0.3, 0, 0, 0]),
        (3, 1.0, [0.6166666667, 0.2166666667, 0.1666666667, 0, 0]),
        (5, 1.0, [0.6166666667, 0.2166666667, 0.1666666667, 0, 0]),
        (2, 0.3, [0.3, 0, 0, 0, 0]),
    ],
)
def test_vectors_of_the_specification(backend64, max_nz, total, want):
    u = torch.tensor(VECTOR, dtype=torch.float64, device=backend64.device)
    x = dashpot.sparse_simplex_projection(u, max_nz, total)
    torch.testing.assert_close(
        x, torch.tensor(want, dtype=x.dtype, device=x.device), atol=1e-10, rtol=0
    )


@given(n=st.integers(1, 7), k=st.integers(1, 8), seed=st.integers(0, 99), total=st.floats(0.1, 3.0))
def test_no_support_does_better(backend64, best_column, n, k, seed, total):
    u = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, want = best_column(u, total, 1.0, min(k, n))
    x = dashpot.sparse_simplex_projection(u.to(backend64.device), k, total)
    torch.testing.assert_close(x.cpu(), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 20, 64])
@pytest.mark.parametrize("n", [64, 257])
def test_sum_and_count_of_long_rows(backend, n, k):
    """k in the registers' lists (<= 8), by thresholds (> 8), and without effect (64 of 64)."""
    generator = torch.Generator().manual_seed(n + k)
    u = torch.randn(40, n, generator=generator).to(backend.device)
    total = torch.rand(40, generator=generator).to(backend.device) * 5
    x = dashpot.sparse_simplex_projection(u, k, total)
    assert bool((x >= 0).all()) and int((x > 0).sum(1).max()) <= k
    torch.testing.assert_close(x.sum(1), total, rtol=2e-6, atol=2e-6)
    kept = u.double().topk(k).indices  # its support lies among the k largest
    assert float((x.double().sum(1) - x.double().gather(1, kept).sum(1)).abs().max()) == 0


@pytest.mark.parametrize("k", [3, 20])
def test_equal_entries_are_taken_in_order(backend64, k):
    u = torch.zeros(2, 50, dtype=torch.float64, device=backend64.device)
    u[1, ::2] = 1.0
    x = dashpot.sparse_simplex_projection(u, k, 6.0)
    want = torch.zeros_like(x)
    want[0, :k] = 6 / k
    want[1, : 2 * k : 2] = 6 / k
    torch.testing.assert_close(x, want)


@pytest.mark.parametrize("k", [2, 12])
def test_forbidden_entries(backend64, k):
    u = torch.linspace(1, 0, 30, dtype=torch.float64, device=backend64.device).repeat(3, 1)
    u[1, 1:] = -torch.inf
    u[2] = -torch.inf
    x = dashpot.sparse_simplex_projection(u, k)
    assert x[0].sum().item() == pytest.approx(1)
    assert x[1].tolist() == [1.0] + [0.0] * 29
    assert not x[2].any()


def test_total_zero_gives_zero(backend64):
    u = torch.randn(5, 12, dtype=torch.float64, device=backend64.device).requires_grad_()
    x = dashpot.sparse_simplex_projection(u, 3, 0.0)
    (grad,) = torch.autograd.grad(x.sum(), u)
    assert not x.any() and not grad.any()


def test_any_axis_and_no_rows(backend64):
    u = torch.randn(3, 6, 4, dtype=torch.float64, device=backend64.device)
    total = torch.rand(3, 4, dtype=torch.float64, device=backend64.device)
    got = dashpot.sparse_simplex_projection(u, 2, total, dim=1)
    want = dashpot.sparse_simplex_projection(u.mT.contiguous(), 2, total)
    torch.testing.assert_close(got, want.mT)
    assert dashpot.sparse_simplex_projection(u[:0], 2, dim=1).shape == (0, 6, 4)


def test_more_than_the_length_is_no_bound(backend64):
    u = torch.randn(4, 6, dtype=torch.float64, device=backend64.device)
    got = dashpot.sparse_simplex_projection(u, 1000)
    torch.testing.assert_close(got, dashpot.sparse_simplex_projection(u, 6))


def test_errors():
    u = torch.ones(3, 4)
    with pytest.raises(TypeError, match=r"input: .*Tensor.*got list"):
        dashpot.sparse_simplex_projection([1.0], 1)
    with pytest.raises(TypeError, match=r"input: .*float64.*got torch.int64"):
        dashpot.sparse_simplex_projection(torch.arange(3), 1)
    with pytest.raises(ValueError, match=r"input: .*at least one axis"):
        dashpot.sparse_simplex_projection(torch.tensor(1.0), 1)
    with pytest.raises(ValueError, match=r"input: .*at least one entry.*\(3, 0\)"):
        dashpot.sparse_simplex_projection(u[:, :0], 1)
    with pytest.raises(ValueError, match=r"max_nz: expected at least 1, got 0"):
        dashpot.sparse_simplex_projection(u, 0)
    with pytest.raises(TypeError, match="max_nz: expected an int, got float"):
        dashpot.sparse_simplex_projection(u, 2.0)
    with pytest.raises(ValueError, match=r"total: .*at least 0, got -1"):
        dashpot.sparse_simplex_projection(u, 2, -1.0)
    with pytest.raises(ValueError, match=r"total: expected \(3,\).*got \(4,\)"):
        dashpot.sparse_simplex_projection(u, 2, torch.ones(4))
    with pytest.raises(TypeError, match=r"total: .*got str"):
        dashpot.sparse_simplex_projection(u, 2, "1")
    with pytest.raises(ValueError, match="dim: expected an axis"):
        dashpot.sparse_simplex_projection(u, 2, dim=2)
