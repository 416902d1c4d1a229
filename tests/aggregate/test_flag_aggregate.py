"""flag_aggregate: p workers' gradients into one, by the Gram matrix."""

from __future__ import annotations

import importlib

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

EPS = 1e-7  # the official code's


def official(rows: torch.Tensor, m: int, lam: float, n_iter: int) -> torch.Tensor:
    """The published algorithm itself, on d-dimensional vectors: a singular value decomposition of
    the (d, p) matrix of unit rows, with p (p - 1) columns of differences beside them if lam > 0."""
    p = rows.shape[0]
    x = (rows / rows.norm(dim=1, keepdim=True)).mT  # (d, p)
    first, second = (~torch.eye(p, dtype=torch.bool)).nonzero().unbind(1)
    gaps = x[:, first] - x[:, second]  # (d, p (p - 1)), both orders
    v, q = torch.zeros(p, dtype=rows.dtype), torch.zeros(len(first), dtype=rows.dtype)
    basis, best = None, float(p)
    for _ in range(n_iter):
        columns = x * (1 - v + EPS) ** -0.25
        if lam:
            factor = lam / (p * (p - 1)) * ((1 - q).abs() + EPS) ** -0.25
            columns = torch.cat([columns, gaps * factor], dim=1)
        new = torch.linalg.svd(columns, full_matrices=False).U[:, :m]  # (d, m)
        v = (new.mT @ x).square().sum(0).clamp(0, 1)
        q = (new.mT @ gaps).square().sum(0)
        objective = (1 - v).sqrt().sum().item()
        if objective > best:
            break
        fall, basis, best = best - objective, new, objective
        if fall <= 1e-10 or objective <= 1e-10:
            break
    return basis @ (basis.mT @ x.sum(1)) / m


@pytest.mark.parametrize("n_iter", [1, 2, 5])
@pytest.mark.parametrize("lam", [0.0, 1.0, 64.0])
def test_agrees_with_the_published_algorithm(backend64, random_rows, lam, n_iter):
    rows = random_rows(15, 3000)
    update = dashpot.flag_aggregate(rows.to(backend64.device), 8, lam=lam, n_iter=n_iter)
    want = official(rows, 8, lam, n_iter)
    torch.testing.assert_close(update.cpu(), want, rtol=0, atol=1e-9 * want.norm().item())


@pytest.mark.backends("kernels")
@pytest.mark.parametrize("lam", [0.0, 64.0])
def test_float32_is_as_near_to_the_truth_as_plain_pytorch(backend, random_rows, lam):
    """The same algorithm in plain PyTorch, as the benchmark has it, both in float32."""
    plain = importlib.import_module("bench.aggregate.bench_flag_aggregate").torch_gram
    rows = random_rows(15, 3000, dtype=torch.float32)
    truth = official(rows.double(), 8, lam, 1)
    update = dashpot.flag_aggregate(rows.to(backend.device), 8, lam=lam)
    assert update.dtype == torch.float32
    error = (update.cpu().double() - truth).norm()
    assert error <= 1.5 * (plain(rows, lam).double() - truth).norm()
    assert error <= 2e-6 * truth.norm()


VECTORS = [  # the specification's
    ({"m": 2}, [0.5873965253, 1.6439779443, 0.4132691132, -0.6349761408]),
    ({"m": 2, "output": "paper"}, [0.2435203138, 1.6579430286, 0.8429614855, -0.4001415882]),
    ({"m": 2, "n_iter": 3, "lam": 2.0, "pair": "objective"},
     [0.5217167501, 1.6691286275, 0.3676452292, -0.6490045055]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "update"), VECTORS)
def test_vectors(backend64, spec_rows, options, update):
    """All options arrive; test_flag_coeffs.py has every vector."""
    got = dashpot.flag_aggregate(spec_rows(device=backend64.device), **options)
    want = torch.tensor(update, dtype=torch.float64)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-9)


OPTIONS = [  # one option, and what it needs beside it to make a difference
    ({"m": 1}, {}),
    ({"n_iter": 4}, {}),
    ({"lam": 90.0}, {"n_iter": 2}),
    ({"eps": 0.1}, {"n_iter": 2}),
    ({"power": 1.0}, {"n_iter": 2}),
    ({"pair": "objective"}, {"lam": 9.0}),
    ({"output": "rescaled"}, {}),
    ({"tol": 0.5}, {"n_iter": 4}),
]


@pytest.mark.parametrize(("option", "beside"), OPTIONS)
def test_is_its_three_steps(backend64, random_rows, option, beside):
    """combine(grads, flag_coeffs(gram(grads))); each option arrives, and each one matters."""
    rows = random_rows(6, 40, device=backend64.device)
    coeffs, info = dashpot.flag_coeffs(dashpot.gram(rows), **option, **beside)
    update, got = dashpot.flag_aggregate(rows, **option, **beside, return_info=True)
    torch.testing.assert_close(update, dashpot.combine(rows, coeffs), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.v, info.v, rtol=1e-10, atol=1e-10)
    assert torch.equal(got.iters, info.iters)
    assert not torch.allclose(dashpot.flag_aggregate(rows, **beside), update, rtol=1e-4)


