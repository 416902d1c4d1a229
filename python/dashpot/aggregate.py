"""Robust aggregation: p workers' gradients into one update (family `aggregate`).

Every rule that commutes with rotations needs the rows only twice: once for the p x p Gram matrix
K = G G^T, once for the combination c^T G. In between lies a tiny problem on K. So the family is
three ops and what is made of them:

    gram, pairwise_sqdist   rows (p, d) -> (p, p)      one streaming read
    flag_coeffs             (p, p) -> c (p,)           no pass over d
    combine                 rows (p, d), c -> (d,)     one streaming read, one write
    flag_aggregate          combine(grads, flag_coeffs(gram(grads)))

`grads` is a tensor (p, ...), a list of p tensors, or p lists of parameters' gradients; lists are
read where they lie. Shapes: p workers, d coordinates, S parameters ("segments") per worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dashpot._dispatch import chain, declare, public

__all__ = ["FlagInfo", "combine", "flag_aggregate", "flag_coeffs", "gram", "pairwise_sqdist"]

Grads = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# --------------------------------------------------------------------------------------------
# Rows: the three forms of `grads` as one


class _Rows(NamedTuple):
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
            return outs[0][0].reshape(grads.shape[1:])
        if self.form == "list":
            return outs[0][0].reshape(grads[0].shape)
        result = [None] * len(grads[0])
        for out, order in zip(outs, self.order, strict=True):
            for tensor, s in zip(out, order, strict=True):
                result[s] = tensor.reshape(grads[0][s].shape)
        return result


def _check_tensor(value, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: expected float64, float32, bfloat16 or float16, got {value.dtype}"
        )


def _rows(grads: Grads) -> _Rows:
    """Check `grads` and bring its three forms into one. Only metadata is touched."""
    if isinstance(grads, Tensor):
        _check_tensor(grads, "grads")
        if grads.dim() == 0:
            raise ValueError("grads: expected a tensor (p, ...) of p workers, got a scalar")
        if grads.shape[0] == 0:
            raise ValueError(f"grads: expected at least one worker, got {tuple(grads.shape)}")
        return _Rows(grads.shape[0], [[grads.contiguous()]], [[0]], "tensor")
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
            _check_tensor(tensor, name)
            device = tensor.device if device is None else device
            if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, device):
                raise ValueError(
                    f"{name}: expected {tuple(first.shape)} {first.dtype} on {device} "
                    f"as for worker 0, got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )
        tensors, order = groups.setdefault(first.dtype, ([], []))
        tensors += (tensor.contiguous() for tensor in column)
        order.append(s)
    return _Rows(p, [g[0] for g in groups.values()], [g[1] for g in groups.values()], form)


def _segments(grads: list[Tensor], p: int) -> list[Tensor]:
    """The op's tensors as matrices (p, n), one per segment; in lists this copies."""
    if len(grads) == 1:
        return [grads[0].reshape(p, -1)]
    return [
        torch.stack([tensor.reshape(-1) for tensor in grads[s : s + p]])
        for s in range(0, len(grads), p)
    ]


def _spread(mixed: list[Tensor], grads: list[Tensor], p: int) -> list[Tensor]:
    """Matrices (p, n) per segment back onto the op's tensors; inverse of `_segments`."""
    if len(grads) == 1:
        return [mixed[0].reshape(grads[0].shape)]
    return [
        row.reshape(like.shape)
        for s, matrix in enumerate(mixed)
        for row, like in zip(matrix.unbind(0), grads[s * p : (s + 1) * p], strict=True)
    ]


def _mix(grads: list[Tensor], weights: Tensor, p: int) -> list[Tensor]:
    """weights (p, p) times the rows: the gradient of everything quadratic in them."""
    mixed = []
    for rows in _segments(grads, p):  # (p, n)
        work = rows if rows.dtype == torch.float64 else rows.float()
        mixed.append((weights.to(work.dtype) @ work).to(rows.dtype))
    return _spread(mixed, grads, p)


# --------------------------------------------------------------------------------------------
# gram


_CHUNK = 1 << 20  # columns converted to float64 at a time by the references


