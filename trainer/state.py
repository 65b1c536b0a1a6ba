"""The networks of a run as tensors and JSON, and back: weights, averages, optimizers, update counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.networks import Trained
from trainer.origin import refuse_other_origin
from utils import checkpoint
from utils.errors import UserError
from utils.optim_state import flatten_optimizer, restore_optimizer
from utils.parallel.parallelize import reshard
from utils.shards import Entry, Table

Tensors = dict[str, dict[str, Tensor]]


def save_run(networks: dict[str, Trained]) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by group, state) for `checkpoint.Saver.save`: the live tensors, whole or sharded, without a copy."""
    tensors: Tensors = {}
    state: dict[str, Any] = {"networks": {}}
    for name, trained in networks.items():
        tensors[name] = trained.state_dict()
        if trained.ema is not None:
            tensors[f"{name}_ema"] = dict(trained.ema.shadow)
        kinds: dict[str, Any] = {}
        for kind, optimizer in trained.optimizer.optimizers.items():
            named = trained.optimizer.names_of(kind).items()
            tensors[f"{name}_{kind}"], kinds[kind] = flatten_optimizer(optimizer, named)
        state["networks"][name] = {"updates": trained.optimizer.updates, "optimizers": kinds}
        if trained.origin is not None:
            state["networks"][name]["adapter"] = trained.origin
    return tensors, state


def load_run(
    networks: dict[str, Trained], path: Path, state: dict[str, Any], layout: Table, group: ProcessGroup | None
) -> None:
    """Fills the networks in place, each rank what it holds, whatever ranks saved. layout: `checkpoint.layout(path)`.

    Raises UserError when the checkpoint is of other networks, another geometry or optimizer, or an adapter on others.
    """
    if set(state["networks"]) != set(networks):
        raise UserError(
            f"{path} holds {', '.join(sorted(state['networks']))}, this run trains {', '.join(sorted(networks))}: "
            "resume with the config of that run, or --resume never"
        )
    tensors: Tensors = {}
    for name, trained in networks.items():
        saved = state["networks"][name]
        reshard(trained.net)  # a gathered copy would go on being used
        tensors[name] = trained.state_dict()
        refuse_other_origin(name, trained.origin, saved.get("adapter"), path)
        _refuse_other_geometry(name, tensors[name], layout.get(name, {}), path)
        if set(saved["optimizers"]) != set(trained.optimizer.optimizers):
            theirs, mine = (" and ".join(of) for of in (saved["optimizers"], trained.optimizer.optimizers))
            raise UserError(
                f"{path}: {name} was trained with {theirs}, and this run's optimizer.kind is of {mine}: set the kind "
                "of that run, or --resume never"
            )
        for kind, optimizer in trained.optimizer.optimizers.items():
            group_name, named = f"{name}_{kind}", trained.optimizer.names_of(kind).items()
            tensors[group_name] = restore_optimizer(
                optimizer, named, layout.get(group_name, {}), saved["optimizers"][kind]
            )
        trained.optimizer.apply_config()
        gone = trained.optimizer.fit_state()
        for kind in trained.optimizer.optimizers:
            slots = tensors[f"{name}_{kind}"]
            tensors[f"{name}_{kind}"] = {key: slot for key, slot in slots.items() if key not in gone}
        if trained.ema is not None:
            if f"{name}_ema" not in layout:
                raise UserError(f"{path} has no average of {name}: set ema.decay to null, or --resume never")
            tensors[f"{name}_ema"] = trained.ema.shadow
            _refuse_other_geometry(f"{name}_ema", trained.ema.shadow, layout[f"{name}_ema"], path)
    checkpoint.load_into(path, layout, tensors, group)
    for name, trained in networks.items():
        trained.optimizer.updates = state["networks"][name]["updates"]


def _refuse_other_geometry(name: str, mine: dict[str, Tensor], saved: dict[str, Entry], path: Path) -> None:
    here = {key: tuple(value.shape) for key, value in mine.items()}
    stored = {key: entry.shape for key, entry in saved.items()}
    differing = sorted(key for key in here.keys() | stored.keys() if here.get(key) != stored.get(key))
    if differing:
        raise UserError(
            f"{path}: {name} has another geometry ({len(differing)} parameters differ, first {differing[0]}: "
            f"{stored.get(differing[0])} there, {here.get(differing[0])} here): use its config, or --resume never"
        )
