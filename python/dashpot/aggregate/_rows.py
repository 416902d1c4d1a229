"""What the family's ops share: the three forms of `grads`, checks, inputs for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Grads = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Rows(NamedTuple):
    """`grads` after the checks. One group per dtype: a model may mix them.

    groups: lists of contiguous tensors; one tensor (p, ...) alone, or S*p tensors, parameter by
    parameter (entry s*p + i is parameter s of worker i). order: which parameter each one is.
    """

    p: int
    groups: list[list[Tensor]]
    order: list[list[int]]
    form: Literal["tensor", "list", "lists"]

    def rebuild(self, outs: list[list[Tensor]], grads: Grads) -> Tensor | list[Tensor]:
        """Outputs per group back into the shape of one worker."""
        if self.form == "tensor":
            out = outs[0][0]  # (d,)
            return out if grads.dim() == 2 else out.reshape(grads.shape[1:])
        if self.form == "list":
            return outs[0][0].reshape(grads[0].shape)
        result = [None] * len(grads[0])
        for out, order in zip(outs, self.order, strict=True):
            for tensor, s in zip(out, order, strict=True):
                result[s] = tensor.reshape(grads[0][s].shape)
        return result


def check_tensor(value, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float64, float32, bfloat16 or float16, got {value.dtype}"
        )


def as_rows(grads: Grads) -> Rows:
    """Check `grads` and bring its three forms into one. Only metadata is touched."""
    if isinstance(grads, Tensor):
        check_tensor(grads, "grads")
        if grads.dim() == 0:
            raise ValueError("grads: expected a tensor (p, ...) of p workers, got a scalar")
        if grads.shape[0] == 0:
            raise ValueError(f"grads: expected at least one worker, got {tuple(grads.shape)}")
        return Rows(grads.shape[0], [[grads.contiguous()]], [[0]], "tensor")
    if not isinstance(grads, list | tuple):
        raise TypeError(
            "grads: expected a tensor, a list of tensors or a list of lists of tensors, "
            f"got {type(grads).__name__}"
        )
    p = len(grads)
    if p == 0:
        raise ValueError("grads: expected at least one worker, got an empty list")
    if isinstance(grads[0], list | tuple):
        for i, row in enumerate(grads):
            if not isinstance(row, list | tuple) or len(row) != len(grads[0]):
                got = f"{len(row)} tensors" if hasattr(row, "__len__") else type(row).__name__
                raise ValueError(f"grads[{i}]: expected {len(grads[0])} tensors, got {got}")
        if not grads[0]:
            raise ValueError("grads[0]: expected at least one tensor, got an empty list")
        form, columns = "lists", list(zip(*grads, strict=True))
    else:
        form, columns = "list", [tuple(grads)]
    groups: dict[torch.dtype, tuple[list[Tensor], list[int]]] = {}
    device = None
    for s, column in enumerate(columns):
        first = column[0]
        for i, tensor in enumerate(column):
            name = f"grads[{i}][{s}]" if form == "lists" else f"grads[{i}]"
            check_tensor(tensor, name)
            device = tensor.device if device is None else device
            if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, device):
                raise ValueError(
                    f"{name}: expected {tuple(first.shape)} {first.dtype} on {device} "
                    f"as for worker 0, got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )
        tensors, order = groups.setdefault(first.dtype, ([], []))
        tensors += (tensor.contiguous() for tensor in column)
        order.append(s)
    return Rows(p, [g[0] for g in groups.values()], [g[1] for g in groups.values()], form)


def segments(grads: list[Tensor], p: int) -> list[Tensor]:
    """The op's tensors as matrices (p, n), one per segment; in lists this copies."""
    if len(grads) == 1:
        return [grads[0].reshape(p, -1)]
    return [
        torch.stack([tensor.reshape(-1) for tensor in grads[s : s + p]])
        for s in range(0, len(grads), p)
    ]


def spread(mixed: list[Tensor], grads: list[Tensor], p: int) -> list[Tensor]:
    """Matrices (p, n) per segment back onto the op's tensors; inverse of `_segments`."""
    if len(grads) == 1:
        return [mixed[0].reshape(grads[0].shape)]
    return [
        row.reshape(like.shape)
        for s, matrix in enumerate(mixed)
        for row, like in zip(matrix.unbind(0), grads[s * p : (s + 1) * p], strict=True)
    ]


def mix(grads: list[Tensor], weights: Tensor, p: int) -> list[Tensor]:
    """weights (p, p) times the rows: the gradient of everything quadratic in them."""
    mixed = []
    for rows in segments(grads, p):  # (p, n)
        work = rows if rows.dtype == torch.float64 else rows.float()
        mixed.append((weights.to(work.dtype) @ work).to(rows.dtype))
    return spread(mixed, grads, p)


