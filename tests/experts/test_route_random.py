"""route_random: Philox, the same routes on every backend."""

from __future__ import annotations

import itertools

import dashpot
import pytest
import torch
from dashpot.experts._philox import philox

FLAT = [0, 2, 0, 2, 0, 3, 3, 2, 2, 0, 0, 2]
PAIRS = [[0, 4], [3, 0], [1, 4], [3, 0], [0, 4], [3, 0]]
SIXES = [[0, 2, 1, 5, 4, 7], [2, 5, 7, 1, 3, 0], [0, 3, 6, 7, 2, 1]]


def route(case, *args, **kwargs) -> list:
    return dashpot.route_random(*args, device=case.device, **kwargs).tolist()


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [(0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
     (0xFFFFFFFF, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD])],
)  # fmt: skip
def test_known_answers(counter, key, want):
    """The generator's published test vectors."""
    seed = torch.tensor(key)
    words = philox(seed, seed, torch.tensor([counter]), counter)
    assert [word.item() for word in words] == want


def test_first_words():
    words = philox(torch.tensor(1234), torch.tensor(0), torch.arange(4), 0)
    assert words[0].tolist() == [546353992, 2666454581, 1070188760, 3055983166]


def test_vectors(backend):
    assert route(backend, 12, 4, seed=1234) == [[e] for e in FLAT]
    second = [3, 0, 0, 0, 0, 1, 3, 1, 1, 0, 1, 3]
    assert route(backend, 12, 4, seed=1234, offset=1) == [[e] for e in second]
    assert route(backend, 6, 5, top_k=2, seed=1234) == PAIRS
    assert route(backend, 3, 8, top_k=6, seed=-1, offset=2**33 + 7) == SIXES
    assert route(backend, 12, 4, seed=1234, num_passes=2) == [[e] for e in (*FLAT, *second)]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(("units", "experts", "top_k"), [(40, 7, 3), (3, 64, 17), (1500, 9, 9)])
def test_same_bits_as_the_reference(backend, units, experts, top_k, replace):
    kwargs = {"top_k": top_k, "replace": replace, "num_passes": 2, "seed": 2**64 - 3, "offset": -5}
    got = dashpot.route_random(units, experts, device=backend.device, **kwargs)
    with dashpot.backend("reference"):
        want = dashpot.route_random(units, experts, **kwargs)
    assert got.dtype == torch.int32 and torch.equal(got.cpu(), want)


def test_seed_and_offset_as_tensors(backend):
    """A tensor is read on its device, so that a captured graph can advance it in place."""
    offset = torch.tensor(0, device=backend.device)
    first = dashpot.route_random(12, 4, seed=1234, offset=offset)
    assert first.flatten().tolist() == FLAT
    offset += 1
    again = dashpot.route_random(
        12, 4, seed=torch.tensor(1234, device=backend.device), offset=offset
    )
    assert again.tolist() == route(backend, 12, 4, seed=1234, offset=1)


def test_offset_wraps_like_a_64_bit_counter(backend):
    wrapped = route(backend, 5, 100, seed=3, offset=2**63 - 1, num_passes=2)
    assert wrapped[5:] == route(backend, 5, 100, seed=3, offset=-(2**63))


def test_distinct_and_uniform(backend):
    """Each ordered pair of distinct experts equally often: chi-square, 19 degrees of freedom."""
    ids = dashpot.route_random(20_000, 5, top_k=2, seed=5, device=backend.device).cpu().long()
    pairs = (ids[:, 0] * 5 + ids[:, 1]).bincount(minlength=25).reshape(5, 5)
    assert pairs.diagonal().sum() == 0
    counts = [pairs[a, b].item() for a, b in itertools.permutations(range(5), 2)]
    chi = sum((count - 1000) ** 2 / 1000 for count in counts)
    assert 4 < chi < 55


def test_passes_coincide_as_often_as_chance(backend):
    first, second = (
        dashpot.route_random(20_000, 4, num_passes=2, seed=8, device=backend.device).cpu().chunk(2)
    )
    assert abs((first == second).double().mean() - 0.25) < 0.02


