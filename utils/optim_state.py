"""An optimizer's state as named tensors and JSON, and back, on whatever shards this rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.shards import Entry

Names = Mapping[Any, str] | Iterable[tuple[str, Tensor]]  # parameter -> name, or named_parameters()


def flatten_optimizer(optimizer: torch.optim.Optimizer, names: Names) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of ``optimizer`` as (tensors by ``<parameter>/<key>``, JSON-able rest), for ``restore_optimizer``.

    ``names``: parameter -> name, or ``module.named_parameters()``. Raises ValueError for a parameter without a name or
    state that is neither tensor, number, text nor None.
    """
    fqn = _by_parameter(names)
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    shapes: dict[str, list[int]] = {}
    groups = []
    for group in optimizer.param_groups:
        members = [_name(fqn, parameter) for parameter in group["params"]]
        options = {key: _plain(f"option {key}", value) for key, value in group.items() if key != "params"}
        groups.append({"params": members, "options": options})
        for name, parameter in zip(members, group["params"], strict=True):
            shapes[name] = list(parameter.shape)
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value
                else:
                    values.setdefault(name, {})[key] = _plain(f"{name}/{key}", value)
    return tensors, {"groups": groups, "shapes": shapes, "values": values}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Names, saved_tensors: Mapping[str, Entry], saved: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Put back what ``flatten_optimizer`` returned: numbers and the options of each group (lr, betas, ...) at once,
    tensors as empty ones in the optimizer's state, which are returned by name for ``checkpoint.load_into`` to fill.

    A tensor of its parameter's shape is sharded as the parameter is. saved_tensors: the group of ``checkpoint.layout``.
    Raises UserError listing the parameters which are missing, unexpected, in another group or of another shape.
    """
    fqn = _by_parameter(names)
    ours = [[_name(fqn, parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    _refuse_mismatch(optimizer, ours, saved)
    entries: dict[str, dict[str, Entry]] = {}
    for path, entry in saved_tensors.items():
        name, _, key = path.rpartition("/")
        entries.setdefault(name, {})[key] = entry
    slots: dict[str, Tensor] = {}
    optimizer.state.clear()
    for group, members, theirs in zip(optimizer.param_groups, ours, saved["groups"], strict=True):
        for key in theirs["options"].keys() & group.keys():  # the others are another optimizer's
            group[key] = _like(group[key], theirs["options"][key])
        on_device = bool(group.get("capturable") or group.get("fused"))
        for name, parameter in zip(members, group["params"], strict=True):
            tensors = {key: _slot(key, entry, parameter, on_device) for key, entry in entries.get(name, {}).items()}
            slots |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
            if state := {**saved["values"].get(name, {}), **tensors}:
                optimizer.state[parameter] = state
    return slots


def _slot(key: str, entry: Entry, parameter: Tensor, on_device: bool) -> Tensor:
    if entry.shape == tuple(parameter.shape) and key != "step":
        return torch.empty_like(parameter, dtype=entry.dtype, requires_grad=False)
    # a step counter stays on the CPU unless the optimizer's kernels read it: torch keeps it so as well
    device = parameter.device if entry.shape or on_device else torch.device("cpu")
    return torch.empty(entry.shape, dtype=entry.dtype, device=device)


def _refuse_mismatch(optimizer: torch.optim.Optimizer, ours: list[list[str]], saved: Mapping[str, Any]) -> None:
    place = {name: i for i, members in enumerate(ours) for name in members}
    theirs = {name: i for i, group in enumerate(saved["groups"]) for name in group["params"]}
    flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = dict(zip((name for members in ours for name in members), (list(p.shape) for p in flat), strict=True))
    common = [name for name in place if name in theirs]
    wrong = {
        "missing in the checkpoint": [name for name in place if name not in theirs],
        "not in this optimizer": [name for name in theirs if name not in place],
        "in another group": [name for name in common if place[name] != theirs[name]],
        "of another shape": [
            f"{name} ({saved['shapes'][name]} in the checkpoint, {shapes[name]} here)"
            for name in common
            if saved["shapes"][name] != shapes[name]
        ],
    }
    problems = [f"{what}: {', '.join(names)}" for what, names in wrong.items() if names]
    if len(ours) != len(saved["groups"]):
        problems.append(f"{len(saved['groups'])} parameter groups in the checkpoint, {len(ours)} here")
    if problems:
        raise UserError(f"optimizer state does not fit: {'; '.join(problems)}: resume with the config of that run")


def _by_parameter(names: Names) -> dict[Tensor, str]:
    if isinstance(names, Mapping):
        return dict(names)
    return {parameter: name for name, parameter in names}


def _name(fqn: Mapping[Tensor, str], parameter: Tensor) -> str:
    if parameter not in fqn:
        raise ValueError(f"a parameter of shape {list(parameter.shape)} has no name: give one for each")
    return fqn[parameter]


def _plain(what: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(what, item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"optimizer {what} is a {type(value).__name__}: only tensors, numbers, text and None are saved")


def _like(current: Any, value: Any) -> Any:
    """``value`` from JSON, in the type that the optimizer had."""
    if isinstance(current, Tensor):
        return torch.tensor(value, dtype=current.dtype, device=current.device)
    return tuple(value) if isinstance(current, tuple) else value
