"""The op `spectral_loss`: spectra of signals compared, batch averages or pairs."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import bytes_of, check_choice
from dashpot.spectral._spectra import (
    check_constant,
    check_number,
    check_pair,
    check_same_shape,
    needed_slopes,
    random_signals,
    transform_flops,
    wants,
    wide,
    with_slopes,
    work_dtype,
)

KINDS = ("complex", "magnitude", "power", "log_magnitude", "log_power")
DISTANCES = ("l1", "l2")
NORMS = ("backward", "ortho", "forward")


def _bin_weights(n: int, onesided: bool, weight: Tensor | None, like: Tensor) -> Tensor:
    """(F,): h_k w_k / (number of bins); h_k = 2 where a bin stands for two of the full spectrum."""
    k = torch.arange(n // 2 + 1, device=like.device)  # (F,)
    twice = (k > 0) & (2 * k != n)
    h = torch.where(twice, 1.0 if onesided else 2.0, 1.0).to(like.dtype)
    h = h / (n // 2 + 1 if onesided else n)
    return h if weight is None else h * weight.detach()


def _transform(x: Tensor, norm: str) -> Tensor:
    """(..., T) -> (..., F); torch refuses an empty batch."""
    if x.numel() == 0:
        return x[..., : x.shape[-1] // 2 + 1].to(x.dtype.to_complex())
    return torch.fft.rfft(x, norm=norm)


def _levels(spectrum: Tensor, kind: str, batch_mean: bool, eps: float) -> Tensor:
    """u: magnitude or power (R, F), averaged over dim 0 if asked for, then its logarithm."""
    if kind.endswith("power"):
        a = spectrum.real.square() + spectrum.imag.square()
    else:
        a = spectrum.abs()
    a = a.mean(0) if batch_mean else a
    return (a + eps).log() if kind.startswith("log") else a


def _spectral_loss_reference(
    input: Tensor, target: Tensor, weight: Tensor | None, kind: str, distance: str,
    batch_mean: bool, eps: float, norm: str, onesided: bool, reduction: str, wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """L = mean over rows of sum_k h_k w_k rho(u_k - v_k) / n, u and v from |rfft|; kind "complex"
    comes without batch_mean."""

    def loss(input: Tensor, target: Tensor) -> list[Tensor]:
        n = input.shape[-1]
        x, y = wide(input), wide(target)  # (B, ..., T)
        if kind == "complex":
            x_hat = _transform(x, norm)  # (B, ..., F)
            y_hat = _transform(y, norm)
            gap = x_hat - y_hat
            rho = gap.abs() if distance == "l1" else gap.real.square() + gap.imag.square()
        else:
            u = _levels(_transform(x, norm), kind, batch_mean, eps)
            v = _levels(_transform(y, norm), kind, batch_mean, eps)
            rho = (u - v).abs() if distance == "l1" else (u - v).square()
        per_row = (rho * _bin_weights(n, onesided, weight, x)).sum(-1)  # (...)
        return [per_row if reduction == "none" else per_row.mean()]

    (out,), slopes = with_slopes(loss, (input, target), wants)
    return out, *slopes


def _spectral_loss_fake(
    input, target, weight, kind, distance, batch_mean, eps, norm, onesided, reduction, wants
):
    dtype = work_dtype(input.dtype)
    return (
        input.new_empty(input.shape[:-1] if reduction == "none" else (), dtype=dtype),
        input.new_empty(input.shape if wants[0] else (0,), dtype=dtype),
        input.new_empty(target.shape if wants[1] else (0,), dtype=dtype),
    )


def _spectral_loss_backward(
    grad_loss, input, target, weight, kind, distance, batch_mean, eps, norm, onesided, reduction,
    wants, slope_input, slope_target, needs_grad,
):  # fmt: skip
    """dx = dL * slope; with reduction "none" each signal has its own dL."""
    slope_input, slope_target = needed_slopes(
        _spectral_loss_reference,
        (input, target, weight, kind, distance, batch_mean, eps, norm, onesided, reduction, wants),
        (slope_input, slope_target),
        needs_grad,
    )
    scale = grad_loss[..., None] if reduction == "none" else grad_loss
    return (
        (scale * slope_input).to(input.dtype) if needs_grad[0] else None,
        (scale * slope_target).to(input.dtype) if needs_grad[1] else None,
    )


VARIANTS = {  # kind, distance, batch_mean, norm, onesided, weighted, reduction
    "paper": ("log_magnitude", "l2", True, "backward", False, False, "mean"),
    "mean": ("log_power", "l1", True, "ortho", True, True, "mean"),
    "complex": ("complex", "l2", False, "ortho", False, False, "mean"),
    "complex l1": ("complex", "l1", False, "backward", False, True, "mean"),
    "magnitude": ("magnitude", "l1", False, "backward", False, False, "mean"),
    "power": ("power", "l2", False, "forward", True, False, "none"),
    "log": ("log_magnitude", "l2", False, "ortho", False, True, "none"),
    "log power": ("log_power", "l2", False, "ortho", False, False, "mean"),
}


def _spectral_loss_inputs(size, dtype, device, seed):
    name, *shape = size
    variant = name.removeprefix("train ")  # only the input wants a gradient
    kind, distance, batch_mean, norm, onesided, weighted, reduction = VARIANTS[variant]
    input, target = random_signals(shape, dtype, device, seed)
    weight = None
    if weighted:
        weight = torch.linspace(0.5, 2.0, shape[-1] // 2 + 1, dtype=work_dtype(dtype))
        weight = weight.to(device)
    return (input, target, weight, kind, distance, batch_mean, 1e-2, norm, onesided, reduction,
            [True, name == variant])  # fmt: skip


def _spectral_loss_floor(input, target, *_):
    """Both signals read and one slope written; the transforms of both and one inverse."""
    rows = input.numel() // max(input.shape[-1], 1)
    return (
        bytes_of([input, target, input]) + 4,
        3 * rows * transform_flops(input.shape[-1]),
    )


_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? weight, str kind, str distance, bool batch_mean,"
    " float eps, str norm, bool onesided, str reduction, bool[] wants"
)

SPECTRAL_LOSS = declare(
    "spectral_loss",
    forward=f"({_ARGUMENTS}) -> (Tensor loss, Tensor slope_input, Tensor slope_target)",
    backward=f"(Tensor grad_loss, {_ARGUMENTS}, Tensor slope_input, Tensor slope_target,"
    " bool[] needs_grad) -> (Tensor grad_input, Tensor grad_target)",
    reference=_spectral_loss_reference,
    reference_backward=_spectral_loss_backward,
    fake=_spectral_loss_fake,
    public=1,
    inputs=_spectral_loss_inputs,
    floor=_spectral_loss_floor,
    sizes={
        # every kind; one sample, odd, prime; radices 2, 3, 5 alone and mixed; less than, exactly
        # and more than one group of rows; a middle axis; the gaze windows' lengths; primes and odd
        # lengths of every way to compare, more than one chunk of bins
        "test": [("paper", 3, 8), ("paper", 33, 200), ("paper", 5, 1), ("paper", 4, 1021),
                 ("mean", 3, 2, 12), ("mean", 18, 30), ("mean", 3, 2, 21),
                 ("complex", 2, 16), ("complex l1", 17, 18), ("magnitude", 2, 3, 50),
                 ("magnitude", 5, 7), ("power", 16, 64), ("power", 2, 2), ("log", 19, 90),
                 ("log", 2, 15), ("log power", 1, 1458), ("log power", 9, 2000),
                 ("complex", 3, 33), ("log", 2, 4211)],
        "bench": [("train paper", 128, 200), ("train paper", 128, 2000),
                  ("train log power", 128, 2000)],
    },
)  # fmt: skip


@public
def spectral_loss(
    input: Tensor,
    target: Tensor,
    *,
    kind: Literal["complex", "magnitude", "power", "log_magnitude", "log_power"] = "log_magnitude",
    distance: Literal["l1", "l2"] = "l2",
    batch_mean: bool = False,
    weight: Tensor | None = None,
    eps: float = 1e-8,
    norm: Literal["backward", "ortho", "forward"] = "backward",
    spectrum: Literal["full", "onesided"] = "full",
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""Distance of the signals' spectra along the last axis.

    .. math:: L = \frac1{Rn} \sum_{\text{rows}} \sum_k h_k w_k\, \rho(u_k - v_k)

    with :math:`a_k = |X_k|` or :math:`|X_k|^2`, averaged over dim 0 first if `batch_mean`,
    :math:`u_k = a_k` or :math:`\log(a_k + \epsilon)`, and v the same of the target. The paper's
    loss for gaze trajectories is ``12 * spectral_loss(fake, real, batch_mean=True)``: it compares
    batches, not pairs, since the average comes before logarithm and square.

    The transform is always along the *last* axis. The published code passes some generators'
    output as (B, T, 1): its FFT then has length 1 and the loss compares batch averages of |x_t|,
    not spectra. Such a shape is warned of here; pass (B, T) or (B, 1, T).

    Args:
        input: (..., T) signals, T >= 1; float64, float32, bfloat16 or float16.
        target: (..., T), the same shape; with `batch_mean` dim 0 may differ. Two dtypes become
            the wider one.
        kind: what is compared. "complex": the modulus of X - Y enters rho.
        distance: rho, "l2" the square, "l1" the absolute value.
        batch_mean: average over dim 0 before logarithm and distance (needs two axes or more).
        weight: (T//2 + 1,) weights of the frequencies, not normalised; no gradient flows to it.
        eps: added before the logarithm; default of the official code.
        norm: factor of the transform, as in `torch.fft`: 1, n^(-1/2) or 1/n.
        spectrum: "full" averages over the n bins of the full spectrum, "onesided" over the
            n//2 + 1 of the half; two different losses.
        reduction: "none" gives one loss per signal, (...); not with `batch_mean`.

    Returns:
        The loss, () or (...), in float32 (float64 for float64 inputs); NaN for an empty batch.
        Gradients come in the input's dtype, 0 where a magnitude is 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice (the second derivative runs in plain PyTorch). With `batch_mean` the loss
    is not a mean over examples: accumulating gradients over smaller batches gives another one.

    Source: Modeling Eye Gaze Velocity Trajectories using GANs with Spectral Loss for Enhanced
    Fidelity, arXiv 2412.04184, and its published code.
    """
    check_choice("kind", kind, KINDS)
    check_choice("distance", distance, DISTANCES)
    check_choice("norm", norm, NORMS)
    check_choice("spectrum", spectrum, ("full", "onesided"))
    check_choice("reduction", reduction, ("mean", "none"))
    input, target = check_pair(input, target)
    _check_shapes(input, target, batch_mean)
    if batch_mean and reduction == "none":
        raise ValueError('reduction: expected "mean" with batch_mean, got "none"')
    eps = check_number(eps, "eps", 0.0)
    if weight is not None:
        weight = check_constant(weight, "weight", input)
        if weight.shape != (input.shape[-1] // 2 + 1,):
            raise ValueError(
                f"weight: expected ({input.shape[-1] // 2 + 1},), got {tuple(weight.shape)}"
            )
    if batch_mean and kind == "complex":  # the transform is linear
        batch_mean, (input, target) = False, (wide(x).mean(0) for x in (input, target))
    return SPECTRAL_LOSS(
        input, target, weight, kind, distance, batch_mean, eps, norm, spectrum == "onesided",
        reduction, wants(input, target),
    )  # fmt: skip


def _check_shapes(input: Tensor, target: Tensor, batch_mean: bool) -> None:
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ValueError(f"input: expected (..., T) with T >= 1, got {tuple(input.shape)}")
    if not batch_mean:
        check_same_shape(input, target)
    elif input.dim() < 2:
        raise ValueError(f"input: expected (B, ..., T) with batch_mean, got {tuple(input.shape)}")
    elif input.shape[1:] != target.shape[1:] or target.dim() < 2:
        wanted = ", ".join(map(str, input.shape[1:]))
        raise ValueError(f"target: expected (any, {wanted}), got {tuple(target.shape)}")
    if input.dim() > 2 and input.shape[-1] == 1:
        warnings.warn(
            f"spectral_loss: the last axis of {tuple(input.shape)} has length 1, so each spectrum "
            "is one number; time must be the last axis",
            stacklevel=4,
        )


class SpectralLoss(nn.Module):
    """`spectral_loss` as a module, with its options, times `loss_weight` (the paper's code: 12)."""

    def __init__(
        self,
        kind: str = "log_magnitude",
        distance: str = "l2",
        batch_mean: bool = False,
        weight: Tensor | None = None,
        eps: float = 1e-8,
        norm: str = "backward",
        spectrum: str = "full",
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ):
        super().__init__()
        if not math.isfinite(loss_weight):
            raise ValueError(f"loss_weight: expected a finite number, got {loss_weight}")
        self.register_buffer("weight", weight, persistent=False)
        self.loss_weight = loss_weight
        self.options = {
            "kind": kind, "distance": distance, "batch_mean": batch_mean, "eps": eps,
            "norm": norm, "spectrum": spectrum, "reduction": reduction,
        }  # fmt: skip

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss = spectral_loss(input, target, weight=self.weight, **self.options)
        return loss if self.loss_weight == 1.0 else self.loss_weight * loss
