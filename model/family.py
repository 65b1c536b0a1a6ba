"""The seam between families of models and everything else.

A family is a folder model/<name>/ whose module family.py has a `FAMILY`. Nothing outside that folder imports it: this
module finds the folders, and a preset's name says whose network a run is about. `docs/families.md` adds one. A script
registers its own instead.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.attention.kv_cache import CacheSpec, KVCache
from model.attention.sparse import SparseConfig, Sparsity
from model.codec import Codecs
from model.export import Exporter, NoExporter
from model.merged import Lora
from model.path import Path
from model.released import Released, Source, Student
from model.text_encoder import PromptEncoder, TextConfig
from model.types import Prompt, PromptShapes
from model.weights import Shapes, Weights, misfits, shapes_of
from utils.fields import show
from utils.parallel.sequence import SequenceParallel

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

G = TypeVar("G", bound="DataclassInstance")


class Trait(Enum):
    """What a family's networks can do beyond giving a velocity."""

    cache = "cache"  # generate block by block over a KV cache, and see masks of frames
    features = "features"  # give what their blocks put out, for discriminators
    lora = "lora"  # carry adapters beside their matrices
    sparse = "sparse"  # attend to kept tiles only
    sequence = "sequence"  # share a video's tokens among ranks
    replay = "replay"  # give passes their gradient after they were made
    backends = "backends"  # attend by the backend that a run chooses


class FirstFrame(Enum):
    """How a network is given the first frames of a video."""

    none = "none"  # not at all, but through a cache
    channels = "channels"  # as channels beside the latents of every frame, and maybe as an image encoder's tokens
    clean = "clean"  # in the place of its noisy ones, with a time of their own


