"""ema_update_: averages in place, in one pass over parameters of any dtype."""

from __future__ import annotations

import pytest
import torch
from dashpot.contrastive import ema_update_


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_update(dtype, as_tensor):
    """[1, -2] towards [3, 2] at 0.9: [1.2, -1.6], whatever the new values' dtype."""
    average = torch.tensor([1.0, -2.0])
    momentum = torch.tensor(0.9) if as_tensor else 0.9
    ema_update_([average], [torch.tensor([3.0, 2.0], dtype=dtype)], momentum)
    torch.testing.assert_close(average, torch.tensor([1.2, -1.6]))


def test_ema_of_bfloat16_does_not_stall():
    """2,000 steps of one thousandth from 1 towards 1.5: in bfloat16 the average would stay at 1."""
    average, new = torch.ones(3), torch.full((3,), 1.5, dtype=torch.bfloat16)
    for _ in range(2000):
        ema_update_([average], [new], 0.999)
    assert average[0].item() == pytest.approx(1.4324000373, abs=1e-4)


def test_ema_in_place():
    """Storage stays, strides are any, integers are copied, tied tensors move once, 0 and 1."""
    average, count = torch.zeros(4, 6).T, torch.tensor(3)
    new, tied = torch.ones(6, 4, dtype=torch.float16), torch.zeros(5)
    address = average.data_ptr()
    news = [new, torch.tensor(8), torch.ones(5), torch.ones(5), torch.zeros(0)]
    ema_update_([average, count, tied, tied, torch.zeros(0)], news, 0.5)
    assert average.data_ptr() == address and bool((average == 0.5).all())
    assert count.item() == 8 and bool((tied == 0.5).all())
    ema_update_([tied], [torch.ones(5)], 1)
    assert bool((tied == 0.5).all())
    ema_update_([tied], [torch.ones(5)], 0.0)
    assert bool((tied == 1).all())
    ema_update_([tied], [torch.zeros(5)], 0.99, step=0, warmup=4)  # momentum 1 / 4
    assert bool((tied == 0.25).all())


ONE = torch.ones(2)
BAD_EMA = [
    (lambda: ema_update_(ONE, [ONE]), TypeError, r"targets: .*list.*Tensor"),
    (lambda: ema_update_([ONE], []), ValueError, r"onlines: .*1 tensors, got 0"),
    (lambda: ema_update_([ONE], [ONE]), ValueError, r"targets\[0\]: .*memory of its own"),
    (lambda: ema_update_([ONE], [torch.ones(3)]), ValueError, r"onlines\[0\]: .*\(2,\).*\(3,\)"),
    (lambda: ema_update_([ONE.half()], [ONE]), TypeError, r"targets\[0\]: .*float32.*float16"),
    (lambda: ema_update_([ONE], [ONE + 1], 1.5), ValueError, r"momentum: .*0 to 1, got 1.5"),
    (lambda: ema_update_([ONE], [ONE + 1], step=1), ValueError, r"step: .*together with warmup"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD_EMA, ids=[bad[2] for bad in BAD_EMA])
def test_ema_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("momentum", [0.99, 0.3, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ema_is_lerp(backend, dtype, momentum):
    """Of the converted values: 70,001 numbers are a chunk and a rest; 0 copies, 1 leaves."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(70_001,), (3, 5), ()]
    news = [torch.randn(s, generator=generator).to(backend.device, dtype) for s in sizes]
    averages = [torch.randn(s, generator=generator).to(backend.device) for s in sizes]
    wants = [torch.lerp(x, y.float(), 1 - momentum) for x, y in zip(averages, news, strict=True)]
    before = [x.clone() for x in averages]
    ema_update_(averages, news, momentum)
    for average, want, new, old in zip(averages, wants, news, before, strict=True):
        torch.testing.assert_close(average, want, rtol=1e-6, atol=1e-7)
        if momentum in (0, 1):
            assert torch.equal(average, old if momentum else new.float())


def test_ema_bits_do_not_depend_on_threads_or_place():
    """A number gives the same average alone, in a list, and on two threads."""
    x, y = torch.randn(200_003), torch.randn(200_003).bfloat16()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        average = x.clone()
        ema_update_([average], [y], 0.99)
        results.append(average)
    parts = [part.clone() for part in x.split(777)]
    ema_update_(parts, [part.clone() for part in y.split(777)], 0.99)
    results.append(torch.cat(parts))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_ema_in_a_compiled_graph():
    @torch.compile(fullgraph=True, backend="eager")
    def step(average, new):
        ema_update_([average], [new], 0.9)

    average = torch.tensor([1.0, -2.0])
    step(average, torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(average, torch.tensor([1.2, -1.6]))
