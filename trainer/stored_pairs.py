"""ODE trajectories that were stored before: read by position, as they are needed."""

# B batch  S stored points  F latent frames  C channels  H W latent size

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.config import ConfigError, UserError
from utils.data.latents import latent_order, open_latents
from utils.data.stream import Stream, TooManyCorrupt, stacked


class StoredPairs:
    """Trajectories of a folder in an order that depends on the seed and the position alone.

    latent_shape: (F, C, H, W) of the run; batch: positions in a row that must have one shape. sigmas: the levels of
    an LMDB's, which does not hold them. Raises ConfigError for a folder that holds no trajectories of this shape.
    """

    def __init__(
        self, path: Path, latent_shape: Sequence[int], batch: int, seed: int, sigmas: Sequence[float] | None
    ) -> None:
        try:
            source = open_latents(path, sigmas=sigmas)
        except ValueError as problem:
            raise ConfigError(f"ode.path: {problem}") from None
        if odd := sorted({tuple(shape) for shape in source.shapes()} - {tuple(latent_shape)}):
            raise ConfigError(
                f"ode.path: {path} holds latents of {list(odd[0])} and this run makes {list(latent_shape)} "
                "(F, C, H, W): set the size in data to it"
            )
        self.stream, self.path = Stream(source, latent_order(source, batch, seed), seed), path
        first = self.read(range(1))
        self.sigmas_S = first[1]

    def read(self, positions: range) -> tuple[Tensor, Tensor, list[str]]:
        """Trajectories [B, S, F, C, H, W], their levels [S] with the last one 0, and captions. Raises UserError."""
        try:
            samples = self.stream.samples(positions)
            trajectory = stacked([sample.trajectory for sample in samples], "trajectory")
            sigmas = stacked([sample.sigmas for sample in samples], "noise levels")
        except (TooManyCorrupt, ValueError) as problem:
            raise UserError(f"ode.path: {problem}") from None
        if not torch.equal(sigmas, sigmas[:1].expand_as(sigmas)):
            raise UserError(f"ode.path: {self.path} holds trajectories of several lists of levels: keep one")
        return trajectory, sigmas[0], [sample.caption for sample in samples]
