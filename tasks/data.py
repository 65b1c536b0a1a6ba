"""The section `data` of a run: the base of all its kinds, and how they are found.

A kind of data is one file in tasks/kinds/: a section with its task. `DataConfig.variants` finds it by its file, and
`data.kind` in a YAML chooses it. docs/extending.md adds one. A script registers its own instead.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from model.family import FirstFrame
from model.network import NetworkConfig
from model.types import LatentSize, PromptShapes
from tasks.task import Task, TaskContext
from tasks.text_cache import Encode, sizes
from utils.compared import config_hash
from utils.found import Registry
from utils.variants import check_kind

WORLD_FPS = 8  # frames a second of what no released model makes


@dataclass(frozen=True)
class TextSource:
    """What encodes prompts.

    identity: a hash of everything that decides the encoded prompts.
    encode: prompts to tensors by their names.
    shapes: of these tensors.
    made_with: what a cache says of it in words.
    """

    identity: str
    encode: Encode
    shapes: PromptShapes
    made_with: Mapping[str, str | int | None] | None = None


@dataclass
class DataConfig:
    """What a run generates, and what it is trained on.

    kind: where prompts, real samples and the way to pixels come from.
    real: whether training may look at real videos; false is data-free, from prompts alone.
    first_frame: whether networks are given the first frame of real videos; null gives it to image-to-video ones.
    prompts: a file of prompts to train on (.txt, .csv, .jsonl, .parquet) or a folder of .parquet; null: the kind's own.
    negative_prompt: what guidance leads away from.
    """

    # through_codec: whether latent frames stand for several of video, as a codec makes them
    # draws_images: whether every sample has an image's conditioning, for networks that take it
    # is_noise: whether samples are random numbers, from which nothing can be learnt
    # suite: what of evaluate.py judges its samples, None for nothing
    through_codec: ClassVar[bool] = False
    draws_images: ClassVar[bool] = False
    is_noise: ClassVar[bool] = False
    suite: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ()

    kind: str = "toy"
    real: bool = True
    first_frame: bool | None = None
    prompts: str | None = None
    negative_prompt: str = ""

    @classmethod
    def variants(cls) -> Mapping[str, type[DataConfig]]:
        """The section of each kind, the toy world first, for it is the default."""
        return _REGISTRY.kinds()

    @classmethod
    def switched(cls, values: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
        """What the lower layers of a YAML said of one kind, for another kind that a later layer chose."""
        return {**values, **cls.variants()[kind].from_other(values)}

    @classmethod
    def from_other(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What another kind's `values` say for this one, beside the keys that both have."""
        return {}

    def __post_init__(self) -> None:
        check_kind(self)

    @property
    def size(self) -> LatentSize:
        """Latent frames, height and width of a video."""
        raise NotImplementedError

    @property
    def frames(self) -> int:
        """Latent frames of a video."""
        return self.size[0]

    @property
    def frames_key(self) -> str:
        """Where the frames of a video are said: in the section that is named as the kind, where there is one."""
        has_section = hasattr(getattr(self, self.kind, None), "frames")
        return f"data.{self.kind}.frames" if has_section else f"data.kind {self.kind}"

    def fps(self, network: NetworkConfig) -> int:
        """Frames a second of a video."""
        return WORLD_FPS

    @property
    def latents(self) -> str | None:
        """Where real videos are stored, for kinds that store them."""
        return None

    @property
    def images(self) -> str | None:
        """Where first frames with captions are stored, for kinds that store them."""
        return None

    def task(self, context: TaskContext) -> Task:
        """What the run generates. Raises ConfigError."""
        raise NotImplementedError

    def task_to_sample(self, context: TaskContext) -> Task:
        """As `task`, for a run that is only sampled, and whose training data may be gone."""
        return replace(self, prompts=if_present(self.prompts)).task(context)

    def text_identity(self) -> list[Any]:
        """What decides the text embeddings of this kind, beside the networks' sizes."""
        return []

    def text_source(self, context: TaskContext) -> TextSource:
        """What encodes the prompts of the run. Raises UserError."""

        @functools.cache
        def task() -> Task:
            return self.task(context)

        shapes = context.student.prompt_shapes
        identity = config_hash([self.kind, *self.text_identity(), *sizes(shapes)])
        return TextSource(identity, lambda prompts: task().conditioning(prompts).prompt, shapes)

    def has_first_frame(self, network: FirstFrame, *, real: bool) -> bool:
        """Whether samples come with a first frame: of real videos, or of images. network: how it takes one."""
        if self.first_frame is not None:
            return self.first_frame or network is FirstFrame.channels
        always = network is FirstFrame.channels or (real and network is FirstFrame.clean)
        return self.images is not None or always

    def check_use(self, needs: str | None, *, validates: bool) -> None:
        """Raises ValueError for a run that would miss something.

        needs: what of it needs real videos, in words; None if nothing does.
        validates: whether it decodes samples while it trains.
        """
        if needs and not self.real:
            raise ValueError(f"data.real is false, but {needs} needs real videos: set it to true")

    def check_first_frames(self, network: FirstFrame, model_type: str) -> None:
        """Raises ValueError if these networks are to be given first frames by this section, and it has none.

        model_type: what the family calls their way of taking one, for the message.
        """
        if not (self.first_frame and self.real):
            raise ValueError(
                f"data.first_frame {self.first_frame} and data.real {self.real}, but {model_type} networks are "
                "to be given the first frame of real videos: set both to true, or data.first_frame to false"
            )

    def check_size(self, size: LatentSize, *, stored: bool, with_image: bool) -> None:
        """Raises ValueError for a size of videos that training could not draw.

        stored: whether the run trains on stored real videos.
        with_image: whether its networks take an image's channels, which describe so many frames.
        """

    def resized(self, height: int, width: int, network: NetworkConfig) -> DataConfig:
        """With videos of so many pixels, to sample. Raises ValueError for those that cannot be."""
        raise ValueError(f"data of kind {self.kind} has one size")


def if_present(path: str | None) -> str | None:
    """A path that is there, else None."""
    return path if path is not None and Path(path).exists() else None


D = TypeVar("D", bound=DataConfig)

_REGISTRY = Registry("tasks.kinds", DataConfig, first="toy")


def register(kind: type[D]) -> type[D]:
    """Adds a kind of data that a script or a notebook defines: a class decorator, above `@dataclass`. Each process that
    reads its runs has to.

    Raises ValueError for a kind that there is.
    """
    if not is_dataclass(kind) or "__dataclass_fields__" not in vars(kind):
        raise ValueError(f"{kind.__name__} is no dataclass: put @register above @dataclass")
    _REGISTRY.add(kind)
    return kind
