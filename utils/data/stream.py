"""Samples by position: a source (files) read in an order, with corrupt ones replaced, counted and named."""

# T frames  F latent frames  C channels  H W size  L text tokens  D text channels  S stored points of a trajectory

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from utils.data.order import Order
from utils.random import keyed_seed

console = logging.getLogger("fewstep")

MAX_CORRUPT: Final = 0.01  # of a data set: what a few broken downloads cost; more is another defect
REMEDY: Final = "make their files anew, or take them out of the folder"
REMEDY_BEFORE: Final = "repair or remove them, or raise --max_corrupt"  # while the data is made


class CorruptSample(ValueError):
    """One sample cannot be read. The message names the file, the row and what is wrong, in one line."""


class TooManyCorrupt(ValueError):
    """More of the data set is corrupt than `max_corrupt` allows."""


@dataclass(frozen=True)
class Sample:
    """One sample of any kind of data; what a kind does not have is None.

    name: what to call it in a message.
    caption: of the video.
    text: embedding of the caption, [L, D] without padding.
    latents: [F, C, H, W], normalised as the network sees them.
    first_latents: of the first frame and grey ones after it, [F', C, H, W], normalised too.
    clip: image embedding [L, D].
    pixels: [T, 3, H, W] in [0, 1]; an image has T = 1.
    trajectory: [S, F, C, H, W], from noise to clean; `latents` is its clean end.
    sigmas: noise levels of the trajectory, [S].
    """

    name: str
    caption: str = ""
    text: Tensor | None = None
    latents: Tensor | None = None
    first_latents: Tensor | None = None
    clip: Tensor | None = None
    pixels: Tensor | None = None
    trajectory: Tensor | None = None
    sigmas: Tensor | None = None


class Source(Protocol):
    """Items 0 .. sum(shard_sizes) - 1. `read` raises CorruptSample and may be called by several threads.

    The position is given for what is drawn anew each time an item is read, such as where in a video a clip begins.
    """

    @property
    def shard_sizes(self) -> Sequence[int]: ...

    def read(self, item: int, position: int) -> Sample: ...


class Faults:
    """Which items of a data set of `size` could not be read. Raises TooManyCorrupt beyond the share `limit`, and tells
    the remedy.

    Each rank counts what it met itself, and `join` adds what others did. An item is named once however often it is met.
    """

    def __init__(self, size: int, limit: float = MAX_CORRUPT, remedy: str = REMEDY) -> None:
        if not 0 <= limit <= 1:
            raise ValueError(f"max_corrupt must be in [0, 1], got {limit}")
        self.size, self.limit, self.remedy = size, limit, remedy
        self.reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def add(self, item: int, problem: Exception) -> None:
        """Counts and names one item. Raises TooManyCorrupt."""
        reason = " ".join(str(problem).split())
        with self._lock:
            if item in self.reasons:
                return
            self.reasons[item] = reason
        console.warning("corrupt sample skipped (%d so far): %s", len(self.reasons), reason)
        self._check(reason)

    def join(self, items: Iterable[int]) -> None:
        """Counts items that other ranks could not read. Raises TooManyCorrupt."""
        with self._lock:
            for item in items:
                self.reasons.setdefault(item, "another rank's log names it")
        if self.reasons:
            self._check(next(reversed(self.reasons.values())))

    def _check(self, last: str) -> None:
        if len(self.reasons) > self.limit * self.size:
            raise TooManyCorrupt(
                f"data: {len(self.reasons)} of {self.size} samples are corrupt, more than a share of {self.limit:g}; "
                f"the last: {last}; the log names them all: {self.remedy}"
            )


class Stream:
    """An endless stream of samples: `samples(range)` depends on the positions and the files alone.

    A sample that cannot be read is replaced by the next one of its epoch (and bucket), the same on every rank and after
    every resume. caption_dropout: the share of samples whose caption becomes `dropped_caption` (the empty or negative
    prompt, whose embedding is then `dropped_text`), drawn by position.

    Raises ValueError for a share outside [0, 1].
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        seed: int,
        *,
        caption_dropout: float = 0.0,
        dropped_caption: str = "",
        dropped_text: Tensor | None = None,
        max_corrupt: float = MAX_CORRUPT,
    ) -> None:
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in [0, 1], got {caption_dropout}")
        self.source, self.order, self.seed = source, order, seed
        self.caption_dropout = caption_dropout
        self.dropped_caption, self.dropped_text = dropped_caption, dropped_text
        self.faults = Faults(order.size, max_corrupt)

    def samples(self, positions: range) -> list[Sample]:
        """The samples at these positions. Raises TooManyCorrupt."""
        return [self.sample(position) for position in positions]

    def sample(self, position: int) -> Sample:
        """The sample at this position. Raises TooManyCorrupt, or ValueError for a negative position."""
        for item in self.order.candidates(position):
            if item in self.faults.reasons:
                continue
            try:
                found = self.source.read(item, position)
            except CorruptSample as problem:
                self.faults.add(item, problem)
                continue
            return self._without_caption(found) if self.drops_caption(position) else found
        raise TooManyCorrupt(f"data: none of {self.order.size} samples can be read; the first problems are above")

    def drops_caption(self, position: int) -> bool:
        """Whether the sample at this position loses its caption."""
        return keyed_seed(self.seed, "caption dropout", position) < self.caption_dropout * 2.0**63

    def _without_caption(self, sample: Sample) -> Sample:
        return dataclasses.replace(sample, caption=self.dropped_caption, text=self.dropped_text)


def stacked(tensors: Sequence[Tensor | None], what: str) -> Tensor:
    """[B, ...] of one field of B samples. Raises ValueError where a sample has none, or another shape."""
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) < len(tensors) or not present:
        raise ValueError(f"data: {len(tensors) - len(present)} of {len(tensors)} samples have no {what}")
    shapes = sorted({tuple(tensor.shape) for tensor in present})
    if len(shapes) > 1:
        raise ValueError(f"data: {what} of one batch have several shapes: {shapes}; use buckets, or one size")
    return torch.stack(present)