@pytest.mark.parametrize("units", [0, 1])
def test_few_units(backend, units):
    assert (
        route(backend, units, 3, seed=0, num_passes=2)
        == route(backend, 1, 3, seed=0, num_passes=2)[: 2 * units]
    )


def test_one_expert_and_all_experts(backend):
    assert route(backend, 9, 1, seed=4) == [[0]] * 9
    assert all(sorted(row) == list(range(6)) for row in route(backend, 9, 6, top_k=6, seed=4))


def test_compiled_with_an_offset_that_moves():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(offset):
        return dashpot.route_random(12, 4, seed=1234, offset=offset)

    torch._dynamo.reset()
    assert step(torch.tensor(0)).flatten().tolist() == FLAT
    assert step(torch.tensor(1))[:4].flatten().tolist() == [3, 0, 0, 0]


# The published code, run on the CPU with stand-ins for fairseq: it draws one expert for a whole
# batch in training; at inference with level 0 one for each entry of [T, B], and with level 1 it
# draws as many as axis 1 of the *stack* [E, T, B, C] has, which is time: every sentence gets the
# same expert at a position, although the level is called that of sentences.


def official_mask(ids, experts, time, batch, level) -> torch.Tensor:
    """(E, T, B): which expert's output the published inference keeps, as its masks do it."""
    stack = torch.zeros(experts, time, batch)
    shape = stack.shape[1:3] if level == 0 else stack.shape[1:2]
    drawn = ids.reshape(shape)
    masks = torch.stack([drawn == e for e in range(experts)])
    return masks if level == 0 else masks[:, :, None].expand(experts, time, batch)


@pytest.mark.parametrize("level", ["batch", "token", "position", "sequence"])
def test_official_modes(backend, level):
    """Each official mode is units spread over [T, B]; "sequence" is what level 1 is called."""
    time, batch, experts = 5, 3, 4
    units = {"batch": 1, "token": time * batch, "position": time, "sequence": batch}[level]
    ids = dashpot.route_random(units, experts, seed=9, device=backend.device).cpu()[:, 0]
    view = {"batch": (1, 1), "token": (time, batch), "position": (time, 1), "sequence": (1, batch)}
    spread = ids.reshape(view[level]).expand(time, batch)
    kept = torch.stack([spread == e for e in range(experts)])
    assert torch.equal(kept.sum(0), torch.ones(time, batch, dtype=torch.int64))
    if level in ("token", "position"):
        official = official_mask(ids, experts, time, batch, 0 if level == "token" else 1)
        assert torch.equal(kept, official)
    if level == "sequence":  # not the published level 1
        wrong = official_mask(ids.repeat(2)[:time], experts, time, batch, 1)
        assert not torch.equal(kept, wrong)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_units": -1}, ValueError, "num_units: expected 0 <= num_units"),
        ({"num_units": 2.0}, TypeError, "num_units: expected an int, got float"),
        ({"num_experts": 0}, ValueError, "num_experts: expected 1 <= num_experts"),
        ({"top_k": 0}, ValueError, "top_k: expected 1 <= top_k"),
        ({"top_k": 5}, ValueError, "top_k: expected at most num_experts = 4 without"),
        ({"replace": 1}, TypeError, "replace: expected a bool, got int"),
        ({"num_passes": 0}, ValueError, "num_passes: expected 1 <= num_passes"),
        ({"num_units": 2**31 - 1, "num_passes": 2}, ValueError, "num_units: expected at most 2"),
        ({"seed": 1.5}, TypeError, "seed: expected an int or a 0-d int64 tensor, got float"),
        ({"seed": 2**64}, ValueError, "seed: expected at most 64 bits"),
        ({"offset": torch.zeros(2).long()}, ValueError, "offset: expected an int or"),
        ({"offset": torch.tensor(1.0)}, ValueError, "offset: expected an int or a 0-d int64"),
        ({"seed": torch.tensor(1), "device": "meta"}, ValueError, "seed: expected a tensor on"),
    ],
)
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=message):
        dashpot.route_random(**{"num_units": 3, "num_experts": 4, "seed": 0, **kwargs})