# --------------------------------------------------------------------------------------------
# Properties


@given(p=st.integers(2, 8), seed=st.integers(0, 99), lam=st.sampled_from([0.0, 3.0]))
def test_workers_have_no_order(backend64, random_rows, p, seed, lam):
    rows = random_rows(p, 30, seed, device=backend64.device)
    update = dashpot.flag_aggregate(rows, lam=lam, n_iter=2)
    moved = dashpot.flag_aggregate(rows[torch.randperm(p)], lam=lam, n_iter=2)
    torch.testing.assert_close(moved, update, rtol=1e-8, atol=1e-9)


@given(seed=st.integers(0, 99), output=st.sampled_from(["official", "paper", "rescaled"]))
def test_turns_with_the_space(backend64, random_rows, seed, output):
    rows = random_rows(5, 12, seed, device=backend64.device)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q.to(backend64.device)
    options = {"lam": 3.0, "n_iter": 2, "output": output}
    update = dashpot.flag_aggregate(rows, **options)
    turned = dashpot.flag_aggregate(rows @ turn, **options)
    torch.testing.assert_close(turned, update @ turn, rtol=1e-8, atol=1e-9)


@given(seed=st.integers(0, 99), scale=st.floats(1e-6, 1e6))
def test_length_of_a_worker_does_not_matter(backend64, random_rows, seed, scale):
    rows = random_rows(6, 30, seed, device=backend64.device)
    update = dashpot.flag_aggregate(rows)
    assert update.norm() <= 6 / 3 + 1e-12  # p / m
    rows[2] *= scale
    torch.testing.assert_close(dashpot.flag_aggregate(rows), update, rtol=1e-7, atol=1e-8)


def test_three_liars_among_fifteen(backend):
    """What it is for: the mean follows the liars, the flag aggregate the honest workers."""
    torch.manual_seed(0)
    honest = torch.randn(2000) + 0.3 * torch.randn(15, 2000)
    direction = honest[:12].mean(0)
    honest[12:] = -100 * direction + 100 * torch.randn(3, 2000)
    update = dashpot.flag_aggregate(honest.to(backend.device), output="rescaled").cpu()
    assert torch.cosine_similarity(update, direction, dim=0) > 0.8
    assert torch.cosine_similarity(honest.mean(0), direction, dim=0) < 0
    assert 0.5 < update.norm() / direction.norm() < 2


# --------------------------------------------------------------------------------------------
# Forms and dtypes


def test_every_form_gives_the_same(backend64, random_rows, forms, flat):
    rows = random_rows(5, 26, device=backend64.device)
    want = dashpot.flag_aggregate(rows, n_iter=2, lam=3.0)
    for name, grads in forms(rows).items():
        update = dashpot.flag_aggregate(grads, n_iter=2, lam=3.0)
        torch.testing.assert_close(flat(update), want, rtol=1e-10, atol=1e-10)
        parts, likes = (update, grads[0]) if name == "lists" else ([update], [grads[0]])
        assert [part.shape for part in parts] == [like.shape for like in likes]


