"""The emulator's own tests: right kernels give right results, wrong ones are reported."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
KERNELS = [HERE / "kernels" / name for name in ("module.cpp", "correct.cu", "planted.cu")]
NAME = "_emulator_tests"
SEEDS = range(8)


def _import_build():
    """build.py, from its path: tests/ is no package."""
    spec = importlib.util.spec_from_file_location("dashpot_emulator_build", HERE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulator = _import_build()


@pytest.fixture(scope="session")
def emulated():
    return emulator.load(KERNELS, name=NAME)


@pytest.fixture(scope="session")
def sanitized():
    """Builds the sanitized module, once, before several processes want to load it."""
    return emulator.build(KERNELS, sanitize=True, name=NAME)


def run_sanitized(code: str) -> subprocess.CompletedProcess:
    """Runs `code` in a Python process where `emulated` is the sanitized module."""
    sources = [str(path) for path in KERNELS]
    setup = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import build\n"
        f"emulated = build.load({sources!r}, name={NAME!r})\n"
    )
    return subprocess.run(
        [sys.executable, "-c", setup + code],
        env=emulator.sanitizer_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def block_sums(emulated, blocks=64, threads=256, n=100_000, *, sync=True):
    x = torch.randint(-8, 9, (n,), generator=torch.Generator().manual_seed(0)).float()
    out = torch.full((blocks,), torch.nan)
    emulated.call("block_sum", x.data_ptr(), out.data_ptr(), n, blocks, threads, sync)
    stride = blocks * threads
    padded = torch.nn.functional.pad(x, (0, -n % stride))
    return out, padded.view(-1, blocks, threads).sum((0, 2))


# ---- Right kernels ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_block_reduction(emulated, seed):
    emulator.set_seed(emulated, seed)
    out, expected = block_sums(emulated)
    assert expected.abs().max() > 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 2, 4), (0, 2, 4), (3, 0, 1), (2, 2, 0)])
def test_three_dimensional_grid(emulated, grid):
    block = (4, 3, 5)
    # The last axis varies fastest, so the coordinates are laid out z, y, x.
    axes = [torch.arange(n) for n in (*reversed(grid), *reversed(block))]
    order = [2, 1, 0, 5, 4, 3]  # blockIdx.x, y, z, threadIdx.x, y, z
    expected = torch.cartesian_prod(*axes)[:, order].int()
    visits = torch.zeros(len(expected) + 1, dtype=torch.int32)
    place = torch.full((len(expected), 6), -1, dtype=torch.int32)
    emulated.call("visit", visits.data_ptr(), place.data_ptr(), *grid, *block)
    assert visits.tolist() == [1] * len(expected) + [0]
    assert torch.equal(place, expected)


def test_order_is_random_and_repeats_with_its_seed(emulated):
    def order(seed):
        emulator.set_seed(emulated, seed)
        counter = torch.zeros((), dtype=torch.int32)
        tickets = torch.empty(16, 64, dtype=torch.int32)
        emulated.call("tickets", counter.data_ptr(), tickets.data_ptr(), 16, 64)
        assert torch.equal(tickets.flatten().sort().values, torch.arange(1024, dtype=torch.int32))
        return tickets

    def blocks(tickets):
        return tickets.min(1).values.argsort()

    def lanes(tickets):
        return tickets[0, :32].argsort()

    first, second = order(1), order(2)
    assert torch.equal(first, order(1))
    for ranks in (blocks, lanes):
        shuffles = [ranks(first), ranks(second), torch.arange(len(ranks(first)))]
        assert len({tuple(shuffle.tolist()) for shuffle in shuffles}) == 3


@pytest.mark.parametrize("n", [1, 33, 1024])
def test_dynamic_shared_memory(emulated, n):
    x = torch.arange(n, dtype=torch.float64) + 1
    out = x.clone()
    emulated.call("reverse", out.data_ptr(), n)
    assert torch.equal(out, x.flip(0))


def test_shared_memory_starts_as_nan_in_each_block(emulated):
    out = torch.zeros(50, 2)
    emulated.call("uninitialised", out.data_ptr(), 50)
    assert out.isnan().all()


def shuffled(kind: str, argument: int, width: int) -> list[int]:
    """Which lane each lane reads, in the words of the CUDA guide."""
    lanes = []
    for lane in range(32):
        start = lane - lane % width
        source = {
            "idx": start + argument % width,
            "up": lane - argument,
            "down": lane + argument,
            "xor": lane ^ (argument % 32),
        }[kind]
        outside = source < start if kind == "up" else source >= start + width
        lanes.append(lane if outside else source)
    return lanes


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["idx", "up", "down", "xor"])
def test_shuffles(emulated, kind, width):
    number = ["idx", "up", "down", "xor"].index(kind)
    for argument in range(32):
        out = torch.full((32,), -1, dtype=torch.int32)
        emulated.call("shuffle_int32", number, argument, width, out.data_ptr())
        assert out.tolist() == [3 * lane for lane in shuffled(kind, argument, width)]


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32", "float64"])
def test_shuffles_of_each_type(emulated, dtype):
    out = torch.full((32,), -1, dtype=getattr(torch, dtype))
    emulated.call(f"shuffle_{dtype}", 3, 5, 32, out.data_ptr())
    assert out.tolist() == [3 * (lane ^ 5) for lane in range(32)]


@pytest.mark.parametrize("seed", SEEDS)
def test_votes(emulated, seed):
    emulator.set_seed(emulated, seed)
    out = torch.full((32, 6), -1, dtype=torch.int32)
    emulated.call("votes", out.data_ptr())
    low = sum(1 << lane for lane in range(16) if lane % 2)
    high = sum(1 << lane for lane in range(16, 32) if lane % 3 == 0)
    for lane, (ballot, any_, all_, total, match, active) in enumerate(out.tolist()):
        assert ballot % 2**32 == (low if lane < 16 else high)
        assert (any_, all_, total, active) == (1, 0, 31 * 16, 1)
        assert match % 2**32 == sum(1 << other for other in range(lane % 5, 32, 5))


@pytest.mark.parametrize(("threads", "live"), [(64, 64), (64, 20), (50, 33), (7, 1)])
def test_exited_threads_count_as_arrived(emulated, threads, live):
    for seed in SEEDS:
        emulator.set_seed(emulated, seed)
        out = torch.full((threads,), -1, dtype=torch.int32)
        emulated.call("exits", threads, live, out.data_ptr())
        # The number of odd indexes below `live`; all are below it; none is 1000.
        assert out.tolist() == [live // 2 * 4 + 2] * live + [-1] * (threads - live)


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32", "float64"])
def test_atomic_add(emulated, dtype):
    total = torch.ones((), dtype=getattr(torch, dtype))
    emulated.call(f"add_{dtype}", total.data_ptr(), 10, 100)
    assert total.item() == 1 + 10 * 5050


def test_other_atomics(emulated):
    values = torch.tensor([50, 50, 0, 0, 0], dtype=torch.int32)
    emulated.call("extremes", values.data_ptr(), 3, 101)
    assert values.tolist() == [0, 100, 303, 1, 1]


# ---- Half and bfloat16 -----------------------------------------------------------------------


NARROW = {"half": torch.float16, "bfloat16": torch.bfloat16}


def narrowed(emulated, kind, wide):
    narrow = torch.zeros(len(wide), dtype=NARROW[kind])
    emulated.call(f"narrow_{kind}", wide.data_ptr(), narrow.data_ptr(), len(wide))
    return narrow


def assert_same_bits(actual, expected, integer):
    """NaN for NaN, whatever its payload, and equal bits elsewhere."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan].view(integer), expected[~nan].view(integer))


