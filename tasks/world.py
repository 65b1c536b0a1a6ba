"""Worlds that are made on the fly, behind the interface of a task.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from model.network import NetworkConfig
from model.objective import RewardConfig
from model.types import Conditioning, LatentSize, Prompt, VisualConditioning
from tasks.clips import Clips, Glimpse
from tasks.data import DataConfig
from tasks.task import Reward, Shape, TaskContext, for_each, no_reward, repeated, spread
from utils.data.buckets import Size
from utils.data.prompts import PromptStream, load_prompts
from utils.data.stream import Stream
from utils.errors import ConfigError
from worlds.glyphs import Split
from worlds.toy import ToyBatch


class World(Protocol):
    """Real samples with captions, made on the fly. side: pixels of a frame's side. See ToyWorld."""

    latent_shape: tuple[int, ...]
    side: int
    captions: list[str]

    def parse(self, caption: str) -> object: ...

    def batch(self, indices: Sequence[int], split: Split) -> ToyBatch: ...

    def encode(self, pixels_BFCHW: Tensor) -> Tensor: ...

    def decode(self, latents_BFCHW: Tensor, *, clamp: bool = True) -> Tensor: ...

    def real_videos_for(self, captions: Sequence[str], seed: int, split: Split = "test") -> Tensor: ...

    def resized(self, frames: int, height: int) -> World:
        """The same world with so many frames, and latents of another height and width."""


