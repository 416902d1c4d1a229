"""The op `focal_frequency_loss`: images' spectra compared, large gaps weighted more."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import bytes_of, check_choice
from dashpot.spectral._spectra import (
    check_constant,
    check_length,
    check_number,
    check_pair,
    check_same_shape,
    random_signals,
    transform_flops,
    wants,
    wide,
    with_slopes,
    work_dtype,
)


def _patches(x: Tensor, factor: int) -> Tensor:
    """(N, C, H, W) -> (N, factor^2, C, H / factor, W / factor)."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, factor, h // factor, factor, w // factor)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(n, factor * factor, c, h // factor, w // factor)


def _focal_weights(power: Tensor, alpha: float, log_matrix: bool, batch_matrix: bool) -> Tensor:
    """w = P^(alpha/2) over its maximum, within [0, 1]; no gradient."""
    w = power.detach() ** (alpha / 2)
    if log_matrix:
        w = (w + 1.0).log()
    top = w.amax() if batch_matrix else w.amax((-2, -1), keepdim=True)
    return (w / top).nan_to_num(nan=0.0, posinf=torch.inf).clamp(0.0, 1.0)


def _focal_frequency_loss_reference(
    input: Tensor, target: Tensor, weight: Tensor | None, alpha: float, log_matrix: bool,
    batch_matrix: bool, patch_factor: int, reduction: str, wants: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """L = mean(w P), P = |F_x - F_y|^2 of the orthonormal 2-D transform of each patch."""

    def loss(gap: Tensor) -> list[Tensor]:
        spectrum = torch.fft.fft2(_patches(gap, patch_factor), norm="ortho")  # (N, p, C, h, w)
        power = spectrum.real.square() + spectrum.imag.square()
        if power.numel() == 0:
            w = power
        elif weight is None:
            w = _focal_weights(power, alpha, log_matrix, batch_matrix)
        else:
            w = weight.detach()
        weighted = w * power
        return [weighted.mean((1, 3, 4)) if reduction == "none" else weighted.mean()]

    (out,), (slope,) = with_slopes(loss, (wide(input) - wide(target),), [any(wants)])
    return out, slope


def _focal_frequency_loss_fake(
    input, target, weight, alpha, log_matrix, batch_matrix, patch_factor, reduction, wants
):
    dtype = work_dtype(input.dtype)
    return (
        input.new_empty(input.shape[:2] if reduction == "none" else (), dtype=dtype),
        input.new_empty(input.shape if any(wants) else (0,), dtype=dtype),
    )


def _focal_frequency_loss_backward(
    grad_loss, input, target, weight, alpha, log_matrix, batch_matrix, patch_factor, reduction,
    wants, slope, needs_grad,
):  # fmt: skip
    """dx = dL * slope = -dy."""
    scale = grad_loss[..., None, None] if reduction == "none" else grad_loss
    grad = scale * slope
    return (
        grad.to(input.dtype) if needs_grad[0] else None,
        -grad.to(input.dtype) if needs_grad[1] else None,
    )


VARIANTS = {  # alpha, log_matrix, batch_matrix, patch_factor, reduction, weighted
    "plain": (1.0, False, False, 1, "mean", False),
    "square": (2.0, False, True, 1, "mean", False),
    "log": (1.0, True, False, 1, "none", False),
    "root": (0.5, True, True, 2, "mean", False),
    "patches": (1.0, False, False, 2, "none", False),
    "mse": (0.0, False, False, 1, "mean", False),
    "given": (1.0, False, False, 2, "mean", True),
}


def _focal_frequency_loss_inputs(size, dtype, device, seed):
    variant, *shape = size
    alpha, log_matrix, batch_matrix, patch_factor, reduction, weighted = VARIANTS[variant]
    input, target = random_signals(shape, dtype, device, seed)
    weight = None
    if weighted:  # not symmetric in the frequency
        h, w = shape[-2] // patch_factor, shape[-1] // patch_factor
        weight = torch.linspace(0, 1, h * w, dtype=work_dtype(dtype)).reshape(h, w).to(device)
    return (input, target, weight, alpha, log_matrix, batch_matrix, patch_factor, reduction,
            [True, True])  # fmt: skip


def _focal_frequency_loss_floor(input, target, *_):
    """Both images read and one slope written; one transform there and back, by linearity."""
    h, w = input.shape[-2:]
    planes = input.numel() // max(h * w, 1)
    return bytes_of([input, target, input]) + 4, 2 * planes * transform_flops(h * w)


_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? weight, float alpha, bool log_matrix, bool batch_matrix,"
    " int patch_factor, str reduction, bool[] wants"
)

