"""Measures of videos and feature sets that need no model. The toy world's judge is in `toy_judge.py`."""

# B batch  F frames  C channels  H W pixels  N samples  D features

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.distributed import all_reduce_

LUMA_WEIGHTS = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709
DRIFT_SHARE = 0.15
ENOUGH = 10  # samples a dimension, below which the bias of a Frechet distance is no detail


@dataclass
class Moments:
    """Mean and scatter of features [N, D] that come in batches, in fp64: what a Frechet distance needs of them.

    `add` and `merge` combine exactly, up to rounding, whatever the split (Chan, Golub, LeVeque, "Updating formulae and
    a pairwise algorithm for computing sample variances", 1979), and never subtract large sums.
    """

    count: int = 0
    mean_D: Tensor | None = None
    scatter_DD: Tensor | None = None  # sum of outer products of what is left after the mean

    def add(self, features_ND: Tensor) -> None:
        """Takes in a batch. Raises ValueError unless it is [N, D] with the D of earlier ones, and finite."""
        x = features_ND.detach().double()
        width = x.shape[-1] if self.mean_D is None else len(self.mean_D)
        if x.ndim != 2 or x.shape[1] != width:
            raise ValueError(f"moments: features must be [N, {width}], got {list(x.shape)}")
        if not torch.isfinite(x).all():
            raise ValueError("moments: features hold NaN or infinity")
        if len(x):
            mean = x.mean(0)
            self.merge(Moments(len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other: Moments) -> None:
        """Takes in the samples of other moments, such as another rank's."""
        if other.mean_D is None or other.scatter_DD is None:
            return
        if self.mean_D is None or self.scatter_DD is None:
            self.count, self.mean_D, self.scatter_DD = other.count, other.mean_D, other.scatter_DD
            return
        total, apart = self.count + other.count, other.mean_D - self.mean_D
        share = self.count * other.count / total
        self.scatter_DD = self.scatter_DD + other.scatter_DD + share * torch.outer(apart, apart)
        self.mean_D = self.mean_D + apart * (other.count / total)
        self.count = total

    def over_ranks(self) -> Moments:
        """Moments of the samples of all ranks, on every rank. Every rank must have some."""
        assert self.mean_D is not None
        assert self.scatter_DD is not None
        total = int(all_reduce_(torch.tensor([self.count], device=self.mean_D.device)).item())
        mean = all_reduce_(self.mean_D * (self.count / total))
        apart = self.mean_D - mean
        return Moments(total, mean, all_reduce_(self.scatter_DD + self.count * torch.outer(apart, apart)))

    @property
    def covariance_DD(self) -> Tensor:
        """Unbiased. Raises ValueError for fewer than two samples."""
        if self.scatter_DD is None or self.count < 2:
            raise ValueError(f"moments: a covariance needs [N >= 2, D] features, got {self.count}")
        return self.scatter_DD / (self.count - 1)

    @property
    def variance(self) -> float:
        """The total variance: the trace of the covariance."""
        return self.covariance_DD.trace().item()


def moments_of(batches: Iterable[Tensor], features: Callable[[Tensor], Tensor]) -> Moments:
    """Moments of `features` of each batch: any callable that gives [N, D]."""
    moments = Moments()
    for batch in batches:
        moments.add(features(batch))
    return moments


def frechet_between(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)), Gaussians of these moments (arXiv 1706.08500).

    In fp64. Raises ValueError for fewer than two samples, or features of different widths.
    """
    cov_a, cov_b = a.covariance_DD, b.covariance_DD
    assert a.mean_D is not None
    assert b.mean_D is not None
    if cov_a.shape != cov_b.shape:
        raise ValueError(f"frechet distance: features of {len(cov_a)} and {len(cov_b)} dimensions: take one encoder")
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # Tr (C_a C_b)^(1/2) through the symmetric R C_b R, R = C_a^(1/2), which has the same eigenvalues
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean_D - b.mean_D).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root
    return max(distance.item(), 0.0)


def few_samples(a: Moments, b: Moments) -> str:
    """In words, that a Frechet distance of these moments says more of their numbers than of their laws; empty where
    both have ENOUGH samples a dimension, or for moments of nothing."""
    fewest = min(a.count, b.count)
    if a.mean_D is None or fewest >= ENOUGH * len(a.mean_D):
        return ""
    return (
        f"it is of {fewest} samples in {len(a.mean_D)} dimensions, fewer than {ENOUGH} a dimension: two such sets of "
        "one law lie apart too, so compare it only with distances of the same numbers of samples"
    )


def frechet_distance(features_a_ND: Tensor, features_b_ND: Tensor) -> float:
    """`frechet_between` of two feature sets as wholes, with unbiased covariances.

    Biased upwards for few samples: compare at equal counts and beside its floor.
    Raises ValueError unless both are [N >= 2, D] with the same D, finite.
    """
    a, b = features_a_ND, features_b_ND
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"frechet distance: needs [N >= 2, D] twice, got {list(a.shape)} and {list(b.shape)}")
    moments = Moments(), Moments()
    for part, features in zip(moments, (a, b), strict=True):
        part.add(features)
    return frechet_between(*moments)


def drift(values_BFx: Tensor, share: float = DRIFT_SHARE) -> Tensor:
    """[B, ...]: mean of a measure [B, F, ...] over the last frames of each video less that over the first ones.

    `share` of the frames at either end, at least one (FramePack's start-end contrast takes 15 %, arXiv 2504.12626). In
    the measure's unit, signed: take its magnitude or, of features, its norm. Raises ValueError for one frame, or a
    share outside (0, 0.5].
    """
    frames = values_BFx.shape[1]
    if frames < 2 or not 0 < share <= 0.5:
        raise ValueError(f"drift: needs at least 2 frames and a share in (0, 0.5], got {frames} and {share}")
    count = max(1, math.floor(share * frames + 1e-6))  # 0.15 * 20 is 3 frames, also where a float says 2.9999
    return values_BFx[:, -count:].mean(dim=1) - values_BFx[:, :count].mean(dim=1)


def diversity(features_ND: Tensor) -> float:
    """Mean Euclidean distance between the features of two different samples, in the features' unit; nan for one."""
    if len(features_ND) < 2:
        return math.nan
    return torch.nn.functional.pdist(features_ND.float()).mean().item()


def motion(pixels_BFCHW: Tensor) -> Tensor:
    """Mean absolute change of a pixel's value from frame to frame, [B]; 0 for stills. Pixels in [0, 1].

    It counts what changes, not how far it moves: flicker counts too. Raises ValueError for one frame.
    """
    if pixels_BFCHW.shape[1] < 2:
        raise ValueError("motion: needs at least 2 frames")
    return pixels_BFCHW.float().diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


def luma(pixels_BFCHW: Tensor) -> Tensor:
    """Mean BT.709 luma of each video, [B]; pixels in [0, 1], grey or RGB."""
    pixels = pixels_BFCHW.float()
    if pixels.shape[2] == 1:
        return pixels.mean(dim=(1, 2, 3, 4))
    weights = torch.tensor(LUMA_WEIGHTS, device=pixels.device)
    return pixels.mean(dim=(1, 3, 4)) @ weights


def frame_luma(pixels_BFCHW: Tensor) -> Tensor:
    """`luma` of each frame, [B, F]."""
    return luma(pixels_BFCHW.flatten(0, 1)[:, None]).unflatten(0, pixels_BFCHW.shape[:2])


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
