"""What a run generates: prompts, real latents, text embeddings, and the way from latents to pixels.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from configs.objective import RewardConfig
from configs.sections import DataConfig
from model.types import Conditioning, Given
from model.wan.config import WanConfig
from model.wan.text_encoder import toy_text_encoder
from utils.config import ConfigError
from utils.data.buckets import Size
from utils.data.glyphs import Split
from utils.data.prompts import PromptStream, load_prompts
from utils.data.stream import Stream
from utils.data.toy_world import ToyBatch, ToyWorld
from utils.metrics import clipped_share
from utils.random import Noise, keyed_seed
from utils.toy_judge import ToyJudge

if TYPE_CHECKING:
    from trainer.stored import Stored

Shape = tuple[int, ...]
Reward = Callable[[Tensor, Sequence[str]], Tensor]  # latents [B, F, C, H, W], prompts -> [B], higher is better

CLIP_TOKENS = 257  # of ViT-H/14 at 224 pixels: 16 x 16 patches and the class


@dataclass(frozen=True)
class Glimpse:
    """pixels: [B, t, 3, h, w] in [0, 1]. clipped: [B], the share of them that a clamp put there."""

    pixels: Tensor
    clipped: Tensor

    @classmethod
    def of(cls, pixels: Tensor) -> Glimpse:
        """Of pixels before their clamp."""
        return cls(pixels.clamp(0, 1), clipped_share(pixels))


@dataclass(frozen=True)
class Clips:
    """Real videos as latents [B, F, C, H, W], their captions, and what networks are given of them."""

    latents: Tensor
    captions: list[str]
    given: Given = Given()

    def start(self, frames: int, device: torch.device) -> Clips:
        """Their first frames, with the latents on `device`."""
        channels = self.given.channels if self.given.channels is None else self.given.channels[:, :frames]
        latents = self.latents[:, :frames].to(device)
        return replace(self, latents=latents, given=replace(self.given, channels=channels))


class Task(Protocol):
    """What trainers and generation ask of a task. All of it is a function of positions and prompts, none of state."""

    latent_shape: tuple[int, ...]  # (F, C, H, W)
    negative_prompt: str
    streams: Sequence[Stream]  # of files: where corrupt samples are counted

    def prompts(self, positions: range) -> list[str]: ...

    def conditions(self, positions: range, shape: Shape | None = None) -> Conditioning:
        """What training's samples at these positions are made from: a prompt and, where the run has them, an image.

        shape: (F, C, H, W) of the samples, null for `latent_shape`; here and in `real` one that the config allows.
        """

    def real(self, positions: range, shape: Shape | None = None) -> Clips:
        """Real videos at these positions: in any size the same content."""

    def conditioning(self, prompts: Sequence[str], initial: Tensor | None = None) -> Conditioning: ...

    def given(self, prompts: Sequence[str], pixels: Tensor, frames: int | None = None) -> Conditioning:
        """Conditioning on the first pixel frames of the videos too, as these networks take them.

        pixels: [B, T, 1 or 3, h, w] in [0, 1], or [1, ...] that all videos start with. frames: latent frames of the
        videos; null is `latent_shape`'s. Raises ValueError for pixels of another size.
        """

    def negative(self, batch: int) -> Tensor: ...

    def load_text_encoder(self) -> None:
        """Now, and not at the first prompt that needs it; nothing where prompts need none. Raises UserError."""

    def validation_prompts(self, count: int) -> list[str]: ...

    def validation_given(self, numbers: range, prompts: Sequence[str]) -> Given:
        """What validation's videos of these numbers are given beside their prompts."""

    def check_captions(self, stored: Stored) -> None:
        """Raises ConfigError where a stored sample's caption has no embedding, as far as that is known beforehand."""

    def decode(self, latents: Tensor) -> Tensor: ...

    def glimpse(self, latents: Tensor) -> Glimpse | None:
        """How samples look, by what can be decoded in passing; None where nothing can."""

    def decoding(self) -> Callable[[Tensor], Tensor]:
        """A new stream: blocks of latents in, in order, their pixels out; together what `decode` makes of the whole."""

    def encode(self, pixels: Tensor) -> Tensor: ...

    def pixel_size(self, frames: int) -> Size:
        """Pixel frames, height and width of so many latent frames."""

    def reencode(self, latents: Tensor) -> Tensor: ...

    def reward(self, config: RewardConfig | None) -> Reward | None:
        """What the config names, of a sample's latents [B, F, C, H, W] and prompts: [B], higher is better. Raises
        ConfigError for a reward that this task does not have."""


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


