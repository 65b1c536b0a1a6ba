"""Latents and ODE trajectories that were stored before: read by position, as they are needed."""

# B batch  S stored points  F latent frames  C channels  H W latent size

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.types import LatentSize, VisualConditioning
from tasks.clips import Clips
from tasks.first_frames import VisualOf
from utils.data.latents import latent_order, open_latents, order_of_shape
from utils.data.safetensors_shards import SafetensorsFolder
from utils.data.stream import CorruptSample, Sample, Stream, TooManyCorrupt, stacked
from utils.data.tensors import Statistics
from utils.errors import ConfigError, UserError
from utils.reading import reading


class Stored:
    """Samples of a folder, in an order that depends on the seed and the position alone.

    key: the option that names the folder, for messages.
    path: the folder.
    latent_shape: (F, C, H, W) of the run.
    seed: keys the order of the samples.
    sigmas: noise levels of an LMDB's trajectories, which the LMDB does not hold.
    statistics: mean and deviation of the VAE's latents, for a folder of raw latents.
    visual_of: makes the visual conditioning of a batch's samples.

    Raises ConfigError for a folder that cannot be read, or that holds samples of another shape.
    """

    def __init__(
        self,
        key: str,
        path: Path,
        latent_shape: Sequence[int],
        seed: int,
        sigmas: Sequence[float] | None = None,
        statistics: Statistics | None = None,
        visual_of: VisualOf = lambda samples: VisualConditioning(),
    ) -> None:
        try:
            source = open_latents(path, sigmas=sigmas, statistics=statistics)
        except ValueError as problem:
            raise ConfigError(f"{key}: {problem}") from None
        self.key, self.path, self.visual_of, self.source = key, path, visual_of, source
        self.stored = Counter(map(tuple, source.shapes()))
        self.streams = self._grouped(latent_shape, seed)
        self.stream = self.streams[0]

    def _grouped(self, latent_shape: Sequence[int], seed: int) -> list[Stream]:
        """The streams that the run reads, the one of its own size first. Raises ConfigError for a folder that holds
        anything else."""
        if not all(self._fits(shape, latent_shape) for shape in self.stored):
            raise ConfigError(f"{self._holds(latent_shape)}: set the size in data to it")
        return [Stream(self.source, latent_order(self.source, 1, seed), seed)]

    def _fits(self, found: Sequence[int], latent_shape: Sequence[int]) -> bool:
        return tuple(found) == tuple(latent_shape)

    def _holds(self, *wanted: Sequence[int]) -> str:
        """What the folder holds and what the run makes, for messages."""
        counted = [f"{list(shape)} ({count} samples)" for shape, count in sorted(self.stored.items())]
        held = ", ".join(counted) if len(counted) > 1 else str(list(next(iter(self.stored))))
        made = ", ".join(str(list(shape)) for shape in wanted)
        return f"{self.key}: {self.path} holds latents of {held} and this run makes {made} (F, C, H, W)"

    @cached_property
    def captions(self) -> list[str]:
        """The caption of every sample, by its number in the folder; no tensors are read. Raises UserError."""
        try:
            return self.source.captions()
        except ValueError as problem:
            raise UserError(f"{self.key}: {problem}") from None

    def index(self) -> list[str]:
        """Shape and caption of every sample, in order. Raises UserError."""
        shapes = zip(self.source.shapes(), self.captions, strict=True)
        return [f"{list(shape)} {caption}" for shape, caption in shapes]

    def samples(self, positions: range, stream: Stream | None = None) -> list[Sample]:
        """The samples at these positions of a stream, None for the first. Raises UserError if too many samples cannot
        be read."""
        try:
            return (stream or self.stream).samples(positions)
        except TooManyCorrupt as problem:
            raise UserError(f"{self.key}: {problem}") from None


