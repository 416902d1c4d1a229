"""`stft_loss`: `multi_resolution_stft_loss` of one resolution."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._rows import bytes_of
from dashpot.spectral._spectra import random_signals, transform_flops
from dashpot.spectral.multi_resolution_stft_loss import (
    MULTI_RESOLUTION_STFT_LOSS,
    check_stft,
    loss_of,
)


@public
def stft_loss(
    input: Tensor,
    target: Tensor,
    n_fft: int = 1024,
    hop_length: int = 120,
    win_length: int = 600,
    window: Tensor | None = None,
    *,
    filters: Tensor | None = None,
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
    r"""Distance of two signals' STFT magnitudes.

    .. math:: L = w_{sc} \frac{\|m_y - m_x\|_F}{\|m_y\|_F}
        + w_{log}\,\overline{|\log m_x - \log m_y|} + w_{lin}\,\overline{|m_x - m_y|}

    with :math:`m = \sqrt{\max(|\mathrm{STFT}|^2, \text{floor})}` as `torch.stft` defines it:
    centred frames, reflected edges, one-sided.

    Args:
        input: (B, T) or (B, C, T) signals; float64, float32, bfloat16 or float16.
        target: (B, T) or (B, C, T), the same shape. Two dtypes become the wider one.
        n_fft, hop_length, win_length: transform length (n_fft // 2 < T), hop, window's length;
            defaults of auraloss' and ParallelWaveGAN's first resolution.
        window: (win_length,) window; default: periodic Hann.
        filters: (M, n_fft // 2 + 1) filter bank, not negative, that the magnitudes are multiplied
            with before they are compared (`mel_filters`); no gradient flows to it. Runs in plain
            PyTorch.
        w_sc, w_log, w_lin: weights of the terms; a term of weight 0 is not computed.
        power_floor: floor of the power, positive; auraloss 1e-8, ParallelWaveGAN 1e-7.
        mag_distance: "l1" absolute differences, "l2" squares, in the second and third term.
        sc_reduction: "batch" takes norms over the whole batch as the published code does,
            "example" per example.
        reduction: "mean"; "sum" (second and third term summed, as auraloss); "none": one loss per
            example, (B,), the first term per example too.
        scale_invariance: multiply the target's magnitudes by the factor that fits them best to the
            input's, one for each (example, channel). Runs in plain PyTorch.
        return_terms: also return the three terms, () or (B,); all carry gradients.

    Returns:
        The loss, () or (B,), in float32 (float64 for float64 inputs); with `return_terms` the
        loss and its terms sc, log, lin.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice (the second derivative runs in plain PyTorch).

    Source: Parallel WaveGAN, arXiv 1910.11480; auraloss' and ParallelWaveGAN's code.
    """
    arguments = check_stft(
        input, target, () if window is None else (window,), () if filters is None else (filters,),
        ((n_fft,), (hop_length,), (win_length,)), ("n_fft", "hop_length", "win_length"),
        [w_sc, w_log, w_lin], power_floor, mag_distance, sc_reduction, reduction, scale_invariance,
        return_terms,
    )  # fmt: skip
    out = MULTI_RESOLUTION_STFT_LOSS(*arguments)
    return (loss_of(out, [w_sc, w_log, w_lin]), *out[0].unbind(0)) if return_terms else out


def _stft_loss_inputs(size, dtype, device, seed):
    rows, n_fft, hop, length, t = size
    return (*random_signals((rows, t), dtype, device, seed), n_fft, hop, length)


def _stft_loss_floor(input, target, n_fft, hop_length, *_):
    """Both signals read and one slope written; the frames' transforms and one inverse."""
    rows, t = input.shape
    flops = 3 * rows * (1 + t // hop_length) * transform_flops(n_fft)
    return bytes_of([input, target, input]) + 4, flops


STFT_LOSS = chain(
    "stft_loss",
    stft_loss,
    (MULTI_RESOLUTION_STFT_LOSS,),
    inputs=_stft_loss_inputs,
    floor=_stft_loss_floor,
    sizes={
        "test": [(2, 8, 3, 6, 12), (2, 16, 5, 16, 40), (3, 64, 16, 48, 700)],
        "bench": [(4, 1024, 256, 1024, 65536)],
    },
)
