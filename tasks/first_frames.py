"""What stored samples give networks of their first frame: its clean latent, or channels and an image's tokens."""

# B batch  F latent frames  C channels  H W latent size  Li image tokens  Di their width

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.family import FirstFrame
from model.network import NetworkConfig
from model.types import VisualConditioning
from utils.data.stream import Sample, stacked

VisualOf = Callable[[Sequence[Sample]], VisualConditioning]


def visual_reader(
    network: NetworkConfig, frames: int, device: torch.device, *, has_first_frame: bool, of_videos: bool = False
) -> VisualOf:
    """A function that makes the visual conditioning of a batch's stored samples.

    network: whose geometry says what it takes of a first frame.
    frames: latent frames of a video.
    device: where the conditioning goes.
    has_first_frame: whether networks get the samples' first frames.
    of_videos: whether the samples are videos, of which smaller buckets have fewer frames.

    The function raises ValueError for samples that lack what the network needs.
    """
    geometry = network.geometry()
    if not has_first_frame:
        return lambda samples: VisualConditioning()
    if geometry.first_frame is FirstFrame.channels:

        def beside(samples: Sequence[Sample]) -> VisualConditioning:
            lengths = [len(s.latents) for s in samples if of_videos and s.latents is not None]
            return _beside(samples, network, min([frames, *lengths]), device)

        return beside
    return lambda samples: VisualConditioning(stacked([_first(s) for s in samples], "latents").float().to(device))


def _first(sample: Sample) -> Tensor | None:
    return None if sample.latents is None else sample.latents[:1]


def _beside(samples: Sequence[Sample], network: NetworkConfig, frames: int, device: torch.device) -> VisualConditioning:
    geometry = network.geometry()
    short = [s.name for s in samples if s.first_latents is None or len(s.first_latents) < frames]
    if short:
        raise ValueError(
            f"{short[0]} has no first_frame_latent of {frames} frames, which an i2v network needs: preprocess with "
            "--i2v and a bucket of so many frames"
        )
    first = stacked([s.first_latents[:frames] for s in samples if s.first_latents is not None], "first_frame_latent")
    channels = network.codecs.channels_of(first.float().to(device))
    if channels.shape[2] != geometry.in_dim - geometry.out_dim:
        raise ValueError(
            f"{samples[0].name} makes {channels.shape[2]} channels beside the latents, the network takes "
            f"{geometry.in_dim - geometry.out_dim}: preprocess with its VAE"
        )
    if geometry.image_dim is None:
        return VisualConditioning(channels=channels)
    bare = [s.name for s in samples if s.clip is None or s.clip.shape[-1] != geometry.image_dim]
    if bare:
        raise ValueError(
            f"{bare[0]} has no clip_feature of width {geometry.image_dim}, which the network needs: preprocess with "
            "--image_encoder"
        )
    return VisualConditioning(
        channels=channels, image=stacked([s.clip for s in samples], "clip_feature").float().to(device)
    )
