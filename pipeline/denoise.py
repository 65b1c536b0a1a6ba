"""One block's denoising, shared by training rollouts and inference.

B batch  F frames of the block  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.schedule import mix
from model.score import Condition, ScoreNet
from model.types import NoiseSource
from model.wan.kv_cache import KVCache
from model.wan.replay import Trace


def denoise_block(
    student: ScoreNet,
    noise: Tensor,
    given: Condition,
    sigmas: Sequence[float],
    *,
    exit_step: int,
    block: int,
    source: NoiseSource,
    cache: KVCache | None,
    with_gradient: bool = False,
    trace: Trace | None = None,
    seen: list[Tensor] | None = None,
    write_cache: bool = False,
) -> Tensor:
    """x0 [B, F, C, H, W] of one block after steps 0..exit_step (Self-Forcing, arXiv 2506.08009, algorithm 1).

    Each step predicts x0 and noises it afresh to the next step's sigma; only the exit step may carry gradient.
    With a trace it carries none either, and is noted there instead, for `WanTransformer` to replay.
    seen: gets what the exit step sees, [B, F, C, H, W] at its sigma. write_cache: its keys and values are kept.
    noise: [B, F, C, H, W] at sigmas[0]. given: conditioning of these frames, or its text alone. block: its index, which
    names its draws. Inference exits at the last step.
    """
    x = noise
    for step, sigma in enumerate(sigmas[:exit_step]):
        with torch.no_grad():
            x0 = student.x0(x, per_sample(sigma, x), given, cache=cache)
            fresh = source.normal(f"renoise.b{block}.s{step}", tuple(x.shape[1:]))
            x = mix(x0, fresh, per_sample(sigmas[step + 1], x))
    if seen is not None:
        seen.append(x)
    noted: dict[str, Any] = {} if trace is None else {"trace": trace}
    if write_cache:
        noted["write_cache"] = True
    with torch.set_grad_enabled(with_gradient and trace is None and torch.is_grad_enabled()):
        return student.x0(x, per_sample(sigmas[exit_step], x), given, cache=cache, **noted)


def context_input(x0: Tensor, *, sigma: float, block: int, source: NoiseSource) -> Tensor:
    """A finished block [B, F, C, H, W] as its keys and values are computed from it: noised to sigma, or clean at 0."""
    if sigma == 0:
        return x0
    return mix(x0, source.normal(f"context_noise.b{block}", tuple(x0.shape[1:])), per_sample(sigma, x0))


@torch.no_grad()
def write_context(
    student: ScoreNet, x0: Tensor, given: Condition, *, sigma: float, block: int, source: NoiseSource, cache: KVCache
) -> None:
    """Runs a finished block [B, F, C, H, W] once more to append its keys and values to the cache.

    sigma: context noise; the block is noised to it, and it is the network's time input. 0 leaves the block clean.
    """
    x = context_input(x0.detach(), sigma=sigma, block=block, source=source)
    student.velocity(x, per_sample(sigma, x), given, cache=cache, write_cache=True)


def per_sample(sigma: float, x: Tensor) -> Tensor:
    """One noise level for all samples of x: [B], fp32."""
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
