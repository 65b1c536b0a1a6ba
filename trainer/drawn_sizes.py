"""The sizes of a run's videos, update by update.

F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from configs.schema import RunConfig
from configs.sizes import sizes_of
from model.types import LatentSize
from utils import activity
from utils.random import Noise, keyed_seed


def drawn_size(config: RunConfig, noise: Noise) -> LatentSize:
    """The size of a step's videos. It depends on the step alone, so all ranks and micro-batches agree."""
    if config.training.sizes is None:
        return config.data.size
    weights = [size.weight for size in config.training.sizes]
    left = noise.shared_uniform("size", 1)[0] * sum(weights)
    for size, weight in zip(sizes_of(config), weights, strict=True):
        left -= weight
        if left < 0:
            return size
    return sizes_of(config)[-1]


class DrawnSizes:
    """data_shape: (F, C, H, W) of the data's videos."""

    def __init__(self, config: RunConfig, data_shape: tuple[int, ...]) -> None:
        self.config, self.data_shape = config, data_shape
        self._met: set[LatentSize] = set()
        self._drawn: dict[str, float] = {}

    def shape(self, phase: str, step: int) -> tuple[int, ...]:
        """(F, C, H, W) of the videos of a phase's update, by (seed, phase, step) alone: the same on every rank."""
        if self.config.training.sizes is None:
            return self.data_shape
        size = drawn_size(self.config, Noise(keyed_seed(self.config.seed, phase), step, ()))
        if size not in self._met:
            activity.begin(step, slow=True)  # an iteration that compiles and allocates
            self._met.add(size)
        self._drawn |= zip((f"{phase}/{name}" for name in ("frames", "height", "width")), map(float, size), strict=True)
        return (size[0], self.data_shape[1], *size[1:])

    def metrics(self) -> dict[str, float]:
        """What was drawn since the last call."""
        drawn, self._drawn = self._drawn, {}
        return drawn
