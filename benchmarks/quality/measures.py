"""Measures how near images are to others."""

from __future__ import annotations

import torch
from skimage.metrics import structural_similarity
from torch import Tensor

_WINDOW = 7
"""Pixels along the edge of the window of the structural similarity, scikit-image's default."""


def psnr(images: Tensor, reference: Tensor) -> tuple[float, float]:
    """Peak signal-to-noise ratio, a mean over images and its standard error.

    Args:
        images: [B, ...], clamped here to [-1, 1] as a viewer would; the peak is 2.
        reference: likewise.

    Returns:
        (mean, standard error) in dB.
    """
    difference = images.clamp(-1, 1).double() - reference.clamp(-1, 1).double()
    error = difference.square().flatten(1).mean(dim=1).clamp_min(1e-12)
    values = 10 * torch.log10(4.0 / error)
    spread = values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return values.mean().item(), spread


def ssim(images: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), a mean over images.

    Args:
        images: [B, H, W] or [B, C, H, W], clamped here to [-1, 1].
        reference: likewise.
    """
    pairs = zip(images.clamp(-1, 1).numpy(), reference.clamp(-1, 1).numpy(), strict=True)
    channels = 0 if images.dim() == 4 else None
    values = [
        structural_similarity(one, other, win_size=_WINDOW, data_range=2.0, channel_axis=channels)  # type: ignore[no-untyped-call]
        for one, other in pairs
    ]
    return sum(map(float, values)) / len(values)
