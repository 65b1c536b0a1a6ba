"""`preprocess.py images` and `video --i2v` with a real VAE and CLIP: the files hold what networks are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.text_encoder import toy_text_encoder
from model.wan.codecs import WanCodecs
from model.wan.image_encoder import image_channels, load_image_encoder
from model.wan.vae import WanVAE
from scripts.tiny_models import save_image_encoder, save_text_encoder, small_vae
from tasks.preprocess_video import preprocess_images, preprocess_video
from tests.nets import relative
from tests.small import trainer
from tests.utils.data.test_videos import encode
from utils.data.buckets import Info, Size
from utils.data.clips import decode_image, probe_image
from utils.data.latents import open_latents
from utils.data.media import IMAGES, find_media
from utils.data.stream import CorruptSample
from utils.data.tensors import Statistics
from utils.errors import UserError
from utils.video import read_video

pytest.importorskip("pyarrow")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE and an image encoder; a wide image, a tall one that is stored on its side, and captions."""
    root = tmp_path_factory.mktemp("images")
    small_vae("2.1").save_pretrained(root / "model/vae")
    save_image_encoder(root / "model", 20)
    (root / "pictures").mkdir()
    for name, exif in (("wide", None), ("tall", 6)):
        levels = np.random.default_rng(len(name) + (exif or 0)).integers(0, 256, (40, 56, 3), np.uint8)
        image, notes = Image.fromarray(levels), Image.Exif()
        if exif is not None:
            notes[0x0112] = exif
        image.save(root / f"pictures/{name}.png", exif=notes)
        (root / f"pictures/{name}.txt").write_text(f"a {name} one")
    return root


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    model = ["--vae", str(folder / "model"), "--vae_dtype", "fp32", "--i2v"]
    buckets = ["--bucket", "5x32x48", "--bucket", "9x48x32"]
    return ["--images", str(folder / "pictures"), *model, *buckets, "--out", str(out), *more]


