"""Causal few-step generation, one block at a time.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.score import ScoreNet
from model.types import Conditioning, NoiseSource
from model.wan.kv_cache import KVCache
from pipeline.causal import CausalConfig
from pipeline.denoise import denoise_block, per_sample, write_context


@torch.no_grad()
def cache_initial(
    student: ScoreNet, conditioning: Conditioning, blocks: Sequence[int], source: NoiseSource, cache: KVCache
) -> None:
    """Puts the given clean frames into the cache, block by block, at sigma 0."""
    if conditioning.initial is None:
        return
    start = 0
    for index, part in enumerate(conditioning.initial.split(list(blocks), dim=1)):
        given = conditioning.frames(start, part.shape[1])
        write_context(student, part, given, sigma=0.0, block=-1 - index, source=source, cache=cache)
        start += part.shape[1]


@torch.no_grad()
def stream(
    student: ScoreNet,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    causal: CausalConfig,
    source: NoiseSource,
    cache: KVCache,
) -> Iterator[Tensor]:
    """Yields x0 [B, f, C, H, W] of each new block as it is done.

    noise: [B, F, C, H, W], the frames to generate, after any initial ones of the conditioning. cache: an empty one from
    `causal.new_cache`. Raises ValueError unless the frames fill whole blocks.
    """
    given, blocks = causal.split(conditioning.initial_frames, noise.shape[1])
    cache_initial(student, conditioning, given, source, cache)
    start = conditioning.initial_frames
    for index, part in enumerate(noise.split(list(blocks), dim=1)):
        own = conditioning.frames(start, part.shape[1])
        start += part.shape[1]
        last = len(sigmas) - 1
        x0 = denoise_block(student, part, own, sigmas, exit_step=last, block=index, source=source, cache=cache)
        yield x0
        if index < len(blocks) - 1:  # nothing reads what the last block would write
            write_context(student, x0, own, sigma=causal.context_sigma, block=index, source=source, cache=cache)


@torch.no_grad()
def causal_trajectory(
    teacher: ScoreNet,
    noise: Tensor,
    conditioning: Conditioning,
    negative: Tensor,
    sigmas: Sequence[float],
    guidance: float,
    causal: CausalConfig,
    source: NoiseSource,
    caches: Sequence[KVCache],
) -> Iterator[list[Tensor]]:
    """A causal many-step teacher (Causal Forcing, arXiv 2602.02214): each block's ODE given those before it, by Euler.
    Yields a block's states [B, f, C, H, W] at every level of `sigmas` and at 0, whose last one the next blocks see.

    noise: [B, F, C, H, W] of the frames to generate. caches: empty ones, for the prompt and for the negative text
    [B, L, D]; at guidance 1 the first is enough.
    """
    given, blocks = causal.split(conditioning.initial_frames, noise.shape[1])
    branches = [conditioning, conditioning.with_text(negative)][: 1 if guidance == 1.0 else 2]
    if len(caches) < len(branches):
        raise ValueError(f"guidance {guidance} needs a cache for each of its branches, got {len(caches)}")
    for branch, cache in zip(branches, caches, strict=False):
        cache_initial(teacher, branch, given, source, cache)
    start = conditioning.initial_frames
    for index, part in enumerate(noise.split(list(blocks), dim=1)):
        own = [branch.frames(start, part.shape[1]) for branch in branches]
        start += part.shape[1]
        states = [part.float()]
        for sigma, target in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
            x, time = states[-1], per_sample(sigma, part)
            cond, *uncond = (
                teacher.velocity(x, time, one, cache=cache) for one, cache in zip(own, caches, strict=False)
            )
            velocity = uncond[0] + guidance * (cond - uncond[0]) if uncond else cond
            states.append(x + (target - sigma) * velocity)
        yield states
        if index < len(blocks) - 1:
            for one, cache in zip(own, caches, strict=False):
                write_context(teacher, states[-1], one, sigma=0.0, block=index, source=source, cache=cache)


def generate(
    student: ScoreNet,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    causal: CausalConfig,
    source: NoiseSource,
    cache: KVCache,
) -> Tensor:
    """The whole video [B, Fi + F, C, H, W], given frames first."""
    parts = [] if conditioning.initial is None else [conditioning.initial.to(noise.dtype)]
    return torch.cat(parts + list(stream(student, noise, conditioning, sigmas, causal, source, cache)), dim=1)
