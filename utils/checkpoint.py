"""A checkpoint is a folder of safetensors files and one ``state.json``; no pickle anywhere.

    checkpoints/step_00000100/  <name>.safetensors ...  state.json   (format version, step, size of each file, state)

It is written to ``checkpoints/.tmp-step_00000100``, fsynced, and renamed: a folder named ``step_*`` is complete, so a
killed save never stands in the way of the last good one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.config import UserError

FORMAT = 1
_STATE = "state.json"
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY, _REPLACED = ".tmp-", ".old-"

# ---------------------------------------------------------------------------------------------------------------- save


def save(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write checkpoint ``step`` under ``root`` and return its folder; an older one of the same step is replaced.

    Each key of ``tensors`` becomes ``<key>.safetensors``. Tensors may be non-contiguous, aliased, 0-d, on any device.
    ``state`` is JSON-able. Call it in one process only.

    Raises UserError when it cannot be written (disk full, no permission); what was there before is intact then.
    """
    root = Path(root)
    final = root / f"step_{step:08d}"
    temporary = root / f"{_TEMPORARY}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        temporary.mkdir()
        for name, group in tensors.items():
            save_file(_independent(group), temporary / f"{name}.safetensors")
            _fsync(temporary / f"{name}.safetensors")
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        _write_json(temporary / _STATE, {"format": FORMAT, "step": step, "files": files, "state": dict(state)})
        _fsync(temporary)
        _publish(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} could not be written: {_reason(error)}; earlier checkpoints are intact: "
            f"free some space there or choose another --logdir, then start again with --resume auto"
        ) from error
    return final


def _publish(temporary: Path, final: Path) -> None:
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    _fsync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _sweep(root: Path) -> None:
    """Clear what killed saves and prunes left behind."""
    for path in root.iterdir():
        if path.name.startswith(_TEMPORARY):
            shutil.rmtree(path)
        elif path.name.startswith(_REPLACED):
            original = root / path.name.removeprefix(_REPLACED)
            # killed between the two renames of _publish: the older one of that step is still the good one
            if original.exists():
                shutil.rmtree(path)
            else:
                os.rename(path, original)


