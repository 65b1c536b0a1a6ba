"""What a run says of a network: its geometry, where its weights come from, its adapter, its attention."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path as FilePath
from typing import Any

from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.attention.sparse import SparseConfig
from model.codec import Codecs
from model.family import Family, FirstFrame, Geometry, families, family_of
from model.folders import pipeline_folder
from model.path import Path
from model.released import CLUES, Released, classes_of
from model.types import PromptShapes
from utils.fields import check_modes
from utils.limits import RANK, check_counts

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass
class LoraWeights:
    """A LoRA file or folder, local or on the Hub, and by how much it counts.

    path: of the file or folder, or its Hub name.
    scale: by how much it counts.
    """

    path: str
    scale: float = 1.0


class InitWeights(StrEnum):
    ema = "ema"  # raw where it has none
    raw = "raw"
    critic = "critic"


class Expert(StrEnum):
    high = "high"  # for the high noise levels
    low = "low"  # for the low ones


@dataclass
class LoraConfig:
    """An adapter that is trained in place of the weights themselves (LoRA, arXiv 2106.09685).

    rank: inner width of the adapter's two matrices: the weight is W + alpha / rank * up @ down.
    alpha: scale of the adapter, see rank; null takes alpha = rank.
    targets: which linear layers of each block get one; null takes its family's `lora_targets`.
    share: the adapter lies on the teacher's own copy of the weights, of which there is then one for all roles; false
        gives it a frozen copy of its own, which `init` may then take from elsewhere.
    """

    rank: int = 64
    alpha: float | None = None
    targets: list[str] | None = None
    share: bool = True

    def __post_init__(self) -> None:
        check_counts(self, {"rank": RANK}, "no matrix is larger")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha must be positive, or null for the rank, got {self.alpha}")
        if self.targets is not None and not self.targets:
            raise ValueError("targets is empty: name layers of a block, or null for those of the network's family")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def layers(self) -> list[str]:
        """targets, which `NetworkConfig` fills in where they are null."""
        assert self.targets is not None
        return self.targets


@dataclass
class NetworkConfig:
    """One network of a run.

    preset: name of its geometry, which is of one family.
    overrides: fields of the geometry that differ from the preset's.
    init: where its weights come from: a run or checkpoint folder of ours, a file or folder in Wan's, Diffusers' or
        Self-Forcing's format, a Hub repository (`owner/name`), null for random ones.
    init_weights: which weights of what has several.
    init_lora_scale: by how much the adapter of a run that init names counts.
    expert: which network of a model that has two, null for a model of one.
    loras: LoRA files that are added to the weights as they are loaded.
    lora: an adapter to train while the weights are frozen; null trains the weights.
    sparse: sparse self-attention, null for dense.
    attention: backend of dense attention.
    checkpointing: what a pass with gradient keeps of each block.
    """

    preset: str = "toy"
    overrides: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    init_weights: InitWeights = InitWeights.ema
    init_lora_scale: float = 1.0
    expert: Expert | None = None
    loras: list[LoraWeights] = field(default_factory=list)
    lora: LoraConfig | None = None
    sparse: SparseConfig | None = None
    attention: Backend = Backend.SDPA
    checkpointing: Checkpointing = Checkpointing.none

    def __post_init__(self) -> None:
        family = self.family
        try:
            family.geometry(self.preset, self.overrides)
        except ValueError as problem:
            raise ValueError(f"overrides: {problem}") from None
        check_modes(self)
        if self.loras and self.init is None:
            raise ValueError("loras are added to the weights of init, which is null: set it")
        if self.init_lora_scale != 1 and self.init is None:
            raise ValueError("init_lora_scale is of an adapter in init, which is null: set it")
        if self.lora is not None and self.lora.targets is None and (layers := self.family.lora_targets):
            self.lora = replace(self.lora, targets=list(layers))  # a run says what it trained, whatever comes later

    def other_weights(self, other: NetworkConfig) -> str | None:
        """The first of what names the weights that differs, None where both start from the same: by what they say, not
        by what the files hold."""
        if self.geometry() != other.geometry():
            return "geometry"
        names = ("sparse", "init", "init_weights", "init_lora_scale", "expert", "loras")
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)

    @property
    def family(self) -> Family:
        return family_of(self.preset)

    @property
    def pins_initial(self) -> bool:
        """Whether given frames are shown to the network clean, each frame with its own time (see `ScoreNet`)."""
        return self.geometry().first_frame is FirstFrame.clean

    @property
    def path(self) -> Path:
        return self.family.path(self.geometry())

    @property
    def prompt_shapes(self) -> PromptShapes:
        return self.family.prompt_shapes(self.geometry())

    @property
    def codecs(self) -> Codecs:
        return self.family.codecs

    def geometry(self) -> Geometry:
        return self.family.geometry(self.preset, self.overrides)


def network_of(path: str | FilePath, expert: Expert | None) -> NetworkConfig:
    """The network that stored weights are of: a preset of their family, with their geometry over it.

    path, expert: as `Family.open_weights` takes them. Raises ValueError for weights of no family.
    """
    problems = []
    for family in families().values():
        try:
            geometry: Any = family.geometry_of(str(path), expert)
        except ValueError as problem:
            problems.append(str(problem))
            continue
        if geometry is None:
            continue
        return NetworkConfig(next(iter(family.presets)), overrides=asdict(geometry), init=str(path), expert=expert)
    raise ValueError("; ".join(problems) or f"{path}: no family reads files")


def is_pipeline(path: str) -> bool:
    """Whether `path` is a pipeline's folder or the Hub name of one, and not weights by themselves."""
    folder = FilePath(path)
    if folder.is_dir():
        return bool(classes_of(folder))
    if folder.exists() or folder.suffix in WEIGHT_SUFFIXES:
        return False
    return path.count("/") < 2 or path.startswith(("/", ".", "~"))


def released_model(path: str) -> tuple[FilePath, Released]:
    """The folder of a released model, and how it is sampled. path: a pipeline's folder, or its Hub name.

    Of a Hub name the files that say what it is are fetched first, then the parts that sampling needs. Raises ValueError
    in one line, also for a model of no family.
    """
    clues = pipeline_folder(path, CLUES)
    found = classes_of(clues)
    for family in families().values():
        if set(found) & set(family.released_as):
            released = family.released(clues)
            return pipeline_folder(path, released.parts), released
    known = ", ".join(name for family in families().values() for name in family.released_as)
    raise ValueError(f"it is a model of {', '.join(found) or 'no class'}, and known are {known}: give one of these")