def _gram_reference(grads: list[Tensor], mask: Tensor | None, p: int, accum: str) -> Tensor:
    """K_ij = sum_k g_ik g_jk, (p, p) float64; rows with mask False are not read and give 0."""
    k = grads[0].new_zeros((p, p), dtype=torch.float64)
    for rows in _segments(grads, p):  # (p, n)
        if mask is not None:
            rows = torch.where(mask[:, None], rows, 0)
        for part in rows.split(_CHUNK, dim=1):  # (p, <= chunk)
            wide = part.double() if accum == "fp64" or part.dtype == torch.float64 else part.float()
            k = k + (wide @ wide.mT).double()
    return k


def _gram_backward(grad_k: Tensor, grads: list[Tensor], mask: Tensor | None, p: int) -> list[Tensor]:
    """dG = (dK + dK^T) G, rows with mask False 0."""
    weights = grad_k + grad_k.mT  # (p, p)
    if mask is not None:
        weights = weights * (mask[:, None] & mask[None, :])
        grads = [torch.where(row, g, 0) for row, g in _with_mask(grads, mask, p)]
    return _mix(grads, weights, p)


def _with_mask(grads: list[Tensor], mask: Tensor, p: int):
    if len(grads) == 1:
        g = grads[0]
        return [(mask.reshape(p, *[1] * (g.dim() - 1)) if g.dim() else mask, g)]
    return [(mask[i % p], g) for i, g in enumerate(grads)]


def _square(grads: list[Tensor], mask: Tensor | None, p: int, *_) -> Tensor:
    return grads[0].new_empty((p, p), dtype=torch.float64)


def _random_rows(size, dtype, device, seed) -> tuple[list[Tensor], int]:
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


def _gram_inputs(size, dtype, device, seed):
    grads, p = _random_rows(size, dtype, device, seed)
    return grads, None, p, "fp32"


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _coordinates(grads: Sequence[Tensor], p: int) -> int:
    return sum(tensor.numel() for tensor in grads) // p


def _gram_floor(grads, _mask, p, _accum):
    """One read of the rows, p(p+1)/2 multiply-adds per coordinate."""
    return _bytes_of(grads) + 8 * p * p, p * (p + 1) * _coordinates(grads, p)


_ROW_SIZES = {
    # one worker; one coordinate; below, at and above a SIMD width and a register tile; a block
    # of the streaming kernels and a tail; more workers than one tile; parameter lists
    "test": [(1, 5), (2, 1), (3, 17), (5, 64), (15, 1000), (16, 4099), (33, 517), (2, 0),
             ("lists", 7, 33, 1, 1500), ("lists", 15, 640, 0, 5)],
    "bench": [(15, 100_000), (15, 1_000_000), (15, 10_000_000), (7, 1_000_000), (60, 1_000_000)],
}  # fmt: skip

GRAM = declare(
    "gram",
    forward="(Tensor[] grads, Tensor? mask, int p, str accum) -> (Tensor k)",
    backward="(Tensor grad_k, Tensor[] grads, Tensor? mask, int p) -> (Tensor[] grad_grads)",
    reference=_gram_reference,
    reference_backward=_gram_backward,
    fake=_square,
    inputs=_gram_inputs,
    floor=_gram_floor,
    sizes=_ROW_SIZES,
    prefer="cuda",  # bench/aggregate/bench_gram.py: operands go from memory to registers
)


@public
def gram(
    grads: Grads, *, accum: Literal["fp64", "fp32"] = "fp64", mask: Tensor | None = None
) -> Tensor:
    r"""Gram matrix of the workers' rows, :math:`K_{ij} = \sum_k g_{ik} g_{jk}`, in one read.

    Args:
        grads: tensor (p, ...), list of p tensors (...), or p lists of S tensors (their rows are
            the concatenation); float64, float32, bfloat16 or float16.
        accum: "fp64": every product and sum in float64, exact to its rounding. "fp32": products
            in float32, sums in float32 over at most 2,048 coordinates and in float64 from there;
            rows whose squares leave float32's range are summed again in float64 (C++).
        mask: (p,) bool; rows with False are not read and their entries of K are 0.

    Returns:
        K (p, p) float64. A row that holds NaN or inf has non-finite entries, the others have not.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice: :math:`dG = (dK + dK^T) G`.
    """
    _check_choice("accum", accum, ("fp64", "fp32"))
    rows = _rows(grads)
    _check_mask(mask, rows)
    return _sum([GRAM(group, mask, rows.p, accum) for group in rows.groups])


