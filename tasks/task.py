"""What a run generates: prompts, real latents, text embeddings, and the way from latents to pixels.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.network import NetworkConfig
from model.objective import RewardConfig
from model.types import Conditioning, LatentSize, Prompt, VisualConditioning
from tasks.clips import Clips, Glimpse
from utils.data.buckets import Size
from utils.data.stream import Stream
from utils.errors import ConfigError

Shape = tuple[int, ...]
Reward = Callable[[Tensor, Sequence[str]], Tensor]  # latents [B, F, C, H, W], prompts -> [B], higher is better


@dataclass(frozen=True)
class TaskContext:
    """What of a run a task must know beside its data.

    student: the network that sees the samples.
    seed: of the order of prompts and samples.
    device: where tensors go.
    sizes: of the real videos that the run draws, None for the data's own alone.
    """

    student: NetworkConfig
    seed: int
    device: torch.device
    sizes: Sequence[LatentSize] | None = None


class Task(Protocol):
    """What trainers and generation ask of a task. All of it is a function of positions and prompts, none of state."""

    latent_shape: tuple[int, ...]  # (F, C, H, W)
    negative_prompt: str
    library: list[str]  # prompts to train on; empty where stored samples bring them
    streams: Sequence[Stream]  # of files: where corrupt samples are counted

    def contents(self) -> Mapping[str, Sequence[str]]:
        """What all ranks must have alike, by the option that names it: prompts, samples by shape and caption. What
        follows a NUL byte is compared, and not shown. No tensors are read."""

    def prompts(self, positions: range) -> list[str]: ...

    def conditions(self, positions: range, shape: Shape | None = None) -> Conditioning:
        """What training's samples at these positions are made from: a prompt and, if the run has images, an image.

        shape: (F, C, H, W) of the samples, one that the config allows, as in `real`; None is `latent_shape`.
        """

    def real(self, positions: range, shape: Shape | None = None) -> Clips:
        """Real videos at these positions; another shape shows the same content in another size."""

    def conditioning(self, prompts: Sequence[str], visual: VisualConditioning = VisualConditioning()) -> Conditioning:
        """Conditioning on these prompts, and on what the videos are given beside them."""

    def image_conditioning(self, prompts: Sequence[str], pixels: Tensor, frames: int | None = None) -> Conditioning:
        """Conditioning on prompts and on the first pixel frames of the videos, as these networks take them.

        pixels: [B, T, 1 or 3, h, w] in [0, 1], or [1, ...] that all videos start with.
        frames: latent frames of the videos; None is `latent_shape`'s.

        Raises ValueError for pixels of another size.
        """

    def negative(self, batch: int) -> Prompt:
        """The encoded negative prompt, for each of a batch."""

    def load_text_encoder(self) -> None:
        """Loads the text encoder, if there is one, before the first prompt needs it. Raises UserError."""

    def validation_prompts(self, count: int) -> list[str]: ...

    def validation_visual(self, numbers: range, prompts: Sequence[str]) -> VisualConditioning:
        """Visual conditioning of validation's videos of these numbers."""

    def check_captions(self, key: str, captions: Sequence[str]) -> None:
        """Raises ConfigError for a caption that is known to have no embedding. key: of the config, which needs them."""

    def decode(self, latents: Tensor) -> Tensor: ...

    def glimpse(self, latents: Tensor) -> Glimpse | None:
        """How samples look, decoded in part; None if this task cannot decode."""

    def decoding(self) -> Callable[[Tensor], Tensor]:
        """A new decoder of a stream: it takes blocks of latents in order and returns their pixels.

        All blocks together give the pixels that `decode` makes of the whole.
        """

    def encode(self, pixels: Tensor) -> Tensor: ...

    def pixel_size(self, frames: int) -> Size:
        """Pixel frames, height and width of so many latent frames."""

    def reencode(self, latents: Tensor) -> Tensor: ...

    def reward(self, config: RewardConfig | None) -> Reward | None:
        """The reward that the config names. Raises ConfigError for a reward that this task does not have."""


def no_reward(config: RewardConfig | None) -> None:
    """For a task without rewards: raises ConfigError if the config names one."""
    if config is not None:
        raise ConfigError(f"objective.reward.name '{config.name}': this data has no rewards: choose data.kind toy")


def repeated(prompt: Prompt, batch: int) -> Prompt:
    """One encoded prompt for each of a batch."""
    return {name: value.expand(batch, *value.shape[1:]) for name, value in prompt.items()}


def for_each(prompts: Sequence[str], one_or_each: Tensor) -> Tensor:
    """[B, ...], from a row for each prompt or [1, ...] for all. Raises ValueError for another number of rows."""
    if one_or_each.shape[0] not in (1, len(prompts)):
        raise ValueError(f"{len(prompts)} prompts and {one_or_each.shape[0]} images: give one for all, or one for each")
    return one_or_each.expand(len(prompts), *one_or_each.shape[1:])


def spread(library: Sequence[str], count: int) -> list[str]:
    """`count` prompts at even distances over the library, from its start again where it has fewer."""
    return [library[(i * len(library)) // count % len(library)] for i in range(count)]
