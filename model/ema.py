"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.distributed import local, stored
from utils.optim import trainable
from utils.parallel.parallelize import reshard


@dataclass
class EMAConfig:
    """The average of the student's weights. All keys count generator updates, not iterations.

    decay: what is kept of the average at an update, null for no average.
    start: the first update that is averaged; until then the average is a copy.
    every: updates between two steps of the average.
    """

    decay: float | None = 0.99
    start: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1) or null for none, got {self.decay}")
        if self.start < 0 or self.every < 1:
            raise ValueError(f"start must be >= 0 and every >= 1, got {self.start} and {self.every}")


class EMA:
    """fp32 shadow of the trained parameters, on the shards that this rank holds: nothing is gathered.

    net: the network whose parameters are averaged.
    decay: what is kept of the average at an update.
    start: the generator update, counted from 1, up to which the average is a copy.
    every: it follows each so many generator updates.
    named: the parameters by the names under which they are kept; None for all that `net` trains, under its own names.
    """

    def __init__(
        self, net: nn.Module, decay: float, start: int, every: int, named: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        self.net, self.decay, self.start, self.every = net, decay, start, every
        # held here: while a sharded network is gathered, it names other tensors its parameters
        self.live = {name: stored(p) for name, p in (trainable(net) if named is None else named).items()}
        self.shadow: dict[str, Tensor] = {name: p.detach().clone().float() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """After the `updates`-th generator update (counted from 1)."""
        if updates % self.every:
            return
        decay = 0.0 if updates <= self.start else self.decay
        shadow = [local(value) for value in self.shadow.values()]
        live = [local(p).detach().float() for p in self.live.values()]
        torch._foreach_lerp_(shadow, live, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network carries the average inside, and its own weights again after, bit for bit."""
        trained = {name: p.detach().clone() for name, p in self.live.items()}
        self._carry(self.shadow)
        try:
            yield
        finally:
            self._carry(trained)

    @torch.no_grad()
    def _carry(self, values: dict[str, Tensor]) -> None:
        reshard(self.net)
        for name, p in self.live.items():
            local(p).copy_(local(values[name]))
