"""Problems that the tests of this family share."""

from __future__ import annotations

import itertools

import pytest
import torch


def _spec_problem(dtype=torch.float64, device="cpu") -> dict:
    """The specification's second vector: C (4, 3), a (4,), b (3,), alpha (4,), beta (3,)."""
    rows = {
        "cost": [[0.1, 0.8, 0.5], [0.7, 0.2, 0.9], [0.4, 0.6, 0.3], [1, 0.35, 0.15]],
        "a": [0.3, 0.2, 0.4, 0.1],
        "b": [0.5, 0.25, 0.25],
        "alpha": [0.6, 0.5, 0.85, 0.2],
        "beta": [0.1, 0.05, -0.2],
    }
    return {name: torch.tensor(value, dtype=dtype, device=device) for name, value in rows.items()}


def _best_column(scores: torch.Tensor, mass: float, gamma: float, k: int) -> tuple:
    """max t.s - gamma/2 |t|^2 over t >= 0, sum t = mass, at most k nonzeros, by trying every
    support: (value, t). On a support the optimum is s - theta, theta from the sum."""
    best = (-float("inf"), None)
    n = scores.numel()
    for size in range(1, k + 1):
        for support in itertools.combinations(range(n), size):
            chosen = scores[list(support)]
            t = (chosen - (chosen.sum() - gamma * mass) / size) / gamma
            value = float((t * chosen).sum() - gamma / 2 * t.square().sum())
            if bool((t >= 0).all()) and value > best[0]:
                full = torch.zeros_like(scores)
                full[list(support)] = t
                best = (value, full)
    return best


@pytest.fixture(scope="session")
def spec_problem():
    return _spec_problem


@pytest.fixture(scope="session")
def best_column():
    return _best_column
