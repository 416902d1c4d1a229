"""`STFTLoss` and `MultiResolutionSTFTLoss`, with auraloss' constructors, and mel filters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dashpot.aggregate._rows import check_choice
from dashpot.spectral._spectra import check_length, check_number, wide
from dashpot.spectral.multi_resolution_stft_loss import multi_resolution_stft_loss


def _mel(hertz: Tensor) -> Tensor:
    """Slaney's scale: 3 mel for 200 Hz up to 1,000 Hz, from there 27 mel for a factor 6.4."""
    above = hertz.clamp(min=1000.0)
    return torch.where(
        hertz < 1000.0, 3 * hertz / 200, 15 + 27 * (above / 1000).log() / math.log(6.4)
    )


def _hertz(mel: Tensor) -> Tensor:
    above = 1000 * (math.log(6.4) / 27 * (mel - 15)).exp()
    return torch.where(mel < 15, 200 * mel / 3, above)


def mel_filters(sample_rate: float, n_fft: int, n_mels: int = 128) -> Tensor:
    """Triangular filters, equally far apart on Slaney's mel scale: `filters` of the STFT losses.

    The corners go from 0 to half the sample rate, and each triangle has area 1 in Hz: what
    `librosa.filters.mel` gives by default, which auraloss uses.

    Args:
        sample_rate: samples per second, a positive number.
        n_fft: length of the transform.
        n_mels: how many filters M; default of auraloss and librosa.

    Returns:
        (M, n_fft // 2 + 1) filters in float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    sample_rate = check_number(sample_rate, "sample_rate", 0.0, strict=True)
    n_fft, n_mels = check_length(n_fft, "n_fft"), check_length(n_mels, "n_mels")
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * (sample_rate / n_fft)  # (F,)
    top = _mel(torch.tensor(sample_rate / 2, dtype=torch.float64)).item()
    corners = _hertz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))[:, None]  # (M + 2, 1)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return (2 / (right - left) * torch.minimum(rising, falling).clamp(min=0)).float()


def _a_weighting(sample_rate: float) -> Tensor:
    """(1, 1, 101) taps of the filter auraloss calls "aw": the magnitude of the A-weighting curve of
    IEC 61672, in its bilinear form, fitted by least squares. Needs SciPy, as auraloss does."""
    import scipy.signal

    poles = [20.598997, 20.598997, 107.65265, 737.86223, 12194.217, 12194.217]  # Hz
    zeros = [0.0] * 4
    gain = (2 * math.pi * 12194.217) ** 2 * 10 ** (1.9997 / 20)
    analog = scipy.signal.zpk2tf(zeros, [-2 * math.pi * p for p in poles], gain)
    digital = scipy.signal.bilinear(*analog, fs=sample_rate)
    frequencies, response = scipy.signal.freqz(*digital, worN=512, fs=sample_rate)
    taps = scipy.signal.firls(101, frequencies, abs(response), fs=sample_rate)
    return torch.tensor(taps).float()[None, None]


class MultiResolutionSTFTLoss(nn.Module):
    """`multi_resolution_stft_loss` with the constructor of auraloss' module of this name.

    forward takes (B, C, T) (or (B, T)); output="full" returns the loss and lists of the terms
    (sc, log, lin, phase), one entry per resolution. `reduction="none"` gives (B,). Where auraloss'
    module fails this one does not: `scale_invariance` fits each (example, channel) by itself, for
    any batch. Not taken: scale="chroma", with which auraloss' constructor fails.

    `w_phs`, `scale`, `perceptual_weighting` and `scale_invariance` run in plain PyTorch.
    """

    def __init__(
        self,
        fft_sizes: Sequence[int] = (1024, 2048, 512),
        hop_sizes: Sequence[int] = (120, 240, 50),
        win_lengths: Sequence[int] = (600, 1200, 240),
        window: str = "hann_window",
        w_sc: float = 1.0,
        w_log_mag: float = 1.0,
        w_lin_mag: float = 0.0,
        w_phs: float = 0.0,
        sample_rate: float | None = None,
        scale: str | None = None,
        n_bins: int | None = None,
        perceptual_weighting: bool = False,
        scale_invariance: bool = False,
        eps: float = 1e-8,
        output: str = "loss",
        reduction: str = "mean",
        mag_distance: str = "L1",
        device=None,
    ):
        super().__init__()
        check_choice("output", output, ("loss", "full"))
        check_choice("mag_distance", mag_distance, ("L1", "L2"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        if scale not in (None, "mel"):
            raise ValueError(f"scale: expected None or 'mel', got {scale!r}")
        if (scale or perceptual_weighting) and sample_rate is None:
            raise ValueError("sample_rate: expected a number with scale or perceptual_weighting")
        if scale and n_bins is None:
            raise ValueError("n_bins: expected an int with scale, got None")
        if not isinstance(window, str) or not hasattr(torch, window) or window[-7:] != "_window":
            raise ValueError(f"window: expected a window of torch as 'hann_window', got {window!r}")
        self.w_phs = check_number(w_phs, "w_phs", -math.inf)
        self.full = output == "full"
        self.options = {
            "n_ffts": list(fft_sizes), "hop_lengths": list(hop_sizes),
            "win_lengths": list(win_lengths), "w_sc": w_sc, "w_log": w_log_mag, "w_lin": w_lin_mag,
            "power_floor": eps, "mag_distance": mag_distance.lower(), "reduction": reduction,
            "scale_invariance": scale_invariance, "return_terms": self.full,
        }  # fmt: skip
        self.tables = {"window": 0, "filters": 0}  # how many buffers of each name
        if window != "hann_window":  # which kernels have
            self._keep("window", [getattr(torch, window)(n) for n in win_lengths], device)
        if scale:
            self._keep("filters", [mel_filters(sample_rate, n, n_bins) for n in fft_sizes], device)
        taps = _a_weighting(sample_rate).to(device) if perceptual_weighting else None
        self.register_buffer("taps", taps, persistent=False)

    def _keep(self, name: str, tensors: list[Tensor], device) -> None:
        self.tables[name] = len(tensors)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"{name}_{i}", tensor.to(device), persistent=False)

    def _kept(self, name: str, like: Tensor) -> list[Tensor] | None:
        tensors = [getattr(self, f"{name}_{i}") for i in range(self.tables[name])]
        return [tensor.to(like.device) for tensor in tensors] or None

    def forward(self, input: Tensor, target: Tensor):
        if self.taps is not None:
            input, target = (self._weighted(signal) for signal in (input, target))
        windows = self._kept("window", input)
        out = multi_resolution_stft_loss(
            input, target, windows=windows, filters=self._kept("filters", input), **self.options
        )
        loss, *terms = out if self.full else (out,)
        phases = [0.0] * len(self.options["n_ffts"])
        if self.w_phs:
            phases = self._phase_terms(input, target, windows)  # (R,) or (R, B)
            loss = loss + self.w_phs * phases.mean(0)
            phases = list(phases.unbind(0))
        if not self.full:
            return loss
        return (loss, *(list(term.unbind(0)) for term in terms), phases)

    def _weighted(self, signal: Tensor) -> Tensor:
        rows = wide(signal).reshape(-1, 1, signal.shape[-1])
        taps = self.taps.to(rows)
        return torch.nn.functional.conv1d(rows, taps, padding=taps.shape[-1] // 2).view_as(signal)

    def _phase_terms(self, input: Tensor, target: Tensor, windows: list[Tensor] | None) -> Tensor:
        """The mean squared difference of the bins' angles at each resolution."""
        found = []
        for r, (n_fft, hop, length) in enumerate(
            zip(*(self.options[k] for k in ("n_ffts", "hop_lengths", "win_lengths")), strict=True)
        ):
            rows = [wide(signal).reshape(-1, signal.shape[-1]) for signal in (input, target)]
            if windows:
                window = windows[r].to(rows[0])
            else:
                window = torch.hann_window(length, dtype=rows[0].dtype, device=rows[0].device)
            angles = [torch.stft(x, n_fft, hop, length, window, return_complex=True).angle()
                      for x in rows]  # fmt: skip
            gap = (angles[0] - angles[1]).square()
            each = self.options["reduction"] == "none"
            found.append(gap.reshape(input.shape[0], -1).mean(1) if each else gap.mean())
        return torch.stack(found)


class STFTLoss(MultiResolutionSTFTLoss):
    """`stft_loss` with the constructor of auraloss' module of this name, and its defaults: one
    resolution of `MultiResolutionSTFTLoss`; output="full" returns (loss, sc, log, lin, phase)."""

    def __init__(
        self,
        fft_size: int = 1024,
        hop_size: int = 256,
        win_length: int = 1024,
        *arguments,
        **options,
    ):
        super().__init__((fft_size,), (hop_size,), (win_length,), *arguments, **options)

    def forward(self, input: Tensor, target: Tensor):
        out = super().forward(input, target)
        return (out[0], *(term[0] for term in out[1:])) if self.full else out
