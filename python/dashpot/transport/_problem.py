"""What the family's ops share: checks of a problem, the columns' selection, inputs for tests."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REGULARIZERS = ("negentropy", "l2", "sparse")
METRICS = ("sqeuclidean", "euclidean", "inner")  # of a cost that kernels make from points


def check_tensor(value, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float64, float32, bfloat16 or float16, got {value.dtype}"
        )


def state_dtype(cost: Tensor) -> torch.dtype:
    """Potentials and marginals are float32; float64 where the cost is."""
    return torch.float64 if cost.dtype == torch.float64 else torch.float32


def check_max_nz(max_nz, length: int, name: str = "max_nz") -> int:
    """k, at most the length of a column: more means no bound."""
    if not isinstance(max_nz, int) or isinstance(max_nz, bool):
        raise TypeError(f"{name}: expected an int, got {type(max_nz).__name__}")
    if max_nz < 1:
        raise ValueError(f"{name}: expected at least 1, got {max_nz}")
    return min(max_nz, length)


def check_gamma(gamma) -> float:
    if not isinstance(gamma, int | float) or isinstance(gamma, bool):
        raise TypeError(f"gamma: expected a number, got {type(gamma).__name__}")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma: expected a positive, finite number, got {gamma}")
    return float(gamma)


class Problem(NamedTuple):
    """A batch of problems after the checks. cost (B, m, n), or points (B, m, d); a (B, m), b (B, n)
    and the potentials in the state dtype; batch: the caller's leading shape."""

    cost: Tensor
    a: Tensor
    b: Tensor
    potentials: tuple[Tensor, ...]
    batch: torch.Size
    gamma: float
    k: int  # m where the columns are not bounded


def as_problem(
    cost, a, b, reg, gamma, max_nz, along: int = -2, **potentials: tuple[Tensor, int]
) -> Problem:
    """potentials: name=(tensor, axis of cost that it belongs to, -2 or -1); along: the axis whose
    entries max_nz counts."""
    check_tensor(cost, "cost")
    if cost.dim() < 2:
        raise ValueError(f"cost: expected (..., m, n), got {tuple(cost.shape)}")
    m, n = cost.shape[-2:]
    if m == 0 or n == 0:
        raise ValueError(f"cost: expected m and n of at least 1, got {tuple(cost.shape)}")
    flat = cost if cost.dim() == 3 else cost.reshape(-1, m, n)
    return _checked(flat.contiguous(), cost.shape, a, b, reg, gamma, max_nz, along, potentials)


def as_problem_of_points(
    x, y, a, b, reg, gamma, max_nz, along: int = -2, **potentials: tuple[Tensor, int]
) -> tuple[Problem, Tensor]:
    """The problem with x (B, m, d) in the place of the cost, and y (B, n, d), both in the state
    dtype: as `as_problem`, for the cost that a metric makes of them."""
    for name, points, count in (("x", x, "m"), ("y", y, "n")):
        check_tensor(points, name)
        if points.dim() < 2 or 0 in points.shape[-2:]:
            raise ValueError(
                f"{name}: expected (..., {count}, d) with {count} and d of at least 1, "
                f"got {tuple(points.shape)}"
            )
    want = (*x.shape[:-2], y.shape[-2], x.shape[-1])
    if y.shape != want or y.device != x.device or y.dtype != x.dtype:
        raise ValueError(
            f"y: expected {want} in {x.dtype} on {x.device}, "
            f"got {tuple(y.shape)} in {y.dtype} on {y.device}"
        )
    shape = torch.Size((*x.shape[:-1], y.shape[-2]))
    wide = [points.to(state_dtype(x)).reshape(-1, *points.shape[-2:]) for points in (x, y)]
    problem = _checked(wide[0].contiguous(), shape, a, b, reg, gamma, max_nz, along, potentials)
    return problem, wide[1].contiguous()


