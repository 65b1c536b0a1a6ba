"""Causal generation, one block at a time: few steps as a stream, or many as a teacher's trajectory.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention.kv_cache import KVCache
from model.attention.masks import block_causal_mask
from model.score import ScoreNet
from model.types import Conditioning, NoiseSource, Prompt
from pipeline.causal import CausalConfig
from pipeline.denoise import ExitPass, context_input, denoise_block, per_sample, write_context


def initial_parts(conditioning: Conditioning, blocks: Sequence[int]) -> Iterator[tuple[int, Tensor, Conditioning]]:
    """The given clean frames block by block: a number that names its draws, its frames, their conditioning."""
    if conditioning.initial is None:
        return
    start = 0
    for index, part in enumerate(conditioning.initial.split(list(blocks), dim=1)):
        yield -1 - index, part, conditioning.frames(start, part.shape[1])
        start += part.shape[1]


@torch.no_grad()
def cache_initial(
    student: ScoreNet, conditioning: Conditioning, blocks: Sequence[int], source: NoiseSource, cache: KVCache
) -> None:
    """Puts the given clean frames into the cache, block by block, at sigma 0.

    student: whose cache it is.
    conditioning: the video's conditioning, with its initial frames.
    blocks: how many frames each of their blocks has.
    source: draws nothing, as sigma 0 needs no noise.
    cache: an empty one.
    """
    for index, part, condition in initial_parts(conditioning, blocks):
        write_context(student, part, condition, sigma=0.0, block=index, source=source, cache=cache)


def block_noise(source: NoiseSource, blocks: Sequence[int], frame: Sequence[int]) -> Tensor:
    """Noise [B, F, C, H, W] of blocks of so many frames of shape (C, H, W), drawn block by block: a longer video begins
    as a shorter one does."""
    return torch.cat([source.normal(f"noise.b{index}", (size, *frame)) for index, size in enumerate(blocks)], 1)


@dataclass(frozen=True)
class StreamConfig:
    """How a causal student is streamed.

    schedules: noise levels of each block's steps; blocks after the last one named are made as that one. Fewer steps
    once a scene stands, say. noisy_context: later blocks see the keys and values of a block's last denoising pass, in
    place of those of one more pass over the finished block: a forward less for each block.
    """

    schedules: Sequence[Sequence[float]]
    noisy_context: bool = False

    def __post_init__(self) -> None:
        if not self.schedules or not all(self.schedules):
            raise ValueError("a stream needs the noise levels of at least one step for each block")

    def sigmas(self, block: int) -> Sequence[float]:
        return self.schedules[min(block, len(self.schedules) - 1)]


class _Shown(NamedTuple):
    """A frame [B, 1, C, H, W] as the cache's keys and values were computed from it, at `sigma`; its block's number."""

    x: Tensor
    sigma: float
    block: int


class _ToSee(NamedTuple):
    """A finished block [B, f, C, H, W] that a pass has to show."""

    x0: Tensor
    condition: Conditioning
    block: int


class _Seen(NamedTuple):
    """What a block's last pass saw [B, f, C, H, W]; whether its keys and values are still to be written."""

    x: Tensor
    sigma: float
    block: int
    is_staged: bool


_Unseen = _ToSee | _Seen


