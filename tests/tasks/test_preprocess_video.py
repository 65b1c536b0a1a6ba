"""`preprocess.py video` with a real VAE: what training reads is what the VAE makes of the clip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.wan.vae import WanVAE
from scripts.tiny_models import small_vae
from tasks.preprocess_video import preprocess_video
from tests.nets import relative
from tests.utils.data.test_videos import encode
from utils.data.buckets import Pace, Size
from utils.data.clips import VideoClips, plan_clips
from utils.data.latents import open_latents
from utils.data.media import find_media
from utils.errors import UserError


def test_stored_latents_are_the_vaes_own(tmp_path: Path) -> None:
    """Of a clip that was cut as the bucket says, normalised, in fp32; FastVideo's raw ones are those, un-normalised."""
    vae = WanVAE(small_vae("2.1"))
    vae.model.save_pretrained(tmp_path / "vae")
    videos = tmp_path / "videos"
    videos.mkdir()
    encode(videos / "a.mp4", 9, height=32, width=48)
    (videos / "a.txt").write_text("a caption")
    arguments = ["--videos", str(videos), "--vae", str(tmp_path / "vae"), "--vae_dtype", "fp32", "--bucket", "5x32x32"]
    assert preprocess_video([*arguments, "--out", str(tmp_path / "out")]) == 0
    sample = open_latents(tmp_path / "out").read(0, 0)
    shards, sizes, pace = find_media(videos), [Size.parse("5x32x32")], Pace(None, 1)
    clip = VideoClips(shards, plan_clips(shards, sizes, pace), sizes, pace).read(0, 0)
    assert sample.caption == "a caption"
    assert sample.latents is not None
    assert clip.pixels is not None
    assert relative(sample.latents, vae.encode(clip.pixels[None])[0]) < 1e-6
    assert torch.isfinite(sample.latents).all()
    assert sample.latents.shape == (
        2,
        vae.channels,
        32 // vae.spatial,
        32 // vae.spatial,
    )


def test_a_missing_vae_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    encode(tmp_path / "videos/a.mp4", 5)
    arguments = ["--videos", str(tmp_path / "videos"), "--bucket", "5x32x32", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="^--vae: ") as caught:
        preprocess_video([*arguments, "--vae", str(tmp_path / "nothing")])
    assert "\n" not in str(caught.value)
