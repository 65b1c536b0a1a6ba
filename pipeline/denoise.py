"""One block's denoising, shared by training rollouts and inference.

B batch  F frames of the block  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Sequence

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
) -> Tensor:
    """x0 [B, F, C, H, W] of one block after steps 0..exit_step (Self-Forcing, arXiv 2506.08009, algorithm 1).

    Each step predicts x0 and noises it afresh to the next step's sigma; only the exit step may carry gradient.
    With a trace it carries none either, and is noted there instead, for `WanTransformer` to replay.
    noise: [B, F, C, H, W] at sigmas[0]. given: conditioning of these frames, or its text alone. block: its index, which
    names its draws. Inference exits at the last step.
    """
    x = noise
    for step, sigma in enumerate(sigmas[:exit_step]):
        with torch.no_grad():
            x0 = student.x0(x, _per_sample(sigma, x), given, cache=cache)
            fresh = source.normal(f"renoise.b{block}.s{step}", tuple(x.shape[1:]))
            x = mix(x0, fresh, _per_sample(sigmas[step + 1], x))
    noted = {} if trace is None else {"trace": trace}
    with torch.set_grad_enabled(with_gradient and trace is None and torch.is_grad_enabled()):
        return student.x0(x, _per_sample(sigmas[exit_step], x), given, cache=cache, **noted)


@torch.no_grad()
def write_context(
    student: ScoreNet, x0: Tensor, given: Condition, *, sigma: float, block: int, source: NoiseSource, cache: KVCache
) -> None:
    """Runs a finished block [B, F, C, H, W] once more to append its keys and values to the cache.

    sigma: context noise; the block is noised to it, and it is the network's time input. 0 leaves the block clean.
    """
    if sigma > 0:
        x0 = mix(x0, source.normal(f"context_noise.b{block}", tuple(x0.shape[1:])), _per_sample(sigma, x0))
    student.velocity(x0.detach(), _per_sample(sigma, x0), given, cache=cache, write_cache=True)


def _per_sample(sigma: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