class WorldTask:
    """A world behind the interface of a real task: everything by position, nothing by state."""

    def __init__(self, world: World, config: DataConfig, geometry: WanConfig, seed: int, device: torch.device) -> None:
        self.world = world
        self.device = device
        self.latent_shape: tuple[int, ...] = self.world.latent_shape
        channels = self.latent_shape[1]
        if geometry.in_dim != channels or geometry.out_dim != channels:
            raise ConfigError(
                f"student: in_dim {geometry.in_dim} and out_dim {geometry.out_dim} do not fit data.kind {config.kind}: "
                f"set both to its {channels} latent channels in student.overrides"
            )
        self.encoder = toy_text_encoder(self.world.captions, geometry.text_len, geometry.text_dim, config.text_seed)
        self.encoder.to(device)
        self.may_use_data = config.real
        self.streams: Sequence[Stream] = ()
        self.gives_frame = config.gives_frame(geometry.model_type, real=True) and config.real
        self.begins_real = config.real and bool(config.first_frame)  # samples too, and not only real videos
        self.negative_prompt = config.negative_prompt
        try:
            geometry.tokens_per_frame(*self.latent_shape[2:])
            self.library = load_prompts(config.prompts) if config.prompts else self.world.captions
            for prompt in self.library:
                self.world.parse(prompt)
            self.encoder.encode([self.negative_prompt])
        except (ValueError, OSError) as problem:
            raise ConfigError(f"data: {problem}") from None
        self.stream = PromptStream(len(self.library), seed)

    def prompts(self, positions: range) -> list[str]:
        """Training prompts at these positions of the endless shuffled library, or those of the videos whose first
        frame is given."""
        if self.begins_real:
            return self.world.batch(positions, "train").captions
        return [self.library[i] for i in self.stream.indices(positions.start, len(positions))]

    def conditions(self, positions: range, shape: Shape | None = None) -> Conditioning:
        if self.begins_real:
            clips = self.real(positions, shape)
            return clips.given.with_text(self.conditioning(clips.captions).text)
        return self.conditioning(self.prompts(positions))

    def real(self, positions: range, shape: Shape | None = None) -> Clips:
        """Real videos at these positions. RuntimeError in a data-free run."""
        if not self.may_use_data:
            raise RuntimeError("a data-free run asked for real videos")
        frames, _, height, _ = shape or self.latent_shape
        batch = self.world.resized(frames, height).batch(positions, "train")
        latents = batch.latents_BFCHW.to(self.device)
        return Clips(latents, batch.captions, Given(latents[:, :1]) if self.gives_frame else Given())

    def conditioning(self, prompts: Sequence[str], initial: Tensor | None = None) -> Conditioning:
        return Conditioning(self.encoder.encode(prompts).to(self.device), initial)

    def given(self, prompts: Sequence[str], pixels: Tensor, frames: int | None = None) -> Conditioning:
        """Conditioning on the latents of the first frames [B or 1, T, C, h, w] in [0, 1]."""
        return self.conditioning(prompts, for_each(prompts, self.encode(pixels)))

    def negative(self, batch: int) -> Tensor:
        """The negative prompt's embedding [B, L, D]."""
        return self.encoder.encode([self.negative_prompt]).to(self.device).expand(batch, -1, -1)

    def load_text_encoder(self) -> None:
        """It is here."""

    def validation_prompts(self, count: int) -> list[str]:
        return spread(self.library, count)

    def check_captions(self, stored: Stored) -> None:
        try:
            for caption in sorted(set(stored.captions)):  # the toy world has few
                self.encoder.encode([caption])
        except ValueError as problem:
            raise ConfigError(f"{stored.key}: {problem}") from None

    def validation_given(self, numbers: range, prompts: Sequence[str]) -> Given:
        return Given(self.first_frames(prompts, numbers.start).to(self.device)) if self.gives_frame else Given()

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

    def reward(self, config: RewardConfig | None) -> Reward | None:
        no_reward(config)
        return None


