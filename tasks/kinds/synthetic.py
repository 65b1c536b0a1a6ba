"""Random numbers of the sizes of a real run as a task: for benchmarks, smoke tests and plans.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.family import FirstFrame
from model.objective import RewardConfig
from model.types import Conditioning, LatentSize, Prompt, VisualConditioning
from tasks.clips import Clips, Glimpse
from tasks.data import DataConfig
from tasks.task import Shape, TaskContext, for_each, no_reward, repeated, spread
from utils.data.buckets import Size
from utils.data.prompts import PromptStream, load_prompts
from utils.data.stream import Stream
from utils.errors import ConfigError
from utils.random import Noise, keyed_seed
from worlds.synthetic import SyntheticConfig

CLIP_TOKENS = 257  # of ViT-H/14 at 224 pixels: 16 x 16 patches and the class


@dataclass
class SyntheticData(DataConfig):
    """Random numbers of a real geometry's sizes, for plans, benchmarks and smoke tests.

    synthetic: sizes.
    text_seed: of the text embeddings.
    """

    through_codec: ClassVar[bool] = True
    draws_images: ClassVar[bool] = True
    is_noise: ClassVar[bool] = True

    kind: str = "synthetic"
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    text_seed: int = 0

    @classmethod
    def from_other(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The sizes of kind wan: a smoke test of a recipe has its sizes."""
        sizes = values.get("wan")
        return {"synthetic": dict(sizes)} if isinstance(sizes, Mapping) else {}

    @classmethod
    def in_place_of(cls, data: DataConfig, size: LatentSize) -> SyntheticData:
        """Random numbers of this size in place of another kind's samples."""
        frames, height, width = size
        sizes = SyntheticConfig(frames, height, width)
        return cls(real=data.real, negative_prompt=data.negative_prompt, synthetic=sizes)

    @property
    def size(self) -> LatentSize:
        return self.synthetic.frames, self.synthetic.height, self.synthetic.width

    def text_identity(self) -> list[Any]:
        return [self.text_seed]

    def task(self, context: TaskContext) -> SyntheticTask:
        return SyntheticTask(self, context)


class SyntheticTask:
    """Random numbers of the sizes that the config gives, in place of a VAE, a text encoder and videos.

    A prompt's embedding is normal noise keyed by its text; it fills all of text_len, the most that a prompt can cost.
    Nothing can be learnt from it: it is for benchmarks, smoke tests and plans.
    """

    def __init__(self, config: SyntheticData, context: TaskContext) -> None:
        student, device, seed = context.student, context.device, context.seed
        sizes, self.device, self.seed = config.synthetic, device, seed
        geometry = self.geometry = student.geometry()
        self.streams: Sequence[Stream] = ()
        if geometry.in_dim != geometry.out_dim and geometry.first_frame is not FirstFrame.channels:
            raise ConfigError(f"student: in_dim {geometry.in_dim} and out_dim {geometry.out_dim} differ: make them one")
        self.latent_shape: tuple[int, ...] = (sizes.frames, geometry.out_dim, sizes.height, sizes.width)
        self.prompt_shapes = student.prompt_shapes
        self.text_seed = keyed_seed(config.text_seed, "synthetic text")
        self.may_use_data, self.negative_prompt = config.real, config.negative_prompt
        try:
            geometry.tokens_per_frame(sizes.height, sizes.width)
            numbered = [f"sample {i}" for i in range(sizes.prompts)]
            self.library = load_prompts(config.prompts) if config.prompts else numbered
        except (ValueError, OSError) as problem:
            raise ConfigError(f"data: {problem}") from None
        self.stream = PromptStream(len(self.library), seed)

    def contents(self) -> Mapping[str, Sequence[str]]:
        """What all ranks must have alike: see `Task`."""
        return {"data.prompts": self.library}

    def prompts(self, positions: range) -> list[str]:
        """Training prompts at these positions of the endless shuffled library."""
        return [self.library[i] for i in self.stream.indices(positions.start, len(positions))]

    def conditions(self, positions: range, shape: Shape | None = None) -> Conditioning:
        return self.conditioning(self.prompts(positions), self._visual(positions, shape))

    def real(self, positions: range, shape: Shape | None = None) -> Clips:
        """Latents [B, F, C, H, W] of noise at these positions. Raises RuntimeError in a data-free run."""
        if not self.may_use_data:
            raise RuntimeError("a data-free run asked for real videos")
        noise = Noise(keyed_seed(self.seed, "synthetic videos"), 0, positions, self.device)
        latents = noise.normal("latents", shape or self.latent_shape)
        return Clips(latents, self.prompts(positions), self._visual(positions, shape))

    def _visual(self, positions: range, shape: Shape | None = None) -> VisualConditioning:
        """Noise in place of an image's conditioning for an i2v network; nothing for other networks."""
        net = self.geometry
        if net.first_frame is not FirstFrame.channels:
            return VisualConditioning()
        noise = Noise(keyed_seed(self.seed, "synthetic images"), 0, positions, self.device)
        frames, _, *size = shape or self.latent_shape
        channels = noise.normal("channels", (frames, net.in_dim - net.out_dim, *size))
        image = None if net.image_dim is None else noise.normal("image", (CLIP_TOKENS, net.image_dim))
        return VisualConditioning(channels=channels, image=image)

    def conditioning(self, prompts: Sequence[str], visual: VisualConditioning = VisualConditioning()) -> Conditioning:
        keys = [keyed_seed(self.text_seed, prompt) for prompt in prompts]
        noise = Noise(self.text_seed, 0, keys, self.device)
        return visual.with_prompt({name: noise.normal(name, shape) for name, shape in self.prompt_shapes.items()})

    def image_conditioning(self, prompts: Sequence[str], pixels: Tensor, frames: int | None = None) -> Conditioning:
        """Conditioning on the latents of the first frames [B or 1, T, C, h, w] in [0, 1]."""
        return self.conditioning(prompts, VisualConditioning(for_each(prompts, self.encode(pixels))))

    def negative(self, batch: int) -> Prompt:
        """The encoded negative prompt, for each of a batch."""
        return repeated(self._negative, batch)

    @cached_property
    def _negative(self) -> Prompt:
        return self.conditioning([self.negative_prompt]).prompt

    def load_text_encoder(self) -> None:
        """Does nothing: embeddings are drawn, not encoded."""

    def validation_prompts(self, count: int) -> list[str]:
        return spread(self.library, count)

    def check_captions(self, key: str, captions: Sequence[str]) -> None:
        """Every text has an embedding."""

    def validation_visual(self, numbers: range, prompts: Sequence[str]) -> VisualConditioning:
        return self._visual(numbers)

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
