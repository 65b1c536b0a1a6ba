"""Parts of a global batch."""

from __future__ import annotations

from dataclasses import dataclass

from configs.sections import TrainingConfig
from utils.errors import ConfigError
from utils.random import Noise


@dataclass(frozen=True)
class MicroBatch:
    """A part of the global batch.

    positions: global sample numbers, which key every draw.
    weight: share of the mean over the global batch.
    shape: (F, C, H, W) of this update's videos.
    """

    positions: range
    noise: Noise
    weight: float
    shape: tuple[int, ...]


def micro_batches(training: TrainingConfig, ranks: int) -> int:
    """Micro-batches of a rank for one update. Raises ConfigError unless the global batch splits evenly."""
    each = ranks * training.micro_batch_size
    if training.global_batch_size % each:
        raise ConfigError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of {ranks} ranks x "
            f"training.micro_batch_size {training.micro_batch_size}: change one of them"
        )
    return training.global_batch_size // each