class CausalStream:
    """A video made block by block over a cache (Self-Forcing, arXiv 2506.08009, algorithm 2), as long as one asks for.

    Memory is the cache's, whatever the length. Draws are keyed by block: those of a block know nothing of later ones.
    student: a few-step network.
    conditioning: the video's conditioning; its initial frames precede the blocks, and fill whole ones.
    config: steps of each block.
    causal: blocks and window.
    source: makes all draws.
    cache: an empty one from `causal.new_cache`, rolling where the video is to have no end.

    blocks, frames: made so far, given frames among the frames alone.
    """

    @torch.no_grad()
    def __init__(
        self,
        student: ScoreNet,
        conditioning: Conditioning,
        config: StreamConfig,
        causal: CausalConfig,
        source: NoiseSource,
        cache: KVCache,
    ) -> None:
        self.student, self.conditioning, self.config, self.causal = student, conditioning, config, causal
        self.source, self.cache = source, cache
        self.blocks, self.frames = 0, conditioning.initial_frames
        self._unseen: _Unseen | None = None  # the last block: no later one has asked for its keys and values
        self._shown: list[_Shown] = []
        initial = causal.blocks(self.frames) if self.frames else ()
        for index, part, condition in initial_parts(conditioning, initial):
            self._show(part, condition, 0.0, index)

    @property
    def block_frames(self) -> int:
        """Frames of the next block."""
        is_first = self.causal.independent_first_frame and self.frames == 0
        return 1 if is_first else self.causal.num_frame_per_block

    def noise(self, frame: Sequence[int]) -> Tensor:
        """The next block's noise [B, f, C, H, W], for frames of shape (C, H, W): as `block_noise` has it."""
        return self.source.normal(f"noise.b{self.blocks}", (self.block_frames, *frame))

    @torch.no_grad()
    def make(self, noise: Tensor) -> Tensor:
        """x0 [B, f, C, H, W] of the next block from its noise."""
        self._finish()
        sigmas, noisy, frames = self.config.sigmas(self.blocks), self.config.noisy_context, noise.shape[1]
        condition = self.conditioning.frames(self.frames, frames)
        is_staged = self.cache.stages(frames)  # what the last pass computes: nobody may ask for it
        seen: list[Tensor] = []
        write_cache = noisy and not is_staged and self.cache.rolling
        x0 = denoise_block(
            self.student,
            noise,
            condition,
            sigmas,
            ExitPass(len(sigmas) - 1, seen=seen, write_cache=write_cache),
            block=self.blocks,
            source=self.source,
            cache=self.cache,
        )
        block = self.blocks
        self._unseen = _Seen(seen[0], sigmas[-1], block, is_staged) if noisy else _ToSee(x0, condition, block)
        self.blocks += 1
        self.frames += frames
        return x0

    @torch.no_grad()
    def switch(self, prompt: Prompt, *, recache: bool = False) -> None:
        """Another encoded prompt from the next block on. recache: the frames that it looks back at are shown
        to the network again, under the new prompt (KV re-cache, LongLive, arXiv 2509.22622): the new prompt takes hold
        sooner. Raises ValueError for a recache with channels beside the latents."""
        if recache and self.conditioning.channels is not None:
            raise ValueError("recache: frames with channels beside the latents cannot be shown again: leave it out")
        self._finish()
        self.conditioning = self.conditioning.with_prompt(prompt)
        self.cache.forget_text()
        if recache and self._shown:
            self._show_again()

    def _finish(self) -> None:
        last, self._unseen = self._unseen, None
        if isinstance(last, _ToSee):
            sigma = self.causal.context_sigma
            x = context_input(last.x0, sigma=sigma, block=last.block, source=self.source)
            self._show(x, last.condition, sigma, last.block)
        elif last is not None:
            if last.is_staged:
                self.cache.write(last.x.shape[1])
            self._remember(last.x, last.sigma, last.block)

    def _show(self, x: Tensor, condition: Conditioning, sigma: float, block: int) -> None:
        self.student.velocity(x, per_sample(sigma, x), condition, cache=self.cache, write_cache=True)
        self._remember(x, sigma, block)

    def _remember(self, x: Tensor, sigma: float, block: int) -> None:
        shown = [*self._shown, *(_Shown(frame, sigma, block) for frame in x.split(1, 1))]
        sinks, held = min(self.cache.sinks, len(shown)), self.cache.held_frames
        self._shown = shown[:sinks] + shown[max(len(shown) - (held - sinks), sinks) :]

    def _show_again(self) -> None:
        """One pass over all frames held, each block seeing those before it, at the positions where they were."""
        x, positions = torch.cat([frame.x for frame in self._shown], 1), self.cache.in_time
        sigma = torch.stack([per_sample(frame.sigma, frame.x) for frame in self._shown], 1)
        blocks = tuple(len(list(frames)) for _, frames in groupby(frame.block for frame in self._shown))
        condition = replace(self.conditioning, initial=None)
        self.cache.restart()
        self.student.velocity(
            x, sigma, condition, cache=self.cache, write_cache=True, positions=positions, mask=block_causal_mask(blocks)
        )