class Geometry(Protocol):
    """Sizes of a network, read-only. A family's own class has more of them.

    dim: width of the features that its blocks put out.
    num_layers, num_heads: blocks, and heads of their attention, 1 where they have none.
    in_dim, out_dim: channels that go in (image conditioning included), and latent channels that come out.
    patch_size: latent frames, rows and columns that make a token.
    image_dim: width of an image encoder's tokens, None for a network that takes none.
    first_frame: how it is given first frames.
    model_type: what the family calls that, for messages.
    """

    @property
    def dim(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def in_dim(self) -> int: ...
    @property
    def out_dim(self) -> int: ...
    @property
    def patch_size(self) -> tuple[int, int, int]: ...
    @property
    def image_dim(self) -> int | None: ...
    @property
    def first_frame(self) -> FirstFrame: ...
    @property
    def model_type(self) -> str: ...

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame. Raises ValueError for a size that patches do not tile."""
        ...


class Network(nn.Module):
    """A family's network: `(x [B, F, C, H, W], time [B] | [B, F], **conditioning and mode)` to its own prediction.

    config: its geometry.
    sparse: its sparse attention, None for dense.
    checkpointing: what a pass with gradient keeps of each block.
    sequence: the ranks that share its tokens, set from outside; None for one rank alone.
    """

    config: Any
    sparse: Sparsity | None = None
    checkpointing: Checkpointing = Checkpointing.none
    sequence: SequenceParallel | None = None

    def fsdp_units(self) -> list[nn.Module]:
        """The blocks, all alike: sharded, compiled and adapted one by one. What is left is the root's."""
        raise NotImplementedError

    def matrices(self) -> list[nn.Parameter]:
        """The matrices of the blocks, which Muon takes and adapters may go beside."""
        return [p for unit in self.fsdp_units() for p in unit.parameters() if p.ndim == 2]

    def low_bit_layers(self) -> list[nn.Module]:
        """The layers that may multiply in low precision: the blocks' linear ones, unless a family knows better."""
        return [module for unit in self.fsdp_units() for module in unit.modules() if isinstance(module, nn.Linear)]

    def new_cache(
        self, spec: CacheSpec, *, dtype: torch.dtype, device: torch.device | str, memory: Tensor | None = None
    ) -> KVCache:
        """An empty cache, for families with the trait."""
        raise NotImplementedError


class Family(Protocol):
    """One family of models.

    traits: what its networks can do.
    presets: its geometries by name; no two families share a name.
    telling: small parameters of every geometry that differ between any two trainings, to know weights again.
    head: the weight of the output layer, which begins at zero.
    shared: fields of the geometry that all networks of a run have alike, for they see the same samples.
    lora_targets: layers of each block that an adapter goes beside where a run names none; empty without the trait.
    codecs: what makes its latents; `PixelCodecs` for a family that generates pixels.
    exporter: what writes files for other programs; `NoExporter` if nothing does.
    released_as: classes in model_index.json, or in a part's config.json, of released models that are this family's.
    sources: by preset, where its weights are on the Hub. Presets of no released model are left out.
    students: published few-step students by the names of their layouts, as `--layout` takes them.
    """

    traits: frozenset[Trait]
    presets: Mapping[str, Any]
    telling: tuple[str, ...]
    head: str
    shared: tuple[str, ...]
    lora_targets: tuple[str, ...]
    codecs: Codecs
    exporter: Exporter
    released_as: tuple[str, ...]
    sources: Mapping[str, Source]
    students: Mapping[str, Student]

    def geometry(self, preset: str, overrides: Mapping[str, Any]) -> Geometry:
        """A preset with some fields replaced. Raises ValueError naming the legal fields."""
        ...

    def path(self, geometry: Geometry) -> Path:
        """The process that its networks were trained on."""
        ...

    def network(
        self, geometry: Geometry, backend: Backend, checkpointing: Checkpointing, sparse: SparseConfig | None
    ) -> Network:
        """A network with random weights; under `torch.device("meta")` without any.

        Raises ValueError for what its networks cannot be. The message begins with the name of the config's key.
        """
        ...

    def random_weights(self, geometry: Geometry, sparse: SparseConfig | None) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of a new network, one layer in memory at a time, by torch's default generator.

        Under `torch.device("meta")` it gives names and shapes in the same order and draws nothing.
        """
        ...

    def prompt_shapes(self, geometry: Geometry) -> PromptShapes:
        """Shapes of an encoded prompt's tensors, without the batch, by the names of the network's arguments.

        Of several dimensions the first counts tokens, and rows after a shorter prompt's last token are zero.
        """
        ...

    def toy_prompts(
        self, captions: Sequence[str], geometry: Geometry, seed: int, device: torch.device
    ) -> Callable[[Sequence[str]], Prompt]:
        """What encodes prompts of a small world, made of the words of these captions; it raises ValueError for others.

        seed: of its random weights, if it has any. Nothing is downloaded.
        """
        ...

    def text_encoder(self, config: TextConfig, geometry: Geometry, device: torch.device) -> PromptEncoder:
        """What encodes the prompts of a real model, not loaded yet. Raises ValueError in one line where there is none.

        config: names its folder or Hub name; with neither it can only say what it is.
        device: where it computes.
        """
        ...

    def open_weights(self, path: str, which: str, expert: str | None) -> Weights:
        """Stored weights: of a file, a folder or a Hub name. Raises ValueError in one line.

        which: "ema", "raw" or "critic", of what holds several.
        expert: "high" or "low", of a model with two.
        """
        ...

    def geometry_of(self, path: str, expert: str | None) -> Geometry | None:
        """The geometry of stored weights, by their config.json and shapes; None for a family that reads no files but
        its runs' own. Raises ValueError in one line."""
        ...

    def check_fit(self, weights: Weights, net: Network) -> None:
        """Compares weights with the network that is to get them, by headers. Raises ValueError in one line."""
        ...

    def open_lora(self, path: str, shapes: Shapes, expert: str | None) -> Lora:
        """The changes of a LoRA file to a base of these shapes. Raises ValueError in one line."""
        ...

    def released(self, folder: FilePath) -> Released:
        """How the model in a pipeline's folder is sampled: by its small files (`CLUES`), for no more may be there yet.

        Raises ValueError in one line for what it does not know.
        """
        ...

    def student_of(self, path: str, layout: str | None) -> Student | None:
        """The published student that stored weights are, by content and name; None for weights that do not tell.

        path: a file, a folder or a Hub name.
        layout: its name among `students`, where the user says it.
        Raises ValueError in one line for an unknown layout, and for weights that are known and are no student.
        """
        ...


class PlainFamily:
    """The part of a `Family` that is the same for all that have no trait and read no files but their runs' own.

    What is left to say: presets, telling, head, shared, codecs; geometry, path, network, prompt_shapes, toy_prompts.
    """

    traits: frozenset[Trait] = frozenset()
    lora_targets: tuple[str, ...] = ()
    exporter: Exporter = NoExporter()
    released_as: tuple[str, ...] = ()
    sources: Mapping[str, Source] = {}
    students: Mapping[str, Student] = {}

    def network(
        self, geometry: Any, backend: Backend, checkpointing: Checkpointing, sparse: SparseConfig | None
    ) -> Network:
        """See `Family`."""
        raise NotImplementedError

    def random_weights(self, geometry: Any, sparse: SparseConfig | None) -> Iterator[tuple[str, Tensor]]:
        """In the order in which the network's modules are made, which is that of their draws."""
        for name, value in self.network(geometry, Backend.SDPA, Checkpointing.none, sparse).named_parameters():
            yield name, value.detach()

    def text_encoder(self, config: TextConfig, geometry: Any, device: torch.device) -> PromptEncoder:
        raise ValueError("text: these networks know the prompts of small worlds only: choose another data.kind")

    def open_weights(self, path: str, which: str, expert: str | None) -> Weights:
        raise ValueError(f"{path} is no run's folder, and this family reads no other files yet")

    def geometry_of(self, path: str, expert: str | None) -> Geometry | None:
        return None

    def check_fit(self, weights: Weights, net: Network) -> None:
        if found := misfits(shapes_of(dict(net.named_parameters())), weights.shapes):
            raise ValueError(f"weights do not fit this geometry: {found}: choose the geometry that they were made for")

    def open_lora(self, path: str, shapes: Shapes, expert: str | None) -> Lora:
        raise ValueError(f"{path}: this family reads no LoRA files")

    def released(self, folder: FilePath) -> Released:
        raise ValueError(f"{folder}: this family reads no released models yet")

    def student_of(self, path: str, layout: str | None) -> None:
        return None


_REGISTERED: dict[str, Family] = {}


def families() -> Mapping[str, Family]:
    """Families by the names of their folders, then those that were registered."""
    return {**_in_folders(), **_REGISTERED}


def register(name: str, family: Family) -> None:
    """Adds a family that a script or a notebook defines. Each process that reads its runs has to.

    One that was registered under this name before goes, for a notebook runs a cell again.

    Raises ValueError, one line, for a name or a preset that another family has, and for a family without presets.
    """
    if name in _in_folders():
        raise ValueError(f"family '{name}' is taken, see model/{name}: choose another name")
    check_presets({**{known: other for known, other in families().items() if known != name}, name: family})
    if not family.presets:
        raise ValueError(f"family '{name}' has no preset, by which a run would choose it: give it one")
    _REGISTERED[name] = family


@functools.cache
def _in_folders() -> Mapping[str, Family]:
    folder = str(FilePath(__file__).parent)
    names = [module.name for module in pkgutil.iter_modules([folder]) if module.ispkg]
    with_seam = [name for name in names if FilePath(folder, name, "family.py").is_file()]
    found = {name: importlib.import_module(f"model.{name}.family").FAMILY for name in with_seam}
    check_presets(found)
    return found


def check_presets(by_name: Mapping[str, Family]) -> None:
    """Raises ValueError, one line, for a preset of two families: a run that names it would get either."""
    owner: dict[str, str] = {}
    for name, family in by_name.items():
        for preset in family.presets:
            if owner.setdefault(preset, name) != name:
                raise ValueError(f"family '{name}': preset '{preset}' is {owner[preset]}'s: choose another name")


def replaced(geometry: G, fields: Mapping[str, Any]) -> G:
    """A geometry, which is a dataclass, with these fields replaced. Raises ValueError naming the legal ones."""
    legal = sorted(field.name for field in dataclasses.fields(geometry))
    if unknown := sorted(set(fields) - set(legal)):
        raise ValueError(f"unknown geometry field '{unknown[0]}': choose among {', '.join(legal)}")
    return dataclasses.replace(geometry, **fields)


def presets() -> Sequence[str]:
    """The names of all families' presets."""
    return [preset for family in families().values() for preset in family.presets]


def family_of(preset: str) -> Family:
    """The family that a preset is of. Raises ValueError naming the presets."""
    for family in families().values():
        if preset in family.presets:
            return family
    raise ValueError(f"unknown geometry preset {show(preset)}: choose one of {', '.join(presets())}")
