"""dashpot.attacks: closed forms, byzfl's classes, the three forms of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from dashpot import attacks

from bench import peers

# Every attack, ready to be called with (honest, f).
ATTACKS: dict[str, Callable] = {
    name: getattr(attacks, name)
    for name in attacks.__all__
    if name not in ("alie_deviations", "flip_labels")
}
RANDOM = ("gaussian", "uniform")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

HONEST = torch.tensor([[1.0, 4.0], [2.0, 0.0], [6.0, 2.0]], dtype=torch.float64)
MEAN = torch.tensor([3.0, 2.0], dtype=torch.float64)
STD = torch.tensor([7.0, 4.0], dtype=torch.float64).sqrt()  # 14 and 8 over n - 1 = 2


@pytest.mark.parametrize(
    ("attack", "want"),
    [
        (attacks.sign_flip, -MEAN),
        (attacks.inner_product_manipulation, -0.1 * MEAN),
        (functools.partial(attacks.inner_product_manipulation, scale=2.0), -2 * MEAN),
        (attacks.alie, MEAN - 0.21 * STD),
        (functools.partial(attacks.alie, deviations=1.5), MEAN + 1.5 * STD),
        (attacks.mimic, HONEST[0]),
        (functools.partial(attacks.mimic, worker=2), HONEST[2]),
        (attacks.constant, torch.full((2,), 1e6, dtype=torch.float64)),
        (functools.partial(attacks.constant, value=-math.inf), torch.tensor([-math.inf] * 2)),
        (functools.partial(attacks.constant, value=math.nan), torch.tensor([math.nan] * 2)),
    ],
    ids=lambda value: getattr(getattr(value, "func", value), "__name__", ""),
)
def test_closed_form_sent_by_all(attack, want):
    sent = attack(HONEST, 2)
    torch.testing.assert_close(sent, want.double().expand(2, 2), equal_nan=True, rtol=0, atol=1e-15)


def test_reverse():
    """Its own row times -10; without own rows the honest ones in turn."""
    torch.testing.assert_close(attacks.reverse(HONEST, 4), -10 * HONEST[[0, 1, 2, 0]])
    own = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(attacks.reverse(HONEST, 1, scale=3, own=own), -3 * own)


def test_alie_deviations():
    """The table of the paper at p = 50, f = 24 is 1.53 rounded up; 0.21 is the official code's."""
    assert attacks.alie_deviations(15, 3) == pytest.approx(0.2104, abs=1e-4)
    # 13 honest of 26 support what lies beyond the quantile: the middle
    assert attacks.alie_deviations(27, 1) == pytest.approx(0.0, abs=0.05)
    # 24 of 26 honest workers may lie below: P(Z < z) = 24/26
    normal = 0.5 * (1 + math.erf(attacks.alie_deviations(50, 24) / math.sqrt(2)))
    assert normal == pytest.approx(24 / 26, abs=1e-12)
    rows = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = rows.mean(0) - attacks.alie_deviations(15, 3) * rows.std(0)
    torch.testing.assert_close(attacks.alie(rows, 3, deviations=None)[2], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_flip(dtype):
    """1.0 has all exponent bits but the highest, so that gives inf; 0.5 and 6.0 by hand; the same
    flip twice is the identity; the sign and the fraction stay."""
    rows = torch.tensor([[1.0, 0.5, 6.0, 0.0, -1.5]], dtype=dtype)
    sent = attacks.bit_flip(rows, 1)[0].double()
    bits = {torch.float64: 11, torch.float16: 5}.get(dtype, 8)
    assert sent[0] == math.inf
    assert sent[1] == math.ldexp(0.5, 2 ** (bits - 1))
    assert sent[2] == math.ldexp(6.0, -(2 ** (bits - 1)))
    assert sent[3] == 2.0
    assert sent[4].isnan()
    assert attacks.bit_flip(rows, 1, bit=0)[0].tolist()[:3] == [0.5, 1.0, 3.0]
    assert torch.equal(attacks.bit_flip(attacks.bit_flip(rows, 1, bit=2), 1, bit=2), rows)


def test_bit_flip_of_a_fraction():
    rows = torch.full((2, 10_000), 0.5)
    sent = attacks.bit_flip(rows, 2, fraction=0.1, generator=torch.Generator().manual_seed(0))
    hit = sent != rows
    assert 800 < hit[0].sum() < 1200
    assert not torch.equal(hit[0], hit[1])
    assert torch.equal(attacks.bit_flip(rows, 2, fraction=0.0), rows)


def test_random_attacks_draw_from_their_distribution():
    rows = torch.zeros(3, 100_000, dtype=torch.float64)
    noise = attacks.gaussian(rows, 2, mean=3, std=100, generator=torch.Generator().manual_seed(0))
    assert noise.mean().item() == pytest.approx(3, abs=1)
    assert noise.std().item() == pytest.approx(100, rel=0.01)
    even = attacks.uniform(rows, 2, low=-1, high=3, generator=torch.Generator().manual_seed(0))
    assert -1 <= even.min() < -0.99
    assert 2.99 < even.max() < 3
    assert even.mean().item() == pytest.approx(1, abs=0.02)
    default = attacks.uniform(rows, 1, generator=torch.Generator().manual_seed(0))
    assert 0 <= default.min() < 0.01
    assert 0.99 < default.max() < 1


@pytest.mark.parametrize("name", RANDOM)
def test_random_attacks_follow_their_generator(name):
    rows = torch.zeros(3, 50)
    first, again, other = (
        ATTACKS[name](rows, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # each Byzantine worker draws


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTACKS)
def test_forms_and_dtypes(name, dtype):
    """Lists give what the tensors stacked give; honest rows are not written to."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3), (), (5,))
    columns = [torch.randn(4, *shape, generator=generator).to(dtype) for shape in shapes]
    before = [column.clone() for column in columns]
    seed = {"generator": torch.Generator()} if name in RANDOM else {}

    def send(honest, f):
        for one in seed.values():
            one.manual_seed(1)
        return ATTACKS[name](honest, f, **seed)

    sent = send(columns[0], 3)
    assert (sent.shape, sent.dtype) == ((3, 2, 3), dtype)
    assert sent.is_contiguous()
    listed = send(list(columns[0].unbind(0)), 3)
    torch.testing.assert_close(torch.stack(listed), sent, rtol=0, atol=0, equal_nan=True)
    nested = send([list(row) for row in zip(*columns, strict=True)], 3)
    assert [[tuple(t.shape) for t in row] for row in nested] == [list(shapes)] * 3
    first = torch.stack([row[0] for row in nested])
    torch.testing.assert_close(first, sent, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(*pair) for pair in zip(columns, before, strict=True))
    assert send(columns[0], 0).shape == (0, 2, 3)
    assert send([list(row) for row in zip(*columns, strict=True)], 0) == []
    assert send(torch.zeros(4, 0, dtype=dtype), 2).shape == (2, 0)


def test_low_precision_is_averaged_in_float32():
    """In float16 the sum of 3,000 rows of 100 would be inf."""
    rows = torch.full((3000, 1), 100.0, dtype=torch.float16)
    assert attacks.sign_flip(rows, 1).item() == -100


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "args", "ours"),
    [
        ("SignFlipping", (), attacks.sign_flip),
        ("InnerProductManipulation", (), functools.partial(
            attacks.inner_product_manipulation, scale=2.0)),
        ("ALittleIsEnough", (), functools.partial(attacks.alie, deviations=1.5)),
        ("Mimic", (1,), functools.partial(attacks.mimic, worker=1)),
        ("Inf", (), functools.partial(attacks.constant, value=math.inf)),
    ],
)  # fmt: skip
def test_agrees_with_byzfl(name, args, ours):
    """byzfl works in float32, and in float64 where it is given NumPy arrays."""
    rows = torch.randn(9, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = torch.as_tensor(getattr(peers.load("byzfl"), name)(*args)(rows.numpy()))
    sent = ours(rows, 2)
    torch.testing.assert_close(sent, theirs.double().expand(2, 100), rtol=0, atol=1e-14)


@pytest.mark.peers
def test_byzfl_draws_the_same_noise():
    """Its Gaussian takes numpy's global state: compared by mean and deviation."""
    rows = torch.zeros(3, 50_000)
    theirs = torch.as_tensor(peers.load("byzfl").Gaussian()(rows.numpy()))
    ours = attacks.gaussian(rows, 1, generator=torch.Generator().manual_seed(0))[0]
    for moment in (torch.mean, torch.std):
        assert moment(ours).item() == pytest.approx(moment(theirs.float()).item(), abs=0.03)


def test_flip_labels():
    labels = torch.tensor([[0, 9], [3, 3]])
    assert attacks.flip_labels(labels, 10).tolist() == [[9, 0], [6, 6]]
    assert attacks.flip_labels(labels.to(torch.int32), 10).dtype == torch.int32
    assert attacks.flip_labels(torch.empty(0, dtype=torch.int64), 10).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attacks.sign_flip([], 1), TypeError, "honest: expected .* at least one row"),
        (lambda: attacks.sign_flip(torch.zeros(0, 3), 1), ValueError, "honest: .* at least one"),
        (lambda: attacks.sign_flip(torch.zeros(2, 3, dtype=torch.int64), 1), TypeError, "honest:"),
        (lambda: attacks.sign_flip(torch.zeros(2, 3), -1), ValueError, "f: expected at least 0"),
        (lambda: attacks.sign_flip(torch.zeros(2, 3), 1.0), TypeError, "f: expected an int"),
        (lambda: attacks.sign_flip([torch.zeros(3), torch.zeros(4)], 1), ValueError,
         r"honest\[1\]: expected \(3,\)"),
        (lambda: attacks.sign_flip([[torch.zeros(3)], []], 1), ValueError, r"honest\[1\]: expec"),
        (lambda: attacks.alie(torch.zeros(1, 3), 1), ValueError, "honest: expected at least 2"),
        (lambda: attacks.alie(HONEST, 1, deviations="1"), TypeError, "deviations: expected a numb"),
        (lambda: attacks.alie_deviations(4, 2), ValueError, "f: expected 1 <= f < p/2"),
        (lambda: attacks.mimic(HONEST, 1, worker=3), ValueError, "worker: expected 0 <= worker"),
        (lambda: attacks.reverse(HONEST, 2, own=HONEST), ValueError, "own: expected the rows of f"),
        (lambda: attacks.reverse(HONEST, 1, scale=-1), ValueError, "scale: expected at least 0"),
        (lambda: attacks.bit_flip(HONEST, 1, bit=11), ValueError, "bit: expected 0 <= bit < 11"),
        (lambda: attacks.bit_flip(HONEST, 1, fraction=2), ValueError, "fraction: .* at most 1"),
        (lambda: attacks.constant(HONEST, 1, value="x"), TypeError, "value: expected a number"),
        (lambda: attacks.uniform(HONEST, 1, low=2), ValueError, "high: expected at least 2"),
        (lambda: attacks.gaussian(HONEST, 1, std=-1), ValueError, "std: expected at least 0"),
        (lambda: attacks.flip_labels(torch.tensor([10]), 10), ValueError, "labels: expected 0"),
        (lambda: attacks.flip_labels(torch.tensor([1.0]), 10), TypeError, "labels: .* integers"),
        (lambda: attacks.flip_labels(torch.tensor([0]), 0), ValueError, "classes: expected"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
