"""A trained module with all that belongs to its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from model.ema import EMA
from model.family import Network
from model.lora import adapter_names
from model.score import ScoreNet
from trainer.engine import Engine
from utils.optim import NetworkOptimizer


@dataclass
class Trained:
    """name: under which it is logged and saved. origin: of an adapter, see `adapter_origin`."""

    name: str
    net: nn.Module
    optimizer: NetworkOptimizer
    engine: Engine
    ema: EMA | None
    origin: dict[str, Any] | None = field(default=None, kw_only=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors that are kept of it, whole or sharded."""
        return dict(self.net.state_dict())


@dataclass
class TrainedNetwork(Trained):
    """A family's network. Where the score has an adapter, this is that adapter, and `net` may be others' too."""

    net: Network
    score: ScoreNet

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        if self.score.adapter is None:
            return state
        return {name: state[parameter] for name, parameter in adapter_names(self.net, self.score.adapter).items()}
