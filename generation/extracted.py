"""An adapter as the difference of two networks' weights: what `--base` subtracts, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from generation.adapters import ADAPTER_FILE, Adapter, comfyui_file
from generation.base import Base
from model.export import Dtype, LoraNames, Pipeline
from model.extraction import Extraction, extract
from model.network import InitWeights, NetworkConfig, network_of
from model.weights import Weights
from trainer.weight_sources import is_run, stored_weights
from utils.errors import UserError
from utils.logging import Progress, warn

EXTRACTED_RANK = 64  # where no rank is asked for


def base_network(network: NetworkConfig, base: str) -> NetworkConfig:
    """A network that begins from the base as it is, without what the other laid over its own start."""
    plain = {"init_weights": InitWeights.ema, "init_lora_scale": 1.0, "loras": [], "lora": None}
    return replace(network, init=base, **plain)  # type: ignore[arg-type]


def network_of_files(path: str, weights: str | None) -> tuple[NetworkConfig, Weights]:
    """The network that stored weights are of, and these. weights: as `--weights`. Raises UserError."""
    if is_run(Path(path)):
        raise UserError(f"--model {path} is a run: give it as --run")
    try:
        network = replace(network_of(path, None), init_weights=InitWeights(weights or "ema"))
        return network, stored_weights(network)
    except UserError:
        raise
    except (ValueError, OSError) as problem:
        raise UserError(f"--model {problem}") from None


def extracted(weights: Weights, network: NetworkConfig, base: str, rank: int, dtype: Dtype) -> Extraction:
    """The difference of a network's weights from a base as an adapter of a rank.

    base: a file, a folder, a run or a Hub name, as a network's init.
    dtype: what it is to be stored in.
    Raises UserError.
    """
    try:
        before = stored_weights(base_network(network, base))
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


def adapter_of(extraction: Extraction) -> Adapter:
    return Adapter(extraction.state, float(extraction.rank), extraction.differences)


def say(extraction: Extraction, names: LoraNames) -> None:
    """The error by rank, and what the adapter lacks, on the console."""
    for rank, error in error_table(extraction):
        print(f"rank {rank}: error {error}")
    print("\n".join(told(extraction, names)))
    if extraction.differences and names is LoraNames.diffusers:
        share = _percent(extraction.share_of_others)
        warn(
            f"--format lora: {len(extraction.differences)} parameters that are no matrices are left out, {share} of "
            "the whole change: --names comfyui writes them, too"
        )


def error_table(extraction: Extraction) -> list[tuple[str, str]]:
    """Rows of (rank, relative error over all matrices)."""
    names = {rank: f"{rank} (full)" if rank == extraction.full else str(rank) for rank in sorted(extraction.tails)}
    return [(name, _percent(extraction.error(rank))) for rank, name in names.items()]


def told(extraction: Extraction, names: LoraNames) -> list[str]:
    """What an extracted adapter holds and lacks, in sentences."""
    said = [
        f"It has rank {extraction.rank}, and as it is stored it lacks {_percent(extraction.stored_error)} of the "
        "change of all matrices."
    ]
    if not extraction.differences:
        return [*said, "Nothing but matrices differs."]
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name, count=1) for name in extraction.differences))
    share = _percent(extraction.share_of_others)
    others = f"{len(extraction.differences)} other parameters ({share} of the whole change)"
    if names is LoraNames.comfyui:
        return [*said, f"It holds {others} as differences: {', '.join(kinds)}."]
    return [*said, f"It lacks {others}, for which Diffusers and PEFT have no names: {', '.join(kinds)}."]


def section(extraction: Extraction, names: LoraNames) -> list[str]:
    """Of a card: what the adapter holds of the difference, and what other ranks would."""
    rows = [f"| {rank} | {error} |" for rank, error in error_table(extraction)]
    head = ["| rank | relative error over all matrices |", "|---|---|"]
    return ["## Extraction", "", *head, *rows, "", " ".join(told(extraction, names)), ""]


def _percent(error: float) -> str:
    """An error relative to a norm."""
    return f"{100 * error:.3g}%"


def card_of_files(
    name: str,
    model: Base,
    base: Base,
    pipeline: Pipeline,
    extraction: Extraction,
    names: LoraNames,
    head: Sequence[str],
) -> str:
    """README.md of an adapter that was extracted from weights of no run.

    name: of the folder.
    model, base: what was subtracted from what.
    pipeline: that samples such a network.
    names: of the adapter.
    head: the card's metadata.
    """
    if names is LoraNames.comfyui:
        how = [
            f"Copy {comfyui_file(name)} into ComfyUI's folder models/loras. The node LoraLoaderModelOnly lays it over "
            "the base, with strength_model 1."
        ]
    else:
        how = [
            "```python",
            f"from diffusers import {pipeline.name}",
            "",
            f'source = "{name}"  # this folder, or its name on the Hub',
            f'pipe = {pipeline.name}.from_pretrained("{base.repo or "BASE"}")  # in Diffusers\' layout',
            f'pipe.load_lora_weights(source, weight_name="{ADAPTER_FILE}")',
            "```",
        ]
    lines = [
        *head,
        f"# {name}",
        "",
        f"Exported by fewstep: an adapter (LoRA). It is the difference of {model.itself} from {base.itself}, extracted "
        "by SVD.",
        "",
        "## Sampling",
        "",
        *how,
        "",
        f"Steps, shift and guidance are those of {model.itself}: the files do not say them.",
        "",
        *section(extraction, names),
    ]
    return "\n".join(lines).rstrip() + "\n"