class StoredLatents(Stored):
    """Clean latents, normalised as the networks see them, of one shape or of several buckets'.

    sizes: (F, H, W) that the run draws, each of which reads the samples of one shape: of its height and width, and of
        as many frames or else of the fewest above it. None is the run's own size alone.

    The other arguments are `Stored`'s, which see. Raises ConfigError for a size without samples, and for samples that
    no size reads.
    """

    def __init__(
        self,
        key: str,
        path: Path,
        latent_shape: Sequence[int],
        seed: int,
        *,
        sizes: Sequence[LatentSize] | None = None,
        statistics: Statistics | None = None,
        visual_of: VisualOf = lambda samples: VisualConditioning(),
    ) -> None:
        self.channels = latent_shape[1]
        self.sizes = None if sizes is None else list(sizes)
        self.of_shape: dict[tuple[int, ...], Stream] = {}
        super().__init__(key, path, latent_shape, seed, statistics=statistics, visual_of=visual_of)

    def _grouped(self, latent_shape: Sequence[int], seed: int) -> list[Stream]:
        if self.sizes is None:
            if len(self.stored) > 1:
                raise ConfigError(
                    f"{self._holds(latent_shape)}: list those to train on in training.sizes: [{_sizes(self.stored)}]"
                )
            return super()._grouped(latent_shape, seed)
        wanted = [(frames, self.channels, height, width) for frames, height, width in self.sizes]
        read = {shape: self._source_of(shape) for shape in wanted}
        if bare := [shape for shape, found in read.items() if found is None]:
            raise ConfigError(
                f"{self._holds(*bare)}, which it has no samples for: set training.sizes (and data.wan) to what it "
                "holds, or store such videos (preprocess.py video --bucket)"
            )
        if unused := sorted(self.stored.keys() - set(read.values())):
            raise ConfigError(
                f"{self._holds(*wanted)}: add what is missing to training.sizes: [{_sizes(unused)}], or take those "
                "samples out"
            )
        self.of_shape = {
            shape: Stream(self.source, order_of_shape(self.source, shape, seed), seed) for shape in self.stored
        }
        usual = self._source_of(tuple(latent_shape))
        return sorted(self.of_shape.values(), key=lambda stream: usual is None or stream is not self.of_shape[usual])

    def _source_of(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The stored shape whose samples videos of `shape` (F, C, H, W) begin; None where there is none."""
        return min((found for found in self.stored if found[1:] == shape[1:] and found[0] >= shape[0]), default=None)

    def read(self, positions: range, shape: Sequence[int] | None = None) -> Clips:
        """The videos at these positions, whole. Raises UserError.

        shape: (F, C, H, W) of what they are for; None is the run's own.
        """
        source = None if shape is None else self._source_of(tuple(shape))
        samples = self.samples(positions, None if source is None else self.of_shape.get(source))
        try:
            latents = stacked([sample.latents for sample in samples], "latents")
            return Clips(latents, [sample.caption for sample in samples], self.visual_of(samples))
        except ValueError as problem:
            raise UserError(f"{self.key}: {problem}") from None


def _sizes(shapes: Iterable[tuple[int, ...]]) -> str:
    """Shapes (F, C, H, W) as `training.sizes` has them."""
    return ", ".join(f"{{frames: {f}, height: {h}, width: {w}}}" for f, _, h, w in sorted(shapes))


class StoredImages(Stored):
    """Images and their captions. In a folder of videos the image is a video's first frame."""

    def planned(self, positions: range) -> list[str]:
        """The captions at these positions, provided that every image there can be read. Raises UserError."""
        return [self.captions[self.stream.order.index(position)] for position in positions]

    def read(self, positions: range) -> tuple[list[str], VisualConditioning]:
        """Captions and visual conditioning at these positions. Raises UserError."""
        samples = self.samples(positions)
        return [sample.caption for sample in samples], self._visual(samples)

    def numbered(self, numbers: Iterable[int]) -> VisualConditioning:
        """Visual conditioning by the images of these numbers; after the last comes the first. Raises UserError."""
        try:
            return self._visual([self.source.read(number % len(self.captions), 0) for number in numbers])
        except CorruptSample as problem:
            raise UserError(f"{self.key}: {problem}") from None

    def _visual(self, samples: Sequence[Sample]) -> VisualConditioning:
        try:
            return self.visual_of(samples)
        except ValueError as problem:
            raise UserError(f"{self.key}: {problem}") from None

    def _fits(self, found: Sequence[int], latent_shape: Sequence[int]) -> bool:
        return tuple(found[1:]) == tuple(latent_shape[1:])


@dataclass(frozen=True)
class Pairs:
    """Trajectories [B, S, F, C, H, W], their noise levels [S], their captions and visual conditioning."""

    trajectory: Tensor
    sigmas: Tensor
    captions: list[str]
    visual: VisualConditioning


class StoredPairs(Stored):
    """Trajectories, all at the same noise levels, the last one 0.

    path: the folder, or an LMDB.
    latent_shape: (F, C, H, W) of the run.
    seed: keys the order of the trajectories.
    sigmas: noise levels of an LMDB's trajectories, which the LMDB does not hold.
    visual_of: makes the visual conditioning of a batch's samples.

    Raises ConfigError as `Stored` does, and UserError if the first trajectory cannot be read.
    """

    def __init__(
        self,
        path: Path,
        latent_shape: Sequence[int],
        seed: int,
        sigmas: Sequence[float] | None = None,
        visual_of: VisualOf = lambda samples: VisualConditioning(),
    ) -> None:
        super().__init__("ode.path", path, latent_shape, seed, sigmas, visual_of=visual_of)
        self.sigmas_S = self.read(range(1)).sigmas

    @property
    def settings(self) -> dict[str, Any]:
        """The sections of the config that the files say they were made with; empty for files of other programs."""
        if not isinstance(self.source, SafetensorsFolder):
            return {}
        with reading("ode.path", self.path):
            return dict(json.loads(self.source.headers[0].get("settings", "{}")))

    def read(self, positions: range) -> Pairs:
        """The trajectories at these positions. Raises UserError."""
        samples = self.samples(positions)
        try:
            trajectory = stacked([sample.trajectory for sample in samples], "trajectory")
            sigmas = stacked([sample.sigmas for sample in samples], "noise levels")
            visual = self.visual_of(samples)
        except ValueError as problem:
            raise UserError(f"ode.path: {problem}") from None
        if not torch.equal(sigmas, sigmas[:1].expand_as(sigmas)):
            raise UserError(f"ode.path: {self.path} holds trajectories of several lists of levels: keep one")
        return Pairs(trajectory, sigmas[0], [sample.caption for sample in samples], visual)
