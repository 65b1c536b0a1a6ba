"""One block's denoising, shared by training rollouts and inference.

B batch  F frames of the block  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention.kv_cache import KVCache
from model.attention.replay import Trace
from model.schedule import mix
from model.score import Condition, ScoreNet
from model.types import NoiseSource


@dataclass(frozen=True)
class ExitPass:
    """The last step that a block is denoised by, and what its pass leaves behind.

    step: the exit step's index in the step list; at inference that of the last step.
    with_gradient: whether x0 carries the gradient of this step.
    trace: notes the pass, so that the network can replay it; it then carries no gradient.
    seen: gets what the step sees, [B, F, C, H, W] at its sigma.
    write_cache: whether its keys and values are kept.
    """

    step: int
    with_gradient: bool = False
    trace: Trace | None = None
    seen: list[Tensor] | None = None
    write_cache: bool = False


def denoise_block(
    student: ScoreNet,
    noise: Tensor,
    condition: Condition,
    sigmas: Sequence[float],
    last: ExitPass,
    *,
    block: int,
    source: NoiseSource,
    cache: KVCache | None,
) -> Tensor:
    """x0 [B, F, C, H, W] of one block after steps 0..last.step (Self-Forcing, arXiv 2506.08009, algorithm 1).

    Each step predicts x0 and noises it afresh to the next step's sigma; only the exit step may carry gradient.

    student: a few-step network.
    noise: [B, F, C, H, W] at sigmas[0].
    condition: conditioning of these frames, or its text alone.
    sigmas: noise levels of the steps, in [0, 1], falling.
    last: the exit step.
    block: the block's index in the video, which names its draws.
    source: draws fresh noise between steps.
    cache: keys and values of the frames before these; None where there are none.
    """
    x = noise
    known: dict[str, Any] = {} if cache is None else {"cache": cache}  # networks without a cache know no such word
    for step, sigma in enumerate(sigmas[: last.step]):
        with torch.no_grad():
            x0 = student.x0(x, per_sample(sigma, x), condition, **known)
            fresh = source.normal(f"renoise.b{block}.s{step}", tuple(x.shape[1:]))
            x = mix(x0, fresh, per_sample(sigmas[step + 1], x))
    if last.seen is not None:
        last.seen.append(x)
    noted: dict[str, Any] = {} if last.trace is None else {"trace": last.trace}
    if last.write_cache:
        noted["write_cache"] = True
    with torch.set_grad_enabled(last.with_gradient and last.trace is None and torch.is_grad_enabled()):
        return student.x0(x, per_sample(sigmas[last.step], x), condition, **known, **noted)


def context_input(x0: Tensor, *, sigma: float, block: int, source: NoiseSource) -> Tensor:
    """A finished block [B, F, C, H, W] as its keys and values are computed from it: noised to sigma, or clean at 0."""
    if sigma == 0:
        return x0
    return mix(x0, source.normal(f"context_noise.b{block}", tuple(x0.shape[1:])), per_sample(sigma, x0))


@torch.no_grad()
def write_context(
    student: ScoreNet,
    x0: Tensor,
    condition: Condition,
    *,
    sigma: float,
    block: int,
    source: NoiseSource,
    cache: KVCache,
) -> None:
    """Runs a finished block once more, which writes its keys and values into the cache.

    student: whose cache it is.
    x0: the block [B, F, C, H, W].
    condition: conditioning of its frames, or its text alone.
    sigma: context noise in [0, 1], to which the block is noised, and the network's time input; 0 leaves it clean.
    block: the block's index in the video, which names its draw.
    source: draws the context noise.
    cache: the cache of the blocks before.
    """
    x = context_input(x0.detach(), sigma=sigma, block=block, source=source)
    student.velocity(x, per_sample(sigma, x), condition, cache=cache, write_cache=True)


def per_sample(sigma: float, x: Tensor) -> Tensor:
    """One noise level for all samples of x: [B], fp32."""
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