def _independent(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors wants them."""
    out: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in group.items():
        cpu = tensor.detach().to("cpu").contiguous()
        pointer = cpu.untyped_storage().data_ptr()
        out[name] = cpu.clone() if pointer in storages else cpu
        storages.add(pointer)
    return out


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


# ---------------------------------------------------------------------------------------------------------------- load


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under ``root``, oldest step first; none when there is no such folder."""
    if not Path(root).is_dir():
        return []
    found = [path for path in Path(root).iterdir() if _NAME.fullmatch(path.name) and (path / _STATE).is_file()]
    return sorted(found, key=step_of)


def latest(root: Path) -> Path | None:
    """The complete checkpoint of the highest step under ``root``, if there is one."""
    return next(reversed(list_checkpoints(root)), None)


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        raise UserError(f"{path} is not a checkpoint: its name should be step_ and eight digits")
    return int(match[1])


def load_state(path: Path) -> dict[str, Any]:
    """The ``state`` that was saved. Raises UserError when ``state.json`` is missing, corrupt or of another format."""
    state: dict[str, Any] = _manifest(path)["state"]
    return state


def tensor_names(path: Path) -> list[str]:
    """Names of the tensor files of a checkpoint, as ``load_tensors`` takes them."""
    return [file.removesuffix(".safetensors") for file in _manifest(path)["files"]]


def load_tensors(path: Path, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """``<name>.safetensors`` of checkpoint ``path`` on ``device``. Raises UserError when missing or damaged."""
    file = Path(path) / f"{name}.safetensors"
    sizes: dict[str, int] = _manifest(path)["files"]
    if file.name not in sizes:
        known = ", ".join(known.removesuffix(".safetensors") for known in sizes)
        raise UserError(f"{path} has no {name!r}: it has {known or 'no tensors'}")
    if not file.is_file():
        raise UserError(f"{file} is missing: the checkpoint is damaged; {_other(path)}")
    size = file.stat().st_size
    if size != sizes[file.name]:
        raise UserError(f"{file} is truncated or changed: {size} bytes of {sizes[file.name]}; {_other(path)}")
    try:
        return load_file(file, device=str(device))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is corrupt ({error}); {_other(path)}") from error


def _manifest(path: Path) -> dict[str, Any]:
    file = Path(path) / _STATE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not a checkpoint: it has no {_STATE}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is corrupt ({error}); {_other(path)}") from error
    if not isinstance(manifest, dict) or not {"format", "step", "files", "state"} <= manifest.keys():
        raise UserError(f"{file} is not a checkpoint's state: it lacks format, step, files or state; {_other(path)}")
    if manifest["format"] != FORMAT:
        raise UserError(f"{file} has format {manifest['format']}, this code reads {FORMAT}: use the code that wrote it")
    return manifest


def _other(path: Path) -> str:
    others = [other.name for other in list_checkpoints(Path(path).parent) if other.name != Path(path).name]
    return f"resume from another: {', '.join(others)}" if others else "there is no other checkpoint beside it"


def resolve_resume(arg: str, root: Path) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start.

    ``"auto"``: the latest under ``root``, if any. ``"never"``: None. Else a path: a checkpoint, a folder of
    checkpoints or a run folder with ``checkpoints/`` in it. Raises UserError, naming what is there, when there is none.
    """
    if arg == "never":
        return None
    if arg == "auto":
        return latest(root)
    path = Path(arg)
    if (path / _STATE).is_file():
        return path
    found = latest(path / "checkpoints") or latest(path)
    if found is None:
        raise UserError(f"no checkpoint in {arg}: {_whats_there(path)}; give a run's folder, or a checkpoint's")
    return found


def _whats_there(path: Path) -> str:
    if path.is_file():
        return "it is a file"
    while not path.is_dir():
        path = path.parent
    names = sorted(child.name for child in path.iterdir())
    return f"{path} has {', '.join(names[:10]) or 'nothing'}{' ...' if len(names) > 10 else ''}"


def prune(root: Path, keep_last: int, keep_every: int | None = None) -> list[Path]:
    """Delete all but the last ``keep_last`` checkpoints and those whose step divides by ``keep_every``.

    Returns what was deleted. Raises ValueError for ``keep_last`` < 1 or ``keep_every`` < 1.
    """
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
        raise ValueError(f"keep_last={keep_last}, keep_every={keep_every}: give whole numbers of at least 1")
    old = list_checkpoints(root)[:-keep_last]
    doomed = [path for path in old if keep_every is None or step_of(path) % keep_every]
    for path in doomed:
        # renamed first: half a deletion must not look like a checkpoint
        os.rename(path, path.with_name(_TEMPORARY + path.name))
        shutil.rmtree(path.with_name(_TEMPORARY + path.name))
    return doomed


# ----------------------------------------------------------------------------------------------------------- optimizer

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
    optimizer: torch.optim.Optimizer, names: Names, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> None:
    """Put back what ``flatten_optimizer`` returned: state and the options of each group (lr, betas, ...).

    Raises UserError listing the parameters which are missing, unexpected, in another group or of another shape.
    """
    fqn = _by_parameter(names)
    ours = [[_name(fqn, parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    _refuse_mismatch(optimizer, ours, saved)
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in saved["values"].items()}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        state.setdefault(name, {})[key] = tensor
    optimizer.state.clear()
    for group, members, theirs in zip(optimizer.param_groups, ours, saved["groups"], strict=True):
        for key, value in theirs["options"].items():
            group[key] = _like(group.get(key), value)
        on_device = bool(group.get("capturable") or group.get("fused"))
        for name, parameter in zip(members, group["params"], strict=True):
            # a step counter stays on the CPU unless the optimizer's kernels read it: torch keeps it so as well
            entries = state.get(name, {})
            if entries:
                optimizer.state[parameter] = {
                    key: _own(value, parameter.device if value.dim() or on_device else torch.device("cpu"))
                    if isinstance(value, Tensor)
                    else value
                    for key, value in entries.items()
                }


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
    """``value`` as JSON gave it, in the form that the optimizer had it in."""
    if isinstance(current, Tensor):
        return torch.tensor(value, dtype=current.dtype, device=current.device)
    return tuple(value) if isinstance(current, tuple) else value


def _own(value: Tensor, device: torch.device) -> Tensor:
    return value.detach().to(device, copy=True)