class ToyTask(WorldTask):
    """The toy world."""

    world: ToyWorld

    def __init__(self, config: DataConfig, geometry: WanConfig, seed: int, device: torch.device) -> None:
        super().__init__(ToyWorld(config.toy), config, geometry, seed, device)

    def reward(self, config: RewardConfig | None) -> Reward | None:
        """'prompt_adherence': the judge's. It is trained at first use, and kept."""
        if config is None:
            return None
        if config.name != "prompt_adherence":
            raise ConfigError(f"objective.reward.name '{config.name}' is unknown: the toy world has prompt_adherence")
        return ToyJudge(self.world, Path("logs/cache")).adherence


def no_reward(config: RewardConfig | None) -> None:
    """Of a task without rewards. Raises ConfigError."""
    if config is not None:
        raise ConfigError(f"objective.reward.name '{config.name}': this data has no rewards: choose data.kind toy")


class SyntheticTask:
    """Random numbers of the sizes that the config gives, in place of a VAE, a text encoder and videos.

    A prompt's embedding is normal noise keyed by its text; it fills all of text_len, the most that a prompt can cost.
    Nothing can be learnt from it: it is for benchmarks, smoke tests and plans.
    """

    def __init__(self, config: DataConfig, geometry: WanConfig, seed: int, device: torch.device) -> None:
        sizes, self.device, self.seed, self.geometry = config.synthetic, device, seed, geometry
        self.streams: Sequence[Stream] = ()
        if geometry.in_dim != geometry.out_dim and geometry.model_type != "i2v":
            raise ConfigError(f"student: in_dim {geometry.in_dim} and out_dim {geometry.out_dim} differ: make them one")
        self.latent_shape: tuple[int, ...] = (sizes.frames, geometry.out_dim, sizes.height, sizes.width)
        self.text_shape = (geometry.text_len, geometry.text_dim)
        self.text_seed = keyed_seed(config.text_seed, "synthetic text")
        self.may_use_data, self.negative_prompt = config.real, config.negative_prompt
        try:
            geometry.tokens_per_frame(sizes.height, sizes.width)
            numbered = [f"sample {i}" for i in range(sizes.prompts)]
            self.library = load_prompts(config.prompts) if config.prompts else numbered
        except (ValueError, OSError) as problem:
            raise ConfigError(f"data: {problem}") from None
        self.stream = PromptStream(len(self.library), seed)

    def prompts(self, positions: range) -> list[str]:
        """Training prompts at these positions of the endless shuffled library."""
        return [self.library[i] for i in self.stream.indices(positions.start, len(positions))]

    def conditions(self, positions: range, shape: Shape | None = None) -> Conditioning:
        return self._given(positions, shape).with_text(self.conditioning(self.prompts(positions)).text)

    def real(self, positions: range, shape: Shape | None = None) -> Clips:
        """Latents [B, F, C, H, W] of noise at these positions. RuntimeError in a data-free run."""
        if not self.may_use_data:
            raise RuntimeError("a data-free run asked for real videos")
        noise = Noise(keyed_seed(self.seed, "synthetic videos"), 0, positions, self.device)
        latents = noise.normal("latents", shape or self.latent_shape)
        return Clips(latents, self.prompts(positions), self._given(positions, shape))

    def _given(self, positions: range, shape: Shape | None = None) -> Given:
        """Noise in place of what an i2v network sees of an image; the others see none."""
        net = self.geometry
        if net.model_type != "i2v":
            return Given()
        noise = Noise(keyed_seed(self.seed, "synthetic images"), 0, positions, self.device)
        frames, _, *size = shape or self.latent_shape
        channels = noise.normal("channels", (frames, net.in_dim - net.out_dim, *size))
        image = None if net.image_dim is None else noise.normal("image", (CLIP_TOKENS, net.image_dim))
        return Given(channels=channels, image=image)

    def conditioning(self, prompts: Sequence[str], initial: Tensor | None = None) -> Conditioning:
        keys = [keyed_seed(self.text_seed, prompt) for prompt in prompts]
        return Conditioning(Noise(self.text_seed, 0, keys, self.device).normal("text", self.text_shape), initial)

    def given(self, prompts: Sequence[str], pixels: Tensor, frames: int | None = None) -> Conditioning:
        """Conditioning on the latents of the first frames [B or 1, T, C, h, w] in [0, 1]."""
        return self.conditioning(prompts, for_each(prompts, self.encode(pixels)))

    def negative(self, batch: int) -> Tensor:
        """The negative prompt's embedding [B, L, D]."""
        return self.conditioning([self.negative_prompt]).text.expand(batch, -1, -1)

    def load_text_encoder(self) -> None:
        """It is here."""

    def validation_prompts(self, count: int) -> list[str]:
        return spread(self.library, count)

    def check_captions(self, stored: Stored) -> None:
        """Every text has an embedding."""

    def validation_given(self, numbers: range, prompts: Sequence[str]) -> Given:
        return self._given(numbers)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, F, 3, H, W] in [0, 1]: the first three channels (the last one again where there are fewer)."""
        return self._pixels(latents).clamp(0, 1)

    def _pixels(self, latents: Tensor) -> Tensor:
        last = latents.shape[2] - 1
        return latents[:, :, [0, min(1, last), min(2, last)]].float() / 4 + 0.5

    def glimpse(self, latents: Tensor) -> Glimpse:
        return Glimpse.of(self._pixels(latents))

    def decoding(self) -> Callable[[Tensor], Tensor]:
        return self.decode  # frames know nothing of each other

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] of pixels [B, F, 1 or 3, H, W] in [0, 1]: `decode` undone, other channels zero."""
        height, width = self.latent_shape[2:]
        if pixels.shape[2] not in (1, 3) or tuple(pixels.shape[3:]) != (height, width):
            raise ValueError(
                f"synthetic data: pixels must be [B, F, 1 or 3, {height}, {width}], got {list(pixels.shape)}"
            )
        return self._latents(pixels)

    def _latents(self, pixels: Tensor) -> Tensor:
        channels = self.latent_shape[1]
        latents = torch.zeros(*pixels.shape[:2], channels, *pixels.shape[3:], device=self.device)
        shown = min(3, channels)
        latents[:, :, :shown] = (pixels.to(self.device)[:, :, :shown] - 0.5) * 4
        return latents

    def pixel_size(self, frames: int) -> Size:
        return Size(frames, *self.latent_shape[2:])

    def reencode(self, latents: Tensor) -> Tensor:
        """The last frame of latents [B, F, C, H, W], decoded and encoded again as an image: [B, 1, C, H, W]."""
        return self._latents(self.decode(latents[:, -1:]))

    def reward(self, config: RewardConfig | None) -> None:
        return no_reward(config)


def for_each(prompts: Sequence[str], one_or_each: Tensor) -> Tensor:
    """[B, ...], of what is there for each prompt or [1, ...] for all. Raises ValueError for another number."""
    if one_or_each.shape[0] not in (1, len(prompts)):
        raise ValueError(f"{len(prompts)} prompts and {one_or_each.shape[0]} images: give one for all, or one for each")
    return one_or_each.expand(len(prompts), *one_or_each.shape[1:])


def spread(library: Sequence[str], count: int) -> list[str]:
    """`count` prompts at even distances over the library, from its start again where it has fewer."""
    return [library[(i * len(library)) // count % len(library)] for i in range(count)]
