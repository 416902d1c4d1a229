"""The op `multi_resolution_stft_loss`: STFT magnitudes compared at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import bytes_of, check_choice
from dashpot.spectral._spectra import (
    check_constant,
    check_length,
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

TERMS = 3  # spectral convergence, logarithm, linear


def _magnitudes(x: Tensor, window: Tensor, n_fft: int, hop: int, power_floor: float) -> Tensor:
    """m = sqrt(max(|STFT|^2, floor)), (rows, F, frames) of x (rows, T)."""
    spectrum = torch.stft(x, n_fft, hop, window.shape[0], window, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    return power.clamp(min=power_floor).sqrt()


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm over all but dim 0, (E,); its gradient at 0 is 0."""
    square = x.square().flatten(1).sum(1)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _log(m: Tensor) -> Tensor:
    """log m; 0 where m is 0, which an empty filter gives for both signals."""
    return torch.where(m == 0, 1.0, m).log()


def _resolution_terms(
    m_x: Tensor, m_y: Tensor, weights: list[float], l2: bool, sc_batch: bool, reduction: str
) -> list[Tensor]:
    """[sc, log, lin], each (E,), of magnitudes (E, bins); their mean over E is the batch's term.
    A term of weight 0 is 0."""
    zero = m_x.new_zeros(m_x.shape[0])
    terms = [zero, zero, zero]
    if weights[0]:
        if sc_batch:
            m_x_all, m_y_all = m_x.flatten()[None], m_y.flatten()[None]
            terms[0] = (_norm(m_y_all - m_x_all) / _norm(m_y_all)).expand_as(zero)
        else:
            terms[0] = _norm(m_y - m_x) / _norm(m_y)
    gaps = [_log(m_x) - _log(m_y)] if weights[1] else [None]
    gaps.append(m_x - m_y if weights[2] else None)
    for i, gap in enumerate(gaps, 1):
        if gap is not None:
            rho = (gap.square() if l2 else gap.abs()).flatten(1)  # (E, bins)
            terms[i] = rho.sum(1) * rho.shape[0] if reduction == "sum" else rho.mean(1)
    return terms


def loss_of(terms: Tensor, weights: list[float]) -> Tensor:
    """Terms (R, 3) or (R, 3, E) -> () or (E,)."""
    return sum(w * terms[:, i] for i, w in enumerate(weights)).mean(0)


