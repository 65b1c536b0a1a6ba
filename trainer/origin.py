"""What an adapter was trained as, and on which weights: kept in the checkpoint, which has none of those weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.merged import MergedWeights
from model.network import LoraConfig
from model.weights import Weights
from utils.errors import UserError

VALUES = 1 << 16  # how many values of a tensor count


def adapter_origin(lora: LoraConfig, base: str) -> dict[str, Any]:
    """JSON for a checkpoint. base: of `base_digest`, or another name of the weights below the adapter."""
    return {"rank": lora.rank, "alpha": lora.scale * lora.rank, "targets": sorted(set(lora.layers)), "base": base}


def base_digest(weights: Weights, telling: Sequence[str]) -> str:
    """A hash of all names and shapes, and of a few tensors as fp32: not of gigabytes, but other weights have another.

    telling: names of those tensors, beside one that each LoRA in the weights changes. Raises what reading raises.
    """
    digest = hashlib.sha256(repr(sorted(weights.shapes.items())).encode())
    names = [name for name in dict.fromkeys([*telling, *_changed(weights)]) if name in weights.shapes]
    for name, value in weights.read(names):
        digest.update(name.encode() + value.flatten()[:VALUES].to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _changed(weights: Weights) -> list[str]:
    """A weight that each of the LoRAs in it changes."""
    if not isinstance(weights, MergedWeights):
        return []
    return [*(f"{min(lora.changes)}.weight" for lora, _ in weights.loras), *_changed(weights.base)]


def refuse_other_origin(name: str, mine: dict[str, Any] | None, saved: dict[str, Any] | None, path: Path) -> None:
    """Raises UserError where a network's adapter would go on as another, or over other weights. None: no adapter."""
    if mine is None and saved is None:
        return
    if mine is None or saved is None:
        how = ("all weights", "an adapter")
        raise UserError(
            f"{path}: {name} was trained as {how[saved is not None]} there, and is {how[mine is not None]} here: use "
            "its config, or --resume never"
        )
    if differing := [key for key in ("rank", "alpha", "targets") if mine[key] != saved[key]]:
        values = ", ".join(f"{key} {saved[key]} there, {mine[key]} here" for key in differing)
        raise UserError(f"{path}: {name}.lora is another ({values}): use its config, or --resume never")
    if mine["base"] != saved["base"]:
        raise UserError(
            f"{path}: the adapter of {name} was trained on other weights than {name}.init names now: name those of "
            "that run, as they were, or --resume never"
        )