def _sum(parts: list[Tensor]) -> Tensor:
    """The Gram matrices of the dtype groups, added."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _check_mask(mask, rows: _Rows) -> None:
    if mask is None:
        return
    device = rows.groups[0][0].device
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != (rows.p,) or mask.device != device:
        raise ValueError(
            f"mask: expected ({rows.p},) torch.bool on {device}, "
            f"got {tuple(mask.shape)} {mask.dtype} on {mask.device}"
        )


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


# --------------------------------------------------------------------------------------------
# pairwise_sqdist


def _pairwise_sqdist_reference(grads: list[Tensor], mask: Tensor | None, p: int) -> Tensor:
    """D_ij = sum_k (g_ik - g_jk)^2, (p, p) float64; from differences, not from K."""
    out = grads[0].new_zeros((p, p), dtype=torch.float64)
    for rows in _segments(grads, p):  # (p, n)
        for part in rows.split(_CHUNK // 16, dim=1):
            wide = part.double()
            out = out + torch.stack([(wide - row).square().sum(1) for row in wide.unbind(0)])
    if mask is not None:
        out = torch.where(mask[:, None] & mask[None, :], out, 0)
    return out


def _pairwise_sqdist_backward(
    grad_sqdist: Tensor, grads: list[Tensor], mask: Tensor | None, p: int
) -> list[Tensor]:
    """dg_i = 2 sum_j (dD_ij + dD_ji)(g_i - g_j): a graph Laplacian times the rows."""
    weights = 2 * (grad_sqdist + grad_sqdist.mT)  # (p, p)
    if mask is not None:
        weights = weights * (mask[:, None] & mask[None, :])
        grads = [torch.where(row, g, 0) for row, g in _with_mask(grads, mask, p)]
    return _mix(grads, torch.diag(weights.sum(1)) - weights, p)


def _pairwise_sqdist_inputs(size, dtype, device, seed):
    grads, p = _random_rows(size, dtype, device, seed)
    return grads, None, p


def _pairwise_sqdist_floor(grads, _mask, p):
    """One read of the rows, a subtraction and a multiply-add per pair and coordinate."""
    return _bytes_of(grads) + 8 * p * p, 3 * p * (p - 1) // 2 * _coordinates(grads, p)


PAIRWISE_SQDIST = declare(
    "pairwise_sqdist",
    forward="(Tensor[] grads, Tensor? mask, int p) -> (Tensor sqdist)",
    backward="(Tensor grad_sqdist, Tensor[] grads, Tensor? mask, int p) -> (Tensor[] grad_grads)",
    reference=_pairwise_sqdist_reference,
    reference_backward=_pairwise_sqdist_backward,
    fake=_square,
    inputs=_pairwise_sqdist_inputs,
    floor=_pairwise_sqdist_floor,
    sizes=_ROW_SIZES,
)


@public
def pairwise_sqdist(grads: Grads, *, mask: Tensor | None = None) -> Tensor:
    r"""Squared distances between the workers' rows, :math:`D_{ij} = \sum_k (g_{ik}-g_{jk})^2`.

    The differences are squared and summed as they are: forming them from the Gram matrix would
    cancel for workers that lie close together.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        mask: (p,) bool; rows with False give 0.

    Returns:
        D (p, p) float64, zero on the diagonal.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice. Two float32 rows are subtracted in float32, squared and summed as in
    `gram(accum="fp32")`.
    """
    rows = _rows(grads)
    _check_mask(mask, rows)
    return _sum([PAIRWISE_SQDIST(group, mask, rows.p) for group in rows.groups])


# --------------------------------------------------------------------------------------------
# combine


def _combine_reference(grads: list[Tensor], coeffs: Tensor, p: int) -> list[Tensor]:
    """u = sum_i c_i g_i per segment (n,); a row with c_i = 0 is left out: 0 * NaN must not leak."""
    outs = []
    for rows in _segments(grads, p):  # (p, n)
        rows = torch.where((coeffs != 0)[:, None], rows, 0)
        work = rows if rows.dtype == torch.float64 else rows.float()
        outs.append((coeffs.to(work.dtype) @ work).to(rows.dtype))
    return outs


def _combine_fake(grads: list[Tensor], coeffs: Tensor, p: int) -> list[Tensor]:
    if len(grads) == 1:
        return [grads[0].new_empty((grads[0].numel() // p,))]
    return [grads[s].new_empty((grads[s].numel(),)) for s in range(0, len(grads), p)]


def _combine_backward(
    grad_update: list[Tensor], grads: list[Tensor], coeffs: Tensor, p: int, needs_grad: list[bool]
) -> tuple[list[Tensor] | None, Tensor | None]:
    """dg_i = c_i du; dc_i = <g_i, du>."""
    grad_grads = grad_coeffs = None
    if needs_grad[0]:
        mixed = []
        for du in grad_update:  # (n,)
            work = du if du.dtype == torch.float64 else du.float()
            mixed.append(torch.outer(coeffs.to(work.dtype), work).to(du.dtype))  # (p, n)
        grad_grads = _spread(mixed, grads, p)
    if needs_grad[1]:
        grad_coeffs = sum(
            (rows.double() @ du.double()).to(coeffs.dtype)
            for rows, du in zip(_segments(grads, p), grad_update, strict=True)
        )
    return grad_grads, grad_coeffs


def _combine_inputs(size, dtype, device, seed):
    grads, p = _random_rows(size, dtype, device, seed)
    coeffs = torch.rand(p, generator=torch.Generator().manual_seed(seed + 1)) + 0.1
    return grads, (coeffs / coeffs.sum()).double().to(device), p


def _combine_floor(grads, coeffs, p):
    """One read of the rows, one write of an update, a multiply-add per entry."""
    read = _bytes_of(grads)
    return read + read // p + 8 * p, 2 * p * _coordinates(grads, p)


COMBINE = declare(
    "combine",
    forward="(Tensor[] grads, Tensor coeffs, int p) -> (Tensor[] update)",
    backward="(Tensor[] grad_update, Tensor[] grads, Tensor coeffs, int p, bool[] needs_grad)"
    " -> (Tensor[] grad_grads, Tensor grad_coeffs)",
    reference=_combine_reference,
    reference_backward=_combine_backward,
    fake=_combine_fake,
    inputs=_combine_inputs,
    floor=_combine_floor,
    sizes=_ROW_SIZES,
    prefer="cuda",  # bench/aggregate/bench_combine.py: as fast as Triton's, quicker to launch
)


@public
def combine(
    grads: Grads, coeffs: Tensor, *, out: Tensor | list[Tensor] | None = None
) -> Tensor | list[Tensor]:
    r"""The combination :math:`u = \sum_i c_i g_i` of the workers' rows, in one read and one write.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        coeffs: (p,) float64 (float32 is converted). A row whose coefficient is 0 is not read, so
            its NaN or inf does not leak.
        out: where to write: a contiguous tensor, or S of them for parameter lists, of one
            worker's shapes, dtype and device; no gradient flows through it.

    Returns:
        u (...), or a list of S tensors, in the dtype of `grads`; sums in float32 at least.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: `out` given while a gradient is wanted.

    Differentiable twice, in `grads` (:math:`dg_i = c_i\,du`) and `coeffs`
    (:math:`dc_i = \langle g_i, du\rangle`).
    """
    rows = _rows(grads)
    device = rows.groups[0][0].device
    if not isinstance(coeffs, Tensor):
        raise TypeError(f"coeffs: expected a torch.Tensor, got {type(coeffs).__name__}")
    if coeffs.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"coeffs: expected float64 or float32, got {coeffs.dtype}")
    if coeffs.shape != (rows.p,) or coeffs.device != device:
        raise ValueError(
            f"coeffs: expected ({rows.p},) on {device}, "
            f"got {tuple(coeffs.shape)} on {coeffs.device}"
        )
    return _combine(grads, rows, coeffs.double(), out)


def _combine(grads: Grads, rows: _Rows, coeffs: Tensor, out) -> Tensor | list[Tensor]:
    if out is None:
        return rows.rebuild([COMBINE(group, coeffs, rows.p) for group in rows.groups], grads)
    like = grads[0] if rows.form == "lists" else [grads[0]]
    targets = out if rows.form == "lists" else [out]
    _check_out(targets, like)
    for group, order in zip(rows.groups, rows.order, strict=True):
        COMBINE.into([targets[s].view(-1) for s in order], group, coeffs, rows.p)
    return out


def _check_out(targets, like: Sequence[Tensor]) -> None:
    if not isinstance(targets, list | tuple) or len(targets) != len(like):
        raise TypeError(f"out: expected a list of {len(like)} tensors, got {type(targets).__name__}")
    for target, model in zip(targets, like, strict=True):
        _check_tensor(target, "out")
        want = (model.shape, model.dtype, model.device)
        if (target.shape, target.dtype, target.device) != want or not target.is_contiguous():
            raise ValueError(
                f"out: expected a contiguous {tuple(model.shape)} {model.dtype} on {model.device}, "
                f"got {tuple(target.shape)} {target.dtype} on {target.device}"
                f"{'' if target.is_contiguous() else ', not contiguous'}"
            )


# --------------------------------------------------------------------------------------------
# flag_coeffs


class FlagInfo(NamedTuple):
    """What the solve found, tensors on the device of K (nothing is read by the host).

    v: (p,) float64 in [0, 1], each worker's explained variance, 0 for dropped workers.
    objective: () float64, sum of sqrt(1 - v) over the workers that were kept.
    iters: () int64, reweighting steps taken.
    """

    v: Tensor
    objective: Tensor
    iters: Tensor


def _flag_coeffs_reference(
    k: Tensor, m: int | None, n_iter: int, lam: float, eps: float, power: float, pair: str,
    output: str, tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Flag-median IRLS on the Gram matrix; no branch on data, so no host synchronisation.

    x_i = g_i / max(|g_i|, 1e-12), Kh = X X^T = Q L Q^T, F = L^{1/2} Q^T (columns f_i = x_i in an
    orthonormal basis of the rows' span). One step: weights w from the last fit, the m leading
    eigenvectors Y of S = F M F^T with M = diag(w) + Laplacian(w_ij), then v_i = |Y^T f_i|^2.
    c = N^-1 Q L^{-1/2} Y Y^T F t.
    """
    p = k.shape[0]
    k = k.detach().double()
    alive = torch.isfinite(k.diagonal())  # (p,) a worker with a NaN or inf is dropped
    both = alive[:, None] & alive[None, :]
    k = torch.where(both, k, 0)
    count = alive.sum().double()  # ()
    rank = (count + 1) // 2 if m is None else torch.full_like(count, m)
    norm = k.diagonal().clamp(min=0).sqrt()  # (p,)
    inverse = torch.where(alive, 1 / norm.clamp(min=1e-12), 0)
    kh = inverse[:, None] * k * inverse[None, :]
    values, q = torch.linalg.eigh(kh)  # ascending
    kept = values > 1e-12 * values[-1]
    root = torch.where(kept, values.clamp(min=0).sqrt(), 0)
    inverse_root = torch.where(kept, 1 / root.where(kept, 1), 0)
    f = root[:, None] * q.mT  # (r, p), column i is x_i
    # A pair is x_i - x_j ("official") or (g_i - g_j) / |g_i - g_j| ("objective").
    size = norm if pair == "objective" else torch.ones_like(norm)  # (p,)
    gap = _square_gaps(f * size)  # (p, p)
    squares = (f * size).square().sum(0)  # (p,)
    apart = gap > 1e-12 * (squares[:, None] + squares[None, :])  # below: the same row, rounded

    off = both & ~torch.eye(p, dtype=torch.bool, device=k.device)
    leading = torch.arange(p, 0, -1, device=k.device).double() <= rank  # ascending order: the last
    v, fit, proj = torch.zeros_like(norm), torch.zeros_like(kh), torch.zeros_like(kh)
    best = count
    iters = torch.zeros((), dtype=torch.int64, device=k.device)
    active = torch.ones((), dtype=torch.bool, device=k.device)
    for _ in range(n_iter):
        w = torch.where(alive, (1 - v + eps) ** -power, 0)
        if lam:
            scale = lam / (count * (count - 1)).clamp(min=1)
            if pair == "official":
                w_pair = 2 * scale**2 * ((1 - fit).abs() + eps) ** -0.5
            else:
                length = gap.where(apart, 1)
                share = (fit / length).clamp(0, 1)
                w_pair = torch.where(apart, 2 * scale * (1 - share + eps) ** -power / length, 0)
            w_pair = torch.where(off, w_pair, 0)  # (p, p)
            laplacian = torch.diag(w_pair.sum(1)) - w_pair
            weights = torch.diag(w) + size[:, None] * laplacian * size[None, :]
        else:
            weights = torch.diag(w)
        y = torch.linalg.eigh(f @ weights @ f.mT)[1] * leading  # (r, p), the m leading columns
        z = y.mT @ f  # (p, p)
        new_v = torch.where(alive, z.square().sum(0), 0)
        new_v = torch.where(new_v > 1 - 1e-14, 1, new_v)  # 1 - v below that is rounding
        new = torch.where(alive, (1 - new_v).sqrt(), 0).sum()
        accept = active & (new <= best)
        v = torch.where(accept, new_v, v)
        fit = torch.where(accept, _square_gaps(z * size), fit)
        proj = torch.where(accept, y @ z, proj)
        iters = iters + active
        active = accept & (best - new > tol) & (new > tol)
        best = torch.where(accept, new, best)

    if output == "official":
        t = torch.ones_like(norm) / rank
    elif output == "paper":
        t = norm / count
    else:  # rescaled: median length of the live workers, mean of the middle two if even
        ordered = norm.where(alive, torch.inf).sort().values
        low, high = ((count - 1) // 2).long(), (count // 2).long()
        t = (ordered.gather(0, low[None]) + ordered.gather(0, high[None])) / (2 * count) * alive
    c = inverse * (q @ (inverse_root * (proj @ t)))
    c = torch.where(count > 0, c, torch.nan)
    return c, v, best, iters


def _square_gaps(columns: Tensor) -> Tensor:
    """Squared distances between the columns of (r, p), from differences: (p, p)."""
    return (columns[:, :, None] - columns[:, None, :]).square().sum(0)


def _flag_coeffs_fake(k, *_):
    return (
        k.new_empty((k.shape[0],)), k.new_empty((k.shape[0],)), k.new_empty(()),
        k.new_empty((), dtype=torch.int64),
    )  # fmt: skip


def _flag_coeffs_inputs(size, dtype, device, seed):
    """A Gram matrix with a gapped spectrum: a projector onto a subspace needs one."""
    grads, p = _random_rows(size, torch.float64, device, seed)
    lam = 0.0 if p % 2 else 8.0
    return _gram_reference(grads, None, p, "fp64"), None, 3, lam, 1e-7, 0.5, "official", "rescaled", 1e-10


def _flag_coeffs_floor(k, *_):
    """K in, c and v out; one eigenproblem of order p: about 9 p^3 operations."""
    p = k.shape[0]
    return 8 * (p * p + 2 * p + 2), 9 * p**3


FLAG_COEFFS = declare(
    "flag_coeffs",
    forward="(Tensor k, int? m, int n_iter, float lam, float eps, float power, str pair,"
    " str output, float tol) -> (Tensor coeffs, Tensor v, Tensor objective, Tensor iters)",
    reference=_flag_coeffs_reference,
    fake=_flag_coeffs_fake,
    inputs=_flag_coeffs_inputs,
    floor=_flag_coeffs_floor,
    sizes={"test": [(1, 4), (2, 9), (5, 40), (15, 300), (16, 300), (33, 700)],
           "bench": [(7, 300), (15, 300), (60, 700)]},
)  # fmt: skip


@public
def flag_coeffs(
    K: Tensor,  # noqa: N803
    m: int | None = None,
    *,
    n_iter: int = 1,
    lam: float = 0.0,
    eps: float = 1e-7,
    power: float = 0.5,
    pair: Literal["official", "objective"] = "official",
    output: Literal["official", "paper", "rescaled"] = "official",
    tol: float = 1e-10,
) -> tuple[Tensor, FlagInfo]:
    r"""Coefficients of the Flag Aggregator from the Gram matrix alone.

    With unit rows :math:`x_i`, find an m-dimensional subspace Y that minimises
    :math:`\sum_i \sqrt{1 - v_i} + \lambda R(Y)`, :math:`v_i = \|Y^T x_i\|^2`, by iteratively
    reweighted least squares started from equal weights; the update is :math:`Y Y^T` applied to a
    sum of the rows, hence a combination :math:`c^T G` of them.

    Args:
        K: (p, p) float64 or float32 Gram matrix; symmetric. A worker whose diagonal entry is not
            finite is dropped: its coefficient is 0 and p shrinks.
        m: dimension of the subspace, 1 <= m <= p. Default (p + 1) // 2 of the workers kept
            (official code: 8 for p = 15).
        n_iter: reweighting steps, at least 1 (official: 1).
        lam: weight of the pairwise term, >= 0 (official sweep: 0 to 64).
        eps: added to 1 - v before the power, > 0 (official: 1e-7).
        power: weight exponent: 0.5 flag median, 0 flag mean (one eigenproblem), 1 likelihood.
        pair: "official": differences of unit rows, weight :math:`2(\lambda/(p(p-1)))^2
            (|1-q_{ij}|+\epsilon)^{-1/2}`; "objective": differences of the rows themselves divided
            by their length, weight :math:`2\lambda/(p(p-1)) (1-q_{ij}+\epsilon)^{-power}`.
        output: "official" :math:`\frac1m YY^T\sum x_i`; "paper" :math:`\frac1p YY^T\sum g_i`,
            NOT bounded under attack; "rescaled" (median norm / p) :math:`YY^T\sum x_i`, bounded
            and on the gradients' scale.
        tol: stop when the objective falls by no more; a step that raises it is taken back.

    Returns:
        c (p,) float64 and `FlagInfo`; NaN if no worker is finite. No gradient flows to K. On CUDA
        nothing is read by the host, except where only the reference can run (`torch.linalg.eigh`).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Flag Aggregator (arXiv 2302.05865) and its published code, in Gram space.
    """
    _check_tensor(K, "K")
    if K.dim() != 2 or K.shape[0] != K.shape[1] or K.shape[0] == 0:
        raise ValueError(f"K: expected a square matrix (p, p), p >= 1, got {tuple(K.shape)}")
    if K.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"K: expected float64 or float32, got {K.dtype}")
    _check_flag(K.shape[0], m, n_iter, lam, eps, power, pair, output, tol)
    c, *info = FLAG_COEFFS(
        K.double().contiguous(), m, n_iter, float(lam), float(eps), float(power), pair, output,
        float(tol),
    )  # fmt: skip
    return c, FlagInfo(*info)


