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
    start: the last update up to which the average is a copy of the weights; it follows those after it. 0 averages from
        the weights that the student begins with.
    every: after start, the average follows each update that is a multiple of this.
    """

    decay: float | None = 0.99
    start: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1) or null for none, got {self.decay}")
        if self.start < 0 or self.every < 1:
            raise ValueError(f"start must be >= 0 and every >= 1, got {self.start} and {self.every}")

    def lag(self, updates: int) -> str | None:
        """What is wrong with the average after `updates` of the student, in one line; None for nothing.

        It lags while it has followed fewer updates than it looks back on, about every / (1 - decay). Up to `start` it
        is a copy, and nothing lags.
        """
        followed = updates // self.every - self.start // self.every
        if self.decay is None or self.decay == 0 or updates <= self.start or followed >= round(1 / (1 - self.decay)):
            return None
        old, horizon = self.decay**followed, round(self.every / (1 - self.decay))
        began = f"of update {self.start}" if self.start else "as it began"
        return (
            f"the average of the weights lags: it has followed {updates - self.start} of the student's {updates} "
            f"updates and looks back on about {horizon} (ema.decay {self.decay:g}, ema.start {self.start}), so "
            f"{old:.0%} of it is the student {began}"
        )


class EMA:
    """fp32 shadow of the trained parameters, on the shards that this rank holds: nothing is gathered.

    net: the network whose parameters are averaged.
    decay: what is kept of the average at an update.
    start: the generator update, counted from 1, up to which the average is a copy.
    every: after that it follows each generator update that is a multiple of this.
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
        copies = updates <= self.start
        if not copies and updates % self.every:
            return
        decay = 0.0 if copies else self.decay
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
