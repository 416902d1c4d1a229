"""coordinate_rules: several rules from one sort of each coordinate."""

from __future__ import annotations

import dashpot
import pytest
import torch
from dashpot.aggregate.coordinate_rules import COORDINATE_RULES, RULES
from hypothesis import given
from hypothesis import strategies as st

NAN, INF = torch.nan, torch.inf


def every(grads, f, rules=RULES, **options) -> torch.Tensor:
    """(R, ...) all rules of one tensor."""
    return torch.stack(list(dashpot.coordinate_rules(grads, f, rules, **options).values()))


def by_hand(values: list[float], f: int, rule: str) -> float:
    """The definitions, one coordinate of finite numbers at a time, without windows."""
    x = sorted(values)
    p = len(x)
    median = (x[(p - 1) // 2] + x[p // 2]) / 2
    trimmed = sum(x[f : p - f]) / (p - 2 * f)
    if rule in ("median", "lower_median", "trimmed_mean"):
        return {"median": median, "lower_median": x[(p - 1) // 2], "trimmed_mean": trimmed}[rule]
    center = median if rule == "meamed" else trimmed
    nearest = sorted(x, key=lambda v: (abs(v - center), v))[: p - f]  # of equal ones the lower
    return sum(nearest) / (p - f)


def test_vectors(backend64, spec_rows):
    """The specification's."""
    got = dashpot.coordinate_rules(spec_rows(device=backend64.device), 1, RULES)
    want = {
        "median": [1, 1.9, 0.1, -1],
        "lower_median": [1, 1.9, 0.1, -1],
        "trimmed_mean": [1, 1.9, 0.1, -0.9666666667],
        "meamed": [1.05, 1.95, 0.05, -1],
        "phocas": [1.05, 1.95, 0.05, -1],
    }
    assert list(got) == list(RULES)
    for rule, values in want.items():
        values = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(got[rule].cpu(), values, rtol=0, atol=1e-10)


@given(p=st.integers(1, 20), seed=st.integers(0, 999), spread=st.sampled_from([2, 100]))
def test_definitions(backend64, p, seed, spread):
    """Small integers: many equal values and equal distances, and every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-spread, spread + 1, (p, 9), generator=generator).double()
    for f in {0, (p - 1) // 3, (p - 1) // 2}:
        got = every(rows.to(backend64.device), f).cpu()
        for r, rule in enumerate(RULES):
            want = [by_hand(column, f, rule) for column in rows.T.tolist()]
            want = torch.tensor(want, dtype=torch.float64)
            torch.testing.assert_close(got[r], want, rtol=1e-14, atol=1e-14)


@pytest.mark.backends("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_workers(backend, dtype):
    """p = 1 .. 257: each network, blocks of 16 whole and in part. Integers, so sums are exact."""
    for p in [*range(1, 70), 127, 128, 129, 255, 256, 257]:
        rows = torch.randint(-99, 100, (p, 37)).to(dtype).to(backend.device)
        x = rows.double().sort(dim=0).values
        f = (p - 1) // 3
        got = every(rows, f, ("median", "lower_median", "trimmed_mean")).double()
        want = torch.stack(
            [0.5 * (x[(p - 1) // 2] + x[p // 2]), x[(p - 1) // 2], x[f : p - f].mean(0)]
        )
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=eps, atol=eps)


@pytest.mark.parametrize("p", [5, 16, 17, 33, 49, 83])
def test_blocks_on_every_backend(backend, p):
    """Registers, one block, two, three (one of them short), four, six."""
    rows = torch.randn(p, 41, device=backend.device)
    got = every(rows, 0, ("median", "lower_median"))
    x = rows.sort(dim=0).values
    assert torch.equal(got[1], x[(p - 1) // 2])
    assert torch.equal(got[0], x[p // 2] if p % 2 else 0.5 * (x[p // 2 - 1] + x[p // 2]))


@given(p=st.integers(2, 18), seed=st.integers(0, 99), shift=st.floats(-9, 9))
def test_symmetries(backend64, random_rows, p, seed, shift):
    """Workers have no order; rules move and scale with their inputs."""
    rows = random_rows(p, 33, seed, device=backend64.device)
    f = (p - 1) // 3
    want = every(rows, f)
    assert torch.equal(every(rows[torch.randperm(p)], f), want)
    torch.testing.assert_close(every(rows + shift, f), want + shift, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(every(3 * rows, f), 3 * want, rtol=1e-12, atol=1e-12)
    mirrored = ("median", "trimmed_mean", "meamed", "phocas")  # in ties the lower value counts
    torch.testing.assert_close(
        every(-rows, f, mirrored), -every(rows, f, mirrored), rtol=1e-12, atol=1e-12
    )
    assert (want >= rows.amin(0) - 1e-12).all() and (want <= rows.amax(0) + 1e-12).all()


def test_equal_distances_take_the_lower_value(backend):
    """-1 and 1 are as far from 0; of -1, 0, 0, 2, 2 one 2 is left out."""
    rows = torch.tensor([[-1.0, 2], [1, 2], [0, 0], [0, -1], [0, 0]], device=backend.device)
    got = dashpot.coordinate_rules(rows, 1, ["meamed"])["meamed"]
    assert got.tolist() == [-0.25, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_lowest_values_are_not_a_tie(backend, dtype):
    """Around 0 of -2, -2, 0, 0, 1 the -2 is furthest: the window has to leave one of two equals."""
    rows = torch.tensor([[-2.0], [-2], [0], [0], [1]], dtype=dtype, device=backend.device)
    assert dashpot.coordinate_rules(rows, 1, ["meamed"])["meamed"].item() == -0.25


@pytest.mark.parametrize("rule", ["meamed", "phocas"])
def test_near_ties_are_decided_in_float64(backend, rule):
    """Float32 sums alone would call these ties: the window must leave 1 - eps, not 2^23."""
    big, eps = 2.0**23, torch.finfo(torch.float32).eps
    rows = torch.tensor([[-big + 1, big], [0, 0], [-eps, eps]], device=backend.device)
    rows = torch.cat([rows, torch.tensor([[big, -big], [0.0, 0.0]], device=backend.device)])
    with dashpot.backend("reference"):
        want = dashpot.coordinate_rules(rows.double(), 1, [rule])[rule]
    got = dashpot.coordinate_rules(rows, 1, [rule])[rule]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------
# NaN and infinities


SPECIAL = [  # values of five workers; median, lower median, trimmed mean, meamed, phocas for f = 1
    ([1, 2, 3, 4, NAN], [3, 3, 3, 2.5, 2.5]),  # NaN last: as furthest as can be
    ([1, 2, 3, NAN, NAN], [3, 3, NAN, NAN, NAN]),
    ([1, 2, NAN, NAN, NAN], [NAN] * 5),
    ([1, 2, 3, 4, INF], [3, 3, 3, 2.5, 2.5]),
    ([1, 2, 3, 4, -INF], [2, 2, 2, 2.5, 2.5]),
    ([-INF, 1, 2, 3, INF], [2, 2, 2, -INF, -INF]),  # as far: the lower one stays
    ([-INF, 1, 2, 3, NAN], [2, 2, 2, -INF, -INF]),  # NaN is further
    ([1, 2, 3, INF, NAN], [3, 3, INF, INF, INF]),
    ([-INF, 1, INF, INF, INF], [INF] * 5),  # an equal infinity is at distance 0
    ([-INF, -INF, -INF, 1, INF], [-INF] * 5),
    ([-INF, INF, INF, INF, NAN], [INF, INF, INF, NAN, NAN]),  # -inf stays, as NaN is further
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_special_values(backend, dtype):
    """In any order, and among ordinary neighbours; NaN of either sign."""
    want = torch.tensor([wanted for _, wanted in SPECIAL]).T.to(dtype)  # (R, n)
    columns = torch.tensor([values for values, _ in SPECIAL]).T.to(dtype)  # (5, n)
    n = len(SPECIAL)
    for seed in range(3):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        rows = torch.randn(5, 70).to(dtype)
        rows[:, 20 : 20 + n] = columns[order]
        for sign in (1, -1):
            nan = torch.tensor(NAN, dtype=dtype).copysign(torch.tensor(float(sign)).to(dtype))
            signed = torch.where(rows.isnan(), nan, rows).to(backend.device)
            got = every(signed, 1).cpu()
            torch.testing.assert_close(got[:, 20 : 20 + n], want, equal_nan=True)
            assert got[:, :20].isfinite().all() and got[:, 20 + n :].isfinite().all()


@pytest.mark.parametrize("form", ["tensor", "list", "lists"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_worker_changes_nothing_much(backend, random_rows, forms, flat, form, bad):
    """One worker of 20 sends nothing else: every rule stays among the others' values."""
    rows = random_rows(20, 70, dtype=torch.float32, device=backend.device)
    rows[7] = bad
    others = rows[torch.arange(20) != 7]
    for update in dashpot.coordinate_rules(forms(rows)[form], 2, RULES[:3]).values():
        assert (flat(update) >= others.amin(0)).all() and (flat(update) <= others.amax(0)).all()


def test_huge_values(backend):
    """Doubles of these leave float32's range; sums of the values that are taken do not."""
    rows = torch.tensor([[3e38], [-3e38], [3e38], [-3e38], [-3e38]], device=backend.device)
    got = dashpot.coordinate_rules(rows, 2, ["median", "meamed"])
    assert got["median"].item() == pytest.approx(-3e38)
    tiny = torch.full((4, 3), 1e-45, device=backend.device)
    assert torch.equal(every(tiny, 1), tiny[:1].expand(5, 3))


# --------------------------------------------------------------------------------------------
# A mask


@pytest.mark.parametrize("form", ["tensor", "list", "lists"])
def test_mask_leaves_rows_out(backend, random_rows, forms, flat, form):
    rows = random_rows(9, 50, dtype=torch.float32, device=backend.device)
    keep = torch.tensor([0, 2, 3, 5, 6, 8])
    mask = torch.zeros(9, dtype=torch.bool)
    mask[keep] = True
    want = every(rows[keep], 2)
    rows[~mask] = NAN
    got = dashpot.coordinate_rules(
        forms(rows)[form], 2, RULES, mask=mask.to(backend.device), count=6
    )
    assert torch.equal(torch.stack([flat(update) for update in got.values()]), want)


@pytest.mark.parametrize("true", [0, 3, 5])
def test_another_number_of_rows_than_said_is_nan(backend, random_rows, true):
    rows = random_rows(5, 20, dtype=torch.float32, device=backend.device)
    mask = torch.arange(5, device=backend.device) < true
    got = dashpot.coordinate_rules(rows, 1, RULES, mask=mask, count=4)
    assert all(update.isnan().all() for update in got.values())


def test_windows_of_less_than_half(backend64):
    """Bulyan's second stage: 3 of 9 values, the window moves past the median. The op takes it."""
    rows = torch.randint(-9, 10, (9, 60)).double().to(backend64.device)
    (got,) = COORDINATE_RULES([rows], None, 9, 9, 6, ["meamed"])
    for column, value in zip(rows.T.tolist(), got.tolist(), strict=True):
        assert value == pytest.approx(by_hand(column, 6, "meamed"), abs=1e-12)


# --------------------------------------------------------------------------------------------
# Forms, gradients, size


def test_every_form_gives_the_same(backend64, random_rows, forms, flat):
    rows = random_rows(6, 26, device=backend64.device)
    want = every(rows, 1)
    for name, grads in forms(rows).items():
        for r, update in enumerate(dashpot.coordinate_rules(grads, 1, RULES).values()):
            assert torch.equal(flat(update), want[r])
            if name == "lists":
                assert [tensor.shape for tensor in update] == [t.shape for t in grads[0]]
            else:
                assert update.shape == grads[0].shape


def test_parameters_of_mixed_dtypes_keep_their_order(backend, random_rows):
    rows = random_rows(5, 30, dtype=torch.float32, device=backend.device)
    lists = [[row[:8].half(), row[8:20].clone(), row[20:].half()] for row in rows]
    for rule, update in dashpot.coordinate_rules(lists, 1, RULES).items():
        assert [tensor.dtype for tensor in update] == [torch.float16, torch.float32, torch.float16]
        for s, tensor in enumerate(update):
            column = torch.stack([row[s] for row in lists]).double()
            with dashpot.backend("reference"):
                want = dashpot.coordinate_rules(column, 1, [rule])[rule]
            tolerance = 2 * torch.finfo(tensor.dtype).eps
            torch.testing.assert_close(tensor.double(), want, rtol=tolerance, atol=tolerance)


def test_many_segments(backend):
    """More than one launch's table holds."""
    lists = [[torch.full((3,), float(i + s)) for s in range(60)] for i in range(15)]
    lists = [[tensor.to(backend.device) for tensor in row] for row in lists]
    update = dashpot.coordinate_rules(lists, 3)["median"]
    assert [tensor.tolist() for tensor in update] == [[7.0 + s] * 3 for s in range(60)]


def test_gradient_goes_to_the_values_that_are_taken(backend64):
    rows = torch.tensor([[3.0], [1], [7], [2], [90]], dtype=torch.float64).to(backend64.device)
    shares = {
        "median": [1, 0, 0, 0, 0],
        "lower_median": [1, 0, 0, 0, 0],
        "trimmed_mean": [1 / 3, 0, 1 / 3, 1 / 3, 0],
        "meamed": [0.25, 0.25, 0.25, 0.25, 0],
        "phocas": [0.25, 0.25, 0.25, 0.25, 0],
    }
    for rule, want in shares.items():
        leaf = rows.clone().requires_grad_()
        dashpot.coordinate_rules(leaf, 1, [rule])[rule].sum().backward()
        torch.testing.assert_close(leaf.grad.flatten().cpu(), torch.tensor(want).double())


def test_gradient_of_equal_values_goes_to_the_first_worker(backend64):
    leaf = torch.ones(4, 2, dtype=torch.float64, device=backend64.device).requires_grad_()
    dashpot.coordinate_rules(leaf, 1, ["lower_median"])["lower_median"].sum().backward()
    assert leaf.grad.tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("rules", [[rule] for rule in RULES] + [list(RULES)], ids="-".join)
def test_gradcheck_of_each_rule(backend64, random_rows, rules):
    rows = random_rows(7, 5, device=backend64.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: every(x, 2, rules), rows)


def test_no_coordinates(backend):
    assert dashpot.coordinate_rules(torch.ones(4, 0, device=backend.device), 1)["median"].shape == (
        0,
    )


@pytest.mark.backends("native")
def test_offsets_beyond_32_bits(backend, lazy_zeros):
    """33 bfloat16 rows of 2^26 + 8: the last one starts past element 2^31."""
    p, d = 33, 2**26 + 8
    rows = lazy_zeros(p, d, backend.device)
    rows[16:, -2:] = 3
    update = dashpot.coordinate_rules(rows, 0, ["median"])["median"]
    assert torch.equal(update[-4:].cpu(), torch.tensor([0, 0, 3, 3], dtype=torch.bfloat16))
    assert not update[:-2].any()


# --------------------------------------------------------------------------------------------
# Errors


ROWS = torch.ones(5, 4)
MASK = torch.tensor([True, True, True, False, True])
BAD = [
    (("rows", 1), {}, TypeError, r"grads: .*got str"),
    ((ROWS, 1.0), {}, TypeError, r"f: expected an int, got float"),
    ((ROWS, True), {}, TypeError, r"f: expected an int, got bool"),
    ((ROWS, -1), {}, ValueError, r"f: expected 0 <= 2 f < p = 5, got -1"),
    ((ROWS, 3), {}, ValueError, r"f: expected 0 <= 2 f < p = 5, got 3"),
    ((ROWS, 2), {"mask": MASK, "count": 4}, ValueError, r"f: expected 0 <= 2 f < p = 4, got 2"),
    ((ROWS, 1, "median"), {}, TypeError, r"rules: expected a sequence of names, got str"),
    ((ROWS, 1, ["mean"]), {}, ValueError, r"rules: .*phocas, got 'mean'"),
    ((ROWS, 1, []), {}, ValueError, r"rules: expected at least one"),
    ((ROWS, 1, ["median"] * 2), {}, ValueError, r"rules: .*each once, got"),
    ((ROWS, 1), {"mask": MASK[:4]}, ValueError, r"mask: .*\(5,\).*\(4,\)"),
    ((ROWS, 1), {"count": 4}, ValueError, r"count: expected p = 5 without a mask, got 4"),
    ((ROWS, 1), {"mask": MASK, "count": 6}, ValueError, r"count: .*<= p = 5, got 6"),
    ((ROWS, 1), {"mask": MASK, "count": 4.0}, TypeError, r"count: .*int or None, got float"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), BAD, ids=[b[3] for b in BAD])
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=message):
        dashpot.coordinate_rules(*args, **options)
