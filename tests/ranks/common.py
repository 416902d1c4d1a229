"""What the checks share: rows, attacks, rules, comparison. p ranks, d numbers per worker."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from dashpot import NNM, attacks
from torch import Tensor, nn

GROUPS: dict[str, tuple[int, list[Callable]]] = {
    "all_reduce": (7, []), "ddp": (4, []), "fsdp": (4, []), "fsdp_of_two": (2, []), "dead": (3, []),
}  # fmt: skip
DEAD_AFTER = 8  # seconds: what a collective waits for a rank in the group "dead"

# Rules of one Byzantine worker in p, as (name, options); those for which p is large enough.
RULES = {
    "mean": ("mean", {}, 1),
    "flag": ("flag", {"output": "rescaled"}, 1),
    "flag-lam": ("flag", {"lam": 8.0}, 3),
    "geometric_median": ("geometric_median", {}, 1),
    "centered_clipping": ("centered_clipping", {"tau": 1.0, "n_iter": 3}, 1),
    "nnm": ("geometric_median", {"pre": [NNM(1)]}, 3),
    "nnm-trimmed": ("trimmed_mean", {"f": 1, "pre": [NNM(1)]}, 3),
    "krum": ("krum", {"f": 1}, 5),
    "multi_krum": ("multi_krum", {"f": 1}, 5),
    "mda": ("mda", {"f": 1}, 3),
    "coordinate_median": ("coordinate_median", {}, 1),
    "trimmed_mean": ("trimmed_mean", {"f": 1}, 3),
    "meamed": ("meamed", {"f": 1}, 3),
    "bulyan": ("bulyan", {"f": 1}, 7),
}


def rules(p: int) -> list[tuple[str, dict]]:
    return [(name, options) for name, options, least in RULES.values() if p >= least]


def check(group: str):
    def enter(function):
        GROUPS[group][1].append(function)
        return function

    return enter


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    """Distance relative to the length; both finite."""
    assert got.shape == want.shape, (got.shape, want.shape)
    error = (got.double() - want.double()).norm()
    assert error <= tolerance * want.double().norm(), (
        f"relative error {(error / want.double().norm()).item():.2g} in {tuple(want.shape)}"
    )


def same_on_all_ranks(tensor: Tensor, group=None) -> None:
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, tensor.contiguous(), group=group)
    assert all(torch.equal(row, tensor) for row in rows)


def honest_rows(p: int, d: int, seed: int = 0) -> Tensor:
    """(p, d) float64, the same on every rank: a common direction, as many others as keep a gap in
    the spectrum where `flag` cuts it, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(p, (p + 1) // 2, generator=generator, dtype=torch.float64)
    mixing[:, 0] = 3
    directions = torch.randn(mixing.shape[1], d, generator=generator, dtype=torch.float64)
    noise = torch.randn(p, d, generator=generator, dtype=torch.float64)
    return mixing @ directions + 0.01 * noise


ATTACKS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda honest: honest[:1] + 0.1,
    "NaN": lambda honest: attacks.constant(honest, 1, value=float("nan")),
    "inf": lambda honest: attacks.constant(honest, 1, value=float("inf")),
    "sign flip": lambda honest: attacks.sign_flip(honest, 1),
    "scaled": lambda honest: attacks.reverse(honest, 1, scale=100.0),
    "ALIE": lambda honest: attacks.alie(honest, 1, deviations=-1.5),
}
FINITE = [name for name in ATTACKS if name not in ("NaN", "inf")]


def attacked(p: int, d: int, name: str, seed: int = 0) -> Tensor:
    """(p, d): the last worker is Byzantine."""
    rows = honest_rows(p - 1, d, seed)
    return torch.cat([rows, ATTACKS[name](rows)])


# --------------------------------------------------------------------------------------------
# A model and what honest workers' gradients of it are


class Net(nn.Module):
    """Two linear layers, of which the second may be left out, and one that never runs."""

    def __init__(self, mixed: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 33), nn.Linear(33, 33)
        self.last, self.never = nn.Linear(33, 3), nn.Linear(4, 4)
        self.double()
        if mixed:
            self.last.float()

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        x = self.first(x).tanh()
        x = x if skip else self.second(x).tanh()
        return self.last(x.to(self.last.weight.dtype)).square().sum()


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(5, 8, generator=generator, dtype=torch.float64)


def gradients(net: Net, p: int, step: int, skips=(), used=None) -> list[list[Tensor]]:
    """p lists of the gradients that p honest workers have, computed here; unused: zeros."""
    rows = []
    for worker in range(p):
        loss = net(batch(worker, step), worker in skips)
        grads = torch.autograd.grad(loss, used, allow_unused=True)
        rows.append(
            [torch.zeros_like(u) if g is None else g for g, u in zip(grads, used, strict=True)]
        )
    return rows


def poison(rows: list[list[Tensor]], attack: str) -> list[Tensor]:
    """What the last worker sends in place of its own gradients."""
    honest = [torch.stack(column) for column in zip(*rows[:-1], strict=True)]
    return [ATTACKS[attack](column)[0] for column in honest]


def used_parameters(net: Net) -> list[Tensor]:
    """Without `never`, which would have no gradient."""
    net.never.requires_grad_(False)
    return [one for one in net.parameters() if one.requires_grad]
