"""Latents and ODE trajectories that were stored before: read by position, as they are needed."""

# B batch  S stored points  F latent frames  C channels  H W latent size

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.config import ConfigError, UserError
from utils.data.latents import latent_order, open_latents
from utils.data.stream import Sample, Stream, TooManyCorrupt, stacked
from utils.data.tensors import Statistics


class Stored:
    """Samples of a folder, in an order that depends on the seed and the position alone.

    key: the option that names the folder, for messages. latent_shape: (F, C, H, W) of the run. sigmas: the levels of
    an LMDB's trajectories, which does not hold them. statistics: of the VAE, for raw latents.
    Raises ConfigError for a folder of nothing of this shape.
    """

    def __init__(
        self,
        key: str,
        path: Path,
        latent_shape: Sequence[int],
        seed: int,
        sigmas: Sequence[float] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        try:
            source = open_latents(path, sigmas=sigmas, statistics=statistics)
        except ValueError as problem:
            raise ConfigError(f"{key}: {problem}") from None
        if odd := sorted({tuple(shape) for shape in source.shapes()} - {tuple(latent_shape)}):
            raise ConfigError(
                f"{key}: {path} holds latents of {list(odd[0])} and this run makes {list(latent_shape)} "
                "(F, C, H, W): set the size in data to it"
            )
        self.key, self.path = key, path
        self.stream = Stream(source, latent_order(source, 1, seed), seed)

    def samples(self, positions: range) -> list[Sample]:
        """Raises UserError where too much cannot be read."""
        try:
            return self.stream.samples(positions)
        except TooManyCorrupt as problem:
            raise UserError(f"{self.key}: {problem}") from None


class StoredLatents(Stored):
    """Clean latents, normalised as the networks see them."""

    def read(self, positions: range) -> tuple[Tensor, list[str]]:
        """Latents [B, F, C, H, W] and captions. Raises UserError."""
        samples = self.samples(positions)
        try:
            return stacked([sample.latents for sample in samples], "latents"), [sample.caption for sample in samples]
        except ValueError as problem:
            raise UserError(f"{self.key}: {problem}") from None


class StoredPairs(Stored):
    """Trajectories, all at the same levels, the last one 0."""

    def __init__(
        self, path: Path, latent_shape: Sequence[int], seed: int, sigmas: Sequence[float] | None = None
    ) -> None:
        super().__init__("ode.path", path, latent_shape, seed, sigmas)
        self.sigmas_S = self.read(range(1))[1]

    def read(self, positions: range) -> tuple[Tensor, Tensor, list[str]]:
        """Trajectories [B, S, F, C, H, W], their levels [S], and captions. Raises UserError."""
        samples = self.samples(positions)
        try:
            trajectory = stacked([sample.trajectory for sample in samples], "trajectory")
            sigmas = stacked([sample.sigmas for sample in samples], "noise levels")
        except ValueError as problem:
            raise UserError(f"ode.path: {problem}") from None
        if not torch.equal(sigmas, sigmas[:1].expand_as(sigmas)):
            raise UserError(f"ode.path: {self.path} holds trajectories of several lists of levels: keep one")
        return trajectory, sigmas[0], [sample.caption for sample in samples]
