"""flag_coeffs: the Flag Aggregator's solve on the Gram matrix."""

from __future__ import annotations

import itertools

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

CLOSE = {"rtol": 0, "atol": 1e-9}  # the specification's vectors have ten digits


def solve(rows, m=None, **options):
    """The update c^T G (d,), and what the solve tells."""
    coeffs, info = dashpot.flag_coeffs(rows @ rows.mT, m, **options)
    return coeffs @ rows, info


def kernel_spectrum(rows: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of the unit rows' Gram matrix, descending (p,)."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    return torch.linalg.eigvalsh(unit @ unit.mT).flip(0)


# --------------------------------------------------------------------------------------------
# The specification's vectors


VECTORS = [
    ({"m": 2}, [0.5873965253, 1.6439779443, 0.4132691132, -0.6349761408]),
    ({"m": 2, "output": "paper"}, [0.2435203138, 1.6579430286, 0.8429614855, -0.4001415882]),
    ({"m": 2, "output": "rescaled"}, [0.5755287055, 1.6107628447, 0.4049193815, -0.6221470175]),
    ({"m": 1}, [1.6914110493, 2.7476931694, -0.1762038991, -1.5499463145]),
    ({"m": 2, "n_iter": 3}, [0.5843194363, 1.6461053731, 0.410313084, -0.6342078397]),
    ({"m": 2, "n_iter": 3, "lam": 2.0}, [0.5843595673, 1.6460825156, 0.4103465655, -0.6342088929]),
    ({"m": 2, "n_iter": 3, "lam": 2.0, "pair": "objective"},
     [0.5217167501, 1.6691286275, 0.3676452292, -0.6490045055]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "update"), VECTORS)
def test_updates_of_the_specification(backend64, spec_rows, options, update):
    got, info = solve(spec_rows(device=backend64.device), **options)
    torch.testing.assert_close(got.cpu(), torch.tensor(update, dtype=torch.float64), **CLOSE)
    assert info.iters.item() == options.get("n_iter", 1)


def test_explained_variance_of_the_specification(backend64, spec_rows):
    _, info = solve(spec_rows(device=backend64.device), m=2)
    want = torch.tensor(
        [0.9986574274, 0.9921207371, 0.9889761738, 0.9966067518, 0.9999979965], dtype=torch.float64
    )
    torch.testing.assert_close(info.v.cpu(), want, **CLOSE)
    # 1e-8: near v = 1 the root turns an error of 1e-10 in v into 1e-8.
    torch.testing.assert_close(info.objective.cpu(), (1 - want).sqrt().sum(), rtol=0, atol=1e-7)


def test_default_m_is_the_official_one(backend64, random_rows):
    """(p + 1) // 2: 8 for 15 workers, 4 for 7."""
    for p, m in ((15, 8), (7, 4), (1, 1)):
        rows = random_rows(p, 40, device=backend64.device)
        k = rows @ rows.mT
        assert torch.equal(dashpot.flag_coeffs(k)[0], dashpot.flag_coeffs(k, m)[0])


# --------------------------------------------------------------------------------------------
# Properties


@given(p=st.integers(1, 9), seed=st.integers(0, 99), lam=st.sampled_from([0.0, 3.0]))
def test_v_is_a_share_and_keeps_ky_fans_bound(backend64, random_rows, p, seed, lam):
    """0 <= v <= 1, and m orthonormal directions explain at most the m largest eigenvalues."""
    rows = random_rows(p, 30, seed, device=backend64.device)
    m = (p + 1) // 2
    _, info = solve(rows, m, n_iter=4, lam=lam)
    assert info.v.shape == (p,) and (info.v >= 0).all() and (info.v <= 1).all()
    assert info.v.sum() <= kernel_spectrum(rows)[:m].sum() + 1e-12
    torch.testing.assert_close(info.objective, (1 - info.v).sqrt().sum(), rtol=0, atol=1e-7)


@given(seed=st.integers(0, 99))
def test_power_zero_is_one_eigenproblem(backend64, random_rows, seed):
    """Weight 1 for all: the flag mean reaches Ky Fan's bound."""
    rows = random_rows(7, 30, seed, device=backend64.device)
    _, info = solve(rows, 3, power=0.0, n_iter=3)
    torch.testing.assert_close(info.v.sum(), kernel_spectrum(rows)[:3].sum())


@given(seed=st.integers(0, 99))
def test_objective_never_rises(backend64, random_rows, seed):
    """Each step of iteratively reweighted least squares is a majorise-minimise step (lam = 0)."""
    rows = random_rows(8, 30, seed, device=backend64.device)
    objectives = [solve(rows, 3, n_iter=n, tol=0.0)[1].objective.item() for n in range(1, 7)]
    assert objectives[-1] < objectives[0]
    for before, after in itertools.pairwise(objectives):
        assert after <= before + 1e-12


@given(p=st.integers(2, 8), seed=st.integers(0, 99), lam=st.sampled_from([0.0, 3.0]))
def test_workers_have_no_order(backend64, random_rows, p, seed, lam):
    rows = random_rows(p, 30, seed, device=backend64.device)
    k, order = rows @ rows.mT, torch.randperm(p)
    for output in ("official", "paper", "rescaled"):
        coeffs, info = dashpot.flag_coeffs(k, lam=lam, n_iter=2, output=output)
        moved, moved_info = dashpot.flag_coeffs(
            k[order][:, order].contiguous(), lam=lam, n_iter=2, output=output
        )
        torch.testing.assert_close(moved, coeffs[order], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(moved_info.v, info.v[order], rtol=1e-8, atol=1e-9)


@given(seed=st.integers(0, 99), scale=st.floats(1e-6, 1e6), lam=st.sampled_from([0.0, 3.0]))
def test_length_of_a_worker_does_not_matter(backend64, random_rows, seed, scale, lam):
    """The official form sees unit rows."""
    rows = random_rows(6, 30, seed, device=backend64.device)
    update, _ = solve(rows, lam=lam, n_iter=2)
    scaled = rows.clone()
    scaled[2] *= scale
    torch.testing.assert_close(solve(scaled, lam=lam, n_iter=2)[0], update, rtol=1e-7, atol=1e-8)


@given(
    seed=st.integers(0, 99),
    scale=st.floats(1e-3, 1e3),
    pair=st.sampled_from(["official", "objective"]),
)
def test_common_scale(backend64, random_rows, seed, scale, pair):
    """All rows longer: official stays, paper and rescaled grow with them."""
    rows = random_rows(6, 30, seed, device=backend64.device)
    for output, factor in (("official", 1.0), ("paper", scale), ("rescaled", scale)):
        options = {"lam": 2.0, "n_iter": 2, "pair": pair, "output": output}
        want = factor * solve(rows, **options)[0]
        torch.testing.assert_close(
            solve(scale * rows, **options)[0], want, rtol=1e-7, atol=1e-9 * scale
        )


@pytest.mark.parametrize("lam", [0.0, 2.0])
def test_full_rank_projector_is_the_identity(backend64, random_rows, lam):
    """m = p: official (1/m) sum x_i, paper the mean, rescaled median length times the mean of x."""
    rows = random_rows(6, 30, device=backend64.device)
    length = rows.norm(dim=1, keepdim=True)
    mean = (rows / length).mean(0)
    median = torch.quantile(length, 0.5)
    wanted = {"official": mean, "paper": rows.mean(0), "rescaled": median * mean}
    for output, want in wanted.items():
        update, info = solve(rows, 6, lam=lam, output=output)
        torch.testing.assert_close(update, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(info.v, torch.ones_like(info.v))


# --------------------------------------------------------------------------------------------
# Degenerate matrices


def test_more_workers_than_coordinates(backend64, random_rows):
    """K has rank 3 < m = 4, so the projector is the identity on the rows."""
    rows = random_rows(8, 3, device=backend64.device)
    update, _ = solve(rows, 4)
    want = (rows / rows.norm(dim=1, keepdim=True)).sum(0) / 4
    torch.testing.assert_close(update, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lam", [0.0, 5.0])
@pytest.mark.parametrize("pair", ["official", "objective"])
def test_duplicates(backend64, spec_rows, lam, pair):
    """Workers that send the same vector: K is singular, twins count alike, nothing overflows."""
    rows = spec_rows(device=backend64.device)[[0, 0, 0, 1, 1, 4]]
    update, info = solve(rows, 2, lam=lam, pair=pair, n_iter=3)
    assert update.isfinite().all() and update.norm() <= 6 / 2
    torch.testing.assert_close(info.v[:3], info.v[:1].expand(3), rtol=1e-9, atol=1e-9)
    coeffs, _ = dashpot.flag_coeffs(rows @ rows.mT, 2, lam=lam, pair=pair, n_iter=3)
    assert coeffs.isfinite().all() and coeffs.abs().max() < 10


def test_identical_workers(backend64, spec_rows):
    rows = spec_rows(device=backend64.device)[[0] * 5]
    update, info = solve(rows, 2, output="paper")
    torch.testing.assert_close(update, rows[0])
    torch.testing.assert_close(info.v, torch.ones_like(info.v))
    assert abs(info.objective.item()) < 1e-6


@pytest.mark.parametrize("lam", [0.0, 5.0])
def test_zero_rows(backend64, random_rows, lam):
    """A worker that sends nothing has v = 0, and the others' subspace is as without it."""
    rows = random_rows(5, 30, device=backend64.device)
    rows[1] = 0
    coeffs, info = dashpot.flag_coeffs(rows @ rows.mT, 2, lam=lam, n_iter=2)
    assert coeffs.isfinite().all() and info.v[1] < 1e-20 and info.v.sum() > 1
    if lam == 0:
        others = torch.tensor([0, 2, 3, 4])
        update, _ = solve(rows[others], 2, n_iter=2)
        torch.testing.assert_close(coeffs @ rows, update)


def test_nothing_but_zeros(backend64):
    coeffs, info = dashpot.flag_coeffs(torch.zeros(3, 3, device=backend64.device).double())
    assert torch.equal(coeffs, torch.zeros_like(coeffs))
    assert torch.equal(info.v, torch.zeros_like(info.v)) and info.objective == 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("lam", [0.0, 5.0])
@pytest.mark.parametrize("output", ["official", "paper", "rescaled"])
def test_a_dropped_worker_is_as_if_never_there(backend64, random_rows, bad, lam, output):
    """Its K_ii is not finite; p, the default m and the median length are those of the others."""
    rows = random_rows(7, 30, device=backend64.device)
    k = rows @ rows.mT
    for gone in ((2,), (0, 6), (1, 3, 4)):
        spoilt = k.clone()
        spoilt[list(gone)] = bad
        spoilt[:, list(gone)] = bad
        kept = [i for i in range(7) if i not in gone]
        coeffs, info = dashpot.flag_coeffs(spoilt, lam=lam, n_iter=2, output=output)
        want, want_info = dashpot.flag_coeffs(
            k[kept][:, kept].contiguous(), lam=lam, n_iter=2, output=output
        )
        torch.testing.assert_close(coeffs[kept], want, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(info.v[kept], want_info.v, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(info.objective, want_info.objective)
        assert not coeffs[list(gone)].any() and not info.v[list(gone)].any()


def test_no_worker_left(backend64):
    k = torch.full((3, 3), torch.nan, dtype=torch.float64, device=backend64.device)
    assert dashpot.flag_coeffs(k)[0].isnan().all()


# --------------------------------------------------------------------------------------------
# Stopping, types, gradient


def test_stops_where_the_objective_falls_no_more(backend64, spec_rows):
    rows = spec_rows(device=backend64.device)
    _, info = solve(rows, 2, n_iter=500, tol=1e-6)
    steps = int(info.iters)
    assert 1 < steps < 500
    objectives = [solve(rows, 2, n_iter=n, tol=0.0)[1].objective for n in range(1, steps + 1)]
    falls = [before - after for before, after in itertools.pairwise(objectives)]
    assert all(fall > 1e-6 for fall in falls[:-1]) and falls[-1] <= 1e-6


def test_a_step_that_raises_the_objective_is_taken_back(backend64, random_rows):
    """The pair term pulls against the monitored objective; with a large lam a step may raise it."""
    rows = random_rows(6, 30, seed=3, device=backend64.device)
    objectives = [
        solve(rows, 2, n_iter=n, lam=500.0, tol=0.0)[1].objective.item() for n in range(1, 8)
    ]
    assert all(b <= a for a, b in itertools.pairwise(objectives))


def test_float32_matrix(backend64, spec_rows):
    rows = spec_rows(torch.float32, backend64.device)
    coeffs, info = dashpot.flag_coeffs(rows @ rows.mT, 2)
    want, _ = dashpot.flag_coeffs(rows.double() @ rows.double().mT, 2)
    assert coeffs.dtype == info.v.dtype == info.objective.dtype == torch.float64
    assert info.iters.dtype == torch.int64
    torch.testing.assert_close(coeffs, want, rtol=1e-3, atol=1e-4)


def test_no_gradient_flows_to_the_matrix(backend64, spec_rows):
    rows = spec_rows(device=backend64.device)
    k = (rows @ rows.mT).requires_grad_()
    coeffs, info = dashpot.flag_coeffs(k, 2)
    assert not coeffs.requires_grad and not info.v.requires_grad


# --------------------------------------------------------------------------------------------
# Errors: the argument, what was expected, what came


K = torch.eye(3, dtype=torch.float64)
BAD = [
    ((None,), {}, TypeError, r"K: .*Tensor.*got NoneType"),
    ((torch.ones(3, 2),), {}, ValueError, r"K: .*square.*\(3, 2\)"),
    ((torch.ones(3),), {}, ValueError, r"K: .*square.*\(3,\)"),
    ((torch.ones(0, 0),), {}, ValueError, r"K: .*p >= 1.*\(0, 0\)"),
    ((K.half(),), {}, TypeError, r"K: .*float64 or float32.*float16"),
    ((K.long(),), {}, TypeError, r"K: .*float64.*int64"),
    ((K, 0), {}, ValueError, r"m: .*1 <= m <= p = 3, got 0"),
    ((K, 4), {}, ValueError, r"m: .*1 <= m <= p = 3, got 4"),
    ((K, 2.0), {}, TypeError, r"m: .*int or None.*float"),
    ((K, True), {}, TypeError, r"m: .*int or None.*bool"),
    ((K,), {"n_iter": 0}, ValueError, r"n_iter: .*at least 1, got 0"),
    ((K,), {"n_iter": 1.0}, TypeError, r"n_iter: .*int, got float"),
    ((K,), {"lam": -1}, ValueError, r"lam: .*>= 0, got -1"),
    ((K,), {"lam": float("nan")}, ValueError, r"lam: .*finite.*got nan"),
    ((K,), {"lam": float("inf")}, ValueError, r"lam: .*finite.*got inf"),
    ((K,), {"lam": "1"}, TypeError, r"lam: .*float, got str"),
    ((K,), {"lam": torch.tensor(1.0)}, TypeError, r"lam: .*float, got Tensor"),
    ((K,), {"eps": 0.0}, ValueError, r"eps: .*> 0, got 0"),
    ((K,), {"power": -0.5}, ValueError, r"power: .*>= 0, got -0.5"),
    ((K,), {"power": True}, TypeError, r"power: .*float, got bool"),
    ((K,), {"tol": -1e-9}, ValueError, r"tol: .*>= 0"),
    ((K,), {"pair": "none"}, ValueError, r"pair: .*official, objective, got 'none'"),
    ((K,), {"output": "mean"}, ValueError, r"output: .*official, paper, rescaled, got 'mean'"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=message):
        dashpot.flag_coeffs(*args, **options)


@pytest.mark.backends("native")
@pytest.mark.parametrize(("p", "d"), [(200, 10), (256, 20), (256, 70), (256, 300)])
def test_many_workers_of_few_dimensions(backend64, random_rows, p, d):
    """Most eigenvalues are 0 up to rounding; the eigensolver must not wait for those to settle."""
    gram = dashpot.gram(random_rows(p, d, device=backend64.device))
    coeffs, info = dashpot.flag_coeffs(gram, d // 2)
    with dashpot.backend("reference"):
        _, want = dashpot.flag_coeffs(gram, d // 2)
    torch.testing.assert_close(info.v, want.v, rtol=1e-7, atol=1e-7)
    assert coeffs.isfinite().all()