FOCAL_FREQUENCY_LOSS = declare(
    "focal_frequency_loss",
    forward=f"({_ARGUMENTS}) -> (Tensor loss, Tensor slope)",
    backward=f"(Tensor grad_loss, {_ARGUMENTS}, Tensor slope, bool[] needs_grad)"
    " -> (Tensor grad_input, Tensor grad_target)",
    reference=_focal_frequency_loss_reference,
    reference_backward=_focal_frequency_loss_backward,
    fake=_focal_frequency_loss_fake,
    public=1,
    inputs=_focal_frequency_loss_inputs,
    floor=_focal_frequency_loss_floor,
    sizes={
        # odd and prime sides, one pixel, one row, radices 2, 3, 5, fewer and more columns than a
        # group, every option
        # (the first, for gradcheck, has constant weights: no gradient flows through the others)
        "test": [("mse", 2, 1, 4, 6), ("plain", 2, 1, 4, 8), ("plain", 1, 3, 64, 32),
                 ("plain", 2, 1, 7, 5),
                 ("plain", 2, 1, 1, 1), ("plain", 1, 2, 1, 24), ("square", 2, 2, 30, 16),
                 ("log", 2, 3, 8, 40), ("root", 2, 1, 12, 20), ("patches", 2, 3, 10, 48),
                 ("mse", 1, 2, 9, 10), ("given", 2, 2, 4, 8), ("patches", 1, 1, 34, 6)],
        "bench": [("plain", 16, 3, 64, 64), ("plain", 8, 3, 256, 256)],
    },
)  # fmt: skip


@public
def focal_frequency_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    log_matrix: bool = False,
    batch_matrix: bool = False,
    ave_spectrum: bool = False,
    patch_factor: int = 1,
    weight: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""Distance of images' spectra, weighted by itself: the focal frequency loss.

    .. math:: L = \overline{w P}, \quad P = |F_x - F_y|^2,
        \quad w = P^{\alpha/2} / \max P^{\alpha/2}

    with F the orthonormal 2-D transform of each patch. The weights w (0 where they are 0/0) are
    constants: no gradient flows through them. alpha = 0 is the mean squared error.

    Args:
        input: (N, C, H, W) images; float64, float32, bfloat16 or float16.
        target: (N, C, H, W), the same shape; with `ave_spectrum` N may differ. Two dtypes become
            the wider one.
        alpha: exponent of the weights, at least 0; defaults are the published code's.
        log_matrix: w = log(P^(alpha/2) + 1) before the division.
        batch_matrix: divide by the maximum over everything; default: over each plane (H, W).
        ave_spectrum: average the spectra over N first.
        patch_factor: cut H and W into this many parts each, and transform the patches.
        weight: (N, patch_factor^2, C, H / patch_factor, W / patch_factor), or what broadcasts to
            it: weights to use instead of w.
        reduction: "none" gives one loss per image and channel, (N, C) ((1, C) with
            `ave_spectrum`).

    Returns:
        The loss, () or (N, C), in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice (the second derivative runs in plain PyTorch).

    Source: Focal Frequency Loss for Image Reconstruction and Synthesis, arXiv 2012.12821, and its
    published code.
    """
    input, target = check_pair(input, target)
    alpha = check_number(alpha, "alpha", 0.0)
    factor = check_length(patch_factor, "patch_factor")
    check_choice("reduction", reduction, ("mean", "none"))
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(
            f"input: expected (N, C, H, W) with C, H, W >= 1, got {tuple(input.shape)}"
        )
    if input.shape[2] % factor or input.shape[3] % factor:
        raise ValueError(
            f"patch_factor: expected a divisor of H and W = {tuple(input.shape[2:])}, got {factor}"
        )
    if ave_spectrum:  # the transform is linear
        if target.shape[1:] != input.shape[1:] or target.dim() != 4:
            raise ValueError(
                f"target: expected (any, {', '.join(map(str, input.shape[1:]))}), "
                f"got {tuple(target.shape)}"
            )
        input, target = wide(input).mean(0, keepdim=True), wide(target).mean(0, keepdim=True)
    check_same_shape(input, target)
    if weight is not None:
        weight = _check_weight(weight, input, factor)
    return FOCAL_FREQUENCY_LOSS(
        input, target, weight, alpha, log_matrix, batch_matrix, factor, reduction,
        wants(input, target),
    )  # fmt: skip


def _check_weight(weight, input: Tensor, factor: int) -> Tensor:
    weight = check_constant(weight, "weight", input)
    n, c, h, w = input.shape
    shape = (n, factor * factor, c, h // factor, w // factor)
    ends = zip(reversed(weight.shape), reversed(shape), strict=False)
    if weight.dim() > 5 or any(have not in (1, want) for have, want in ends):
        raise ValueError(f"weight: expected {shape} or less of it, got {tuple(weight.shape)}")
    return weight


class FocalFrequencyLoss(nn.Module):
    """`focal_frequency_loss` with the constructor of the published module of this name."""

    def __init__(
        self,
        loss_weight: float = 1.0,
        alpha: float = 1.0,
        patch_factor: int = 1,
        ave_spectrum: bool = False,
        log_matrix: bool = False,
        batch_matrix: bool = False,
    ):
        super().__init__()
        self.loss_weight = loss_weight
        self.options = {
            "alpha": alpha, "patch_factor": patch_factor, "ave_spectrum": ave_spectrum,
            "log_matrix": log_matrix, "batch_matrix": batch_matrix,
        }  # fmt: skip

    def forward(self, pred: Tensor, target: Tensor, matrix: Tensor | None = None) -> Tensor:
        """matrix: weights of the frequencies in place of the computed ones."""
        if matrix is not None:
            matrix = matrix.detach()
        loss = focal_frequency_loss(pred, target, weight=matrix, **self.options)
        return loss if self.loss_weight == 1.0 else self.loss_weight * loss
