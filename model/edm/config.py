"""Geometry of a class-conditional convolutional network, and the presets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.family import FirstFrame

GROUP = 8  # channels that group norm takes together


@dataclass(frozen=True)
class EDMConfig:
    """Geometry of one network. All blocks work on one grid: an image in squares of `patch` x `patch`.

    dim: width of the features that the blocks put out.
    num_layers: residual blocks.
    in_dim: channels of an image that goes in.
    out_dim: channels of an image that comes out.
    labels: classes, as many as the data has captions.
    patch: pixels a side that make one place of the grid.
    freq_dim: width of the Fourier embedding of time.
    sigma_data: standard deviation of the data, for the preconditioning.

    Raises ValueError for sizes that make no network.
    """

    dim: int
    num_layers: int
    in_dim: int = 1
    out_dim: int = 1
    labels: int = 10
    patch: int = 2
    freq_dim: int = 32
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "in_dim", "out_dim", "labels", "patch", "freq_dim"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.dim % GROUP:
            raise ValueError(f"dim {self.dim} must be a multiple of {GROUP}, the channels of a group of its norms")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} must be even: half of it is cosines")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive and finite, got {self.sigma_data}")

    @property
    def num_heads(self) -> int:
        return 1

    @property
    def patch_size(self) -> tuple[int, int, int]:
        return (1, self.patch, self.patch)

    @property
    def image_dim(self) -> None:
        return None

    @property
    def first_frame(self) -> FirstFrame:
        return FirstFrame.none

    @property
    def model_type(self) -> str:
        return "class-conditional"

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Places of the grid in one image of `height` x `width`; ValueError unless patches tile it."""
        if height % self.patch or width % self.patch:
            raise ValueError(f"latent size {height}x{width} is not a multiple of the patch {self.patch}x{self.patch}")
        return (height // self.patch) * (width // self.patch)


PRESETS: dict[str, EDMConfig] = {
    # scikit-learn's digits, normalised to unit variance
    "edm-digits": EDMConfig(dim=96, num_layers=4, sigma_data=1.0),
}
