"""The toy world against its own ground truth; prompt files and the order they are read in."""

from __future__ import annotations

import functools
import math
import operator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from utils.data.prompts import PromptStream, load_prompts
from worlds.toy import DIRECTIONS, ToyWorld, ToyWorldConfig

WORLD = ToyWorld(ToyWorldConfig())


def _centroid(pixels_FHW: Tensor) -> Tensor:
    """Plain centroids [F, (x, y)]: right as long as the digit crosses no edge."""
    grid = torch.arange(pixels_FHW.shape[-1], dtype=torch.float32)
    total = pixels_FHW.sum(dim=(1, 2))
    return torch.stack([pixels_FHW.sum(1) @ grid / total, pixels_FHW.sum(2) @ grid / total], dim=-1)


def test_a_sample_does_not_depend_on_its_batch_or_on_other_random_numbers() -> None:
    batch = WORLD.batch([5, 0, 123_456, 7], "train")
    torch.manual_seed(99)
    for row, index in enumerate([5, 0, 123_456, 7]):
        sample = ToyWorld(ToyWorldConfig()).sample(index, "train")
        assert torch.equal(sample.latents_FCHW, batch.latents_BFCHW[row])
        assert sample.caption == batch.captions[row] == WORLD.caption(sample.digit, sample.direction)
    assert batch.latents_BFCHW.shape == (4, *WORLD.latent_shape)
    assert batch.latents_BFCHW.dtype == torch.float32


def test_seed_split_and_index_each_change_the_sample() -> None:
    other_seed = ToyWorld(ToyWorldConfig(seed=1))
    videos = [
        WORLD.sample(3, "train"),
        WORLD.sample(3, "test"),
        WORLD.sample(4, "train"),
        other_seed.sample(3, "train"),
    ]
    for i, a in enumerate(videos):
        assert all(not torch.equal(a.latents_FCHW, b.latents_FCHW) for b in videos[i + 1 :])


def test_the_digit_moves_as_the_caption_says_and_touches_no_edge() -> None:
    batch = WORLD.batch(range(200), "test")
    pixels = WORLD.decode(batch.latents_BFCHW)[:, :, 0]
    for video, caption in zip(pixels, batch.captions, strict=True):
        step = torch.tensor(DIRECTIONS[WORLD.parse(caption)[1]]) * 0.75
        assert torch.allclose(_centroid(video).diff(dim=0), step.expand(8, 2), atol=1e-4)


def test_a_long_video_wraps_round_the_torus_and_keeps_all_its_ink() -> None:
    world = ToyWorld(ToyWorldConfig(frames=65))  # 64 * 0.75 = 48 pixels: three times round
    video = world.decode(world.sample(0, "train").latents_FCHW[None])[0, :, 0]
    assert torch.allclose(video.sum(dim=(1, 2)), video[0].sum().expand(65), rtol=1e-4)
    assert torch.allclose(video[64], video[0], atol=1e-5)
    assert not torch.allclose(video[32], video[0], atol=0.1)


def test_content_is_balanced_and_intensity_is_that_of_the_digits() -> None:
    batch = WORLD.batch(range(4000), "train")
    counts = torch.tensor([batch.captions.count(caption) for caption in WORLD.captions])
    assert len(set(WORLD.captions)) == 40
    assert ((counts - 100).square() / 100).sum() < 80  # chi-square, 39 degrees of freedom: 62 at one in a hundred
    assert abs(WORLD.decode(batch.latents_BFCHW).mean().item() - 0.0763) < 0.001
    assert abs(batch.latents_BFCHW.mean().item()) < 0.05
    assert abs(batch.latents_BFCHW.std().item() - 1) < 0.15


def test_held_out_handwriting_is_never_trained_on() -> None:
    world = ToyWorld(ToyWorldConfig(frames=1, start=0.0, across=0.0))  # whole pixels: every glyph as it is, x 8 y 4
    captions = [world.caption(digit, "left") for digit in range(10)] * 300
    glyphs = {}
    for split in ("train", "test"):
        pixels = world.decode(world.real_videos_for(captions, 0, split))[:, 0, 0]  # type: ignore[arg-type]
        assert torch.allclose(pixels.sum(dim=(1, 2)), pixels[:, 4:12, 8:].sum(dim=(1, 2)), atol=1e-3)
        glyphs[split] = {tuple(row) for row in (pixels[:, 4:12, 8:] * 16).round().int().flatten(1).tolist()}
    assert len(glyphs["test"]) == 397
    assert 1100 < len(glyphs["train"]) <= 1400
    assert not glyphs["train"] & glyphs["test"]


