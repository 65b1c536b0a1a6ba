"""A trained network with all that belongs to its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from model.ema import EMA
from model.score import ScoreNet
from model.wan.transformer import WanTransformer
from utils.optim import NetworkOptimizer


@dataclass
class Trained:
    """name: under which it is logged and saved."""

    name: str
    net: WanTransformer
    score: ScoreNet
    optimizer: NetworkOptimizer
    ema: EMA | None


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Weights need no gradient inside: the other network is being trained through this one."""
    needed = [p for p in net.parameters() if p.requires_grad]
    for p in needed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in needed:
            p.requires_grad_(True)
