"""A trained network with all that belongs to its training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.ema import EMA
from model.score import ScoreNet
from model.wan.lora import adapter_names
from model.wan.transformer import WanTransformer
from trainer.engine import Engine
from utils.optim import NetworkOptimizer


@dataclass
class Trained:
    """name: under which it is logged and saved, and that of its adapter where the score has one: then `net` may be
    other networks' as well."""

    name: str
    net: WanTransformer
    score: ScoreNet
    optimizer: NetworkOptimizer
    engine: Engine
    ema: EMA | None

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors that are kept of it: all weights, or its adapter's, whole or sharded."""
        state: dict[str, Tensor] = dict(self.net.state_dict())
        if self.score.adapter is None:
            return state
        return {name: state[there] for name, there in adapter_names(self.net, self.score.adapter).items()}
