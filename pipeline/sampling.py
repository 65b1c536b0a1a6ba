"""Sampling as a run's network is meant to be sampled: used by validation, evaluation and inference alike.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.captured import Captured
from model.attention.kv_cache import KVCache
from model.family import Network
from model.schedule import uniform_sigmas
from model.score import Condition, ScoreNet
from model.types import Conditioning, NoiseSource, Prompt
from pipeline.bidirectional_inference import euler_sample
from pipeline.causal import CausalConfig, VideoShape
from pipeline.causal_inference import block_noise, stream
from pipeline.denoise import ExitPass, denoise_block


def cache_dtype(score: ScoreNet) -> torch.dtype:
    """Keys and values are kept in the precision in which they are computed."""
    return score.compute_dtype or next(score.net.parameters()).dtype


def few_step_stream(
    score: ScoreNet,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    causal: CausalConfig | None,
    source: NoiseSource,
    trained_frames: int | None = None,
) -> Iterator[Tensor]:
    """A student's new frames [B, f, C, H, W]: block by block over a cache, or all at once where `causal` is None.

    score: the student.
    noise: [B, F, C, H, W], what the new frames start from.
    conditioning: text and first frames of B videos.
    sigmas: noise levels of the steps.
    causal: blocks and context of a causal student, None of a bidirectional one.
    source: draws the noise that is added between steps.
    trained_frames: latent frames of the longest video that a causal student was trained on, see `new_cache`.
    """
    with torch.no_grad():
        if causal is None:
            last = len(sigmas) - 1
            x0 = denoise_block(score, noise, conditioning, sigmas, ExitPass(last), block=0, source=source, cache=None)
            yield score.finished(x0, conditioning)
            return
        assert isinstance(score.net, Network)
        videos = VideoShape.of(noise, conditioning.initial_frames)
        cache = causal.new_cache(score.net, videos, cache_dtype(score), noise.device, trained_frames=trained_frames)
        yield from stream(score, noise, conditioning, sigmas, causal, source, cache=cache)


def student_with_cache(
    score: ScoreNet,
    causal: CausalConfig,
    videos: VideoShape,
    device: torch.device,
    trained_frames: int,
    *,
    recorded: bool = False,
) -> tuple[ScoreNet, KVCache]:
    """What makes the blocks of a causal student's videos, and the cache that they share.

    score: the student.
    causal: the student's blocks and context.
    videos: how many, their latent frames (None: without end), and the latents' size.
    device: where the cache is.
    trained_frames: latent frames of the longest video that the student was trained on.
    recorded: whether its passes are recorded as CUDA graphs; never where ranks share a sequence.
    """
    assert isinstance(score.net, Network)
    cache = causal.new_cache(score.net, videos, cache_dtype(score), device, trained_frames=trained_frames)
    student = score.through(Captured(score.net, cache)) if recorded and score.net.sequence is None else score
    return student, cache


def euler(
    score: ScoreNet,
    source: NoiseSource,
    shape: tuple[int, ...],
    condition: Condition,
    negative: Prompt,
    steps: int,
    shift: float,
    guidance: float,
) -> Tensor:
    """A many-step network's video [B, F, C, H, W]: Euler over a shifted uniform grid with guidance.

    score: the network.
    source: draws the noise.
    shape: (F, C, H, W) of a video.
    condition: text and first frames of B videos.
    negative: [B, L, D], what guidance leads away from.
    steps: intervals of the grid.
    shift: the shift of the grid's noise levels.
    guidance: the guidance scale.
    """
    noise = score.path.start_noise(source.normal("noise", shape))
    grid = uniform_sigmas(steps, shift, score.path.start)
    return euler_sample(score, noise, condition, negative, grid, guidance)


@dataclass(frozen=True)
class ManySteps:
    """Euler over a shifted uniform grid with guidance, as a many-step network is sampled."""

    steps: int
    shift: float
    guidance: float


@dataclass(frozen=True)
class FewSteps:
    """A student's own noise levels, block by block over a cache, or all frames at once where `causal` is None.

    trained_frames: latent frames of the longest video that it was trained on, see `few_step_stream`.
    """

    sigmas: Sequence[float]
    causal: CausalConfig | None
    trained_frames: int | None = None


def sample(
    way: ManySteps | FewSteps,
    score: ScoreNet,
    shape: tuple[int, ...],
    conditioning: Conditioning,
    negative: Prompt,
    source: NoiseSource,
) -> Tensor:
    """Latents [B, F, C, H, W] of a network.

    way: how it is meant to be sampled.
    score: the network.
    shape: (F, C, H, W) of a video, frames that `conditioning` gives counted.
    conditioning: text and first frames of B videos.
    negative: [B, L, D], what guidance leads away from.
    source: draws the noise.
    """
    if isinstance(way, ManySteps):
        return euler(
            score, source, shape, conditioning, negative, steps=way.steps, shift=way.shift, guidance=way.guidance
        )
    causal = way.causal
    initial = 0 if causal is None else conditioning.initial_frames  # the others see first frames pinned in the noise
    frames = shape[0] - initial
    if causal is None:
        noise = score.path.start_noise(source.normal("noise", (frames, *shape[1:])))
    else:
        noise = block_noise(source, causal.split(initial, frames)[1], shape[1:])
    new = list(few_step_stream(score, noise, conditioning, way.sigmas, causal, source, way.trained_frames))
    kept = [conditioning.initial] if initial and conditioning.initial is not None else []
    return torch.cat([*kept, *new], dim=1)
