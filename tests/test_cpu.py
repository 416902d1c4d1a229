"""The CPU kernels on every instruction set that this machine has, and their 16-bit conversions."""

from __future__ import annotations

import dashpot
import pytest
import torch
from dashpot import _C, _check
from dashpot._dispatch import REGISTRY, Chain

SETS = ("baseline", "avx2", "avx512")  # each includes the ones before it
AVAILABLE = SETS[: SETS.index(_C.cpu_isa()) + 1]


@pytest.fixture(params=AVAILABLE)
def isa(request):
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(None)


def test_choosing(isa):
    assert _C.cpu_isa() == isa
    with pytest.raises(ValueError, match="expected avx512, avx2 or baseline, got sse"):
        _C.set_cpu_isa("sse")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [op.name for op in REGISTRY.values() if not isinstance(op, Chain)])
def test_every_kernel(isa, name, dtype):
    op = REGISTRY[name]
    for size in op.sizes["test"]:
        args = op.inputs(size, dtype, torch.device("cpu"), 0)
        if op.reason("cpp", op._flatten(args)[0], args):
            continue  # tests/test_every_op.py has the refusal
        verdict = _check.compare(op, "cpp", args)
        assert verdict.ok, f"{size}: {verdict}"


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """(65536,): each bit pattern of a 16-bit float, NaN and inf among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_come_through(isa, dtype):
    """Widened, times 1, narrowed: every number is what it was."""
    values = every_value(dtype)
    got = dashpot.combine(values[None], torch.ones(1, dtype=torch.float64))
    assert got.isnan().equal(values.isnan())
    real = ~values.isnan()
    assert torch.equal(got[real], values[real])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_sixteen_bits(isa, dtype):
    """Scaled by numbers that make ties, overflow and subnormal results: as torch rounds."""
    values = every_value(dtype)
    for factor in (1.5, 1 + 2**-8, 1 + 2**-11, 0.5, 2.0**-9, 2.0**9, 0.1):
        got = dashpot.combine(values[None], torch.tensor([factor], dtype=torch.float64))
        want = (values.float() * torch.tensor(factor, dtype=torch.float32)).to(dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["exp", "log"])
def test_vector_functions(isa, name, dtype):
    """Within 2 ulp over the whole range, and torch's at 0, inf, NaN and beyond the range."""
    highest, lowest = {torch.float32: (88.72, -103.9), torch.float64: (709.78, -745.0)}[dtype]
    if name == "exp":
        x = torch.cat([torch.linspace(lowest, highest, 100_000), torch.linspace(-2, 2, 9_999)])
    else:
        x = torch.cat([torch.logspace(-44, 38, 50_000, dtype=torch.float64),
                       torch.linspace(0.5, 2, 50_001)])  # fmt: skip
    x = x.to(dtype)
    function = getattr(_C, f"vector_{name}")
    got, want = function(x), getattr(torch, name)(x.double() if dtype == torch.float32 else x)
    ulp = torch.finfo(dtype).eps * want.abs().clamp(min=torch.finfo(dtype).tiny)
    limit = 2 if dtype == torch.float32 else 3  # torch's own float64 is off by one
    assert ((got.double() - want.double()).abs() <= limit * ulp).all()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -1.0, 1.0, 2 * highest,
                            2 * lowest], dtype=dtype)  # fmt: skip
    torch.testing.assert_close(function(special), getattr(torch, name)(special), equal_nan=True)