def _check_flag(p, m, n_iter, lam, eps, power, pair, output, tol) -> None:
    if m is not None:
        if not isinstance(m, int) or isinstance(m, bool):
            raise TypeError(f"m: expected an int or None, got {type(m).__name__}")
        if not 1 <= m <= p:
            raise ValueError(f"m: expected 1 <= m <= p = {p}, got {m}")
    if not isinstance(n_iter, int) or isinstance(n_iter, bool):
        raise TypeError(f"n_iter: expected an int, got {type(n_iter).__name__}")
    if n_iter < 1:
        raise ValueError(f"n_iter: expected at least 1, got {n_iter}")
    for name, value in (("lam", lam), ("eps", eps), ("power", power), ("tol", tol)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
        if not 0 <= value < float("inf") or (name == "eps" and value == 0):
            bound = "a finite number > 0" if name == "eps" else "a finite number >= 0"
            raise ValueError(f"{name}: expected {bound}, got {value}")
    _check_choice("pair", pair, ("official", "objective"))
    _check_choice("output", output, ("official", "paper", "rescaled"))


# --------------------------------------------------------------------------------------------
# flag_aggregate


@public
def flag_aggregate(
    grads: Grads,
    m: int | None = None,
    *,
    n_iter: int = 1,
    lam: float = 0.0,
    eps: float = 1e-7,
    power: float = 0.5,
    pair: Literal["official", "objective"] = "official",
    output: Literal["official", "paper", "rescaled"] = "official",
    tol: float = 1e-10,
    nonfinite: Literal["drop", "raise"] = "drop",
    return_info: bool = False,
) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], FlagInfo]:
    r"""Aggregate p workers' gradients with the Flag Aggregator: two reads of the rows, one write.

    ``combine(grads, flag_coeffs(gram(grads)))``: a subspace that explains most workers is fitted
    by iteratively reweighted least squares and their sum is projected onto it.

    Args:
        grads: tensor (p, ...), list of p tensors (...), or p lists of S parameters' gradients
            (read where they lie); float64, float32, bfloat16, float16.
        m, n_iter, lam, eps, power, pair, output, tol: see `flag_coeffs`. The official output has
            length at most p/m whatever the gradients' scale: retune the learning rate, or use
            ``output="rescaled"``. ``output="paper"`` is not bounded under attack.
        nonfinite: "drop" leaves out a worker with NaN or inf (or a squared norm beyond float64)
            and goes on with the others; "raise" raises instead, and reads one flag on the host.
        return_info: also return `FlagInfo`.

    Returns:
        The update (...), or a list of S tensors, in the dtype of `grads`; NaN if no worker is
        finite. The Gram matrix is summed as `gram(accum="fp32")`, the solve is float64.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients flow with the coefficients held fixed: :math:`dg_i = c_i\,du`.

    Source: Flag Aggregator: Scalable Distributed Training under Failures and Augmented Losses
    using Convex Optimization, arXiv 2302.05865; defaults of its published code.
    """
    rows = _rows(grads)
    _check_flag(rows.p, m, n_iter, lam, eps, power, pair, output, tol)
    _check_choice("nonfinite", nonfinite, ("drop", "raise"))
    with torch.no_grad():
        k = _sum([GRAM(group, None, rows.p, "fp32") for group in rows.groups])
        if nonfinite == "raise":
            _check_finite(k)
        c, *info = FLAG_COEFFS(
            k, m, n_iter, float(lam), float(eps), float(power), pair, output, float(tol)
        )
    update = _combine(grads, rows, c, None)
    return (update, FlagInfo(*info)) if return_info else update


def _check_finite(k: Tensor) -> None:
    bad = (~torch.isfinite(k.diagonal())).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"grads: expected finite rows, got NaN or inf from workers {bad}")


def _flag_aggregate_inputs(size, dtype, device, seed):
    grads, p = _random_rows(size, dtype, device, seed)
    return ([grads[i::p] for i in range(p)] if size[0] == "lists" else grads[0],)


def _flag_aggregate_floor(grads):
    """Two reads of the rows and one write of an update."""
    tensors = [grads] if isinstance(grads, Tensor) else [t for row in grads for t in row]
    p, read = len(grads), _bytes_of(tensors)
    return 2 * read + read // p, (p * (p + 1) + 2 * p) * _coordinates(tensors, p)


FLAG_AGGREGATE = chain(
    "flag_aggregate",
    flag_aggregate,
    (GRAM, FLAG_COEFFS, COMBINE),
    inputs=_flag_aggregate_inputs,
    floor=_flag_aggregate_floor,
    sizes={
        "test": [size for size in _ROW_SIZES["test"] if size not in [(2, 0), (2, 1)]],
        "bench": _ROW_SIZES["bench"],
    },
)