def _checked(cost, shape, a, b, reg, gamma, max_nz, along, potentials) -> Problem:
    """shape: (..., m, n) of the problem, whatever cost is made from."""
    if reg not in REGULARIZERS:
        raise ValueError(f"reg: expected one of {', '.join(REGULARIZERS)}, got {reg!r}")
    if reg == "sparse":
        if max_nz is None:
            raise ValueError('max_nz: expected an int for reg="sparse", got None')
        k = check_max_nz(max_nz, shape[along])
    elif max_nz is not None:
        raise ValueError(f"max_nz: expected None for reg={reg!r}, got {max_nz}")
    else:
        k = shape[along]
    gamma = check_gamma(gamma)
    batch, dtype = shape[:-2], state_dtype(cost)

    def state(value, name: str, axis: int) -> Tensor:
        length = shape[axis]
        if value is None:
            return cost.new_full((batch.numel(), length), 1 / length, dtype=dtype)
        check_tensor(value, name)
        want = (*batch, length)
        if value.shape != want or value.device != cost.device:
            raise ValueError(
                f"{name}: expected {tuple(want)} on {cost.device}, "
                f"got {tuple(value.shape)} on {value.device}"
            )
        flat = value if value.dim() == 2 else value.reshape(-1, length)
        return (flat if flat.dtype == dtype else flat.to(dtype)).contiguous()

    return Problem(
        cost, state(a, "a", -2), state(b, "b", -1),
        tuple(state(value, name, axis) for name, (value, axis) in potentials.items()),
        batch, gamma, k,
    )  # fmt: skip


def points_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """C (B, m, n) of x (B, m, d), y (B, n, d): sqeuclidean |x - y|^2, euclidean |x - y|, inner
    -x.y. Distances from differences, a coordinate at a time: nothing cancels."""
    if metric == "inner":
        return -(x @ y.mT)
    square = sum(
        (x[:, :, q, None] - y[:, None, :, q]).square() for q in range(x.shape[2])
    )  # (B, m, n)
    return square.sqrt() if metric == "euclidean" else square


def top_sorted(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each column (B, m, n) -> values and indices (B, k, n), descending; of equal
    scores the lowest index first."""
    values, indices = scores.sort(dim=-2, descending=True, stable=True)
    return values[..., :k, :], indices[..., :k, :]


def random_problem(size, dtype, device, seed):
    """size (B, k or a regulariser's name, m, n) -> cost (B, m, n), a (B, m), b (B, n) not uniform,
    alpha, beta; reg, k. In batches of large enough problems a pair is forbidden and a column has
    no mass (a peer that is timed on single problems takes neither)."""
    batch, k, m, n = size
    reg, k = (k, m) if isinstance(k, str) else ("sparse", min(k, m))
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(batch, count, 2, generator=generator) for count in (m, n))
    cost = torch.cdist(x, y + 0.5).square()  # (B, m, n)
    if batch > 1 and m > 2 and n > 2:
        cost[:, 1, 2] = math.inf
    a, b = (torch.rand(batch, count, generator=generator) + 0.2 for count in (m, n))
    if batch > 1 and n > 3:
        b[:, 3] = 0
    alpha, beta = (torch.randn(batch, count, generator=generator) for count in (m, n))
    cost = cost.to(device, dtype)
    state = state_dtype(cost)
    a, b = (x / x.sum(-1, keepdim=True) for x in (a, b))
    return (cost, *(x.to(device, state) for x in (a, b, alpha, beta)), reg, k)


def random_points(size, dtype, device, seed):
    """size (B, k or a regulariser's name, d, m, n) -> x (B, m, d), y (B, n, d), a (B, m), b (B, n)
    not uniform, alpha, beta, all in the state dtype; reg, k."""
    batch, k, d, m, n = size
    _, a, b, alpha, beta, reg, k = random_problem((batch, k, m, n), dtype, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x, y = (torch.randn(batch, count, d, generator=generator) / d**0.5 for count in (m, n))
    x, y = (points.to(device, a.dtype) for points in (x, y + 0.5 / d**0.5))
    return x, y, a, b, alpha, beta, reg, k


def cost_floor(cost: Tensor, b: Tensor, y: Tensor | None) -> tuple[int, int]:
    """FLOPs and bytes of one pass over a cost (B, m, n), or over points x (B, m, d), y (B, n, d):
    a difference, a comparison and a sum per entry; two more per coordinate."""
    if y is None:
        return 3 * cost.numel(), cost.nbytes
    pairs = cost.shape[1] * b.numel()
    return (3 + 2 * cost.shape[2]) * pairs, cost.nbytes + y.nbytes