def test_parameters_of_mixed_dtypes(backend, random_rows):
    """A model in half precision with norms in float32: one fit over all, each dtype comes back."""
    rows = random_rows(5, 30, dtype=torch.float32, device=backend.device)
    lists = [[row[:8].half(), row[8:20].clone(), row[20:].half()] for row in rows]
    wide = torch.stack([torch.cat([t.double() for t in row]) for row in lists])
    update = dashpot.flag_aggregate(lists)
    assert [part.dtype for part in update] == [torch.float16, torch.float32, torch.float16]
    with dashpot.backend("reference"):
        want = dashpot.flag_aggregate(wide).split([8, 12, 10])
    for part, true in zip(update, want, strict=True):
        tolerance = 4 * torch.finfo(part.dtype).eps + 1e-5
        torch.testing.assert_close(part.double(), true, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(backend, random_rows, dtype):
    rows = random_rows(7, 2500, dtype=dtype, device=backend.device)
    update = dashpot.flag_aggregate(rows)
    with dashpot.backend("reference"):
        want = dashpot.flag_aggregate(rows.double())
    assert update.dtype == dtype
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(update.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.backends("kernels")
def test_a_huge_worker_in_float32(backend, random_rows):
    """Its squares leave float32's range; only directions matter, so nothing may change."""
    rows = random_rows(6, 40, dtype=torch.float32, device=backend.device)
    want = dashpot.flag_aggregate(rows)
    rows[2] *= 1e30
    torch.testing.assert_close(dashpot.flag_aggregate(rows), want, rtol=1e-4, atol=1e-5)


@pytest.mark.backends("kernels")
def test_a_tiny_worker_in_float32(backend, random_rows):
    """A length below 1e-12 counts as 1e-12: at 1e-9 the worker counts, at 1e-30 it is nothing."""
    rows = random_rows(6, 40, dtype=torch.float32, device=backend.device)
    for scale, like in ((1e-9, 1.0), (1e-30, 0.0)):
        tiny, alike = rows.clone(), rows.clone()
        tiny[2] *= scale
        alike[2] *= like
        want = dashpot.flag_aggregate(alike)
        torch.testing.assert_close(dashpot.flag_aggregate(tiny), want, rtol=1e-4, atol=1e-5)


def test_one_worker(backend64, random_rows):
    rows = random_rows(1, 30, device=backend64.device)
    torch.testing.assert_close(dashpot.flag_aggregate(rows)[None], rows / rows.norm())
    torch.testing.assert_close(dashpot.flag_aggregate(rows, output="paper")[None], rows)


def test_no_coordinates(backend):
    update = dashpot.flag_aggregate(torch.ones(4, 0, device=backend.device))
    assert update.shape == (0,)


# --------------------------------------------------------------------------------------------
# Workers with NaN or inf


@pytest.mark.parametrize("form", ["tensor", "list", "lists"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_worker_is_as_if_never_there(backend, random_rows, forms, flat, form, bad):
    """Dropped by hand, with the default m of those that are left."""
    rows = random_rows(7, 34, dtype=torch.float32, device=backend.device)
    rows[2, 5], rows[4, 33] = bad, bad
    kept = rows[[0, 1, 3, 5, 6]]
    update, info = dashpot.flag_aggregate(forms(rows)[form], return_info=True)
    torch.testing.assert_close(flat(update), dashpot.flag_aggregate(kept), rtol=1e-5, atol=1e-6)
    assert not info.v[[2, 4]].any() and info.v[[0, 1, 3, 5, 6]].all()


def test_no_worker_left(backend):
    rows = torch.full((3, 20), torch.nan, device=backend.device)
    assert dashpot.flag_aggregate(rows).isnan().all()


def test_raise_names_the_workers(backend, random_rows):
    rows = random_rows(5, 20, dtype=torch.float32, device=backend.device)
    want = dashpot.flag_aggregate(rows)
    assert torch.equal(dashpot.flag_aggregate(rows, nonfinite="raise"), want)
    rows[1, 3], rows[4, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"grads: expected finite rows.*workers \[1, 4\]"):
        dashpot.flag_aggregate(rows, nonfinite="raise")


# --------------------------------------------------------------------------------------------
# Gradients: the coefficients are held fixed


def test_gradient(backend64, random_rows):
    rows = random_rows(5, 20, device=backend64.device)
    coeffs, _ = dashpot.flag_coeffs(dashpot.gram(rows))
    leaf = rows.clone().requires_grad_()
    du = torch.randn(20, dtype=torch.float64, device=backend64.device)
    (grad,) = torch.autograd.grad(dashpot.flag_aggregate(leaf), leaf, du)
    torch.testing.assert_close(grad, torch.outer(coeffs, du))


def test_gradient_through_lists(backend64, random_rows):
    rows = random_rows(4, 20, device=backend64.device)
    coeffs, _ = dashpot.flag_coeffs(dashpot.gram(rows))
    lists = [[row[:7].clone().requires_grad_(), row[7:].clone().requires_grad_()] for row in rows]
    leaves = [tensor for row in lists for tensor in row]
    total = sum(tensor.sum() for tensor in dashpot.flag_aggregate(lists))
    grads = torch.autograd.grad(total, leaves)
    torch.testing.assert_close(torch.cat(grads).reshape(4, 20), coeffs[:, None].expand(4, 20))


# --------------------------------------------------------------------------------------------
# Errors; those of `grads` are in test_gram.py, those of the solve's options in test_flag_coeffs.py


ROWS = torch.ones(3, 4)
BAD = [
    (("rows",), {}, TypeError, r"grads: .*got str"),
    (([ROWS[0], None],), {}, TypeError, r"grads\[1\]: .*got NoneType"),
    ((ROWS, 4), {}, ValueError, r"m: .*1 <= m <= p = 3, got 4"),
    ((ROWS,), {"lam": -1.0}, ValueError, r"lam: .*>= 0, got -1"),
    ((ROWS,), {"nonfinite": "ignore"}, ValueError, r"nonfinite: .*drop, raise, got 'ignore'"),
    ((ROWS,), {"output": None}, ValueError, r"output: .*official.*got None"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=message):
        dashpot.flag_aggregate(*args, **options)