@pytest.mark.parametrize("kind", NARROW)
def test_every_narrow_number(emulated, kind):
    narrow = torch.arange(-(2**15), 2**15).to(torch.int16).view(NARROW[kind])
    wide = torch.zeros(2**16)
    emulated.call(f"widen_{kind}", narrow.data_ptr(), wide.data_ptr(), len(wide))
    assert_same_bits(wide, narrow.float(), torch.int32)
    assert_same_bits(narrowed(emulated, kind, wide), narrow, torch.int16)


@pytest.mark.parametrize("kind", NARROW)
def test_rounding(emulated, kind):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).int().view(torch.float32)
    near_one = torch.randn(2**16, generator=generator)
    small = near_one * 2.0**-24
    # Half-way between neighbours, and one float to either side.
    grid = torch.arange(2**15 - 1).to(torch.int16).view(NARROW[kind]).double()
    grid = grid[grid.isfinite()]
    tie = ((grid[1:] + grid[:-1]) / 2).float()
    beside = torch.cat([tie, tie.nextafter(tie * 0), tie.nextafter(tie + torch.inf)])
    wide = torch.cat([bits, near_one, small, beside, -beside])
    assert_same_bits(narrowed(emulated, kind, wide), wide.to(NARROW[kind]), torch.int16)


