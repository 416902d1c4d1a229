"""The loop that solves what is too large for one block of a GPU: kernels evaluate, PyTorch steps.

There is no GPU here, so the loop is told that there are kernels (the CPU's), that nobody may ask
for a number, and is watched by a dispatch mode, which sees every operator."""

import contextlib

import pytest
import torch
from dashpot.transport import _reference_solve, _solve
from dashpot.transport._problem import points_cost, random_points
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {  # operators that read a number from the device, or whose output's size is one
    "_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "unique",
    "_unique2", "unique_dim", "allclose",
}  # fmt: skip
FROM_THE_HOST = {"lift_fresh"}  # torch.tensor, torch.as_tensor: a copy that waits on its stream


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out

    @property
    def waits(self):
        return [name for name in self.names if name in WAITS | FROM_THE_HOST]

    @property
    def evaluations(self):
        return self.names.count("ot_value_grad_forward")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_solve, "_has_kernels", lambda tensor: True)
    monkeypatch.setattr(_reference_solve, "may_ask", lambda tensor: False)
    monkeypatch.setattr(_solve, "CHUNK", 4000)


M, N, K, D = 150, 90, 3, 2
SOLVES = {  # solver, formulation, reg, steps, smoothing
    "adam": ("adam", "semi_dual", "sparse", 6, 0.0),
    "adam-dual": ("adam", "dual", "sparse", 6, 0.0),
    "lbfgs": ("lbfgs", "semi_dual", "sparse", 6, 0.0),
    "lbfgs-l2": ("lbfgs", "semi_dual", "l2", 6, 0.0),
    "auto": ("auto", "semi_dual", "sparse", 6, 0.0),
    "smoothed": ("lbfgs", "dual", "sparse", 4, 1e-4),
    "sinkhorn": ("sinkhorn", "semi_dual", "negentropy", 6, 0.0),
}


def problem(reg, of_points):
    x, y, a, b, alpha, beta, _, _ = random_points((2, K, D, M, N), torch.float64, "cpu", 0)
    b = b + 0.5 / N
    b = b / b.sum(1, keepdim=True)
    points = (x, y, "sqeuclidean") if of_points else (points_cost(x, y, "sqeuclidean"), None, "")
    return points, a, b, 0.1 * alpha, 0.1 * beta, M if reg != "sparse" else K


def solve(how, of_points, watch=contextlib.nullcontext):
    solver, formulation, reg, steps, smoothing = SOLVES[how]
    (cost, y, metric), a, b, alpha, beta, k = problem(reg, of_points)
    with watch() as seen:
        out = _solve._regularized_ot_reference(
            cost, a, b, alpha, beta, False, reg, 1.0, k, formulation, solver, steps, 1e-9,
            smoothing, 1e-2, y, metric,
        )  # fmt: skip
    return out, seen


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("of_points", [False, True], ids=["stored", "points"])
@pytest.mark.parametrize("how", SOLVES)
def test_no_number_is_asked_for(how, of_points):
    _, seen = solve(how, of_points, Watch)
    assert seen.waits == []
    assert seen.evaluations > 6


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("how", SOLVES)
def test_an_evaluation_is_one_pass_of_a_kernel(how):
    """Of points nothing as large as the cost is made by the loop, the smoothed dual's shares
    included."""
    _, seen = solve(how, True, Watch)
    per_step = 11 * 2 * (M + N)  # L-BFGS's pairs, of a batch of two
    assert seen.largest <= max(per_step, 2 * _solve.CHUNK)
    assert seen.largest < 2 * M * N
    (_, counts), evaluations = solve(how, True)[0][-2:], seen.evaluations
    assert evaluations >= int(counts[:, 1].max())


@pytest.mark.parametrize(
    ("how", "of_points"),
    # points have no Newton's steps where there are kernels: "auto" then takes another path
    [(how, of_points) for how in SOLVES for of_points in (False, True)
     if not (of_points and how == "auto")],
)  # fmt: skip
def test_kernels_and_pytorch_agree(how, of_points, monkeypatch):
    """The loop with kernels, levels of the smoothed dual kept, against the loop without."""
    want, _ = solve(how, of_points)
    monkeypatch.setattr(_solve, "_has_kernels", lambda tensor: True)
    got, _ = solve(how, of_points)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_the_watch_sees_what_waits():
    """The tests above are red where a loop asks."""
    one = torch.ones(3)
    for ask in (lambda: bool((one > 0).all()), lambda: one.sum().item(), lambda: one.nonzero(),
                lambda: torch.as_tensor(2.0)):  # fmt: skip
        with Watch() as seen:
            ask()
        assert seen.waits
