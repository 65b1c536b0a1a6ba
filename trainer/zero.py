"""The engine that lets DeepSpeed update a network, and the way from its flat states to those of every other engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.engine import Engine
from utils.distributed import full, like, local
from utils.optim import NetworkOptimizer
from utils.parallel.deepspeed import DeepSpeedConfig, Zero, part_of, whole_of

if TYPE_CHECKING:
    from trainer.networks import Trained


class DeepSpeedEngine(Engine):
    """ZeRO-2 or ZeRO-3. twin: makes the same network, without values, as the other engines hold it, in CPU memory."""

    def __init__(
        self, net: nn.Module, optimizer: NetworkOptimizer, config: DeepSpeedConfig, twin: Callable[[], Trained]
    ) -> None:
        super().__init__(net, optimizer)
        self.twin = twin
        self.zero = Zero(net, optimizer.optimizers["adamw"], config, optimizer.config.clip_norm)

    def zero_grad(self) -> None:
        self.zero.discard()
        super().zero_grad()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.zero.backward(loss, last=last)

    def clip(self) -> Tensor:
        """The norm; the clipping itself is part of the step."""
        return self.zero.norm()

    def step(self) -> float:
        rate = self.optimizer.set_rates()
        self.zero.step()
        self.optimizer.updates += 1
        return rate


def portable(networks: dict[str, Trained], *, values: bool = True) -> dict[str, Trained]:
    """The networks with tensors of the usual names and shapes, to be saved, or to be loaded into (values: false).

    What DeepSpeed trains is copied, tensor by tensor, to its twin; the others are themselves. A collective.
    """
    out = dict(networks)
    for name, trained in networks.items():
        if isinstance(trained.engine, DeepSpeedEngine):
            out[name] = trained.engine.twin()
            if values:
                _copy_out(trained, trained.engine.zero, out[name])
    return out


def absorb(networks: dict[str, Trained], loaded: dict[str, Trained]) -> None:
    """Takes over what was loaded into `portable(networks, values=False)`. A collective."""
    for name, trained in networks.items():
        if isinstance(trained.engine, DeepSpeedEngine):
            _copy_in(loaded[name], trained, trained.engine.zero)


@torch.no_grad()
def _copy_out(trained: Trained, zero: Zero, twin: Trained) -> None:
    keys, step = zero.keys()
    (group,), (theirs,) = (t.optimizer.optimizers["adamw"].param_groups for t in (trained, twin))
    theirs.update({key: value for key, value in group.items() if key in theirs and key != "params"})
    for name, p in trained.optimizer.named.items():
        target = twin.optimizer.named[name]
        _fill(target, zero.read(p))
        if step is not None:
            state: dict[str, Any] = {"step": step.clone()}
            for key in keys:
                state[key] = torch.empty_like(target, requires_grad=False)
                _fill(state[key], zero.read(p, key))
            twin.optimizer.optimizers["adamw"].state[target] = state
        if trained.ema is not None and twin.ema is not None:
            shadow = trained.ema.shadow[name]
            _fill(twin.ema.shadow[name], whole_of(shadow, p) if hasattr(p, "ds_tensor") else shadow)
    twin.optimizer.updates = trained.optimizer.updates


@torch.no_grad()
def _copy_in(twin: Trained, trained: Trained, zero: Zero) -> None:
    states = twin.optimizer.optimizers["adamw"].state
    primed = False
    for name, p in trained.optimizer.named.items():
        source = twin.optimizer.named[name]
        zero.put(p, full(source))
        state = states.get(source, {})
        keys = [key for key in state if key != "step"]
        if state and not primed:
            zero.prime(keys, state["step"])
            primed = True
        for key in keys:
            zero.put(p, full(state[key]), key)
        if trained.ema is not None and twin.ema is not None:
            shadow = full(twin.ema.shadow[name])
            trained.ema.shadow[name].copy_(part_of(shadow, p) if hasattr(p, "ds_tensor") else shadow)
    trained.optimizer.updates = twin.optimizer.updates


def _fill(target: Tensor, value: Tensor) -> None:
    """`value`, whole on every rank, into a tensor that may be sharded."""
    local(target).copy_(local(like(value.to(local(target).device), target)))