@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_files_hold_what_networks_are_given(
    folder: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each image in the bucket of its shape: its latent, the condition of a video of that bucket, CLIP's tokens."""
    clip = ["--image_encoder", str(folder / "model")]
    command = arguments(folder, tmp_path / "out", *clip, "--format", kind)
    assert preprocess_images(command) == 0
    assert preprocess_images(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert "1 files made (2 rows), 0 were there" in said[-2]
    assert "0 files made (0 rows), 1 were there" in said[-1]
    with pytest.raises(UserError, match="was made from other data or settings: give another --out"):
        preprocess_images(arguments(folder, tmp_path / "out", "--format", kind))
    stored, vae = open_latents(tmp_path / "out"), WanVAE(small_vae("2.1"))
    encoder = load_image_encoder(folder / "model")
    shards = find_media(folder / "pictures", IMAGES)
    for number, (media, size) in enumerate(zip(shards[0], (Size(9, 48, 32), Size(5, 32, 48)), strict=True)):
        found, pixels = stored.read(number, 0), decode_image(media, size)
        frames = (size.frames - 1) // 4 + 1
        assert found.caption == media.text()
        assert found.latents is not None
        assert found.first_latents is not None
        assert found.latents.shape == (1, 16, size.height // 8, size.width // 8)
        assert relative(found.latents, vae.encode(pixels[None])[0]) < 1e-6
        assert relative(WanCodecs().channels_of(found.first_latents[None]), image_channels(vae, pixels, frames)) < 1e-6
        # what of a longer video is kept is a shorter one's
        longer = image_channels(vae, pixels, frames + 1)[:, :frames]
        assert relative(WanCodecs().channels_of(found.first_latents[None]), longer) < 1e-6
        assert relative(found.first_latents[:1], found.latents) < 1e-6
        assert found.clip is not None
        assert relative(found.clip, encoder.encode(pixels)[0]) < 1e-6


def test_videos_have_the_same_columns_and_raw_latents_leave_first_frames_alone(folder: Path, tmp_path: Path) -> None:
    """FastVideo's I2V layout: `vae_latent` is raw, `first_frame_latent` normalised; no captions are empty ones."""
    import pyarrow.parquet as pq

    (tmp_path / "videos").mkdir()
    encode(tmp_path / "videos/a.mp4", 5, height=32, width=48)
    plain = ["--videos", str(tmp_path / "videos"), *arguments(folder, tmp_path / "plain")[2:]]
    raw = [*plain[:-1], str(tmp_path / "raw"), "--raw"]
    assert preprocess_video(plain) == 0
    assert preprocess_video(raw) == 0
    sample = open_latents(tmp_path / "plain").read(0, 0)
    vae = WanVAE(small_vae("2.1"))

    statistics = Statistics(tuple(vae.model.config.latents_mean), tuple(vae.model.config.latents_std))
    raw_sample = open_latents(tmp_path / "raw", statistics=statistics).read(0, 0)
    assert sample.caption == raw_sample.caption == ""
    assert sample.clip is None
    for name in ("latents", "first_latents"):
        assert relative(getattr(raw_sample, name), getattr(sample, name)) < 1e-5
    assert sample.latents is not None
    assert sample.first_latents is not None
    assert relative(sample.first_latents[:1], sample.latents[:1]) < 1e-6
    assert relative(sample.first_latents[1:], sample.latents[1:]) > 1e-2  # grey, and not the video
    tables = {name: pq.read_table(next((tmp_path / name).glob("*.parquet"))) for name in ("plain", "raw")}
    row, plain_row = (tables[name].to_pylist()[0] for name in ("raw", "plain"))
    assert row["first_frame_latent_bytes"] == plain_row["first_frame_latent_bytes"]
    assert row["vae_latent_bytes"] != plain_row["vae_latent_bytes"]
    tensors = ("vae_latent", "text_embedding", "first_frame_latent", "clip_feature", "pil_image")
    columns = [f"{name}_{part}" for name in tensors for part in ("bytes", "shape", "dtype")]
    assert tables["raw"].schema.names[: 1 + len(columns)] == ["id", *columns]
    assert row["pil_image_bytes"] == b""


def test_headers_of_images(folder: Path, tmp_path: Path) -> None:
    tall, wide = find_media(folder / "pictures", IMAGES)[0]
    assert probe_image(wide) == Info(1, 1.0, 40, 56)
    assert probe_image(tall) == Info(1, 1.0, 56, 40)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(CorruptSample, match="broken.png cannot be decoded"):
        probe_image(find_media(tmp_path, IMAGES)[0][0])


@pytest.mark.parametrize("kind", ["folder", "csv", "jsonl"])
def test_data_without_captions_has_empty_ones(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    table = tmp_path / f"files.{kind}"
    rows: list[dict[str, Any]] = [{"file": "a.png"}, {"file": "b.png"}]
    if kind == "csv":
        table.write_text("file\na.png\nb.png\n")
    elif kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    (shard,) = find_media(tmp_path, IMAGES, None if kind == "folder" else table)
    assert [item.text() for item in shard] == ["", ""]
    if kind == "folder":
        assert "none of 2 files has a caption" in caplog.text
        (tmp_path / "a.txt").write_text("only one")
        first, second = find_media(tmp_path, IMAGES)[0]
        assert first.text() == "only one"
        with pytest.raises(CorruptSample, match="b.png has no caption"):
            second.text()
    elif kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, [rows[0] | {"caption": "only one"}, rows[1]])))
        with pytest.raises(ValueError, match="row 2 needs a file .* and a caption"):
            find_media(tmp_path, IMAGES, table)


def test_bad_options_are_one_line(folder: Path, tmp_path: Path) -> None:
    clip = ["--image_encoder", str(folder / "model")]
    for command, message in [
        (
            [word for word in arguments(folder, tmp_path, *clip) if word != "--i2v"],
            "--image_encoder: only i2v networks",
        ),
        (arguments(folder, tmp_path, "--image_encoder", str(tmp_path)), "--image_encoder: "),
        (arguments(folder, tmp_path, "--bucket", "6x32x32"), "bucket 6x32x32: frames must be 1"),
        (["--images", str(tmp_path), *arguments(folder, tmp_path)[2:]], "holds no .png"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            preprocess_images(command)
        assert "\n" not in str(caught.value)


def test_a_run_from_image_files_to_a_validation_video(folder: Path, tmp_path: Path) -> None:
    """An i2v student learns from the cache alone, and shows what it makes of the images."""
    text = toy_text_encoder(["a wide one", "a tall one", ""], 6, 16, seed=0)
    save_text_encoder(tmp_path / "text", text)
    where = ["--images", str(folder / "pictures"), "--vae", str(folder / "model"), "--bucket", "5x32x32"]
    clip = ["--i2v", "--image_encoder", str(folder / "model"), "--vae_dtype", "fp32"]
    assert preprocess_images([*where, *clip, "--out", str(tmp_path / "cache")]) == 0
    sizes = {"dim": 24, "ffn_dim": 32, "num_layers": 1, "num_heads": 2, "text_dim": 16, "text_len": 6, "freq_dim": 16}
    network = {"overrides": {**sizes, "in_dim": 36, "out_dim": 16, "model_type": "i2v", "image_dim": 20}}
    data = {
        **{"kind": "wan", "images": str(tmp_path / "cache"), "wan": {"frames": 2, "height": 4, "width": 4}},
        **{"text": {"encoder": str(tmp_path / "text"), "dtype": "fp32"}},
        **{"vae": {"path": str(folder / "model"), "dtype": "fp32"}},
    }
    run = trainer(
        tmp_path / "run", data=data, student=network, teacher=network, critic=network,
        causal={"num_frame_per_block": 1}, validation={"every": 1}, training={"max_steps": 1, "critic_warmup_steps": 0},
    )  # fmt: skip
    assert run.train() == 0
    (shown,) = (tmp_path / "run").rglob("*.mp4")
    assert read_video(shown).shape[0] == 5