class Judge(Protocol):
    """Measures a world's videos by means that never saw a generator. See ToyJudge."""

    @property
    def world(self) -> World: ...

    def evaluate(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Every measure of these videos, by name; the shares of what is right end in `_right`."""


@dataclass
class WorldData(DataConfig):
    """A world that is made on the fly. text_seed: of the tiny frozen text encoder."""

    text_seed: int = 0

    def text_identity(self) -> list[Any]:
        return [self.text_seed]


@dataclass
class SquareData(WorldData):
    """A world on a square canvas, whose section is the field that has the kind's name.

    called: the world, for messages.
    place: pixels a side of a latent place.
    """

    called: ClassVar[str]
    place: ClassVar[int]

    @property
    def world(self) -> Any:
        """The world's section, with its frames and its canvas."""
        return getattr(self, self.kind)

    @property
    def size(self) -> LatentSize:
        side = self.world.canvas // self.place
        return self.world.frames, side, side

    def text_identity(self) -> list[Any]:
        return [*super().text_identity(), self.world]

    def check_size(self, size: LatentSize, *, stored: bool, with_image: bool) -> None:
        frames, height, width = size
        if height != width:
            raise ValueError(f"{self.called} is square, not {height}x{width}: give one height and width")
        replace(self.world, frames=frames, canvas=self.place * height)

    def resized(self, height: int, width: int, network: NetworkConfig) -> SquareData:
        if height != width:
            raise ValueError(f"{self.called} is square")
        return replace(self, **{self.kind: replace(self.world, canvas=height)})


class WorldTask:
    """A world behind the interface of a task: all that it returns depends on positions, nothing on state."""

    def __init__(self, world: World, config: WorldData, context: TaskContext) -> None:
        student, device = context.student, context.device
        self.world, geometry = world, student.geometry()
        self.device = device
        self.latent_shape: tuple[int, ...] = self.world.latent_shape
        channels = self.latent_shape[1]
        if geometry.in_dim != channels or geometry.out_dim != channels:
            raise ConfigError(
                f"student: in_dim {geometry.in_dim} and out_dim {geometry.out_dim} do not fit data.kind {config.kind}: "
                f"set both to its {channels} latent channels in student.overrides"
            )
        self.may_use_data = config.real
        self.streams: Sequence[Stream] = ()
        self.has_first_frame = config.has_first_frame(geometry.first_frame, real=True) and config.real
        self.begins_real = config.real and bool(config.first_frame)  # samples too, and not only real videos
        self.negative_prompt = config.negative_prompt
        try:
            self.encode_prompts = student.family.toy_prompts(self.world.captions, geometry, config.text_seed, device)
            geometry.tokens_per_frame(*self.latent_shape[2:])
            self.library = load_prompts(config.prompts) if config.prompts else self.world.captions
            for prompt in self.library:
                self.world.parse(prompt)
            self.encode_prompts([self.negative_prompt])
        except (ValueError, OSError) as problem:
            raise ConfigError(f"data: {problem}") from None
        self.stream = PromptStream(len(self.library), context.seed)

    def contents(self) -> Mapping[str, Sequence[str]]:
        """What all ranks must have alike: see `Task`."""
        return {"data.prompts": self.library}

    def prompts(self, positions: range) -> list[str]:
        """Training prompts at these positions of the endless shuffled library.

        If samples begin with real first frames, the prompts are the captions of those videos.
        """
        if self.begins_real:
            return self.world.batch(positions, "train").captions
        return [self.library[i] for i in self.stream.indices(positions.start, len(positions))]

    def conditions(self, positions: range, shape: Shape | None = None) -> Conditioning:
        if self.begins_real:
            clips = self.real(positions, shape)
            return self.conditioning(clips.captions, clips.visual)
        return self.conditioning(self.prompts(positions))

    def real(self, positions: range, shape: Shape | None = None) -> Clips:
        """Real videos at these positions. Raises RuntimeError in a data-free run."""
        if not self.may_use_data:
            raise RuntimeError("a data-free run asked for real videos")
        frames, _, height, _ = shape or self.latent_shape
        batch = self.world.resized(frames, height).batch(positions, "train")
        latents = batch.latents_BFCHW.to(self.device)
        return Clips(
            latents,
            batch.captions,
            VisualConditioning(latents[:, :1]) if self.has_first_frame else VisualConditioning(),
        )

    def conditioning(self, prompts: Sequence[str], visual: VisualConditioning = VisualConditioning()) -> Conditioning:
        return visual.with_prompt(self.encode_prompts(prompts))

    def image_conditioning(self, prompts: Sequence[str], pixels: Tensor, frames: int | None = None) -> Conditioning:
        """Conditioning on the latents of the first frames [B or 1, T, C, h, w] in [0, 1]."""
        return self.conditioning(prompts, VisualConditioning(for_each(prompts, self.encode(pixels))))

    def negative(self, batch: int) -> Prompt:
        """The encoded negative prompt, for each of a batch."""
        return repeated(self.encode_prompts([self.negative_prompt]), batch)

    def load_text_encoder(self) -> None:
        """Does nothing: the encoder was made with the task."""

    def validation_prompts(self, count: int) -> list[str]:
        return spread(self.library, count)

    def check_captions(self, key: str, captions: Sequence[str]) -> None:
        try:
            for caption in sorted(set(captions)):  # the toy world has few
                self.encode_prompts([caption])
        except ValueError as problem:
            raise ConfigError(f"{key}: {problem}") from None

    def validation_visual(self, numbers: range, prompts: Sequence[str]) -> VisualConditioning:
        return (
            VisualConditioning(self.first_frames(prompts, numbers.start).to(self.device))
            if self.has_first_frame
            else VisualConditioning()
        )

    def first_frames(self, prompts: Sequence[str], seed: int) -> Tensor:
        """Latents [B, 1, C, H, W] of held-out videos of these prompts; seed picks the draws."""
        return self.world.real_videos_for(prompts, seed)[:, :1]

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, T, 3, h, w] in [0, 1]."""
        return self.world.decode(latents.float().cpu())

    def glimpse(self, latents: Tensor) -> Glimpse:
        return Glimpse.of(self.world.decode(latents.float().cpu(), clamp=False))

    def decoding(self) -> Callable[[Tensor], Tensor]:
        return self.decode  # frames know nothing of each other

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] of pixels [B, T, C, h, w] in [0, 1]."""
        return self.world.encode(pixels).to(self.device)

    def pixel_size(self, frames: int) -> Size:
        return Size(frames, self.world.side, self.world.side)

    def reencode(self, latents: Tensor) -> Tensor:
        """The last frame of latents [B, F, C, H, W], decoded and encoded again as an image: [B, 1, C, H, W]."""
        world = self.world.resized(latents.shape[1], latents.shape[3])
        return world.encode(self.decode(latents)[:, -1:]).to(self.device)

    def judge(self, cache: Path) -> Judge | None:
        """The world's judge, if it has one; what it has to learn first it keeps in `cache`."""
        return None

    def reward(self, config: RewardConfig | None) -> Reward | None:
        no_reward(config)
        return None
