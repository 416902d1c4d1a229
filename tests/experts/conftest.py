"""What the tests of this family share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dashpot.experts._stack import ACTIVATIONS

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


# --------------------------------------------------------------------------------------------
# Layers of experts, by hand


def _one_expert(layer, e: int, x: torch.Tensor) -> torch.Tensor:
    h = F.linear(x, layer.w1[e], None if layer.b1 is None else layer.b1[e])
    act = layer.activation
    act = ACTIVATIONS[act] if isinstance(act, str) else act
    h = act(h[..., : layer.hidden]) * h[..., layer.hidden :] if layer.gated else act(h)
    return F.linear(h, layer.w2[e], None if layer.b2 is None else layer.b2[e])


@pytest.fixture
def one_expert():
    """(layer, e, x): expert e of a layer as a plain network."""
    return _one_expert


@pytest.fixture
def by_hand():
    """(layer, x, ids): each token through the expert of its id, one by one."""

    def by_hand(layer, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = zip(x.reshape(-1, layer.d), ids.flatten().tolist(), strict=True)
        return torch.stack([_one_expert(layer, e, row) for row, e in rows]).view(x.shape)

    return by_hand
