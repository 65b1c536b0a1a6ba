"""The networks of a run as tensors and JSON, and back: weights, averages, optimizers, update counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.networks import Trained
from utils import checkpoint
from utils.config import UserError
from utils.distributed import full, like
from utils.parallel.parallelize import reshard

Tensors = dict[str, dict[str, Tensor]]


def save_run(networks: dict[str, Trained]) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by file, state) for `checkpoint.save`. Sharded tensors are gathered: all ranks take part."""
    tensors: Tensors = {}
    state: dict[str, Any] = {"networks": {}}
    for name, trained in networks.items():
        tensors[name] = dict(trained.net.state_dict())
        if trained.ema is not None:
            tensors[f"{name}_ema"] = dict(trained.ema.shadow)
        kinds: dict[str, Any] = {}
        for kind, optimizer in trained.optimizer.optimizers.items():
            named = trained.optimizer.names_of(kind).items()
            tensors[f"{name}_{kind}"], kinds[kind] = checkpoint.flatten_optimizer(optimizer, named)
        state["networks"][name] = {"updates": trained.optimizer.updates, "optimizers": kinds}
    return {file: {key: full(value) for key, value in group.items()} for file, group in tensors.items()}, state


def load_run(networks: dict[str, Trained], path: Path, state: dict[str, Any], device: torch.device) -> None:
    """Raises UserError when the checkpoint is of other networks, another geometry or another optimizer."""
    if set(state["networks"]) != set(networks):
        raise UserError(
            f"{path} holds {', '.join(sorted(state['networks']))}, this run trains {', '.join(sorted(networks))}: "
            "resume with the config of that run, or --resume never"
        )
    for name, trained in networks.items():
        saved = state["networks"][name]
        weights = checkpoint.load_tensors(path, name, device)
        _refuse_other_geometry(trained, weights, path)
        reshard(trained.net)
        with torch.no_grad():
            for key, own in trained.net.state_dict().items():
                own.copy_(like(weights[key], own))
        if set(saved["optimizers"]) != set(trained.optimizer.optimizers):
            raise UserError(
                f"{path}: {name} was trained with {', '.join(saved['optimizers'])}: set that optimizer kind"
            )
        for kind, optimizer in trained.optimizer.optimizers.items():
            tensors = checkpoint.load_tensors(path, f"{name}_{kind}", device)
            named = trained.optimizer.names_of(kind).items()
            held = trained.optimizer.names_of(kind)
            tensors = {key: _as_kept(value, held[key.rpartition("/")[0]]) for key, value in tensors.items()}
            checkpoint.restore_optimizer(optimizer, named, tensors, saved["optimizers"][kind])
        trained.optimizer.apply_config()
        trained.optimizer.updates = saved["updates"]
        if trained.ema is not None:
            if f"{name}_ema" not in checkpoint.tensor_names(path):
                raise UserError(f"{path} has no average of {name}: set ema.decay to null, or --resume never")
            trained.ema.load(checkpoint.load_tensors(path, f"{name}_ema", device))


def _as_kept(value: Tensor, parameter: Tensor) -> Tensor:
    """Optimizer state sharded like its parameter; a count is whole on every rank."""
    return like(value, parameter) if value.shape == parameter.shape else value


def _refuse_other_geometry(trained: Trained, weights: dict[str, Tensor], path: Path) -> None:
    mine = {key: tuple(value.shape) for key, value in trained.net.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in weights.items()}
    odd = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if odd:
        raise UserError(
            f"{path}: {trained.name} has another geometry ({len(odd)} parameters differ, first {odd[0]}: "
            f"{theirs.get(odd[0])} there, {mine.get(odd[0])} here): use its config, or --resume never"
        )
