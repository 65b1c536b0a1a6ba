"""Prompts through a text encoder, pixels through the codec of the networks' family, behind the interface of a task.

B batch  F latent frames  C channels  H W latent size  T pixel frames  h w pixel size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.codec import ClipConfig, Codec, ImageEncoder, VAEConfig
from model.family import FirstFrame, Geometry
from model.network import NetworkConfig
from model.objective import RewardConfig
from model.text_encoder import TextConfig
from model.types import Conditioning, LatentSize, Prompt, VisualConditioning
from tasks.clips import Clips, Glimpse
from tasks.data import DataConfig, TextSource, if_present
from tasks.first_frames import visual_reader
from tasks.fitting import check_channels, fitting_vae, statistics_of
from tasks.stored import StoredImages, StoredLatents
from tasks.task import Shape, TaskContext, for_each, no_reward, repeated, spread
from tasks.text import TextEmbeddings, encoder_hash, prompt_encoder, warn_once
from utils.data.buckets import Size
from utils.data.prompts import PromptStream, load_prompts
from utils.data.stream import Stream
from utils.data.tensors import Statistics
from utils.errors import ConfigError, UserError


@dataclass
class EncodedData(DataConfig):
    """A real model's text encoder and codec.

    wan: sizes of the latents.
    text: where text embeddings come from.
    vae: what decodes and encodes pixels.
    image_encoder: a pipeline's folder or Hub name with CLIP, for networks with an image_dim.
    latents: real videos, as a folder of `preprocess.py video`, of FastVideo's parquet files, or of Self-Forcing's LMDB.
    images: a folder of `preprocess.py images`, whose captions are the prompts: each video is made from an image and its
        caption.
    """

    through_codec: ClassVar[bool] = True
    suite: ClassVar[str | None] = "vbench"

    kind: str = "wan"
    wan: ClipConfig = field(default_factory=ClipConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    image_encoder: str | None = None
    latents: str | None = None
    images: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None and self.prompts is not None:
            raise ValueError("images and prompts are both given, and images have captions of their own: set one null")
        if self.images is not None and self.first_frame is False:
            raise ValueError("first_frame is false, but images give the first frame: set one of them null")

    @classmethod
    def from_other(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The sizes of kind synthetic."""
        sizes = values.get("synthetic")
        keys = ("frames", "height", "width")
        return {"wan": {key: sizes[key] for key in keys if key in sizes}} if isinstance(sizes, Mapping) else {}

    @property
    def size(self) -> LatentSize:
        return self.wan.frames, self.wan.height, self.wan.width

    def fps(self, network: NetworkConfig) -> int:
        return network.codecs.fps(network.geometry().out_dim)

    def task(self, context: TaskContext) -> EncodedTask:
        return EncodedTask(self, context)

    def task_to_sample(self, context: TaskContext) -> EncodedTask:
        text = self.text if self.text.encoder is None else replace(self.text, cache=if_present(self.text.cache))
        data = replace(
            self,
            latents=if_present(self.latents),
            images=if_present(self.images),
            prompts=if_present(self.prompts),
            text=text,
        )
        return EncodedTask(data, context, library=[])

    def text_source(self, context: TaskContext) -> TextSource:
        """The text encoder. Raises UserError for one that is absent."""
        encoder = prompt_encoder(self.text, context.student, context.device)
        if self.text.encoder is None:
            raise UserError(f"data.text.encoder is null: give the folder of {encoder.what}, as data.text.encoder=DIR")
        try:
            identity = encoder_hash(encoder)
        except (ValueError, OSError) as problem:
            raise UserError(f"data.text.encoder: {problem}") from None

        embeddings = TextEmbeddings(replace(self.text, cache=None), context.student, context.device)
        return TextSource(identity, embeddings.encode, embeddings.shapes, encoder.made_with())

    def check_use(self, needs: str | None, *, validates: bool) -> None:
        super().check_use(needs, validates=validates)
        if needs and self.latents is None:
            raise ValueError(
                f"data.latents is null, but {needs} needs real videos: give a folder of preprocess.py video"
            )
        if self.vae.path is None and validates:
            raise ValueError("data.vae.path is null: give the VAE's folder, or set validation.every to null")

    def check_first_frames(self, network: FirstFrame, model_type: str) -> None:
        if self.images is None:
            raise ValueError(
                "data.images is null, but networks are to be given a first frame: name a folder of preprocess.py "
                "images or videos, and set data.prompts null"
                + ("" if network is FirstFrame.channels else ", or set data.first_frame to false")
            )

    def check_size(self, size: LatentSize, *, stored: bool, with_image: bool) -> None:
        """Images have one size, and are seen by videos of any length. Videos are grouped by size, and may be cut."""
        frames, height, width = size
        videos, images = stored and self.latents is not None, self.images is not None
        if images and (height, width) != self.size[1:]:
            raise ValueError(
                f"{height}x{width} is not the {self.wan.height}x{self.wan.width} of data.wan, in which data.images "
                "was stored: vary frames alone"
            )
        if (videos or (images and with_image)) and frames > self.frames:
            key = "data.latents" if videos else "data.images"
            raise ValueError(f"{frames} frames of {key}, which gives {self.frames} (data.wan.frames): choose fewer")

    def resized(self, height: int, width: int, network: NetworkConfig) -> EncodedData:
        if self.vae.path is None:
            raise ValueError("data.vae.path is null, and only a VAE tells how large a latent is: give it")
        side = network.codecs.spatial(self.vae.path)
        if height % side or width % side:
            raise ValueError(f"give multiples of {side}")
        if self.images is not None:
            raise ValueError("this run's images are stored in one size: give --image, and a run with prompts")
        clip = replace(self.wan, height=height // side, width=width // side)
        return replace(self, wan=clip, latents=None)  # stored in the size that they have, and only training reads them


class EncodedTask:
    """Prompts, encoded text and pixels, and real videos as stored latents (data.kind wan).

    The VAE is loaded when it is first needed.

    config: the run's data section.
    context: the run; its student's family has the codec.
    library: the prompts of a config that names no file of prompts; empty for a task that only generates.

    Raises ConfigError, one line, for a part of `data` that is absent or does not fit the networks.
    """

    def __init__(self, config: EncodedData, context: TaskContext, library: Sequence[str] | None = None) -> None:
        student, self.context, self.device = context.student, context, context.device
        self.vae_config, clip = config.vae, config.wan
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
            self.text = TextEmbeddings(config.text, student, self.device)
            self.text.check([*self.library, self.negative_prompt])
            if config.vae.path is not None:
                # now and not hours later
                check_channels(config.vae, self.codecs.channels(config.vae), geometry.out_dim)
            if config.image_encoder is not None:
                self.codecs.check_image_encoder(config.image_encoder)
        except (ValueError, OSError, UserError) as problem:
            raise ConfigError(f"data: {problem}") from None
        self.stream = PromptStream(max(len(self.library), 1), context.seed)
        statistics = statistics_of(self.codecs, config.vae)
        self.videos = self._videos(config, statistics) if config.latents is not None and config.real else None
        self.images = None if config.images is None else self._images(config, statistics)
        self.folders = [stored for stored in (self.videos, self.images) if stored is not None]
        self.streams: Sequence[Stream] = [stream for stored in self.folders for stream in stored.streams]
        self._check_first(geometry)

    def _videos(self, config: EncodedData, statistics: Statistics | None) -> StoredLatents:
        takes, sizes, student = self.geometry.first_frame, self.context.sizes, self.context.student
        if sizes is not None and takes is FirstFrame.channels:
            sizes = [*sizes, config.size]  # validation shows first frames of its own size
        gives = config.has_first_frame(takes, real=True)
        assert config.latents is not None
        return StoredLatents(
            "data.latents",
            Path(config.latents),
            self.latent_shape,
            self.context.seed,
            sizes=sizes,
            statistics=statistics,
            visual_of=visual_reader(student, config.frames, self.device, has_first_frame=gives, of_videos=True),
        )

    def _images(self, config: EncodedData, statistics: Statistics | None) -> StoredImages:
        gives = config.has_first_frame(self.geometry.first_frame, real=False)
        assert config.images is not None
        return StoredImages(
            "data.images",
            Path(config.images),
            self.latent_shape,
            self.context.seed,
            statistics=statistics,
            visual_of=visual_reader(self.context.student, config.frames, self.device, has_first_frame=gives),
        )

    def _check_first(self, geometry: Geometry) -> None:
        """Files that lack what the network needs, and captions that have no embedding, are refused now."""
        try:
            if self.images is not None:
                self.images.read(range(1))
                self.check_captions(self.images.key, self.images.captions)
            if self.videos is not None:
                if geometry.first_frame is FirstFrame.channels:
                    self.videos.read(range(1))
                self.check_captions(self.videos.key, self.videos.captions)
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
            encoder = self.codecs.load_image_encoder(path, self.vae_config.dtype.torch, self.device)
            if encoder.width != width:
                raise ValueError(f"image_encoder: {path} has width {encoder.width}, the networks take {width}")
            return encoder
        except (ValueError, OSError) as problem:
            raise UserError(f"data.{problem}") from None

    def contents(self) -> Mapping[str, Sequence[str]]:
        """What all ranks must have alike: see `Task`. Raises UserError."""
        stored = {folder.key: folder.index() for folder in self.folders}
        return {"data.prompts": self.library, **stored, "data.text.cache": self.text.contents()}

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
            return self.text.encode(prompts)
        except (ValueError, OSError) as problem:
            raise UserError(f"data: {problem}") from None

    def load_text_encoder(self) -> None:
        """Loads the text encoder now, if the config names one. Raises UserError.

        If it cannot be loaded but there is a cache, it warns that only the cache's prompts can be used.
        """
        try:
            self.text.load()
        except (ValueError, OSError) as problem:
            if self.text.cache is None:
                raise UserError(f"data: {problem}") from None
            warn_once(f"data.text: only prompts of {self.text.config.cache} can be used: {problem}")

    def check_captions(self, key: str, captions: Sequence[str]) -> None:
        """Raises ConfigError if there is no encoder and the cache lacks a caption. With one it warns."""
        if self.text.cache is None:
            return
        try:
            self.text.check(captions)
        except UserError as problem:
            raise ConfigError(str(problem)) from None
        except ValueError as problem:
            raise ConfigError(f"{key}: {problem}") from None

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
