"""A trained network with all that belongs to its training."""

from __future__ import annotations

from dataclasses import dataclass

from model.ema import EMA
from model.score import ScoreNet
from model.wan.transformer import WanTransformer
from trainer.engine import Engine
from utils.optim import NetworkOptimizer


@dataclass
class Trained:
    """name: under which it is logged and saved."""

    name: str
    net: WanTransformer
    score: ScoreNet
    optimizer: NetworkOptimizer
    engine: Engine
    ema: EMA | None
