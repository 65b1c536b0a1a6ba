"""The world of shapes against its own ground truth, its code, and its judge against videos whose faults are known."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evaluation.toy_suite import SPLITS, Row, eval_prompts, judge_of, table
from model.network import NetworkConfig
from tasks.kinds.shapes import ShapesData
from worlds import shapes_judge
from worlds.block_dct import AXES, BlockDCT
from worlds.shapes import COLOURS, DIRECTIONS, SHAPES, SPEEDS, ShapesWorld, ShapesWorldConfig, Thing
from worlds.shapes_judge import METRICS, ShapesJudge
from worlds.toy_judge import displacement

WORLD = ShapesWorld(ShapesWorldConfig())
HARD = ShapesWorld(ShapesWorldConfig(frames=12, objects=2, sizes=True, speeds=True, start=32, across=16))
CAPTIONS = WORLD.captions * 2


def _chroma(pixels_BFCHW: Tensor) -> Tensor:
    return pixels_BFCHW.amax(dim=2, keepdim=True) - pixels_BFCHW.amin(dim=2, keepdim=True)


# ------------------------------------------------------------------------------------------------------------- world


def test_a_sample_does_not_depend_on_its_batch_or_on_other_random_numbers() -> None:
    for world in (WORLD, HARD):
        batch = world.batch([5, 0, 123_456, 7], "train")
        torch.manual_seed(99)
        for row, index in enumerate([5, 0, 123_456, 7]):
            alone = world.batch([index], "train")
            assert torch.equal(alone.latents_BFCHW[0], batch.latents_BFCHW[row])
            assert alone.captions == [batch.captions[row]]
        assert batch.latents_BFCHW.shape == (4, *world.latent_shape)


def test_seed_and_split_and_index_each_change_the_sample() -> None:
    captions = WORLD.captions[:3]
    videos = [
        WORLD.batch([3], "train").latents_BFCHW,
        WORLD.batch([3], "test").latents_BFCHW,
        WORLD.batch([4], "train").latents_BFCHW,
        ShapesWorld(ShapesWorldConfig(seed=1)).batch([3], "train").latents_BFCHW,
        *(WORLD.real_videos_for(captions, seed, "test")[:1] for seed in SPLITS.values()),
        WORLD.real_videos_for(captions, SPLITS["test"], "train")[:1],
    ]
    for i, a in enumerate(videos):
        assert all(not torch.allclose(a, b, atol=0.1) for b in videos[i + 1 :])
    assert eval_prompts(WORLD.captions, 20, "dev") != eval_prompts(WORLD.captions, 20, "test")


def test_an_object_moves_as_its_caption_says() -> None:
    contents = [WORLD.parse(caption) for caption in WORLD.captions]
    pixels = WORLD.draw(contents, torch.rand(64, 7, dtype=torch.float64).numpy())
    coded = WORLD.decode(WORLD.encode(pixels))
    for videos, each, on_average in ((pixels, 0.01, 0.01), (coded, 0.6, 0.1)):
        for steps, (thing,) in zip(displacement(_chroma(videos)), contents, strict=True):
            wanted = torch.tensor(DIRECTIONS[thing.direction]).double() * SPEEDS[""]
            assert (steps - wanted).norm(dim=1).max() < each
            assert (steps.mean(dim=0) - wanted).norm() < on_average


def test_a_video_that_runs_backwards_is_none_of_the_opposite_direction() -> None:
    """Else the order of frames alone would tell directions, which small networks are slow to learn (see LOG.md)."""
    captions = [f"a red {shape} moving {way}" for shape in SHAPES for way in ("left", "right")] * 20
    ink = _chroma(WORLD.decode(WORLD.real_videos_for(captions, 0)))[:, :, 0]
    middle = (ink.sum(dim=2) @ torch.arange(32.0)) / ink.sum(dim=(2, 3))
    assert middle[1::2, 0].max() < middle[0::2, -1].min() + 0.5  # right begins before where left ends


def test_what_is_left_to_chance_varies_and_what_is_said_does_not() -> None:
    things = WORLD.parse("a green square moving left") * 300
    videos = WORLD.decode(WORLD.real_videos_for([str(thing) for thing in things], 0))
    chroma = _chroma(videos)[:, 0, 0]
    peak = chroma.flatten(1).amax(dim=1)
    size = (chroma.sum(dim=(1, 2)) / peak).sqrt()
    assert 0.15 < (size.max() - size.min()) / size.mean() < 0.35
    assert peak.std() > 0.02
    assert videos[:, 0, :, 16, -1].mean(dim=1).std() > 0.015  # the background
    green = videos[:, 0].permute(0, 2, 3, 1)[chroma > 0.5]
    assert (green.argmax(dim=1) == 1).all()


def test_a_long_video_wraps_round_the_torus() -> None:
    world = ShapesWorld(ShapesWorldConfig(frames=17))  # 16 * 2 = 32 pixels: once round
    video = world.decode(world.batch([0], "train").latents_BFCHW)
    assert torch.allclose(video[:, 16], video[:, 0], atol=1e-4)
    assert not torch.allclose(video[:, 8], video[:, 0], atol=0.1)


def test_two_objects_pass_and_the_first_is_in_front() -> None:
    world = ShapesWorld(ShapesWorldConfig(frames=1, objects=2))
    content = world.parse("a red circle moving left and a blue square moving right")
    draws = torch.full((1, 13), 0.5).double().numpy()
    alone = ShapesWorld(ShapesWorldConfig(frames=1))
    red, blue = (alone.draw([(thing,)], draws[:, :7]) for thing in content)
    both = world.draw([content], draws)
    inside = alone.draw([(content[0],)], draws[:, :7])[:, :, 1:2] < 0.3  # where red covers all
    assert torch.equal(torch.where(inside, both, 0), torch.where(inside, red, 0))
    assert (both - red).abs().max() > 0.3
    assert (both - blue).abs().max() > 0.3


def test_a_larger_canvas_shows_the_same_larger() -> None:
    large = WORLD.resized(6, 8)
    assert large.latent_shape == (6, 46, 8, 8)
    assert WORLD.resized(6, 4) is WORLD
    a = WORLD.decode(WORLD.batch([2], "train").latents_BFCHW)
    b = large.decode(large.batch([2], "train").latents_BFCHW)
    smaller = torch.nn.functional.avg_pool2d(b.flatten(0, 1), 2)
    assert (smaller - a[0]).abs().mean() < 0.01


def test_captions_parse_back_and_others_are_refused() -> None:
    assert len(set(WORLD.captions)) == 64
    assert len(HARD.captions) == 64 * 4 * 36 * 4
    for world in (WORLD, HARD):
        for caption in world.captions[::97]:
            assert world.caption(world.parse(caption)) == caption
    assert WORLD.parse("A Red  circle moving left") == (Thing("circle", "red", "left"),)
    for wrong in ("a pink circle moving left", "a red circle", "", "a small red circle moving left"):
        with pytest.raises(ValueError, match="cannot read caption.*like 'a red circle moving left'"):
            WORLD.parse(wrong)
    easy = "a small red circle moving slowly left"
    for wrong in (easy, f"{easy} and {easy}", f"{easy} and a large red star moving slowly up"):
        with pytest.raises(ValueError, match="differ in both colour and shape"):
            HARD.parse(wrong)


@pytest.mark.parametrize(
    "field", [{"frames": 0}, {"canvas": 20}, {"objects": 3}, {"start": 33.0}, {"across": -1.0}, {"canvas": 0}]
)
def test_impossible_worlds_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(field))} must be"):
        ShapesWorldConfig(**field)  # type: ignore[arg-type]


def test_wrong_split_index_and_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        WORLD.batch([0], "val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        WORLD.batch([0, -1], "train")
    with pytest.raises(ValueError, match="pixels must be"):
        WORLD.encode(torch.zeros(1, 9, 3, 16, 32))


# -------------------------------------------------------------------------------------------------------------- code


def test_the_code_keeps_the_world_and_inverts_itself() -> None:
    batch = WORLD.batch(range(160), "train")
    again = WORLD.encode(WORLD.decode(batch.latents_BFCHW, clamp=False))
    assert torch.allclose(again, batch.latents_BFCHW, atol=1e-5)
    assert abs(batch.latents_BFCHW.mean()) < 0.05
    assert 0.6 < batch.latents_BFCHW.std() < 1
    draws = torch.rand(64, 7, dtype=torch.float64).numpy()
    pixels = WORLD.draw([WORLD.parse(caption) for caption in WORLD.captions], draws)
    lost = (WORLD.decode(WORLD.encode(pixels), clamp=False) - pixels).square().mean()
    assert 35 < -10 * math.log10(lost) < 38  # dB, as block_dct.py says


def test_the_code_is_an_orthogonal_projection() -> None:
    assert torch.allclose(torch.tensor(AXES) @ torch.tensor(AXES).T, torch.eye(3), atol=1e-6)
    code, noise = BlockDCT(), torch.rand(2, 1, 3, 16, 16)
    kept = code.decode(code.encode(noise))
    assert torch.allclose(code.decode(code.encode(kept)), kept, atol=1e-5)
    assert abs(((noise - kept) * (kept - kept.mean())).sum() / kept.square().sum()) < 1e-3
    assert torch.allclose(code.decode(code.encode(torch.full((1, 1, 3, 8, 8), 0.3))), torch.tensor(0.3), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- judge


@pytest.fixture(scope="module")
def judge() -> Iterator[ShapesJudge]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes_judge, "_REFERENCE_VIDEOS", 256)
        patch.setattr(shapes_judge, "_FLOOR_DRAWS", 2)
        yield ShapesJudge(WORLD)


@functools.cache
def real() -> Tensor:
    return WORLD.real_videos_for(CAPTIONS, seed=5)


def test_real_videos_score_as_real(judge: ShapesJudge) -> None:
    row = judge.evaluate(real(), CAPTIONS)
    assert METRICS.keys() <= row.keys()
    assert row["prompt_right"] == row["shape_right"] == row["colour_right"] == row["direction_right"] == 1
    assert max(row["appearance_fd"], row["appearance_fd_floor"]) < 1.5
    assert row["motion_error"] < 0.03
    assert row["jitter"] < 0.05
    assert row["flicker"] < 1e-3
    assert row["clipped"] < 0.002
    assert abs(row["saturation"] - row["saturation_real"]) < 4 * row["saturation_se"]
    assert row["diversity"] == pytest.approx(1, abs=0.07)
    assert row["motion"] == pytest.approx(row["motion_real"], rel=0.05)


def test_shuffled_captions_are_right_by_chance(judge: ShapesJudge) -> None:
    shuffled = [CAPTIONS[i] for i in torch.randperm(len(CAPTIONS)).tolist()]
    right = judge.right(real(), shuffled)
    for name in ("shape", "colour", "direction"):
        assert abs(right[f"{name}_right"].float().mean() - 0.25) < 0.11
    assert torch.stack(list(right.values())).all(dim=0).float().mean() < 0.06  # 1 in 64


def test_wrong_captions_are_noticed_attribute_by_attribute(judge: ShapesJudge) -> None:
    names = {"shape": list(SHAPES), "colour": list(COLOURS), "direction": list(DIRECTIONS)}
    for wrong, values in names.items():
        said = {}
        for caption in CAPTIONS:
            (thing,) = WORLD.parse(caption)
            other = values[(values.index(getattr(thing, wrong)) + 1) % 4]
            said[caption] = str(Thing(**{**vars(thing), wrong: other}))
        right = judge.right(real()[:64], [said[caption] for caption in WORLD.captions])
        assert {name: right[f"{name}_right"].float().mean() for name in names} == {n: float(n != wrong) for n in names}


def test_faults_move_their_own_measures(judge: ShapesJudge) -> None:
    good = judge.evaluate(real(), CAPTIONS)
    pixels = WORLD.decode(real())

    def faulty(changed: Tensor) -> dict[str, float]:
        return judge.evaluate(WORLD.encode(changed), CAPTIONS)

    grey = pixels.mean(dim=2, keepdim=True)
    assert faulty(grey + 0.7 * (pixels - grey))["saturation"] < 0.75 * good["saturation"]
    mush = torch.nn.functional.avg_pool2d(pixels.flatten(0, 1), 7, 1, 3).unflatten(0, pixels.shape[:2])
    blurred = faulty(mush)
    assert blurred["appearance_fd"] > 10 * good["appearance_fd"]
    still = faulty(pixels[:, :1].expand_as(pixels))
    assert still["direction_right"] == 0
    assert still["shape_right"] == 1
    shaken = faulty(torch.stack([frame.roll(i % 2, dims=-1) for i, frame in enumerate(pixels.unbind(1))], dim=1))
    assert shaken["jitter"] > 5 * good["jitter"]
    fading = torch.linspace(1, 0.5, pixels.shape[1])[:, None, None, None]
    assert faulty(grey + fading * (pixels - grey))["flicker"] > 0.05
    noisy = faulty((pixels + 0.05 * torch.randn_like(pixels)).clamp(0, 1))
    assert noisy["appearance_fd"] > 5 * good["appearance_fd"]
    one = judge.evaluate(real()[:64].repeat(2, 1, 1, 1, 1), CAPTIONS)  # the same video for each mention of a caption
    assert one["diversity"] == pytest.approx(0, abs=1e-4)
    empty = faulty(grey.amax(dim=(3, 4), keepdim=True).expand_as(pixels))
    assert empty["colour_right"] == 0
    assert empty["prompt_right"] == 0


def test_objects_that_pass_each_other_are_told_apart() -> None:
    captions = HARD.captions[::361]
    videos, judge = HARD.real_videos_for(captions, 3), ShapesJudge(HARD)
    right = judge.right(videos, captions)
    assert torch.stack(list(right.values())).all(dim=0).all(dim=1).float().mean() > 0.9
    assert all(ok_BN.float().mean() > 0.95 for ok_BN in right.values())
    swapped = [" and ".join(reversed(caption.split(" and "))) for caption in captions]
    assert torch.equal(judge.right(videos, swapped)["direction_right"], right["direction_right"].flip(1))


def test_the_judge_refuses_what_it_cannot_measure(judge: ShapesJudge) -> None:
    for latents, captions, problem in (
        (real()[:4], CAPTIONS[:3], "one caption each"),
        (real()[:1], CAPTIONS[:1], "at least 2"),
        (real()[:4] * math.nan, CAPTIONS[:4], "NaN"),
        (real()[:4, :, :9], CAPTIONS[:4], "latents must be"),
        (real()[:4], ["a red dog moving left"] * 4, "cannot read"),
    ):
        with pytest.raises(ValueError, match=problem):
            judge.evaluate(latents, captions)
    with pytest.raises(ValueError, match="at least 2 frames"):
        ShapesJudge(ShapesWorld(ShapesWorldConfig(frames=1)))


def test_evaluation_asks_the_task_for_its_judge() -> None:
    student = NetworkConfig("toy", overrides={"in_dim": 46, "out_dim": 46, "patch_size": [1, 1, 1]})
    task = ShapesData().task(student, 0, torch.device("cpu"))
    found = judge_of(task, Path("unused"))
    assert isinstance(found, ShapesJudge)
    row = dict.fromkeys(METRICS, 0.5)
    heads = table([Row("real", row, 0.0, 0.0)]).splitlines()[0].split("  ")
    assert [head.strip() for head in heads if head][:4] == ["prompt right", "shape", "colour", "direction"]
