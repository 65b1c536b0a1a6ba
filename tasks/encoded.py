"""Prompts through a text encoder, pixels through the codec of the networks' family, behind the interface of a task.

B batch  F latent frames  C channels  H W latent size  T pixel frames  h w pixel size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from configs.sections import DataConfig
from model.codec import Codec, Codecs, ImageEncoder, VAEConfig
from model.family import FirstFrame, Geometry
from model.network import NetworkConfig
from model.objective import RewardConfig
from model.text_encoder import DTYPES
from model.types import Conditioning, Prompt, VisualConditioning
from tasks.clips import Clips, Glimpse
from tasks.first_frames import visual_reader
from tasks.stored import Stored, StoredImages, StoredLatents
from tasks.task import Shape, for_each, no_reward, repeated, spread
from tasks.text import TextEmbeddings, warn_once
from utils.data.buckets import Size
from utils.data.prompts import PromptStream, load_prompts
from utils.data.stream import Stream
from utils.data.tensors import Statistics
from utils.errors import ConfigError, UserError


class EncodedTask:
    """Prompts, encoded text and pixels, and real videos as stored latents (data.kind wan).

    The VAE is loaded when it is first needed.

    config: the run's data section.
    student: the network that sees the latents and embeddings; its family has the codec.
    seed: of the order of prompts and stored samples.
    device: where tensors and encoders go.
    library: the prompts of a config that names no file of prompts; empty for a task that only generates.
    sizes: (F, H, W) of the real videos that the run draws, None for its own size alone.

    Raises ConfigError, one line, for a part of `data` that is absent or does not fit the networks.
    """

    def __init__(
        self,
        config: DataConfig,
        student: NetworkConfig,
        seed: int,
        device: torch.device,
        library: Sequence[str] | None = None,
        sizes: Sequence[tuple[int, int, int]] | None = None,
    ) -> None:
        self.device, self.vae_config, clip = device, config.vae, config.wan
        geometry = student.geometry()
        self.geometry, self.image_encoder_path = geometry, config.image_encoder
        self.latent_shape: tuple[int, ...] = (clip.frames, geometry.out_dim, clip.height, clip.width)
        self.negative_prompt = config.negative_prompt
        try:
            self.codecs = student.codecs
            geometry.tokens_per_frame(clip.height, clip.width)
            if config.prompts is None and config.images is None and library is None:
                raise ValueError("prompts is null: kind wan needs a file of prompts, or images")
            self.library = list(library or []) if config.prompts is None else load_prompts(config.prompts)
            self.text = TextEmbeddings(config.text, student, device)
            self.text.check([*self.library, self.negative_prompt])
            if config.vae.path is not None:
                _check_channels(
                    config.vae, self.codecs.channels(config.vae), geometry.out_dim
                )  # now and not hours later
            if config.image_encoder is not None:
                self.codecs.check_image_encoder(config.image_encoder)
        except (ValueError, OSError, UserError) as problem:
            raise ConfigError(f"data: {problem}") from None
        self.stream = PromptStream(max(len(self.library), 1), seed)
        statistics, frames = statistics_of(self.codecs, config.vae), clip.frames
        if sizes is not None and geometry.first_frame is FirstFrame.channels:
            sizes = [*sizes, (clip.frames, clip.height, clip.width)]  # validation shows first frames of its own size
        self.videos: StoredLatents | None = None
        if config.latents is not None and config.real:
            visual_of = visual_reader(config, student, frames, device, real=True)
            self.videos = StoredLatents(
                "data.latents",
                Path(config.latents),
                self.latent_shape,
                seed,
                sizes=sizes,
                statistics=statistics,
                visual_of=visual_of,
            )
        self.images: StoredImages | None = None
        if config.images is not None:
            visual_of = visual_reader(config, student, frames, device, real=False)
            self.images = StoredImages(
                "data.images", Path(config.images), self.latent_shape, seed, statistics=statistics, visual_of=visual_of
            )
        folders = [stored for stored in (self.videos, self.images) if stored is not None]
        self.streams: Sequence[Stream] = [stream for stored in folders for stream in stored.streams]
        self._check_first(geometry)

    def _check_first(self, geometry: Geometry) -> None:
        """Files that lack what the network needs, and captions that have no embedding, are refused now."""
        try:
            if self.images is not None:
                self.images.read(range(1))
                self.check_captions(self.images)
            if self.videos is not None:
                if geometry.first_frame is FirstFrame.channels:
                    self.videos.read(range(1))
                self.check_captions(self.videos)
        except UserError as problem:
            raise ConfigError(str(problem)) from None

    @cached_property
    def vae(self) -> Codec:
        """The VAE. Raises UserError for one that is damaged or does not fit the networks."""
        return fitting_vae(self.codecs, self.vae_config, self.latent_shape[1], self.device)

    @cached_property
    def image_encoder(self) -> ImageEncoder:
        """CLIP. Raises UserError for one that is absent, damaged or does not fit the networks."""
        path, width = self.image_encoder_path, self.geometry.image_dim
        try:
            if path is None:
                raise ValueError(
                    "image_encoder is null: these networks see CLIP's tokens: give a pipeline's folder (inference.py: "
                    "--image_encoder)"
                )
            encoder = self.codecs.load_image_encoder(path, DTYPES[self.vae_config.dtype], self.device)
            if encoder.width != width:
                raise ValueError(f"image_encoder: {path} has width {encoder.width}, the networks take {width}")
            return encoder
        except (ValueError, OSError) as problem:
            raise UserError(f"data.{problem}") from None

    def prompts(self, positions: range) -> list[str]:
        """Training prompts at these positions of the endless shuffled library, or of the shuffled images."""
        if self.images is not None:
            return self.images.planned(positions)
        return [self.library[i] for i in self.stream.indices(positions.start, len(positions))]

    def conditions(self, positions: range, shape: Shape | None = None) -> Conditioning:
        """What samples at these positions are made from. Raises UserError."""
        if self.images is None:
            return self.conditioning(self.prompts(positions))
        captions, visual = self.images.read(positions)
        return visual.with_prompt(self._embed(captions)).frames(0, (shape or self.latent_shape)[0])

    def real(self, positions: range, shape: Shape | None = None) -> Clips:
        """Stored videos at these positions. Raises UserError.

        A shape of fewer frames gives the beginnings of the videos: no latent frame depends on later ones.
        """
        if self.videos is None:
            raise UserError("data.latents is null: this run needs real videos: give a folder of preprocess.py video")
        clips = self.videos.read(positions, shape)
        return clips.start((shape or self.latent_shape)[0], self.device)

    def conditioning(self, prompts: Sequence[str], visual: VisualConditioning = VisualConditioning()) -> Conditioning:
        """Conditioning on these prompts. Raises UserError for a prompt without an embedding."""
        return visual.with_prompt(self._embed(prompts))

    def _embed(self, prompts: Sequence[str]) -> Prompt:
        try:
            return {"text": self.text.encode(prompts)}
        except (ValueError, OSError) as problem:
            raise UserError(f"data: {problem}") from None

    def load_text_encoder(self) -> None:
        """Loads UMT5 now, if the config names it. Raises UserError.

        If UMT5 cannot be loaded but there is a cache, it warns that only the cache's prompts can be used.
        """
        try:
            if self.text.config.encoder is not None:
                self.text.encoder  # noqa: B018  (loaded by being asked for)
        except (ValueError, OSError) as problem:
            if self.text.cache is None:
                raise UserError(f"data: {problem}") from None
            warn_once(f"data.text: only prompts of {self.text.config.cache} can be used: {problem}")

    def check_captions(self, stored: Stored) -> None:
        """Raises ConfigError if there is no encoder and the cache lacks a stored caption."""
        if not self.text.from_cache_alone:
            return
        try:
            self.text.check(stored.captions)
        except UserError as problem:
            raise ConfigError(str(problem)) from None
        except ValueError as problem:
            raise ConfigError(f"{stored.key}: {problem}") from None

    @torch.no_grad()
    def image_conditioning(self, prompts: Sequence[str], pixels: Tensor, frames: int | None = None) -> Conditioning:
        """Conditioning on the first pixel frames [B or 1, T, 3, h, w] in [0, 1] of videos of `frames` latent frames.

        Networks of model_type i2v get channels and, if they take them, CLIP's tokens of the first pixel frame. Other
        networks get latents.

        Raises ValueError for another size, or more frames than the videos have.
        """
        if self.geometry.first_frame is not FirstFrame.channels:
            return self.conditioning(prompts, VisualConditioning(for_each(prompts, self.encode(pixels))))
        self._check_size(pixels)
        seen = pixels.expand(-1, -1, 3, -1, -1)
        channels = self.codecs.image_channels(self.vae, seen, frames or self.latent_shape[0])
        image = None if self.geometry.image_dim is None else self.image_encoder.encode(seen[:, 0])
        return replace(
            self.conditioning(prompts),
            channels=for_each(prompts, channels),
            image=None if image is None else for_each(prompts, image),
        )

    def negative(self, batch: int) -> Prompt:
        """The encoded negative prompt, for each of a batch; it is encoded once."""
        return repeated(self._negative, batch)

    @cached_property
    def _negative(self) -> Prompt:
        return self._embed([self.negative_prompt])

    def validation_prompts(self, count: int) -> list[str]:
        """Prompts of the library, or the captions of what `validation_visual` shows. Raises UserError."""
        if self.images is not None:
            return (self.images.captions * count)[:count]
        if not self.library and self.videos is not None:
            return self.videos.read(range(count)).captions
        if not self.library:
            raise UserError("data.prompts is null, or not there any more: give a file of prompts")
        return spread(self.library, count)

    def validation_visual(self, numbers: range, prompts: Sequence[str]) -> VisualConditioning:
        """Visual conditioning by the images of these numbers, or by the real videos. Raises UserError."""
        if self.images is not None:
            return self.images.numbered(numbers)
        return VisualConditioning() if self.videos is None else self.videos.read(numbers).visual

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, T, 3, h, w] in [0, 1], T = 4 (F - 1) + 1, decoded one video at a time to save memory."""
        return torch.cat([self.vae.decode(latent) for latent in latents.split(1)])

    def glimpse(self, latents: Tensor) -> Glimpse | None:
        """The last latent frame, where drift shows most, decoded as an image; None without a VAE.

        The decoder clamps its pixels, so pixels at 0 or 1 count as clipped.
        """
        if self.vae_config.path is None:
            return None
        pixels = self.decode(latents[:, -1:])
        at_limits = (pixels <= 0) | (pixels >= 1)
        return Glimpse(pixels, at_limits.float().mean(dim=(1, 2, 3, 4)))

    def decoding(self) -> Callable[[Tensor], Tensor]:
        return torch.no_grad()(self.vae.decoding())

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] of pixels [B, T, 1 or 3, h, w] in [0, 1]. Raises ValueError for another size."""
        self._check_size(pixels)
        return self.vae.encode(pixels.expand(-1, -1, 3, -1, -1))

    def pixel_size(self, frames: int) -> Size:
        height, width = (self.vae.spatial * size for size in self.latent_shape[2:])
        return Size(self.codecs.time_stride * (frames - 1) + 1, height, width)

    def _check_size(self, pixels: Tensor) -> None:
        size = self.pixel_size(1)
        if pixels.shape[2] not in (1, 3) or tuple(pixels.shape[3:]) != (size.height, size.width):
            raise ValueError(
                f"vae: pixels are {list(pixels.shape[2:])}, this run's are [3, {size.height}, {size.width}] "
                "(channels, height, width): resize them"
            )

    def reward(self, config: RewardConfig | None) -> None:
        return no_reward(config)

    @torch.no_grad()
    def reencode(self, latents: Tensor) -> Tensor:
        """The last frame of latents [B, F, C, H, W], decoded and encoded again as an image: [B, 1, C, H, W]."""
        decode = self.vae.decoding()
        for latent in latents.split(1, dim=1):
            last = decode(latent)[:, -1:]
        return self.vae.encode(last)


def statistics_of(codecs: Codecs, config: VAEConfig) -> Statistics | None:
    """Mean and deviation of the raw latents of a config's VAE, for files that hold those; None without a VAE."""
    if config.path is None:
        return None
    return Statistics(*codecs.statistics(config.path))


def fitting_vae(codecs: Codecs, config: VAEConfig, channels: int, device: torch.device) -> Codec:
    """The VAE of a config, for networks of so many latent channels. Raises UserError."""
    try:
        vae = codecs.load(config, device)
        _check_channels(config, vae.channels, channels)
        return vae
    except (ValueError, OSError) as problem:
        raise UserError(f"data.{problem}") from None


def _check_channels(config: VAEConfig, found: int, channels: int) -> None:
    if found != channels:
        raise ValueError(f"vae: {config.path} has {found} channels, the networks {channels}: give theirs")
