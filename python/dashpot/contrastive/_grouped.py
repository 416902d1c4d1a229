"""What the losses on grouped rows share beyond `_pairs`: inputs for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_rows(size, dtype, device, seed) -> tuple[Tensor, Tensor]:
    """Rows (N, d) around a centre of their group, and the groups (N,) int64: about N/6 groups of
    unequal size, some of one row, ids of both signs and without order."""
    n, d = size
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, max(n // 6, 2), (n,), generator=generator)
    groups = groups * groups % (n + 1)
    centres = torch.randn(n + 1, d, generator=generator)
    rows = torch.randn(n, d, generator=generator) + 0.8 * centres[groups]
    return rows.to(device=device, dtype=dtype), (groups * 7 - 11).to(device)


def mixed_rows(size, dtype, device, seed) -> tuple[Tensor, Tensor]:
    """Rows (N, d) and groups as of a mixed batch: the first third in 20 classes, the rest alone."""
    n, d = size
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(n) + 20
    groups[: n // 3] = torch.randint(0, 20, (n // 3,), generator=generator)
    centres = torch.randn(20, d, generator=generator)
    rows = torch.randn(n, d, generator=generator)
    rows[: n // 3] += 0.8 * centres[groups[: n // 3]]
    return rows.to(device=device, dtype=dtype), groups.to(device)


GROUP_SIZES = {
    # two rows; below, at and above panels of 64 rows; more coordinates than rows, and fewer; a
    # mixed batch, most of whose rows are alone; no row
    "test": [(2, 3), (7, 5), (33, 16), (64, 128), (130, 40), (257, 17), (0, 5),
             ("mixed", 198, 33)],
    "bench": [("mixed", 768, 128), ("mixed", 768, 256), (768, 128), (2048, 128), (8192, 128)],
}  # fmt: skip


def rows_of(size, dtype, device, seed) -> tuple[Tensor, Tensor]:
    """`grouped_rows` or, with "mixed" first, `mixed_rows`."""
    if size[0] == "mixed":
        return mixed_rows(size[1:], dtype, device, seed)
    return grouped_rows(size, dtype, device, seed)
