"""Measures of videos and feature sets that need no model. The toy world's judge is in `toy_judge.py`."""

# B batch  F frames  C channels  H W pixels  N samples  D features

from __future__ import annotations

import math

import torch
from torch import Tensor

LUMA_WEIGHTS = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709


def frechet_distance(features_a_ND: Tensor, features_b_ND: Tensor) -> float:
    """|mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)), Gaussians fitted to two feature sets (arXiv 1706.08500).

    In fp64, unbiased covariances. Biased upwards for few samples: compare at equal counts and beside its floor.
    Raises ValueError unless both are [N >= 2, D] with the same D, finite.
    """
    a, b = features_a_ND.double(), features_b_ND.double()
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"frechet distance: needs [N >= 2, D] twice, got {list(a.shape)} and {list(b.shape)}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("frechet distance: features hold NaN or infinity")
    cov_a, cov_b = _covariance(a), _covariance(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # Tr (C_a C_b)^(1/2) through the symmetric R C_b R, R = C_a^(1/2), which has the same eigenvalues
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root
    return max(distance.item(), 0.0)


def _covariance(x_ND: Tensor) -> Tensor:
    centred = x_ND - x_ND.mean(0)
    return centred.T @ centred / (len(x_ND) - 1)


def luma(pixels_BFCHW: Tensor) -> Tensor:
    """Mean BT.709 luma of each video, [B]; pixels in [0, 1], grey or RGB."""
    pixels = pixels_BFCHW.float()
    if pixels.shape[2] == 1:
        return pixels.mean(dim=(1, 2, 3, 4))
    weights = torch.tensor(LUMA_WEIGHTS, device=pixels.device)
    return pixels.mean(dim=(1, 3, 4)) @ weights


def saturation(pixels_BFCHW: Tensor) -> Tensor:
    """Mean HSV saturation (max - min) / max over a pixel's channels, [B]; 0 for black. Pixels in [0, 1]."""
    high, low = pixels_BFCHW.float().amax(dim=2), pixels_BFCHW.float().amin(dim=2)
    return ((high - low) / high.clamp(min=1e-6)).mean(dim=(1, 2, 3))


def clipped_share(pixels_BFCHW: Tensor, tolerance: float = 1 / 255) -> Tensor:
    """Share of each video's values outside [0, 1] by more than `tolerance`, [B]: what clamping will throw away.

    Give it pixels from before the clamp.
    """
    outside = (pixels_BFCHW < -tolerance) | (pixels_BFCHW > 1 + tolerance)
    return outside.float().mean(dim=(1, 2, 3, 4))


def binomial_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent trials: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / count)
