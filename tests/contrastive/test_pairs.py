"""Rows that break contrastive losses, for each of them: values in float32 and bfloat16 against the
reference in float64, gradients that are finite."""

from __future__ import annotations

import dashpot
import pytest
import torch

ROWS = ("one row", "odd", "duplicates", "zero rows", "antipodes", "bfloat16")
LABELS = ("mixed", "one class", "all distinct")


def rows_of(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views (B, 9); "odd": B is no multiple of any tile's height."""
    b = {"one row": 1, "odd": 131}.get(kind, 70)
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, b, 9, generator=generator)
    if kind == "duplicates":
        z1[40:] = z1[0]
        z2[10:] = z1[0]
    elif kind == "zero rows":
        z1[3] = z1[66] = z2[3] = 0
    elif kind == "antipodes":
        z1[35:] = -z1[:35]
        z2 = -z1
    return z1, z2


def labels_of(kind: str, b: int) -> torch.Tensor:
    if kind == "one class":
        return torch.zeros(b, dtype=torch.int64)
    return torch.arange(b) if kind == "all distinct" else torch.arange(b) * 7 % 11


def core_tuning(a, b, temperature, y):
    """Three logits, soft labels between two classes, rows of length 1 in float32 at least."""
    soft = torch.nn.functional.one_hot(y % 3, 3) * 0.75
    soft[:, 0] += 0.25
    z = torch.nn.functional.normalize(a if a.dtype == torch.float64 else a.float(), dim=1)
    return dashpot.core_tuning_loss(
        a[:, :3], z, soft.to(a.dtype), y, eta=1.0, temperature=temperature
    )


# {name: function(z1, z2, temperature, labels)}
LOSSES = {
    "info_nce": lambda a, b, t, y: dashpot.info_nce(a, b, temperature=t, symmetric=True),
    "info_nce_queue": lambda a, b, t, y: dashpot.info_nce_queue(
        a, b, b.detach().flip(0), temperature=t
    ),
    "nt_xent": lambda a, b, t, y: dashpot.nt_xent(a, b, temperature=t, subject_ids=y),
    "koleo_loss": lambda a, b, t, y: dashpot.koleo_loss(a) + 0 * b.sum(),
    "regularized_info_nce": lambda a, b, t, y: dashpot.regularized_info_nce(
        a, b, temperature=t, subject_ids=y
    ),
    "supcon_loss": lambda a, b, t, y: dashpot.supcon_loss(
        a, y, temperature=t, normalize=True
    ) + 0 * b.sum(),
    "focal_supcon_loss": lambda a, b, t, y: dashpot.focal_supcon_loss(
        a, y, temperature=t, normalize=True
    ) + 0 * b.sum(),
    "core_tuning_loss": lambda a, b, t, y: core_tuning(a, b, t, y) + 0 * b.sum(),
    "tcm_loss": lambda a, b, t, y: dashpot.tcm_loss(a, y) + 0 * b.sum(),
}  # fmt: skip


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("temperature", [0.04, 0.01])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", LOSSES)
def test_traps(name, rows, temperature, labels):
    dtype = torch.bfloat16 if rows == "bfloat16" else torch.float32
    views = [z.to(dtype) for z in rows_of(rows)]
    y = labels_of(labels, len(views[0]))
    leaves = [z.clone().requires_grad_() for z in views]
    loss = LOSSES[name](*leaves, temperature, y)
    with dashpot.backend("reference"):
        want = LOSSES[name](*(z.double() for z in views), temperature, y)
    # Rows that nearly coincide: the log of a rounding error.
    near = name in ("koleo_loss", "regularized_info_nce") and rows in ("duplicates", "antipodes")
    torch.testing.assert_close(loss.double(), want, atol=2e-4, rtol=0.2 if near else 2e-4)
    loss.backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
