"""A network as files that other programs load: what the rest of the project asks of a family for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from model.weights import State, Weights

SHARD_BYTES = 5_000_000_000
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # Diffusers'
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's


class Format(Enum):
    """Whose parameter names a state dict has."""

    NATIVE = "native"
    DIFFUSERS = "diffusers"


class LoraNames(Enum):
    """Whose names an adapter has. diffusers: Diffusers' and PEFT's. comfyui: ComfyUI's, which most programs know."""

    diffusers = "diffusers"
    comfyui = "comfyui"


class Dtype(Enum):
    """What weights are stored in. fp8: float8_e4m3fn of the blocks' matrices, bf16 of all else."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


@dataclass(frozen=True)
class Pipeline:
    """The pipeline of Diffusers that samples a network.

    name: of its class.
    base: a repository on the Hub whose other parts fit.
    parts: names of those other parts.
    index: of model_index.json, all but the scheduler and what a run says.
    takes_image: whether a call needs an image.
    pixels: a side of one latent place.
    note: a sentence for the exported folder's page, or nothing.
    """

    name: str
    base: str
    parts: tuple[str, ...]
    index: Mapping[str, Any]
    takes_image: bool
    pixels: int
    note: str = ""


class Exporter(Protocol):
    """How a family writes files.

    formats: those that export.py's --format may ask for: "diffusers", "native", "lora".
    networks: folders of a pipeline's networks: the only one or the high-noise expert's, then the low-noise expert's.
    experts: the same two experts' folders in the native layout, where one network has none of its own.
    """

    formats: tuple[str, ...]
    networks: tuple[str, ...]
    experts: tuple[str, ...]

    def save(
        self, folder: Path, weights: Weights, geometry: Any, names: Format, dtype: Dtype, shard_bytes: int | None
    ) -> None:
        """Weights and config.json into `folder`, one tensor in memory at a time. Raises ValueError or OSError."""
        ...

    def pipeline(self, geometry: Any, boundary: float | None) -> Pipeline:
        """boundary: the noise level that parts two experts, None for one network."""
        ...

    def scheduler(self, shift: float, *, few_steps: bool) -> dict[str, Any]:
        """The pipeline's scheduler_config.json: of a student with a step list, or of a many-step network.

        shift: of the run's noise levels.
        """
        ...

    def lora_to_diffusers(self, state: Mapping[str, Tensor], alpha: float) -> State:
        """An adapter of ours under Diffusers' names. Raises ValueError."""
        ...

    def lora_to_peft(self, state: Mapping[str, Tensor], alpha: float) -> tuple[State, dict[str, Any]]:
        """An adapter of ours under PEFT's names, and its adapter_config.json. Raises ValueError."""
        ...

    def lora_to_comfyui(self, state: Mapping[str, Tensor], alpha: float, differences: Mapping[str, Tensor]) -> State:
        """An adapter of ours under ComfyUI's names, with alpha. Raises ValueError.

        differences: what is added to parameters that no adapter lies beside, by their names.
        """
        ...


class NoExporter:
    """Of a family whose files nothing else reads yet. It knows no format, and refuses: ValueError, one line."""

    formats: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()

    def save(
        self, folder: Path, weights: Weights, geometry: Any, names: Format, dtype: Dtype, shard_bytes: int | None
    ) -> None:
        raise self._refusal()

    def pipeline(self, geometry: Any, boundary: float | None) -> Pipeline:
        raise self._refusal()

    def scheduler(self, shift: float, *, few_steps: bool) -> dict[str, Any]:
        raise self._refusal()

    def lora_to_diffusers(self, state: Mapping[str, Tensor], alpha: float) -> State:
        raise self._refusal()

    def lora_to_peft(self, state: Mapping[str, Tensor], alpha: float) -> tuple[State, dict[str, Any]]:
        raise self._refusal()

    def lora_to_comfyui(self, state: Mapping[str, Tensor], alpha: float, differences: Mapping[str, Tensor]) -> State:
        raise self._refusal()

    def _refusal(self) -> ValueError:
        return ValueError("nothing writes this family for other programs yet")
