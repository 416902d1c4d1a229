"""Rows that the tests of this family share."""

from __future__ import annotations

import numpy as np
import pytest
import torch


def _spec_rows(dtype=torch.float64, device="cpu") -> torch.Tensor:
    """(5, 4): four workers that agree and one that does not; the specification's vectors."""
    rows = [
        [1, 2, 0, -1],
        [1.2, 1.8, 0.1, -0.9],
        [0.9, 2.1, -0.1, -1.1],
        [1.1, 1.9, 0.2, -1],
        [-3, 0.5, 4, 2],
    ]
    return torch.tensor(rows, dtype=dtype, device=device)


def _random_rows(p, d, seed=0, dtype=torch.float64, device="cpu") -> torch.Tensor:
    """(p, d): a common direction, noise, and a loud last worker."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d, generator=generator) + 0.5 * torch.randn(p, d, generator=generator)
    rows[-1] *= -3
    return rows.to(dtype).to(device)


def _forms(rows: torch.Tensor) -> dict:
    """(p, d), d >= 6, as every form of `grads` there is: tensors, lists, lists of parameters."""
    p, d = rows.shape
    cuts = [1, 4, d - 5]  # a scalar parameter, a matrix, the rest
    return {
        "tensor": rows,
        "tensor (p, 2, d/2)": rows.reshape(p, 2, -1),
        "list": list(rows.unbind(0)),
        "tuple": tuple(rows.unbind(0)),
        "lists": [
            [a.reshape(()), b.reshape(2, 2), c]
            for a, b, c in (row.split(cuts) for row in rows.unbind(0))
        ],
    }


def _lazy_zeros(p: int, d: int, device: str) -> torch.Tensor:
    """(p, d) bfloat16 zeros; on the CPU only the pages that are written take memory."""
    if device != "cpu":
        return torch.zeros(p, d, dtype=torch.bfloat16, device=device)
    return torch.from_numpy(np.zeros(p * d, np.int16)).view(torch.bfloat16).view(p, d)


@pytest.fixture(scope="session")
def lazy_zeros():
    return _lazy_zeros


@pytest.fixture(scope="session")
def spec_rows():
    return _spec_rows


@pytest.fixture(scope="session")
def random_rows():
    return _random_rows


@pytest.fixture(scope="session")
def forms():
    return _forms


@pytest.fixture(scope="session")
def flat():
    """A worker's update as one vector, whatever its form."""

    def flatten(update) -> torch.Tensor:
        tensors = update if isinstance(update, list) else [update]
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    return flatten
