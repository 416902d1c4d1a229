"""The op `grouped_linear`: a linear layer of its own for each segment of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import bytes_of, check_tensor
from dashpot.experts._plan import check_like, check_rows, random_matrix, work_dtype


def segment_of(offsets: Tensor, rows: int) -> Tensor:
    """The segment that each row lies in (R,), E past the last end."""
    row = torch.arange(rows, device=offsets.device)
    return (row[:, None] >= offsets[None, :]).sum(1)


def _grouped_linear_reference(
    xp: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """y_r = W_e x_r + b_e for the rows r of segment e, zeros past the last end: (R, N).

    Every expert meets every row, since no offset may be read by the host; the others' results
    are masked."""
    work = work_dtype(xp.dtype)
    owner = segment_of(offsets, xp.shape[0])  # (R,)
    y = xp.new_zeros((xp.shape[0], weight.shape[1]), dtype=work)
    for e in range(weight.shape[0]):
        mine = (owner == e)[:, None]
        z = torch.where(mine, xp, 0).to(work) @ weight[e].to(work).T  # (R, N)
        z = z if bias is None else z + bias[e].to(work)
        y = y + torch.where(mine, z, 0)
    return y.to(xp.dtype)


def _grouped_linear_backward(
    grad_y: Tensor, xp: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor,
    needs_grad: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx_r = W_e^T dy_r; dW_e = sum_r dy_r x_r^T and db_e = sum_r dy_r over the segment's rows:
    zeros for an expert without rows."""
    grad_xp = grad_weight = grad_bias = None
    if needs_grad[0]:
        grad_xp = _grouped_linear_reference(grad_y, weight.mT, None, offsets)
    if needs_grad[1]:
        grad_weight = grouped_outer(grad_y, xp, offsets).to(weight.dtype)
    if needs_grad[2] and bias is not None:
        grad_bias = grouped_sum(grad_y, offsets).to(bias.dtype)
    return grad_xp, grad_weight, grad_bias


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """A_e^T B_e of each segment's rows: a (R, N), b (R, K) -> (E, N, K)."""
    work = work_dtype(a.dtype)
    owner = segment_of(offsets, a.shape[0])[:, None]  # (R, 1)
    parts = []
    for e in range(offsets.shape[0]):
        left, right = (torch.where(owner == e, rows, 0).to(work) for rows in (a, b))
        parts.append(left.T @ right)
    return torch.stack(parts)


def grouped_sum(a: Tensor, offsets: Tensor) -> Tensor:
    """The sum of each segment's rows: (R, N) -> (E, N)."""
    owner = segment_of(offsets, a.shape[0])[:, None]  # (R, 1)
    wide = a.to(work_dtype(a.dtype))
    return torch.stack([torch.where(owner == e, wide, 0).sum(0) for e in range(offsets.shape[0])])


def _grouped_linear_fake(xp, weight, bias, offsets):
    return xp.new_empty((xp.shape[0], weight.shape[1]))


def segment_ends(rows: int, num_experts: int, seed: int, device) -> Tensor:
    """(E,) int32 random ends; some segments empty, the last end before R where R > 2."""
    generator = torch.Generator().manual_seed(seed)
    last = rows - (rows > 2)
    ends = torch.randint(0, last + 1, (num_experts,), generator=generator).sort().values
    ends[-1] = last
    return ends.int().to(device)


def _grouped_linear_inputs(size, dtype, device, seed):
    """size: (R, E, N, K)."""
    rows, num_experts, n, k = size
    xp = random_matrix(rows, k, dtype=dtype, device=device, seed=seed)
    weight = random_matrix(num_experts, n, k, dtype=dtype, device=device, seed=seed + 1) * 0.5
    bias = random_matrix(num_experts, n, dtype=dtype, device=device, seed=seed + 2)
    bias = bias if num_experts != 3 else None
    return xp, weight, bias, segment_ends(rows, num_experts, seed, device)


def _grouped_linear_floor(xp, weight, bias, offsets):
    """Rows and weights in, rows out; 2 N K operations a row."""
    rows, n = xp.shape[0], weight.shape[1]
    moved = bytes_of([xp, weight, offsets] + ([] if bias is None else [bias]))
    return moved + rows * n * xp.element_size(), 2 * rows * n * xp.shape[1]


GROUPED_LINEAR = declare(
    "grouped_linear",
    forward="(Tensor xp, Tensor weight, Tensor? bias, Tensor offsets) -> (Tensor y)",
    backward="(Tensor grad_y, Tensor xp, Tensor weight, Tensor? bias, Tensor offsets,"
    " bool[] needs_grad) -> (Tensor grad_xp, Tensor grad_weight, Tensor grad_bias)",
    reference=_grouped_linear_reference,
    reference_backward=_grouped_linear_backward,
    fake=_grouped_linear_fake,
    torch_products=True,
    inputs=_grouped_linear_inputs,
    floor=_grouped_linear_floor,
    # one row; one expert; no bias; tiles of the kernels and tails in every direction; more experts
    # than rows; no row
    sizes={"test": [(1, 1, 1, 1), (9, 1, 24, 8), (20, 3, 9, 7), (33, 4, 17, 16),
                    (150, 5, 70, 40), (200, 3, 72, 136), (5, 9, 7, 6), (0, 1, 2, 2)],
           "bench": [(4096, 8, 1024, 256), (4096, 8, 256, 1024)]},
)  # fmt: skip


@public
def grouped_linear(xp: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    r"""Each expert's linear layer on its own rows: :math:`y_r = W_e x_r + b_e`, r in segment e.

    Args:
        xp: (R, K) rows by expert, as `permute` returns them.
        weight: (E, N, K) in the dtype of xp, N and K as in `torch.nn.Linear`.
        bias: (E, N) in the dtype of xp, or None.
        offsets: (E,) int32 ends of the segments, ascending, as `DispatchPlan.offsets`; stays on
            the device.

    Returns:
        y (R, N) in the dtype of xp; rows past ``offsets[-1]`` are zeros, padding rows of a segment
        are b_e. Sums in float32 at least.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice in xp, weight and bias; an expert without rows gets a gradient of zeros
    (an optimizer therefore decays its moments and applies weight decay, where the published code,
    with separate layers, gives None and skips it).
    """
    xp = check_rows("xp", xp, None, "(R, K)")
    check_tensor(weight, "weight")
    if weight.dim() != 3 or weight.shape[0] == 0 or weight.shape[2] != xp.shape[1]:
        raise ValueError(
            f"weight: expected (E, N, {xp.shape[1]}), E >= 1, got {tuple(weight.shape)}"
        )
    weight = check_like("weight", weight, tuple(weight.shape), xp)
    if bias is not None:
        bias = check_like("bias", bias, tuple(weight.shape[:2]), xp)
    return GROUPED_LINEAR(xp, weight, bias, check_offsets(offsets, weight.shape[0], xp))


def check_offsets(offsets, num_experts: int, like: Tensor) -> Tensor:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets: expected a torch.Tensor, got {type(offsets).__name__}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets: expected int32, got {offsets.dtype}")
    if offsets.shape != (num_experts,) or offsets.device != like.device:
        raise ValueError(
            f"offsets: expected ({num_experts},) on {like.device}, "
            f"got {tuple(offsets.shape)} on {offsets.device}"
        )
    return offsets.contiguous()
