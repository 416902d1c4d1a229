"""byzfl's names: its arguments, its values, its kinds of input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dashpot.aggregate import byzfl as names

from bench import peers

BYZFL = {
    "Average": {},
    "Median": {},
    "TrMean": {"f": 3},
    "Meamed": {"f": 3},
    "GeometricMedian": {},
    "Krum": {"f": 3},
    "MultiKrum": {"f": 3},
    "CenteredClipping": {"L": 2, "tau": 1.0},
    "MDA": {"f": 3},
    "MoNNA": {"f": 3, "idx": 2},
    "NNM": {"f": 3},
    "Clipping": {"c": 3.0},
    "ARC": {"f": 3},
    "Bucketing": {"s": 3},
}


@pytest.mark.peers
@pytest.mark.parametrize("p", [7, 11, 12])
@pytest.mark.parametrize("name", BYZFL)
def test_byzfls_values(random_rows, monkeypatch, name, p):
    """byzfl turns tensors into float32; held back from that, it agrees to float64's rounding."""
    theirs = getattr(peers.load("byzfl"), name)(**BYZFL[name])
    ours = getattr(names, name)(**BYZFL[name])
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    for seed in range(3):  # CenteredClipping goes on from its last result
        rows = random_rows(p, 40, seed)
        torch.manual_seed(seed)
        want = theirs(rows.clone())
        torch.manual_seed(seed)
        torch.testing.assert_close(ours(rows), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BYZFL)
def test_byzfls_kinds_of_input(random_rows, name):
    """Arrays and tensors, whole or in a list; the same kind comes back, of the same dtype."""
    rows = random_rows(11, 40, dtype=torch.float32)

    def run(vectors):
        torch.manual_seed(0)
        return getattr(names, name)(**BYZFL[name])(vectors)

    want = run(rows)
    assert isinstance(want, torch.Tensor) and want.dtype == torch.float32
    assert torch.equal(run(list(rows)), want)
    for vectors in (rows.numpy(), list(rows.numpy())):
        got = run(vectors)
        assert isinstance(got, np.ndarray) and np.array_equal(got, want.numpy())


def test_byzfls_arguments():
    assert repr(names.GeometricMedian()) == "GeometricMedian(nu=0.1, T=3)"
    assert repr(names.MoNNA(f=1)) == "MoNNA(f=1, idx=0)"
    assert repr(names.CenteredClipping()) == "CenteredClipping(L=1, tau=100.0)"
    center = torch.ones(4)
    assert torch.equal(names.CenteredClipping(center, L=0)(torch.zeros(2, 4)), center)
    with pytest.raises(ValueError, match="f: expected at least 0, got -1"):
        names.Krum(f=-1)
    with pytest.raises(ValueError, match="f: expected 2 f < n = 4, got 2"):
        names.MultiKrum(f=2)(torch.zeros(4, 3))
    with pytest.raises(TypeError, match=r"vectors: expected a NumPy array.*got str"):
        names.Average()("rows")
    with pytest.raises(TypeError, match=r"m: expected an array or a torch.Tensor, got float"):
        names.CenteredClipping(m=0.0)
