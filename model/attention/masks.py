"""Attention masks of causal video models. All of them are uniform within a frame, so a mask is a small table of
frames: who may look at whom. Backends turn it into dense slices, a token mask or FlexAttention blocks.

Fq query frames  Fk key frames
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor


def frame_blocks(frames: int, frames_per_block: int, independent_first_frame: bool = False) -> tuple[int, ...]:
    """Sizes of the blocks that `frames` fall into; the first has one frame if it is independent.

    Raises ValueError when the frames do not fill whole blocks, naming the nearest legal counts.
    """
    first = 1 if independent_first_frame else 0
    rest = frames - first
    if frames_per_block < 1 or rest < 0 or rest % frames_per_block:
        below = max(rest, 0) // max(frames_per_block, 1) * frames_per_block + first
        legal = f"{below} or {below + frames_per_block}" if below else str(frames_per_block + first)
        extra = " after an independent first frame" if first else ""
        raise ValueError(f"{frames} latent frames are not whole blocks of {frames_per_block}{extra}: use {legal}")
    return (1,) * first + (frames_per_block,) * (rest // frames_per_block)


@dataclass(frozen=True)
class FrameMask:
    """allowed[q][k]: whether query frame q attends to key frame k. Hashable, so backends can memoise on it."""

    allowed: tuple[tuple[bool, ...], ...]

    @property
    def query_frames(self) -> int:
        return len(self.allowed)

    @property
    def key_frames(self) -> int:
        return len(self.allowed[0])

    def among(self, frames: Sequence[int]) -> FrameMask:
        """The mask among some frames of a square one, in this order."""
        return FrameMask(tuple(tuple(self.allowed[q][k] for k in frames) for q in frames))

    @cached_property
    def segments(self) -> tuple[tuple[slice, tuple[slice, ...]], ...]:
        """Runs of query frames that see the same keys, and those keys as runs of frames: each a dense problem."""
        out = []
        start = 0
        for q in range(1, self.query_frames + 1):
            if q == self.query_frames or self.allowed[q] != self.allowed[start]:
                out.append((slice(start, q), _runs(self.allowed[start])))
                start = q
        return tuple(out)

    def tokens(self, tokens_per_frame: int, device: torch.device) -> Tensor:
        """The mask over tokens, bool [Fq * tokens_per_frame, Fk * tokens_per_frame], True where attended."""
        table = torch.tensor(self.allowed, device=device)
        return table.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)


def _runs(row: Sequence[bool]) -> tuple[slice, ...]:
    edges = [i for i in range(len(row) + 1) if (i > 0 and row[i - 1]) != (i < len(row) and row[i])]
    return tuple(slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True))


def check_window(window: int | None, sinks: int, block: int) -> None:
    """ValueError unless a window of `window` frames holds the sinks and one block."""
    if sinks < 0 or (window is not None and window < sinks + block):
        raise ValueError(f"window of {window} frames cannot hold {sinks} sink frames and a block of {block}: widen it")


@lru_cache(maxsize=64)
def block_causal_mask(blocks: tuple[int, ...], window: int | None = None, sinks: int = 0) -> FrameMask:
    """A frame sees all of its own block and what precedes it (CausVid, arXiv 2412.07772, section 4.1).

    window: how many frames a block sees in all, its own and the first `sinks` of the video included; None is all.
    """
    check_window(window, sinks, max(blocks))
    total = sum(blocks)
    rows = []
    for size, end in zip(blocks, accumulate(blocks), strict=True):
        low = 0 if window is None or end <= window else end - (window - sinks)
        rows += [tuple(k < end and (k >= low or k < sinks) for k in range(total))] * size
    return FrameMask(tuple(rows))


@lru_cache(maxsize=64)
def teacher_forcing_mask(blocks: tuple[int, ...], window: int | None = None, sinks: int = 0) -> FrameMask:
    """Over [clean | noisy]: clean is block-causal; a noisy block sees itself and the clean blocks before it."""
    causal = block_causal_mask(blocks, window, sinks).allowed
    total = len(causal)
    block_of = [b for b, size in enumerate(blocks) for _ in range(size)]
    rows = [row + (False,) * total for row in causal]
    for q, row in enumerate(causal):
        clean = tuple(seen and block_of[k] < block_of[q] for k, seen in enumerate(row))
        noisy = tuple(block_of[k] == block_of[q] for k in range(total))
        rows.append(clean + noisy)
    return FrameMask(tuple(rows))
