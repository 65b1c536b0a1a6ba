"""Adapters (LoRA) in files that others load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from generation.find import Found
from model.export import ADAPTER_CONFIG, ADAPTER_FILE, Dtype, Exporter
from model.weights import State
from utils import checkpoint
from utils.errors import UserError
from utils.shards import write_file
from utils.writing import write_text


@dataclass(frozen=True)
class Adapter:
    """W + alpha / rank * up @ down.

    state: the factors under native names, `blocks.0.self_attn.q.lora_A.weight`.
    alpha: of all of them.
    differences: what is added to whole parameters, by their names.
    """

    state: State
    alpha: float
    differences: State = field(default_factory=dict)


def trained_adapter(found: Found) -> Adapter:
    """The adapter that a network trained. Raises UserError for a network that trained all weights."""
    lora = found.network.lora
    if lora is None:
        raise UserError(
            f"--format lora: {found.folder} trained all weights, and has no adapter: use --format diffusers or native, "
            "or name the weights that it began from (--base) to extract one from the difference"
        )
    stored = checkpoint.StoredGroup(found.folder, found.group)
    return Adapter(dict(stored.read(stored.shapes)), lora.scale * lora.rank)


def comfyui_file(name: str) -> str:
    """The file in an exported folder of this name. ComfyUI lists adapters by their files' names."""
    return f"{name}.safetensors"


def save_lora(folder: Path, exporter: Exporter, adapter: Adapter, dtype: Dtype, file: str | None = None) -> None:
    """An adapter alone: `ADAPTER_FILE` for Diffusers and `peft/` for PEFT, or one file for ComfyUI. Raises ValueError.

    dtype: fp32 or bf16.
    file: name of the file for ComfyUI, None for the others.
    """
    state = _stored(adapter.state, dtype)
    if file is not None:
        named = exporter.lora_to_comfyui(state, adapter.alpha, _stored(adapter.differences, dtype))
        write_file(folder / file, _contiguous(named))
        return
    write_file(folder / ADAPTER_FILE, _contiguous(exporter.lora_to_diffusers(state, adapter.alpha)))
    (folder / "peft").mkdir()
    weights, config = exporter.lora_to_peft(state, adapter.alpha)
    write_file(folder / "peft" / "adapter_model.safetensors", _contiguous(weights))
    write_text(folder / "peft" / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def _stored(state: Mapping[str, Tensor], dtype: Dtype) -> State:
    return {name: value.bfloat16() if dtype is Dtype.bf16 else value.float() for name, value in state.items()}


def _contiguous(state: Mapping[str, Tensor]) -> State:
    return {name: value.contiguous() for name, value in state.items()}
