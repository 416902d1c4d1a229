"""Losses on spectra (family `spectral`): real Fourier transforms compared, and their gradients.

    spectral_loss                  signals (..., T), batch averages or pairs      1-D transform
    stft_loss                      (B, T) or (B, C, T), one resolution            frames
    multi_resolution_stft_loss     the same, mean over resolutions                frames
    focal_frequency_loss           images (N, C, H, W)                            2-D transform

A loss is one number and its gradient is linear in what arrives from above. So the forward forms the
gradient while the spectra are in the cache ("slope", one tensor of the signal's size), if one is
wanted, and the backward is a product. A second derivative runs the reference.

Letters: B examples, C channels, T samples, n length of a transform, F = n//2 + 1 bins, R
resolutions (in `spectral_loss`: rows that are left after the batch average).
"""

from dashpot.spectral.focal_frequency_loss import (
    FOCAL_FREQUENCY_LOSS,
    FocalFrequencyLoss,
    focal_frequency_loss,
)
from dashpot.spectral.multi_resolution_stft_loss import (
    MULTI_RESOLUTION_STFT_LOSS,
    multi_resolution_stft_loss,
)
from dashpot.spectral.spectral_loss import SPECTRAL_LOSS, SpectralLoss, spectral_loss
from dashpot.spectral.stft_loss import STFT_LOSS, stft_loss
from dashpot.spectral.stft_modules import MultiResolutionSTFTLoss, STFTLoss, mel_filters

__all__ = [
    "FocalFrequencyLoss", "MultiResolutionSTFTLoss", "STFTLoss", "SpectralLoss",
    "focal_frequency_loss", "mel_filters", "multi_resolution_stft_loss", "spectral_loss",
    "stft_loss",
]  # fmt: skip

TOOLS = ("mel_filters",)

OPS = (SPECTRAL_LOSS, MULTI_RESOLUTION_STFT_LOSS, STFT_LOSS, FOCAL_FREQUENCY_LOSS)
