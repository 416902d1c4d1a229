"""What the losses on grouped rows share: checks, unit rows, inputs for tests."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_rows(value, name: str) -> None:
    """A dense (N, d) matrix of floats."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float64, float32, bfloat16 or float16, got {value.dtype}"
        )
    if value.dim() != 2:
        raise ValueError(f"{name}: expected a matrix (N, d), got {tuple(value.shape)}")


def check_like(value, name: str, like: Tensor, shape: tuple[int, ...]) -> None:
    """A tensor of `shape`, of the dtype and on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    want = (shape, like.dtype, like.device)
    if (tuple(value.shape), value.dtype, value.device) != want:
        raise ValueError(
            f"{name}: expected {shape} {like.dtype} on {like.device}, "
            f"got {tuple(value.shape)} {value.dtype} on {value.device}"
        )


def as_ids(value, name: str, rows: Tensor) -> Tensor:
    """Labels of the rows as kernels take them: (N,) int64, contiguous."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
    if tuple(value.shape) != (rows.shape[0],) or value.device != rows.device:
        raise ValueError(
            f"{name}: expected ({rows.shape[0]},) on {rows.device}, "
            f"got {tuple(value.shape)} on {value.device}"
        )
    return value.long().contiguous()


def check_number(name: str, value, *, least: float = -math.inf, above: float | None = None) -> float:
    """A finite number >= least, or > above."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not math.isfinite(value) or value < least or (above is not None and value <= above):
        bound = f" > {above:g}" if above is not None else f" >= {least:g}" if least > -math.inf else ""
        raise ValueError(f"{name}: expected a finite number{bound}, got {value}")
    return float(value)


def check_count(name: str, value, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_bool(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def wide(x: Tensor) -> Tensor:
    """What sums are formed in: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def unit_rows(x: Tensor) -> Tensor:
    """u = x / max(|x|, 1e-12) in the dtype of the sums: a zero row stays zero."""
    return F.normalize(wide(x), dim=1, eps=1e-12)


def unit_rows_backward(grad_u: Tensor, x: Tensor) -> Tensor:
    """dx = (g - u (u . g)) / |x|; of a row shorter than 1e-12: g / 1e-12."""
    x = wide(x)
    norm = x.norm(dim=1, keepdim=True)  # (N, 1)
    u = x / norm.clamp(min=1e-12)
    along = torch.where(norm >= 1e-12, (u * grad_u).sum(1, keepdim=True), 0)
    return (grad_u - u * along) / norm.clamp(min=1e-12)


def grouped_rows(size, dtype, device, seed) -> tuple[Tensor, Tensor]:
    """Rows (N, d) around a centre of their group, and the groups (N,) int64: about N/6 groups of
    unequal size, some of one row, ids of both signs and without order."""
    n, d = size
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, max(n // 6, 2), (n,), generator=generator).square()
    centres = torch.randn(int(groups.max()) + 1 if n else 1, d, generator=generator)
    rows = torch.randn(n, d, generator=generator) + 0.8 * centres[groups]
    return rows.to(device=device, dtype=dtype), (groups * 7 - 11).to(device)


def row_bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