# Columns that the references convert to float64 at a time.
CHUNK = 1 << 20


def masked(
    weights: Tensor, grads: list[Tensor], mask: Tensor | None, p: int
) -> tuple[Tensor, list[Tensor]]:
    """Pair weights (p, p) and rows, those of mask False as 0: no NaN of theirs must leak."""
    if mask is None:
        return weights, grads
    weights = weights * (mask[:, None] & mask[None, :])
    if len(grads) == 1:
        per_row = mask.reshape((p, *[1] * (grads[0].dim() - 1)) if grads[0].dim() else ())
        return weights, [torch.where(per_row, grads[0], 0)]
    return weights, [torch.where(mask[i % p], g, 0) for i, g in enumerate(grads)]


def square(grads: list[Tensor], mask: Tensor | None, p: int, *_) -> Tensor:
    return grads[0].new_empty((p, p), dtype=torch.float64)


def total(parts: list[Tensor]) -> Tensor:
    """The Gram matrices of the dtype groups, added."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def check_mask(mask, rows: Rows) -> Tensor | None:
    """The mask as kernels take it."""
    if mask is None:
        return None
    device = rows.groups[0][0].device
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != (rows.p,) or mask.device != device:
        raise ValueError(
            f"mask: expected ({rows.p},) torch.bool on {device}, "
            f"got {tuple(mask.shape)} {mask.dtype} on {mask.device}"
        )
    return mask.contiguous()


def check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_int(name: str, value, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        bound = f"at least {least}" if most is None else f"{least} <= {name} <= {most}"
        raise ValueError(f"{name}: expected {bound}, got {value}")


def check_float(name: str, value, *, positive: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not 0 <= value < float("inf") or (positive and value == 0):
        bound = "a finite number > 0" if positive else "a finite number >= 0"
        raise ValueError(f"{name}: expected {bound}, got {value}")


def check_sqdist(sqdist) -> Tensor:
    """Squared distances as kernels take them."""
    check_tensor(sqdist, "sqdist")
    if sqdist.dim() != 2 or sqdist.shape[0] != sqdist.shape[1] or sqdist.shape[0] == 0:
        raise ValueError(
            f"sqdist: expected a square matrix (p, p), p >= 1, got {tuple(sqdist.shape)}"
        )
    if sqdist.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"sqdist: expected float64 or float32, got {sqdist.dtype}")
    return sqdist.double().contiguous()


def random_rows(size, dtype, device, seed) -> tuple[list[Tensor], int]:
    """Correlated rows of unequal length: what honest workers and one loud one send.

    size: (p, d) for one tensor, (p, d_1, d_2, ...) with "lists" first for parameter lists."""
    generator = torch.Generator().manual_seed(seed)
    listed = size[0] == "lists"
    p, *lengths = size[1:] if listed else size
    groups = []
    for d in lengths:
        common = torch.randn(d, generator=generator)
        rows = common + 0.5 * torch.randn(p, d, generator=generator)
        if p > 2:  # two opposite rows would cancel
            rows[-1] *= -3.0
        groups.append(rows.to(device=device, dtype=dtype))
    return (groups if not listed else [row.clone() for g in groups for row in g.unbind(0)]), p


def random_grads(size, dtype, device, seed) -> Tensor | list[list[Tensor]]:
    """The same as a public function takes them: a tensor, or p lists."""
    grads, p = random_rows(size, dtype, device, seed)
    return [grads[i::p] for i in range(p)] if size[0] == "lists" else grads[0]


def random_sqdist(size, device, seed) -> Tensor:
    """(p, p) float64 squared distances of random rows (p, d)."""
    grads, _ = random_rows(size, torch.float64, device, seed)
    return (grads[0][:, None] - grads[0][None]).square().sum(-1)


def tensors_of(grads) -> list[Tensor]:
    """The tensors of a tensor or of lists of them."""
    return [grads] if isinstance(grads, Tensor) else [t for row in grads for t in row]


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def coordinates(grads: Sequence[Tensor], p: int) -> int:
    return sum(tensor.numel() for tensor in grads) // p


ROW_SIZES = {
    # one worker; one coordinate; below, at and above a SIMD width and a register tile; a block
    # of the streaming kernels and a tail; more workers than one tile; parameter lists
    "test": [(1, 5), (2, 1), (3, 17), (5, 64), (15, 1000), (16, 4099), (33, 517), (2, 0),
             ("lists", 7, 33, 1, 1500), ("lists", 15, 640, 0, 5)],
    "bench": [(15, 100_000), (15, 1_000_000), (15, 10_000_000), (7, 1_000_000), (60, 1_000_000)],
}  # fmt: skip
