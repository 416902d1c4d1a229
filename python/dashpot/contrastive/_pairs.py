"""What the family's ops share: normalised rows, checks, inputs for tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
EPS = 1e-12  # the least norm that torch.nn.functional.normalize divides by


# --------------------------------------------------------------------------------------------
# Rows


def wide(z: Tensor) -> Tensor:
    """In the dtype that sums are formed in: float64 as it is, all else in float32."""
    return z if z.dtype == torch.float64 else z.float()


def unit_rows(z: Tensor, eps: float = EPS) -> Tensor:
    """u = z / max(|z|, eps) by rows, (n, d), in float32 at least; a zero row stays 0."""
    return torch.nn.functional.normalize(wide(z), dim=1, eps=eps)


def project(grad: Tensor, z: Tensor, eps: float = EPS) -> Tensor:
    """dL/dz (n, d) from dL/du: (g - u (u.g)) / |z|, and g / eps where |z| < eps, in z's dtype."""
    rows = wide(z)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)  # (n, 1)
    u = rows / norm.clamp_min(eps)
    along = torch.where(norm >= eps, (u * grad).sum(1, keepdim=True), 0)
    return ((grad - u * along) / norm.clamp_min(eps)).to(z.dtype)


# --------------------------------------------------------------------------------------------
# Checks


def check_rows(value, name: str, like: Tensor | None = None, *, same_count: bool = False) -> None:
    """A matrix (n, d) of floats; with `like` (m, d) of its d, dtype and device (and of its m)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float64, float32, bfloat16 or float16, got {value.dtype}"
        )
    if value.dim() != 2:
        raise ValueError(f"{name}: expected a matrix (B, D), got {tuple(value.shape)}")
    if like is None:
        return
    rows = like.shape[0] if same_count else value.shape[0]
    want = (rows, like.shape[1]), like.dtype, like.device
    if (tuple(value.shape), value.dtype, value.device) != want:
        count = rows if same_count else "N"
        raise ValueError(
            f"{name}: expected ({count}, {like.shape[1]}) {like.dtype} on {like.device}, "
            f"got {tuple(value.shape)} {value.dtype} on {value.device}"
        )


def check_integers(value, name: str, count: int, device: torch.device) -> Tensor:
    """(count,) integers on the device, as int64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integers, got {value.dtype}")
    if value.shape != (count,) or value.device != device:
        raise ValueError(
            f"{name}: expected ({count},) on {device}, got {tuple(value.shape)} on {value.device}"
        )
    return value.long().contiguous()


def check_labelled(rows, labels, ref, ref_labels, name: str) -> tuple[Tensor, Tensor | None]:
    """Rows `embeddings` (B, D) and labels (B,), and references called `name` (N, D) with labels
    (N,) or neither: both labels as int64."""
    check_rows(rows, "embeddings")
    labels = check_integers(labels, "labels", rows.shape[0], rows.device)
    if (ref is None) != (ref_labels is None):
        raise ValueError(f"ref_labels: expected together with {name}, got one of them")
    if ref is None:
        return labels, None
    check_rows(ref, name, rows)
    return labels, check_integers(ref_labels, "ref_labels", ref.shape[0], rows.device)


def check_number(value, name: str, *, least: float = 0.0, strict: bool = True) -> float:
    """A finite number above `least` (with strict=False: or equal)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not -math.inf < value < math.inf or value < least or (strict and value == least):
        sign = ">" if strict else ">="
        raise ValueError(f"{name}: expected a finite number {sign} {least:g}, got {value}")
    return float(value)


def check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_bool(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def reduced(rows: Tensor, reduction: str) -> Tensor:
    """The rows' losses (B,) as asked for; no rows give 0, attached to the graph."""
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" or rows.numel() == 0 else rows.mean()


REDUCTIONS = ("mean", "sum", "none")


# --------------------------------------------------------------------------------------------
# Inputs


def random_rows(n: int, d: int, dtype, device, seed: int, *, scale: float = 1.0) -> Tensor:
    """(n, d) normal rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator)
    lengths = torch.rand(n, 1, generator=generator) + 0.5
    return (scale * lengths * rows).to(device=device, dtype=dtype)


def random_views(size, dtype, device, seed: int) -> tuple[Tensor, Tensor]:
    """Two views (B, D): the second is the first with as much noise again."""
    n, d = size
    first = random_rows(n, d, torch.float32, "cpu", seed)
    second = first + random_rows(n, d, torch.float32, "cpu", seed + 1)
    return first.to(device=device, dtype=dtype), second.to(device=device, dtype=dtype)


def random_ids(n: int, device, seed: int) -> Tensor:
    """(n,) int64 labels; about half of the rows share theirs with another, some are negative."""
    generator = torch.Generator().manual_seed(seed + 2)
    return torch.randint(-2, max(1, n) + 2, (n,), generator=generator).to(device)


PAIR_SIZES = {
    # (B, D): one row; two; below, at and above a SIMD width, a panel (64) and a tile of columns;
    # several panels and a rest; no coordinate of a full vector; no row
    "test": [(1, 4), (2, 3), (5, 17), (16, 32), (33, 40), (65, 16), (130, 129), (0, 5)],
    "bench": [(256, 128), (2048, 128), (4096, 128)],
}


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
