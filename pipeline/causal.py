"""What every causal rollout has: blocks, a window with sinks, and a cache that fits them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.kv_cache import CacheSpec, KVCache, context_frames
from model.attention.masks import FrameMask, block_causal_mask, check_window, frame_blocks, teacher_forcing_mask
from model.family import Network
from utils.limits import FRAMES, check_counts, check_within


@dataclass(frozen=True)
class VideoShape:
    """Videos that are made together: how many, latent frames of each (None: without end), and the latents' size."""

    batch: int
    frames: int | None
    height: int
    width: int

    @classmethod
    def of(cls, latents: Tensor, before: int = 0) -> VideoShape:
        """That of latents [B, F, C, H, W] and of so many frames before them."""
        batch, frames, _, height, width = latents.shape
        return cls(batch, before + frames, height, width)


@dataclass
class CausalConfig:
    """Blocks and context of a causal student.

    num_frame_per_block: latent frames denoised together.
    independent_first_frame: whether the first block has one frame.
    window_frames: frames that a block sees in all, its own and the sinks included; None is all.
    sink_frames: first frames of the video that stay in the window.
    context_noise: timestep 0..1000 to which a finished block is noised before its keys and values are cached.
    """

    num_frame_per_block: int = 3
    independent_first_frame: bool = False
    window_frames: int | None = None
    sink_frames: int = 0
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        check_counts(self, {"num_frame_per_block": FRAMES, "window_frames": FRAMES})
        check_within(self, sink_frames=f"[0, {FRAMES}]")
        if not 0 <= self.context_noise < 1000:
            raise ValueError(f"context_noise is a timestep in [0, 1000), got {self.context_noise}")
        try:
            check_window(self.window_frames, self.sink_frames, self.num_frame_per_block)
        except ValueError as problem:
            raise ValueError(f"window_frames and sink_frames: {problem}") from None

    @property
    def context_sigma(self) -> float:
        return self.context_noise / 1000

    def blocks(self, frames: int) -> tuple[int, ...]:
        return frame_blocks(frames, self.num_frame_per_block, self.independent_first_frame)

    def mask(self, frames: int) -> FrameMask:
        return block_causal_mask(self.blocks(frames), self.window_frames, self.sink_frames)

    def teacher_forcing_mask(self, frames: int) -> FrameMask:
        return teacher_forcing_mask(self.blocks(frames), self.window_frames, self.sink_frames)

    def split(self, initial: int, frames: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Blocks of the initial frames and of those to generate. ValueError unless the former fill theirs."""
        blocks = self.blocks(initial + frames)
        before: tuple[int, ...] = ()
        while sum(before) < initial:
            before = blocks[: len(before) + 1]
        if sum(before) != initial:
            raise ValueError(
                f"{initial} initial latent frames do not end at a block: use {sum(before)} or {sum(before[:-1])}"
            )
        return before, blocks[len(before) :]

    def cache_frames(self, frames: int) -> int:
        return context_frames(frames, self.num_frame_per_block, self.window_frames, self.sink_frames)

    def new_cache(
        self,
        net: Network,
        videos: VideoShape,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        memory: Tensor | None = None,
        trained_frames: int | None = None,
    ) -> KVCache:
        """A cache as small as the window allows. Raises ValueError for videos without end under no window.

        net: whose keys and values it holds.
        videos: what is to be made over it.
        dtype, device: those of keys and values.
        memory: see `KVCache`.
        trained_frames: frames of the longest video that the network was trained on: in longer ones sinks follow, so
        that no frame is further away than there; None leaves them.
        """
        frames = videos.frames
        if frames is None:
            if self.window_frames is None:
                raise ValueError("a video without end needs a window: set window_frames")
            frames = self.window_frames + self.num_frame_per_block
        held = self.cache_frames(frames)
        block = self.num_frame_per_block if held else 0
        spec = CacheSpec(
            videos.batch,
            held,
            videos.height,
            videos.width,
            block_frames=block,
            sinks=min(self.sink_frames, held),
            rolling=held < max(frames - self.num_frame_per_block, 0),
            reach=None if trained_frames is None else max(trained_frames, held + block),
        )
        return net.new_cache(spec, dtype=dtype, device=device, memory=memory)
