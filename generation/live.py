"""A video that is watched while it is made: pixels block by block, its prompt may change, its pace is measured.

T pixel frames of a block  h w pixel size
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from generation.generator import Generator
from generation.sampling import Sampling
from utils.errors import UserError
from utils.overlap import SideDecoder


@dataclass(frozen=True)
class Pace:
    """first: seconds from the text embedding to the first block's pixels, None before it. fps: pixel frames a second
    after the first block, None before the second. frames: pixel frames so far."""

    first: float | None = None
    fps: float | None = None
    frames: int = 0


class Live:
    """One video without end of a causal student. Not for several threads at once; different videos are independent.

    number: with `sampling.seed`, selects this video's random numbers.
    Raises UserError for what the network cannot do, and for a prompt that has no embedding.
    """

    def __init__(self, generator: Generator, prompt: str, sampling: Sampling, *, number: int = 0) -> None:
        self.generator = generator
        self._video = generator.endless([prompt], sampling, [number])
        self._decoder = SideDecoder(generator.task.decoding(), generator.device)
        # a block that is being made while the one before is shown, and its prompt
        self._begun: tuple[Callable[[], Tensor], str] | None = None
        self._next_prompt = prompt  # of the next block to begin
        self.prompt = prompt  # of the block that came last
        self._shape = generator.task.latent_shape[1:]
        self._opened, self._first, self._steady = time.perf_counter(), 0.0, 0.0
        self._frames, self._first_frames = 0, 0

    def next_frames(self) -> Tensor:
        """The next block's pixels [T, 3, h, w] in [0, 1], on the CPU."""
        started = time.perf_counter()
        ready, prompt = self._begun or self._begin()
        # the first block comes as soon as it can; later ones are decoded while the next is made, where they can be
        overlaps = self._decoder.overlaps and self._frames > 0
        self._begun = self._begin() if overlaps else None
        pixels, self.prompt = ready()[0], prompt
        if self._frames == 0:
            self._first, self._first_frames = time.perf_counter() - self._opened, len(pixels)
        else:
            self._steady += time.perf_counter() - started
        self._frames += len(pixels)
        return pixels

    def _begin(self) -> tuple[Callable[[], Tensor], str]:
        return self._decoder.start(self._video.make(self._video.noise(self._shape))), self._next_prompt

    def switch(self, prompt: str, *, recache: bool = False) -> None:
        """Takes another prompt, from the first block not yet started. recache: see `CausalStream.switch`.
        Raises UserError for a prompt that has no embedding; the video then goes on as it was."""
        try:
            encoded = self.generator.task.conditioning([prompt]).prompt
        except ValueError as problem:
            raise UserError(str(problem)) from None
        self._video.switch(encoded, recache=recache)
        self._next_prompt = prompt

    @property
    def is_steady(self) -> bool:
        """Whether the blocks to come are all alike: each sees a full window."""
        return self._video.cache.frames >= self._video.cache.shape.context_frames

    def close(self) -> None:
        """Ends the video: what is recorded of its passes serves the next one."""
        self.generator.keep(self._video)

    @property
    def pace(self) -> Pace:
        if self._frames == 0:
            return Pace()
        steady = self._frames - self._first_frames
        return Pace(self._first, steady / self._steady if steady else None, self._frames)
