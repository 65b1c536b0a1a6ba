"""A network as an adapter (LoRA) in files that others load: the one that it trained, or its difference from a base."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from generation.find import Found
from model.export import ADAPTER_CONFIG, ADAPTER_FILE, Dtype, Exporter, LoraNames
from model.extraction import Extraction, extract
from model.network import InitWeights, NetworkConfig
from model.weights import State
from trainer.weight_sources import stored_weights
from utils import checkpoint
from utils.errors import UserError
from utils.logging import Progress
from utils.shards import write_file

EXTRACTED_RANK = 64  # of an adapter for which no rank is asked


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


def base_network(found: Found, base: str) -> NetworkConfig:
    """A network that begins from the base as it is, without what the run laid over its own start."""
    plain = {"init_weights": InitWeights.ema, "init_lora_scale": 1.0, "loras": [], "lora": None}
    return replace(found.network, init=base, **plain)  # type: ignore[arg-type]


def extracted(found: Found, base: str, rank: int, dtype: Dtype) -> Extraction:
    """The difference of a network from a base as an adapter of a rank.

    base: a file, a folder, a run or a Hub name, as a network's init.
    dtype: what it is to be stored in.
    Raises UserError.
    """
    try:
        before = stored_weights(base_network(found, base))
        weights = found.weights()
        progress = Progress(len(weights.shapes), desc="extract", every=None)
        extraction = extract(
            weights, before, rank, torch.bfloat16 if dtype is Dtype.bf16 else torch.float32,
            device="cuda" if torch.cuda.is_available() else "cpu", done=lambda number: progress.update(number, {}),
        )  # fmt: skip
        progress.close()
        return extraction
    except UserError:
        raise
    except (ValueError, OSError) as problem:
        raise UserError(f"--base {base}: {problem}") from None


def error_table(extraction: Extraction) -> list[tuple[str, str]]:
    """Rows of (rank, relative error over all matrices)."""
    names = {rank: f"{rank} (full)" if rank == extraction.full else str(rank) for rank in sorted(extraction.tails)}
    return [(name, _percent(extraction.error(rank))) for rank, name in names.items()]


def told(extraction: Extraction, names: LoraNames) -> list[str]:
    """What an extracted adapter holds and lacks, in sentences."""
    said = [
        f"It has rank {extraction.rank}, and as it is stored it lacks {_percent(extraction.stored_error)} of the change of "
        "all matrices."
    ]
    if not extraction.differences:
        return [*said, "Nothing but matrices differs."]
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name, count=1) for name in extraction.differences))
    share = _percent(extraction.share_of_others)
    others = f"{len(extraction.differences)} other parameters ({share} of the whole change)"
    if names is LoraNames.comfyui:
        return [*said, f"It holds {others} as differences: {', '.join(kinds)}."]
    return [*said, f"It lacks {others}, for which Diffusers and PEFT have no names: {', '.join(kinds)}."]


def _percent(error: float) -> str:
    """An error relative to a norm."""
    return f"{100 * error:.3g}%"


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
    (folder / "peft" / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _stored(state: Mapping[str, Tensor], dtype: Dtype) -> State:
    return {name: value.bfloat16() if dtype is Dtype.bf16 else value.float() for name, value in state.items()}


def _contiguous(state: Mapping[str, Tensor]) -> State:
    return {name: value.contiguous() for name, value in state.items()}
