"""What the tests of this family share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

# The specification's plan: six tokens, two choices each, four experts.
IDS = [[2, 0], [0, 1], [2, 1], [0, 2], [0, 1], [2, 0]]


@pytest.fixture
def spec_ids():
    return torch.tensor(IDS, dtype=torch.int32)


@pytest.fixture(scope="session")
def lazy():
    """lazy(rows, columns, dtype): zeros; on the CPU only the pages that are written take memory."""

    def make(rows: int, columns: int, dtype=torch.bfloat16, device="cpu") -> torch.Tensor:
        if device != "cpu":
            return torch.zeros(rows, columns, dtype=dtype, device=device)
        size = torch.empty((), dtype=dtype).element_size()
        raw = torch.from_numpy(np.zeros(rows * columns * size, np.uint8))
        return raw.view(dtype).view(rows, columns)

    return make
