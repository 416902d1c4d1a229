"""coordinate_median: the rule by itself; its properties are in test_coordinate_rules.py."""

from __future__ import annotations

import dashpot
import pytest
import torch

from bench import peers


def test_vector(backend64, spec_rows):
    rows = spec_rows(device=backend64.device)
    want = torch.tensor([1, 1.9, 0.1, -1], dtype=torch.float64)
    torch.testing.assert_close(dashpot.coordinate_median(rows).cpu(), want, rtol=0, atol=1e-14)
    want = torch.tensor([1.05, 1.85, 0.15, -0.95], dtype=torch.float64)
    torch.testing.assert_close(dashpot.coordinate_median(rows[[0, 1, 3, 4]]).cpu(), want)


def test_lower_is_the_median_of_torch(backend, random_rows):
    for p in (1, 2, 7, 8, 20):
        rows = random_rows(p, 40, dtype=torch.float32, device=backend.device)
        got = dashpot.coordinate_median(rows, lower=True)
        assert torch.equal(got, rows.median(dim=0).values)


@pytest.mark.peers
@pytest.mark.parametrize("p", [5, 8, 15, 30])
def test_agrees_with_byzfl(random_rows, p):
    """NumPy arrays, which byzfl leaves in float64; it would cast tensors to float32."""
    rows = random_rows(p, 200)
    want = torch.from_numpy(peers.load("byzfl").Median()(rows.numpy()))
    torch.testing.assert_close(dashpot.coordinate_median(rows), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["tensor", "tensor (p, 2, d/2)", "list", "lists"])
def test_out(backend, random_rows, forms, flat, form):
    grads = forms(random_rows(5, 26, dtype=torch.float32, device=backend.device))[form]
    want = dashpot.coordinate_median(grads)
    out = [torch.empty_like(t) for t in grads[0]] if form == "lists" else torch.empty_like(grads[0])
    assert flat(out).isnan().all()
    assert dashpot.coordinate_median(grads, out=out) is out
    assert torch.equal(flat(out), flat(want))


def test_out_takes_no_gradient(backend, random_rows):
    rows = random_rows(3, 8, dtype=torch.float32, device=backend.device).requires_grad_()
    with pytest.raises(RuntimeError, match="out= does not support gradients"):
        dashpot.coordinate_median(rows, out=torch.empty_like(rows[0]))


def test_errors():
    with pytest.raises(TypeError, match=r"grads: .*got int"):
        dashpot.coordinate_median(7)
    with pytest.raises(TypeError, match=r"lower: expected a bool, got int"):
        dashpot.coordinate_median(torch.ones(3, 2), 1)
    with pytest.raises(ValueError, match=r"out: .*\(2,\).*got \(3,\)"):
        dashpot.coordinate_median(torch.ones(3, 2), out=torch.ones(3))