# ---- Wrong kernels, reported by the emulator --------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_syncthreads_shows(emulated, seed):
    emulator.set_seed(emulated, seed)
    out, expected = block_sums(emulated, sync=False)
    assert not torch.equal(out, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_syncwarp_shows(emulated, seed):
    expected = [(lane + 1) % 32 for lane in range(32)]
    out = torch.empty(2, 32, dtype=torch.int32)
    for row, sync in zip(out, (False, True), strict=True):
        emulator.set_seed(emulated, seed)
        emulated.call("warp_rotate", row.data_ptr(), sync)
    assert out[0].tolist() != expected
    assert out[1].tolist() == expected


MISTAKES = {
    "lane_outside_mask": r"__shfl_sync at planted.cu:\d+: lane \d+ reads lane 20, which is not in "
    r"the mask 0x0000ffff",
    "caller_outside_mask": r"thread \(0, 0, 0\): .*mask 0xfffffffe leaves out the calling lane 0",
    "odd_width": r"the width of a shuffle must be 1, 2, 4, 8, 16 or 32",
    "exited_lane": r"__shfl_xor_sync .*: lane \d+ reads lane \d+, which has exited or is not in",
    "absent_lane": r"__shfl_down_sync .*: lane \d+ reads lane \d+, which has exited or is not in",
    "different_intrinsics": r"wait at different intrinsics: __shfl_sync .* and a warp vote at",
    "different_masks": r"deadlock: .*Threads 0 at __syncwarp with mask 0x00000003, planted.cu:\d+; "
    r"1-31 at __syncwarp with mask 0xffffffff",
    "different_barriers": r"different __syncthreads: planted.cu:(\d+) and planted.cu:(?!\1)\d+",
    "deadlock": r"deadlock: .*Threads 0-15 at __syncthreads, planted.cu:\d+; 16-31 at __syncwarp "
    r"with mask 0xffffffff, planted.cu:\d+; 32-47 at __syncthreads, planted.cu:\d+; 48-63 exited",
    "trap": r"thread \(3, 0, 0\): __trap\(\)",
    "too_many_threads": r"no device takes this launch: .*block \(1025, 1, 1\)",
    "too_much_shared": r"no device takes this launch: .*233472 bytes",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_reported(emulated, mistake):
    for seed in SEEDS:
        emulator.set_seed(emulated, seed)
        with pytest.raises(RuntimeError, match=MISTAKES[mistake]):
            emulated.call(mistake)
    out, expected = block_sums(emulated)  # a failed launch leaves nothing behind
    assert torch.equal(out, expected)


# ---- Wrong kernels, reported by AddressSanitizer ----------------------------------------------


OVERFLOWS = {
    "static_overflow": "AddressSanitizer: global-buffer-overflow",
    "dynamic_overflow": "AddressSanitizer: heap-buffer-overflow",
    "global_overflow": "AddressSanitizer: heap-buffer-overflow",
    "local_overflow": "AddressSanitizer: stack-buffer-overflow",
    "row_overflow": r"runtime error: index 32 out of bounds for type 'float \[32\]'",
    "misaligned": "runtime error: .*misaligned address",
}


@pytest.mark.parametrize("mistake", OVERFLOWS)
def test_planted_overflow_is_caught(sanitized, mistake):
    done = run_sanitized(f"print('loaded', flush=True)\nemulated.call({mistake!r})")
    assert done.returncode != 0
    assert done.stdout == "loaded\n"
    assert re.search(OVERFLOWS[mistake], done.stderr), done.stderr
    assert f"{mistake}_kernel" in done.stderr


def test_emulator_is_clean_under_the_sanitizer_and_guards_tensors(sanitized):
    """Right kernels and C++ exceptions raise no alarm; one float past a tensor does."""
    done = run_sanitized(
        """
import torch
x, out = torch.ones(256 * 64), torch.zeros(64)
emulated.call("block_sum", x.data_ptr(), out.data_ptr(), x.numel(), 64, 256, True)
assert out.tolist() == [256.0] * 64
for mistake in ("deadlock", "exited_lane", "trap"):  # threads that are left on their stacks
    try:
        emulated.call(mistake)
    except RuntimeError:
        emulated.call("block_sum", x.data_ptr(), out.data_ptr(), x.numel(), 64, 256, True)
tensor = torch.zeros(100)
emulated.call("fill", tensor.data_ptr(), 100)
assert tensor.sum() == 100
print("clean", flush=True)
emulated.call("fill", tensor.data_ptr(), 101)
"""
    )
    assert done.stdout == "clean\n", done.stderr
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "global_overflow_kernel" in done.stderr


# ---- The build -------------------------------------------------------------------------------


def test_build_is_reused_until_something_changes(tmp_path):
    source, header = tmp_path / "tiny.cu", tmp_path / "tiny.h"
    source.write_text(
        '#include "common/cuda.cuh"\n#include "tiny.h"\nint f() { return kAnswer; }\n'
    )
    header.write_text("constexpr int kAnswer = 41;\n")

    def build():
        time.sleep(0.01)  # past the time stamps of the files just written
        module = emulator.build([source], name="_emulator_tiny")
        return module, module.stat().st_mtime_ns

    first = build()
    assert build() == first
    header.write_text("constexpr int kAnswer = 42;\n")
    second = build()
    assert second[0] != first[0]
    assert build() == second


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (
            "template <int N> void f(int i) { __shared__ int x[N]; x[i] = i; }",
            "anonymous namespace",
        ),
        ("void f() { unknown(); }", "unknown"),
        ("void f(short* x) { atomicAdd(x, 1); }", "no matching function"),
    ],
)
def test_build_refuses(tmp_path, code, complaint):
    source = tmp_path / "refused.cu"
    uses = "void g() { f<3>(1); }" if "template" in code else ""
    source.write_text(f'#include "common/cuda.cuh"\n{code}\n{uses}\n')
    with pytest.raises(RuntimeError, match=complaint):
        emulator.build([source], name="_emulator_tiny")
