"""Validation videos: fixed prompts from a fixed seed, with the average of the student's weights, the raw ones, or both.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from configs.schema import RunConfig
from configs.sections import SampleWeights, ValidationConfig
from configs.sizes import schedule_at, trained_frames
from model.types import Conditioning, Prompt
from pipeline.sampling import FewSteps, ManySteps
from tasks.task import Task
from utils import activity, distributed
from utils.data.prompts import load_prompts
from utils.errors import ConfigError
from utils.random import Noise

Sampler = Callable[[Conditioning, Prompt, Noise], Tensor]  # conditioning, negative, noise -> latents [B, F, C, H, W]


def read_prompts(config: ValidationConfig, task: Task) -> list[str]:
    """At the start of a run: a mistake in the library must not wait for the first validation. Raises ConfigError."""
    try:
        library = None if config.prompts is None else load_prompts(config.prompts)
        prompts = library[: config.count] if library else task.validation_prompts(config.count)
        task.conditioning(prompts)
        return prompts
    except (ValueError, OSError) as problem:
        raise ConfigError(f"validation.prompts: {problem}") from None


def average_warning(config: RunConfig, updates: int) -> str | None:
    """What a validation with the average should say, in one line, where the average lags; None elsewhere."""
    lag = config.ema.lag(updates)
    return lag and f"validation: {lag}: set validation.weights to raw, or to both"


def shown_weights(wanted: SampleWeights, has_average: bool) -> list[str]:
    """`ema`, `raw` or both; without an average the raw ones."""
    ema = has_average and wanted is not SampleWeights.raw
    raw = not has_average or wanted is not SampleWeights.ema
    return ["ema"] * ema + ["raw"] * raw


def sample_pixels(
    sampler: Sampler, task: Task, prompts: list[str], config: RunConfig, device: torch.device
) -> Tensor | None:
    """A video of each prompt, [N, T, 3, h, w] in [0, 1] in CPU memory on rank 0, else None.

    All ranks sample all of them, for the student may be sharded, and in micro-batches: where training fits, they do.
    """
    size, parts = config.training.micro_batch_size, []
    for start in range(0, len(prompts), size):
        activity.mark(f"validation: videos from {start}")  # each batch has the watchdog's time, not all together
        now = prompts[start : start + size]
        noise = Noise(config.validation.seed, 0, range(start, start + len(now)), device)
        visual = task.validation_visual(range(start, start + len(now)), now)
        conditioning = task.conditioning(now, visual)
        latents = sampler(conditioning, task.negative(len(now)), noise)
        if distributed.is_main():
            parts.append(task.decode(latents).cpu())
    return torch.cat(parts) if parts else None


def way_of(config: RunConfig, shape: Sequence[int]) -> ManySteps | FewSteps:
    """How the run's network is meant to be sampled, for videos of `shape` (F, C, H, W)."""
    schedule = schedule_at(config, shape)
    if not config.few_steps:
        validation = config.validation
        return ManySteps(validation.steps, schedule.timestep_shift, validation.guidance)
    return FewSteps(schedule.sigmas(), config.causal if config.is_causal else None, trained_frames(config))
