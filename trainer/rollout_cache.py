"""The KV cache of a run's rollouts."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from configs.schema import RunConfig
from configs.sizes import sizes_of
from model.attention.kv_cache import KVCache
from model.family import Network
from model.score import ScoreNet
from pipeline.causal import VideoShape
from pipeline.sampling import cache_dtype


class RolloutCache:
    """One for the whole run: a new one a rollout would double its memory, and one for each size would add up.

    Caches of several sizes lie in one memory, as large as the largest of them.
    """

    def __init__(self, config: RunConfig, student: ScoreNet, device: torch.device) -> None:
        self.config, self.student, self.device = config, student, device
        self._cache: KVCache | None = None
        self._memory: Tensor | None = None
        self._wanted: tuple[int, ...] = ()

    def empty(self, batch: int, frames: int, height: int, width: int) -> KVCache:
        """For so many videos of `frames` frames in all. The one before must not be read any more."""
        wanted = (batch, frames, height, width)
        if self._cache is not None:
            self._cache.reset()
        if self._cache is None or self._wanted != wanted:
            self._cache, self._wanted = None, wanted
            self._cache = self._new(*wanted, self.device, self._memory_for(batch))
        return self._cache

    def _new(
        self, batch: int, frames: int, height: int, width: int, device: torch.device | str, memory: Tensor | None = None
    ) -> KVCache:
        net, dtype = cast(Network, self.student.net), cache_dtype(self.student)
        videos = VideoShape(batch, frames, height, width)
        return self.config.causal.new_cache(net, videos, dtype, device, memory=memory)

    def _memory_for(self, batch: int) -> Tensor | None:
        """What the largest of several sizes needs; a run of one size needs no more than its cache."""
        sizes = sizes_of(self.config)
        if len(sizes) == 1:
            return None
        dtype, longest = cache_dtype(self.student), self.config.rollout.longest
        caches = [self._new(batch, longest(frames), height, width, "meta") for frames, height, width in sizes]
        count = max(cache.nbytes for cache in caches) // dtype.itemsize
        if self._memory is None or self._memory.numel() != count:
            self._memory = None  # before the next one is made
            self._memory = torch.empty(count, dtype=dtype, device=self.device)
        return self._memory
