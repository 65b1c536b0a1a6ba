"""A run's data section for sampling: what a command names takes the place of what the run was trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from configs.schema import RunConfig
from configs.sizes import resize
from model.network import NetworkConfig
from tasks.data import DataConfig
from tasks.kinds.encoded import EncodedData
from utils.errors import UserError


def change_data(
    config: RunConfig, image_encoder: str | None, size: tuple[int, int] | None, tiny_decoder: str | None
) -> None:
    """Puts what `Generator.load` was told in place of the run's. Raises UserError."""
    if image_encoder is not None:
        if config.student.geometry().image_dim is None:
            raise UserError("--image_encoder: this network sees no CLIP tokens: leave it out")
        config.data = replace(_encoded(config.data, "--image_encoder"), image_encoder=image_encoder)
    elif isinstance(config.data, EncodedData) and config.data.image_encoder is None:
        config.data = replace(config.data, image_encoder=_pipelines_image_encoder(config.data, config.student))
    if size is not None:
        try:
            resize(config, config.data.resized(*size, config.student))
        except (ValueError, OSError) as problem:
            raise UserError(f"--size {size[0]}x{size[1]}: {problem}") from None
    if tiny_decoder is not None:
        data = _encoded(config.data, "--tiny_decoder")
        config.data = replace(data, vae=replace(data.vae, tiny_decoder=tiny_decoder, tiled=False))


def _pipelines_image_encoder(data: EncodedData, student: NetworkConfig) -> str | None:
    """CLIP's folder for a run on stored tokens, which names none: of the pipeline that another part is of, if any."""
    if student.geometry().image_dim is None:
        return None
    folders = (data.vae.path, data.text.encoder, student.init)
    return next((folder for folder in folders if folder and (Path(folder) / "image_encoder").is_dir()), None)


def _encoded(data: DataConfig, option: str) -> EncodedData:
    """Data that a codec makes. Raises UserError."""
    if not isinstance(data, EncodedData):
        raise UserError(f"{option} is for the latents of a codec: this run's data are of kind {data.kind}")
    return data