def test_real_videos_fit_their_captions_and_differ_by_seed() -> None:
    captions = ["the digit seven moving left", "the digit zero moving down"] * 2
    a, again, b = (WORLD.real_videos_for(captions, seed) for seed in (0, 0, 1))
    assert torch.equal(a, again)
    assert not torch.allclose(a, b, atol=0.1)
    assert not torch.allclose(a[0], a[2], atol=0.1)  # one caption, two videos
    for video, caption in zip(WORLD.decode(a)[:, :, 0], captions, strict=True):
        step = torch.tensor(DIRECTIONS[WORLD.parse(caption)[1]]) * 0.75
        assert torch.allclose(_centroid(video).diff(dim=0), step.expand(8, 2), atol=1e-4)


def test_encode_inverts_decode_for_grey_and_rgb() -> None:
    pixels = torch.rand(2, 9, 1, 16, 16)
    latents = WORLD.encode(pixels)
    assert latents.shape == (2, *WORLD.latent_shape)
    assert torch.allclose(WORLD.decode(latents), pixels.expand(-1, -1, 3, -1, -1), atol=1e-6)
    assert torch.allclose(WORLD.encode(WORLD.decode(latents)), latents, atol=1e-5)
    assert WORLD.decode(latents + 10).max() == 1
    assert WORLD.decode(latents + 10, clamp=False).max() > 2


def test_captions_parse_back_and_others_are_refused() -> None:
    for caption in WORLD.captions:
        assert WORLD.caption(*WORLD.parse(caption)) == caption
    for wrong in ("the digit ten moving left", "the digit two moving sideways", "two left", ""):
        with pytest.raises(ValueError, match="one of zero, one.*one of left, right, up, down"):
            WORLD.parse(wrong)


@pytest.mark.parametrize(
    "field", [{"frames": 0}, {"canvas": 15}, {"canvas": 4}, {"speed": 0.0}, {"start": 9.0}, {"across": 5.0}]
)
def test_impossible_worlds_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(field))} must be"):
        ToyWorldConfig(**field)  # type: ignore[arg-type]


def test_wrong_split_index_and_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        WORLD.batch([0], "val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        WORLD.batch([0, -1], "train")
    with pytest.raises(ValueError, match="pixels must be"):
        WORLD.encode(torch.zeros(1, 9, 2, 16, 16))


def test_prompt_stream_loses_and_repeats_nothing() -> None:
    stream = PromptStream(7, seed=3)
    whole = stream.indices(0, 70)
    epochs = [whole[i : i + 7] for i in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    assert PromptStream(7, seed=4).indices(0, 70) != whole


def test_prompt_stream_is_a_pure_function_of_position() -> None:
    whole = PromptStream(5, seed=0).indices(0, 40)
    assert PromptStream(5, seed=0).indices(33, 7) == whole[33:]
    ranks = [PromptStream(5, seed=0).indices(cursor, 2) for cursor in range(8, 16, 2)]  # 4 ranks of one batch of 8
    assert functools.reduce(operator.iadd, ranks, []) == whole[8:16]
    with pytest.raises(ValueError, match="at least one item"):
        PromptStream(0, seed=0)
    with pytest.raises(ValueError, match="must be >= 0"):
        PromptStream(5, seed=0).indices(-1, 2)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a red fox\n\n  a blue, big cat \r\n"),
        ("a.csv", '\ufeffid,caption\n1,a red fox\n2,"a blue, big cat"\n'),
        ("a.jsonl", '{"prompt": "a red fox"}\n\n{"prompt": "a blue, big cat"}\n'),
    ],
)
def test_prompt_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_prompts(tmp_path / name) == ["a red fox", "a blue, big cat"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.csv", "id,text\n1,fox\n", r"needs a column 'prompt' or 'caption', it has \['id', 'text'\]"),
        ("a.csv", "", "needs a column"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": 1}\n', "line 2 needs a text field"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.pdf", "x", "give a .txt, .csv, .jsonl, .parquet file, or a folder"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_the_draws_are_uniform() -> None:
    """Start and offset, read back from the ink: as wide as the configuration says, and not wider."""
    world = ToyWorld(ToyWorldConfig(frames=1))
    captions = ["the digit zero moving right"] * 500
    pixels = world.decode(world.real_videos_for(captions, 0))[:, 0, 0]
    x, y = _centroid(pixels).unbind(-1)
    assert 0.9 < (x.std() * math.sqrt(12) / 2).item() < 1.25  # U(0, 2), and the glyphs' own spread
    assert 0.9 < (y.std() * math.sqrt(12) / 5).item() < 1.15  # U(-2.5, 2.5)