def _multi_resolution_stft_loss_reference(
    input: Tensor, target: Tensor, windows: list[Tensor], filters: list[Tensor], channels: int,
    n_ffts: list[int], hops: list[int], win_lengths: list[int], weights: list[float],
    power_floor: float, mag_distance: str, sc_reduction: str, reduction: str,
    scale_invariance: bool, split: bool, wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean over resolutions of w_sc |m_y - m_x|/|m_y| + w_log |log m_x - log m_y| + w_lin |...|;
    with split the three terms of each resolution instead, (R, 3) or (R, 3, E)."""

    def terms_of(input: Tensor, target: Tensor) -> Tensor:
        x, y = wide(input), wide(target)  # (rows, T), rows = E * channels
        found = []
        for r, (n_fft, hop, length) in enumerate(zip(n_ffts, hops, win_lengths, strict=True)):
            if windows:
                window = windows[r].detach().to(x.dtype)
            else:
                window = torch.hann_window(length, dtype=x.dtype, device=x.device)
            m_x, m_y = (_magnitudes(s, window, n_fft, hop, power_floor) for s in (x, y))
            if filters:  # (M, F) @ (rows, F, frames)
                m_x, m_y = (filters[r].detach() @ m for m in (m_x, m_y))
            if scale_invariance:
                scale = (m_x * m_y).sum((1, 2)) / m_y.square().sum((1, 2))  # (rows,)
                m_y = m_y * scale[:, None, None]
            examples = x.shape[0] // channels
            found += _resolution_terms(
                m_x.reshape(examples, -1), m_y.reshape(examples, -1), weights,
                mag_distance == "l2", sc_reduction == "batch" and reduction != "none", reduction,
            )  # fmt: skip
        terms = torch.stack(found).reshape(len(n_ffts), TERMS, -1)  # (R, 3, E)
        return terms if reduction == "none" else terms.mean(2)  # (R, 3)

    if not split:

        def loss(input: Tensor, target: Tensor) -> list[Tensor]:
            return [loss_of(terms_of(input, target), weights)]

        (out,), slopes = with_slopes(loss, (input, target), wants)
        return out, *slopes
    slopes = [[], []]
    for term in range(len(n_ffts) * TERMS):

        def one(input, target, term=term):
            return [terms_of(input, target).flatten(0, 1)[term]]

        for side, slope in zip(slopes, with_slopes(one, (input, target), wants)[1], strict=True):
            side.append(slope)
    return terms_of(input, target), *(torch.stack(s) if s[0].numel() else s[0] for s in slopes)


def _multi_resolution_stft_loss_fake(
    input, target, windows, filters, channels, n_ffts, hops, win_lengths, weights, power_floor,
    mag_distance, sc_reduction, reduction, scale_invariance, split, wants,
):  # fmt: skip
    dtype, count = work_dtype(input.dtype), len(n_ffts)
    each = (input.shape[0] // channels,) if reduction == "none" else ()
    full = (count * TERMS, *input.shape) if split else input.shape
    return (
        input.new_empty((count, TERMS, *each) if split else each, dtype=dtype),
        input.new_empty(full if wants[0] else (0,), dtype=dtype),
        input.new_empty(full if wants[1] else (0,), dtype=dtype),
    )


def _multi_resolution_stft_loss_backward(
    grad_loss, input, target, windows, filters, channels, n_ffts, hops, win_lengths, weights,
    power_floor, mag_distance, sc_reduction, reduction, scale_invariance, split, wants,
    slope_input, slope_target, needs_grad,
):  # fmt: skip
    """dx = dL * slope; split: the sum over terms of their derivative times their slope."""
    slope_input, slope_target = needed_slopes(
        _multi_resolution_stft_loss_reference,
        (input, target, windows, filters, channels, n_ffts, hops, win_lengths, weights,
         power_floor, mag_distance, sc_reduction, reduction, scale_invariance, split, wants),
        (slope_input, slope_target), needs_grad,
    )  # fmt: skip
    scale = grad_loss.flatten(0, 1) if split else grad_loss  # (), (E,), (3 R,) or (3 R, E)
    if reduction == "none":
        scale = scale.repeat_interleave(channels, -1)[..., None]  # (..., rows, 1)
    elif split:
        scale = scale[:, None, None]

    def gradient(slope: Tensor) -> Tensor:
        grad = scale * slope
        return (grad.sum(0) if split else grad).to(input.dtype)

    return (
        gradient(slope_input) if needs_grad[0] else None,
        gradient(slope_target) if needs_grad[1] else None,
    )


RESOLUTIONS = {  # n_ffts, hop_lengths, win_lengths
    "default": ((1024, 2048, 512), (120, 240, 50), (600, 1200, 240)),
    "small": ((16, 8), (3, 4), (12, 8)),
    "one": ((20,), (7,), (15,)),
    "prime": ((14, 9), (5, 3), (14, 4)),
}
# resolutions, weights, distance, sc, reduction, channels, own windows, split
VARIANTS = {
    "default": ("default", [1.0, 1.0, 0.0], "l1", "batch", "mean", 1, False, False),
    "small": ("small", [1.0, 1.0, 0.0], "l1", "batch", "mean", 1, False, False),
    "l2": ("small", [0.5, 2.0, 1.5], "l2", "example", "mean", 2, True, False),
    "each": ("one", [1.0, 1.0, 0.5], "l1", "example", "none", 2, False, False),
    "each term": ("small", [1.0, 1.0, 0.5], "l1", "example", "none", 2, False, True),
    "sum": ("small", [1.0, 0.0, 0.5], "l1", "batch", "sum", 1, True, False),
    "terms": ("small", [1.0, 1.0, 0.0], "l2", "batch", "mean", 1, True, True),
    "log": ("one", [0.0, 1.0, 0.0], "l1", "batch", "mean", 1, False, False),
    "prime": ("prime", [1.0, 1.0, 1.0], "l1", "batch", "mean", 1, False, False),
    "prime terms": ("prime", [1.0, 1.0, 0.5], "l2", "example", "none", 2, True, True),
    "bands": ("small", [1.0, 1.0, 0.5], "l1", "example", "mean", 2, False, False),
}


def _multi_resolution_stft_loss_inputs(size, dtype, device, seed):
    label, rows, t = size
    variant = label.removeprefix("train ")  # only the input wants a gradient
    name, weights, distance, sc_reduction, reduction, channels, own, split = VARIANTS[variant]
    n_ffts, hops, lengths = RESOLUTIONS[name]
    input, target = random_signals((rows, t), dtype, device, seed)
    windows = []
    if own:
        windows = [0.2 + torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in lengths]
        windows = [w.to(device, work_dtype(dtype)) for w in windows]
    filters = []
    if variant == "bands":  # neighbouring bins overlap, the last band ends before the last bin
        for n in n_ffts:
            filters.append(torch.zeros(3, n // 2 + 1, dtype=work_dtype(dtype)))
            for m in range(3):
                filters[-1][m, m : m + n // 4] = torch.linspace(0.2, 1.0, n // 4)
        filters = [one.to(device) for one in filters]
    return (input, target, windows, filters, channels, list(n_ffts), list(hops), list(lengths),
            weights, 1e-8, distance, sc_reduction, reduction, variant == "bands", split,
            [True, label == variant])  # fmt: skip


def _multi_resolution_stft_loss_floor(
    input, target, windows, filters, channels, n_ffts, hops, win_lengths, *_
):
    """Both signals read and one slope written; the frames' transforms and one inverse."""
    rows, t = input.shape
    flops = sum(3 * rows * (1 + t // h) * transform_flops(n)
                for n, h in zip(n_ffts, hops, strict=True))  # fmt: skip
    return bytes_of([input, target, input]) + 4, flops


_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor[] windows, Tensor[] filters, int channels, int[] n_ffts,"
    " int[] hops, int[] win_lengths, float[] weights, float power_floor, str mag_distance,"
    " str sc_reduction, str reduction, bool scale_invariance, bool split, bool[] wants"
)

MULTI_RESOLUTION_STFT_LOSS = declare(
    "multi_resolution_stft_loss",
    forward=f"({_ARGUMENTS}) -> (Tensor loss, Tensor slope_input, Tensor slope_target)",
    backward=f"(Tensor grad_loss, {_ARGUMENTS}, Tensor slope_input, Tensor slope_target,"
    " bool[] needs_grad) -> (Tensor grad_input, Tensor grad_target)",
    reference=_multi_resolution_stft_loss_reference,
    reference_backward=_multi_resolution_stft_loss_backward,
    fake=_multi_resolution_stft_loss_fake,
    public=1,
    inputs=_multi_resolution_stft_loss_inputs,
    floor=_multi_resolution_stft_loss_floor,
    sizes={
        # fewer and more frames than a group, more frames than a segment, a last frame cut short,
        # own windows, channels, each reduction, lengths that no kernel transforms, filters
        "test": [("small", 2, 30), ("l2", 4, 33), ("each", 4, 150), ("sum", 3, 64), ("log", 1, 120),
                 ("terms", 2, 50), ("each term", 4, 70), ("prime", 2, 41), ("bands", 4, 60),
                 ("prime", 1, 700), ("prime terms", 4, 51),
                 ("small", 1, 3000), ("default", 2, 2400)],
        "bench": [("train default", 4, 65536), ("train default", 16, 65536)],
    },
)  # fmt: skip


def check_stft(
    input, target, windows, filters, sizes, names, weights, power_floor, mag_distance,
    sc_reduction, reduction, scale_invariance, return_terms,
) -> tuple:  # fmt: skip
    """The checks of both STFT losses; returns the op's arguments. names: what the sizes are called
    in the message."""
    input, target = check_pair(input, target)
    check_same_shape(input, target)
    if input.dim() not in (2, 3) or 0 in input.shape[:-1]:
        raise ValueError(
            f"input: expected (B, T) or (B, C, T), not empty, got {tuple(input.shape)}"
        )
    for name, value in zip(("w_sc", "w_log", "w_lin"), weights, strict=True):
        check_number(value, name, -float("inf"))
    power_floor = check_number(power_floor, "power_floor", 0.0, strict=True)
    check_choice("mag_distance", mag_distance, ("l1", "l2"))
    check_choice("sc_reduction", sc_reduction, ("batch", "example"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    t = input.shape[-1]
    for n_fft, hop, length in zip(*sizes, strict=True):
        for name, value in zip(names, (n_fft, hop, length), strict=True):
            check_length(value, name)
        if length > n_fft:
            raise ValueError(f"{names[2]}: expected at most {names[0]} = {n_fft}, got {length}")
        if n_fft // 2 >= t:
            raise ValueError(
                f"{names[0]}: expected n_fft // 2 < T = {t} (the edges are reflected), got {n_fft}"
            )
    checked = [check_constant(w, "window", input) for w in windows]
    for window, length in zip(checked, sizes[2] if checked else (), strict=True):
        if window.shape != (length,):
            raise ValueError(f"window: expected ({length},), got {tuple(window.shape)}")
    filters = [check_constant(one, "filters", input) for one in filters]
    for one, n_fft in zip(filters, sizes[0] if filters else (), strict=True):
        if one.dim() != 2 or one.shape[0] == 0 or one.shape[1] != n_fft // 2 + 1:
            raise ValueError(
                f"filters: expected (M, {n_fft // 2 + 1}) with M >= 1, got {tuple(one.shape)}"
            )
    channels = input.shape[1] if input.dim() == 3 else 1
    return (
        input.reshape(-1, t), target.reshape(-1, t), checked, filters, channels, *map(list, sizes),
        [float(w) for w in weights], power_floor, mag_distance, sc_reduction, reduction,
        bool(scale_invariance), return_terms, wants(input, target),
    )  # fmt: skip


@public
def multi_resolution_stft_loss(
    input: Tensor,
    target: Tensor,
    *,
    n_ffts: Sequence[int] = (1024, 2048, 512),
    hop_lengths: Sequence[int] = (120, 240, 50),
    win_lengths: Sequence[int] = (600, 1200, 240),
    windows: Sequence[Tensor] | None = None,
    filters: Sequence[Tensor] | None = None,
    w_sc: float = 1.0,
    w_log: float = 1.0,
    w_lin: float = 0.0,
    power_floor: float = 1e-8,
    mag_distance: Literal["l1", "l2"] = "l1",
    sc_reduction: Literal["batch", "example"] = "batch",
    reduction: Literal["mean", "sum", "none"] = "mean",
    scale_invariance: bool = False,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The mean over resolutions of `stft_loss`.

    .. math:: L = \frac1R \sum_r \Big( w_{sc} \frac{\|m_y - m_x\|_F}{\|m_y\|_F}
        + w_{log}\,\overline{|\log m_x - \log m_y|} + w_{lin}\,\overline{|m_x - m_y|} \Big)

    with :math:`m = \sqrt{\max(|\mathrm{STFT}|^2, \text{floor})}` as `torch.stft` defines it:
    centred frames, reflected edges, one-sided.

    Args:
        input: (B, T) or (B, C, T) signals; float64, float32, bfloat16 or float16.
        target: (B, T) or (B, C, T), the same shape. Two dtypes become the wider one.
        n_ffts, hop_lengths, win_lengths: R transform lengths (n_fft // 2 < T), hops, windows'
            lengths; defaults of auraloss and ParallelWaveGAN.
        windows: R tensors (win_length, ...) of that one axis; default: periodic Hann windows.
        filters: R tensors (M, n_fft // 2 + 1), each with its own M: filter banks, not negative,
            that the magnitudes are multiplied with before they are compared (`mel_filters`); no
            gradient flows to them. Runs in plain PyTorch.
        w_sc, w_log, w_lin: weights of the terms; a term of weight 0 is not computed.
        power_floor: floor of the power, positive; auraloss 1e-8, ParallelWaveGAN 1e-7. Below it
            a bin has no gradient. Since m_y > 0, the first term is never 0/0.
        mag_distance: "l1" absolute differences, "l2" squares, in the second and third term.
        sc_reduction: "batch" takes norms over the whole batch as the published code does (the
            loss then is not a mean over examples), "example" per example.
        reduction: "mean"; "sum" (second and third term summed, as auraloss); "none": one loss per
            example, (B,), the first term per example too.
        scale_invariance: multiply the target's magnitudes by the factor that fits them best to the
            input's, one for each (example, channel) and resolution. Runs in plain PyTorch.
        return_terms: also return the three terms, each (R,) or (R, B); all carry gradients.

    Returns:
        The loss, () or (B,), in float32 (float64 for float64 inputs); with `return_terms` the
        loss and its terms sc, log, lin.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice (the second derivative runs in plain PyTorch).

    Source: Parallel WaveGAN, arXiv 1910.11480; auraloss' and ParallelWaveGAN's code.
    """
    names = ("n_ffts", "hop_lengths", "win_lengths")
    sizes = (n_ffts, hop_lengths, win_lengths)
    for name, value in zip(names, sizes, strict=True):
        if not isinstance(value, list | tuple) or len(value) == 0 or len(value) != len(n_ffts):
            got = len(value) if isinstance(value, list | tuple) else type(value).__name__
            raise ValueError(f"{name}: expected a sequence, of n_ffts' length, got {got}")
    for name, value in (("windows", windows), ("filters", filters)):
        if value is not None and len(value) != len(n_ffts):
            raise ValueError(f"{name}: expected {len(n_ffts)} tensors, got {len(value)}")
    arguments = check_stft(
        input, target, windows or (), filters or (), sizes, names, [w_sc, w_log, w_lin],
        power_floor, mag_distance, sc_reduction, reduction, scale_invariance, return_terms,
    )  # fmt: skip
    out = MULTI_RESOLUTION_STFT_LOSS(*arguments)
    return (loss_of(out, [w_sc, w_log, w_lin]), *out.unbind(1)) if return_terms else out
