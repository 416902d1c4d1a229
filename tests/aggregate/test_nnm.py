"""nnm and bucketing: mixing matrices of the rows."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def test_vector(backend64, spec_rows):
    rows = spec_rows(device=backend64.device)
    mixed = dashpot.nnm(rows, 1) @ rows
    torch.testing.assert_close(mixed[4].tolist(), [0.075, 1.55, 1.075, -0.225], rtol=0, atol=1e-12)


def test_is_its_two_steps(backend, random_rows, forms):
    rows = random_rows(6, 26, dtype=torch.float32, device=backend.device)
    want = dashpot.nnm_coeffs(dashpot.pairwise_sqdist(rows), 2)
    for grads in forms(rows).values():
        mixing = dashpot.nnm(grads, 2)
        assert mixing.dtype == torch.float64 and torch.equal(mixing, want)


def test_rows_that_want_gradients_give_none(random_rows):
    assert not dashpot.nnm(random_rows(5, 8).requires_grad_(), 1).requires_grad


def test_nnm_errors(random_rows):
    with pytest.raises(ValueError, match="f: expected 0 <= f <= 4, got 5"):
        dashpot.nnm(random_rows(5, 8), 5)
    with pytest.raises(ValueError, match="f: expected at least 0, got -1"):
        dashpot.NNM(-1)


# --------------------------------------------------------------------------------------------
# Bucketing


@given(p=st.integers(1, 12), s=st.integers(1, 14), seed=st.integers(0, 99))
def test_every_worker_is_in_one_bucket(p, s, seed):
    rows = torch.ones(p, 3)
    mixing = dashpot.bucketing(rows, s, torch.Generator().manual_seed(seed))
    sizes = (mixing != 0).sum(1)  # all s but the last
    assert mixing.shape == (-(-p // s), p) and mixing.dtype == torch.float64
    assert ((mixing != 0).sum(0) == 1).all()
    assert (sizes[:-1] == s).all() and 1 <= sizes[-1] <= s
    torch.testing.assert_close(mixing.sum(1), torch.ones(len(mixing)).double())


def test_generator_decides(random_rows):
    rows = random_rows(12, 5)

    def draw(seed):
        return dashpot.bucketing(rows, 3, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    assert torch.equal(dashpot.bucketing(rows, 3), draw(1))


def test_bucketing_errors(random_rows):
    with pytest.raises(ValueError, match="s: expected at least 1, got 0"):
        dashpot.bucketing(random_rows(5, 8), 0)
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator, got int"):
        dashpot.Bucketing(2, 7)