def stream(
    student: ScoreNet,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    causal: CausalConfig,
    source: NoiseSource,
    cache: KVCache,
) -> Iterator[Tensor]:
    """Yields x0 [B, f, C, H, W] of each new block as it is done. Nothing reads what the last block would write into the
    cache, so it writes nothing.

    student: a few-step network.
    noise: [B, F, C, H, W], the frames to generate, after any initial ones of the conditioning.
    conditioning: the whole video's conditioning.
    sigmas: noise levels of the steps, in [0, 1], falling.
    causal: blocks and window.
    source: draws fresh noise between steps, and context noise.
    cache: an empty one from `causal.new_cache`.
    Raises ValueError unless the frames fill whole blocks.
    """
    _, blocks = causal.split(conditioning.initial_frames, noise.shape[1])
    video = CausalStream(student, conditioning, StreamConfig([sigmas]), causal, source, cache)
    for part in noise.split(list(blocks), dim=1):
        yield video.make(part)


@dataclass(frozen=True)
class Branch:
    """One of guidance's two: what the video is conditioned on, and an empty cache for it."""

    conditioning: Conditioning
    cache: KVCache


@torch.no_grad()
def causal_trajectory(
    teacher: ScoreNet,
    noise: Tensor,
    branches: Sequence[Branch],
    sigmas: Sequence[float],
    guidance: float,
    causal: CausalConfig,
    source: NoiseSource,
) -> Iterator[list[Tensor]]:
    """A causal many-step teacher (Causal Forcing, arXiv 2602.02214): each block's ODE given those before it, by Euler.
    Yields a block's states [B, f, C, H, W] at every level of `sigmas` and at 0, whose last one the next blocks see.

    teacher: a causal many-step network.
    noise: [B, F, C, H, W] of the frames to generate.
    branches: one with the prompt and, unless guidance is 1, one with the negative text.
        Raises ValueError for another number.
    sigmas: noise levels of the steps, in [0, 1], falling.
    guidance: w of uncond + w (cond - uncond).
    causal: blocks and window.
    source: draws nothing, as clean context needs no noise.
    """
    if len(branches) != (1 if guidance == 1.0 else 2):
        raise ValueError(f"guidance {guidance} needs {1 if guidance == 1.0 else 2} branches, got {len(branches)}")
    start = branches[0].conditioning.initial_frames
    initial, blocks = causal.split(start, noise.shape[1])
    for branch in branches:
        cache_initial(teacher, branch.conditioning, initial, source, branch.cache)
    for index, part in enumerate(noise.split(list(blocks), dim=1)):
        parts = [Branch(branch.conditioning.frames(start, part.shape[1]), branch.cache) for branch in branches]
        start += part.shape[1]
        states = [part.float()]
        for sigma, target in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
            x, time = states[-1], per_sample(sigma, part)
            cond, *uncond = (teacher.velocity(x, time, branch.conditioning, cache=branch.cache) for branch in parts)
            velocity = uncond[0] + guidance * (cond - uncond[0]) if uncond else cond
            states.append(x + (target - sigma) * velocity)
        yield states
        if index < len(blocks) - 1:
            for branch in parts:
                write_context(
                    teacher, states[-1], branch.conditioning, sigma=0.0, block=index, source=source, cache=branch.cache
                )


def generate(
    student: ScoreNet,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    causal: CausalConfig,
    source: NoiseSource,
    cache: KVCache,
) -> Tensor:
    """The whole video [B, Fi + F, C, H, W], given frames first. Arguments as of `stream`."""
    parts = [] if conditioning.initial is None else [conditioning.initial.to(noise.dtype)]
    return torch.cat(parts + list(stream(student, noise, conditioning, sigmas, causal, source, cache)), dim=1)
