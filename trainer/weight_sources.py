"""Where a network's weights come from: files of other projects, or the checkpoints of runs."""

from __future__ import annotations

from pathlib import Path

from configs.load import run_from_state
from model.family import Network
from model.merged import MergedWeights, StoredLora
from model.network import NetworkConfig
from model.weights import Weights
from trainer.origin import base_digest
from utils import checkpoint
from utils.errors import ConfigError


def open_init(net: Network, config: NetworkConfig, name: str) -> Weights:
    """The weights that `config.init` names, its loras added, checked against `net` by their headers.

    Raises ConfigError naming the network.
    """
    try:
        weights = stored_weights(config)
        config.family.check_fit(weights, net)
        return weights
    except (ValueError, OSError) as problem:
        raise ConfigError(f"{name}.init: {problem}") from None


def stored_weights(config: NetworkConfig) -> Weights:
    """The weights of `config.init` plus its LoRA files; an adapter still in training (`config.lora`) is not included.

    Raises ValueError or OSError.
    """
    if config.init is None:
        raise ValueError("null: the weights were random, and are kept nowhere")
    if is_run(Path(config.init)):
        weights = open_run(Path(config.init), config.init_weights, config.init_lora_scale)
    elif config.init_lora_scale != 1:
        raise ValueError("init_lora_scale is of a run's adapter, and this is no run: leave it 1")
    else:
        weights = config.family.open_weights(config.init, config.init_weights, config.expert)
    if not config.loras:
        return weights
    loras = [(config.family.open_lora(lora.path, weights.shapes, config.expert), lora.scale) for lora in config.loras]
    return MergedWeights(weights, loras)


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run or of one of its checkpoints."""
    return (path / "checkpoints").is_dir() or (path / "state.json").is_file()


def open_run(path: Path, which: str, lora_scale: float = 1.0) -> Weights:
    """The student of a run or checkpoint, its average for 'ema' if it has one, or its critic.

    An adapter is added, times `lora_scale`, to the weights that it was trained on. Raises UserError or ValueError.
    """
    folder = checkpoint.resolve_resume(str(path), path)
    assert folder is not None
    name = "critic" if which == "critic" else "student"
    averaged = which == "ema" and f"{name}_ema" in checkpoint.tensor_names(folder)
    return open_group(folder, f"{name}_ema" if averaged else name, lora_scale)


def lag_of(path: Path, which: str) -> str | None:
    """What is wrong with the average that `open_run` takes for these arguments, in one line; None for nothing.

    Raises UserError.
    """
    folder = checkpoint.resolve_resume(str(path), path)
    if folder is None or which != "ema" or "student_ema" not in checkpoint.tensor_names(folder):
        return None
    state = checkpoint.load_state(folder)
    updates = state.get("networks", {}).get("student", {}).get("updates", 0)
    return run_from_state(state["config"]).ema.lag(updates)


def open_group(folder: Path, group: str, lora_scale: float = 1.0) -> Weights:
    """All weights of a checkpoint's group: `student`, `student_ema`, `critic`.

    An adapter is added, times `lora_scale`, to the weights that it was trained on. Raises UserError, and ValueError
    where those weights are gone or have changed.
    """
    stored = checkpoint.StoredGroup(folder, group)
    name, state = group.removesuffix("_ema"), checkpoint.load_state(folder)
    network = getattr(run_from_state(state["config"]), name)
    if network.lora is None:
        if lora_scale != 1:
            raise ValueError(f"init_lora_scale {lora_scale}: {folder} has no adapter: leave it 1")
        return stored
    try:
        base = stored_weights(network)
        if state["networks"][name]["adapter"]["base"] != base_digest(base, network.family.telling):
            raise ValueError("other weights lie there now: put back those that it was trained on")
        return MergedWeights(base, [(StoredLora(stored, network.lora.scale, folder), lora_scale)])
    except (ValueError, OSError) as problem:
        raise ValueError(f"{folder} is an adapter on {name}.init {network.init}: {problem}") from None
