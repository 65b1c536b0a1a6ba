"""Randomness is an argument: every draw is a pure function of (seed, step, role, sample), never of what ran before.

So any split of a global batch over ranks and micro-batches draws the same numbers, and a resumed run draws what the
unbroken run would have drawn.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

# B samples; the rest of a shape is that of one sample


def keyed_seed(seed: int, *keys: int | str) -> int:
    """63-bit seed from ``seed`` and ``keys`` by blake2b: the same in every process and on every platform.

    Note that torch's CPU generator uses the lower 32 bits of it, CUDA's all.
    """
    digest = hashlib.blake2b(digest_size=8)
    for key in (seed, *keys):
        # type and length go in as well: ("a", "bc") and ("ab", "c"), 1 and "1" are different keys
        data = b"s" + key.encode() if isinstance(key, str) else b"i%d" % operator.index(key)
        digest.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on ``device``, seeded by ``keyed_seed(seed, *keys)``."""
    return torch.Generator(device).manual_seed(keyed_seed(seed, *keys))


class Noise:
    """The draws of one step for the samples at hand, which may be any part of the global batch.

    Sample ``i`` of a draw comes from a generator keyed by (seed, step, role, sample_ids[i]). Everything is pure: the
    same role gives the same numbers again, so two different draws need two roles. Draws are fp32 on ``device``.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        sample_ids: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.seed, self.step = seed, step
        self.sample_ids = tuple(sample_ids)
        self.device, self.dtype = torch.device(device), dtype
        self._generator = torch.Generator(self.device)

    def normal(self, role: str, shape: Sequence[int]) -> Tensor:
        """Standard normal ``[B, *shape]`` in ``dtype``; ``shape`` is that of one sample."""
        out = self._empty(shape)
        for row, sample in zip(out, self.sample_ids, strict=True):
            row.normal_(generator=self._seeded(role, sample))
        return out.to(self.dtype)

    def uniform(self, role: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), ``[B, *shape]``; always fp32, for noise levels are made of it."""
        out = self._empty(shape)
        for row, sample in zip(out, self.sample_ids, strict=True):
            row.uniform_(generator=self._seeded(role, sample))
        return out

    def shared_uniform(self, role: str, count: int) -> list[float]:
        """``count`` numbers in [0, 1) keyed by (seed, step, role) only: the same on every rank, for every sample."""
        return torch.rand(count, generator=self._shared(role), dtype=torch.float64).tolist()

    def shared_randint(self, role: str, high: int, count: int) -> list[int]:
        """``count`` whole numbers in [0, high) keyed by (seed, step, role) only. ``high`` < 1 raises ValueError."""
        if high < 1:
            raise ValueError(f"shared_randint({role!r}): high={high} leaves nothing to draw from: give at least 1")
        return torch.randint(high, (count,), generator=self._shared(role)).tolist()

    def _empty(self, shape: Sequence[int]) -> Tensor:
        return torch.empty((len(self.sample_ids), *shape), device=self.device, dtype=torch.float32)

    def _seeded(self, role: str, sample: int) -> torch.Generator:
        # one generator is re-seeded for all samples: making one costs more than a small draw
        return self._generator.manual_seed(keyed_seed(self.seed, self.step, "sample", role, sample))

    def _shared(self, role: str) -> torch.Generator:
        # always a CPU generator: these numbers steer control flow, which must agree between ranks on any hardware
        return generator(self.seed, self.step, "shared", role)
