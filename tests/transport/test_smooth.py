"""POT's ot.smooth, its names and arguments on dashpot's solver."""

from __future__ import annotations

import contextlib
import inspect
import io

import numpy as np
import pytest
import torch
from dashpot.transport import smooth

from bench import peers

BOTH = pytest.mark.parametrize("name", ["smooth_ot_dual", "smooth_ot_semi_dual"])


def problem(m=40, n=30, seed=0):
    """Two clouds of points, uneven masses; NumPy float64."""
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(m, 2)), draw.normal(size=(n, 2)) + 1
    a, b = draw.random(m) + 0.2, draw.random(n) + 0.2
    cost = ((x[:, None] - y) ** 2).sum(-1)
    return a / a.sum(), b / b.sum(), cost


def value_of(name, a, b, cost, reg, kind, k, log):
    """The objective that POT maximises, by POT's own code, at a log's potentials."""
    pot = peers.load("ot.smooth")
    regularizer = {
        "l2": lambda: pot.SquaredL2(gamma=reg),
        "kl": lambda: pot.NegEntropy(gamma=reg),
        "sparsity_constrained": lambda: pot.SparsityConstrained(gamma=reg, max_nz=k),
    }[kind]()
    if name == "smooth_ot_dual":
        return pot.dual_obj_grad(log["alpha"], log["beta"], a, b, cost, regularizer)[0]
    return pot.semi_dual_obj_grad(log["alpha"], a, b, cost, regularizer)[0]


@pytest.mark.peers
@BOTH
@pytest.mark.parametrize(
    ("kind", "k"), [("l2", None), ("kl", None), ("sparsity_constrained", 2),
                    ("sparsity_constrained", 5)],
)  # fmt: skip
def test_as_good_as_pot(name, kind, k):
    """The same call: a value no lower; where the problem is smooth, marginals no further away and
    the plan POT's."""
    a, b, cost = problem()
    reg = 0.3 if kind == "kl" else 1.0
    arguments = {"reg_type": kind, "max_nz": k, "log": True}
    with contextlib.redirect_stdout(io.StringIO()):
        theirs, their_log = getattr(peers.load("ot.smooth"), name)(a, b, cost, reg, **arguments)
    ours, log = getattr(smooth, name)(a, b, cost, reg, **arguments)
    assert type(ours) is np.ndarray and ours.dtype == np.float64
    assert log.keys() == their_log.keys()
    values = [value_of(name, a, b, cost, reg, kind, k, one) for one in (log, their_log)]
    assert values[0] >= values[1] - 1e-9
    assert -log["res"].fun == pytest.approx(values[0], abs=1e-9)
    if k is not None:  # at a kink the rows' error is that of the tied row which is taken
        assert (ours > 0).sum(0).max() <= k
    else:
        errors = [abs(p.sum(1) - a).sum() + abs(p.sum(0) - b).sum() for p in (ours, theirs)]
        assert errors[0] <= errors[1] + 1e-8
        np.testing.assert_allclose(ours, theirs, atol=2e-3 * theirs.max())


@pytest.mark.peers
@BOTH
def test_the_same_arguments(name):
    """Names, order and defaults, so that positional calls carry over."""
    theirs = inspect.signature(getattr(peers.load("ot.smooth"), name)).parameters
    ours = inspect.signature(getattr(smooth, name)).parameters
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


@BOTH
@pytest.mark.parametrize("k", [40, 41, 1000])
def test_no_bound_is_l2(name, k):
    """POT raises for k = m and beyond in the dual."""
    a, b, cost = problem()
    call = getattr(smooth, name)
    got = call(a, b, cost, 1.0, "sparsity_constrained", max_nz=k)
    np.testing.assert_allclose(got, call(a, b, cost, 1.0), atol=1e-7)


@BOTH
@pytest.mark.parametrize("kind", ["l2", "kl", "sparsity_constrained"])
def test_rows_and_columns_without_mass(name, kind):
    """POT divides by zero."""
    a, b, cost = problem()
    a[3] = b[[0, 7]] = 0
    a, b = a / a.sum(), b / b.sum()
    plan = getattr(smooth, name)(
        a, b, cost, 0.5, kind, max_nz=6 if kind == "sparsity_constrained" else None
    )
    assert np.isfinite(plan).all()
    assert abs(plan[:, [0, 7]]).max() < 1e-6 and abs(plan[3]).max() < 1e-6
    assert abs(plan.sum(0) - b).sum() < 2e-2
    assert (plan[:, 1] > 0).any()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch_tensors(name, dtype):
    """POT's semi-dual fails on them."""
    arrays = problem()
    tensors = [torch.from_numpy(x).to(dtype).requires_grad_() for x in arrays]
    call = getattr(smooth, name)
    plan, log = call(*tensors, 1.0, log=True)
    assert plan.dtype == dtype and not plan.requires_grad
    assert log["alpha"].dtype == dtype and log["alpha"].shape == (40,)
    want = call(*arrays, 1.0)
    atol = 1e-9 if dtype == torch.float64 else 1e-4 * want.max()
    np.testing.assert_allclose(plan.double().numpy(), want, atol=atol)


def test_the_log_and_verbose(capsys):
    a, b, cost = problem()
    _, log = smooth.smooth_ot_semi_dual(a, b, cost, 1.0, "kl", log=True, verbose=True)
    res = log["res"]
    assert res.success and res.message == "converged" and res.nit > 0 and res.nfev > res.nit
    np.testing.assert_array_equal(res.x, log["alpha"])
    assert res.row_error < 1e-7
    assert "converged" in capsys.readouterr().out
    _, log = smooth.smooth_ot_dual(a, b, cost, 1.0, "kl", numItermax=2, log=True)
    assert log["res"].nit == 2 and log["res"].message == "numItermax reached"
    assert log["res"].x.shape == (70,)
    assert capsys.readouterr().out == ""


def test_errors():
    a, b, cost = problem(5, 4)
    call = smooth.smooth_ot_dual
    with pytest.raises(ValueError, match=r"reg_type: expected one of l2.*got 'tv'"):
        call(a, b, cost, 1.0, "tv")
    with pytest.raises(ValueError, match=r"method: expected one of L-BFGS-B.*got 'CG'"):
        call(a, b, cost, 1.0, method="CG")
    with pytest.raises(ValueError, match=r"max_nz: .*got None"):
        call(a, b, cost, 1.0, "sparsity_constrained")
    with pytest.raises(ValueError, match=r"M: expected \(m, n\), got \(5,\)"):
        call(a, b, cost[:, 0], 1.0)
    with pytest.raises(ValueError, match=r"b: expected one axis, got \(4, 1\)"):
        call(a, b[:, None], cost, 1.0)
    with pytest.raises(ValueError, match=r"b: expected"):
        call(a, a, cost, 1.0)
    with pytest.raises(ValueError, match=r"gamma: expected a positive.*got 0"):
        call(a, b, cost, 0)
