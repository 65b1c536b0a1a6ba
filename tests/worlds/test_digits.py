"""scikit-learn's digits as images of one frame: the world, its judge, and every recipe, of both families."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.load import load_run, run_from_plain
from configs.schema import RunConfig
from evaluation.command import evaluate_generator, evaluate_real
from generation.generator import Generator
from generation.sampling import Sampling
from model.discriminator import ImageHeads
from tasks.kinds.digits import DigitsTask
from tests import ROOT
from tests.small import DIFFUSION, DISTILLATION, NETWORK, merged
from trainer.base import RunOptions, Trainer
from trainer.build import build_trainer
from trainer.state import save_run
from utils.errors import ConfigError
from utils.random import Noise
from worlds import digit_net
from worlds.digits import DigitsConfig, DigitsWorld
from worlds.digits_judge import METRICS, DigitsJudge

# overrides that make the networks of each folder's recipes small
SMALL: dict[str, dict[str, Any]] = {
    "digits": {"dim": 32, "ffn_dim": 64, "num_layers": 2, "in_dim": 1, "out_dim": 1, "text_len": 4},
    "digits_edm": {"dim": 32, "num_layers": 2},
}
RECIPES = sorted(f"{path.parent.name}/{path.name}" for path in (ROOT / "configs").glob("digits*/*.yaml"))
WORLD = DigitsWorld(DigitsConfig())
CAPTIONS = WORLD.captions * 40


def test_a_sample_is_a_function_of_its_position() -> None:
    batch = WORLD.batch([5, 0, 123_456], "train")
    assert batch.latents_BFCHW.shape == (3, *WORLD.latent_shape) == (3, 1, 1, 8, 8)
    for row, index in enumerate([5, 0, 123_456]):
        alone = WORLD.batch([index], "train")
        assert torch.equal(alone.latents_BFCHW[0], batch.latents_BFCHW[row])
        assert alone.captions == [batch.captions[row]]
    other = DigitsWorld(DigitsConfig(seed=1)).batch([5, 0, 123_456], "train").latents_BFCHW
    held_out = WORLD.batch([5, 0, 123_456], "test").latents_BFCHW
    assert not torch.equal(batch.latents_BFCHW, other)
    assert not torch.equal(batch.latents_BFCHW, held_out)


def test_digits_are_balanced_normalised_and_captioned_as_their_labels_say() -> None:
    batch = WORLD.batch(range(3000), "train")
    counts = torch.tensor([batch.captions.count(caption) for caption in WORLD.captions])
    assert ((counts - 300).square() / 300).sum() < 22  # chi-square, 9 degrees of freedom: at one in a hundred
    assert abs(batch.latents_BFCHW.mean()) < 0.03
    assert abs(batch.latents_BFCHW.std() - 1) < 0.03
    latents, digits = WORLD.every("train")
    label = {tuple(x.flatten().tolist()): int(digit) for x, digit in zip(latents, digits, strict=True)}
    told = [label[tuple(x.flatten().tolist())] for x in batch.latents_BFCHW]
    assert told == [WORLD.parse(caption) for caption in batch.captions]


def test_the_splits_share_no_handwriting() -> None:
    rows = {
        split: {tuple(x.flatten().tolist()) for x in WORLD.every(split)[0]}  # type: ignore[arg-type]
        for split in ("train", "test")
    }
    assert len(rows["train"]) == 1400
    assert len(rows["test"]) == 397
    assert not rows["train"] & rows["test"]
    real = WORLD.real_videos_for(CAPTIONS, seed=0)
    assert {tuple(x.flatten().tolist()) for x in real} <= rows["test"]
    assert not torch.equal(real, WORLD.real_videos_for(CAPTIONS, seed=1))


def test_pixels_come_back_and_what_cannot_be_read_is_refused() -> None:
    pixels = torch.rand(2, 1, 1, 8, 8)
    assert torch.allclose(WORLD.decode(WORLD.encode(pixels)), pixels.expand(-1, -1, 3, -1, -1), atol=1e-6)
    assert (
        WORLD.decode(WORLD.encode(pixels) + 10).max() == 1 < WORLD.decode(WORLD.encode(pixels) + 10, clamp=False).max()
    )
    assert [WORLD.parse(caption) for caption in WORLD.captions] == list(range(10))
    for problem, call in {
        "write 'a handwritten D', D one of zero": lambda: WORLD.parse("the digit two"),
        r"pixels must be .*got \[1, 1, 1, 8, 9\]": lambda: WORLD.encode(torch.zeros(1, 1, 1, 8, 9)),
        "'train' or 'test', got 'val'": lambda: WORLD.batch([0], "val"),  # type: ignore[arg-type]
        "must be >= 0, got -1": lambda: WORLD.batch([-1], "train"),
    }.items():
        with pytest.raises(ValueError, match=problem):
            call()


# ------------------------------------------------------------------------------------------------------------- judge


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DigitsJudge]:
    """A judge of the fixed recipe, but for a quarter of its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_net, "_STEPS", 300)
        yield DigitsJudge(WORLD, tmp_path_factory.mktemp("judge"))


def class_means() -> Tensor:
    """What a one-step teacher makes: the mean image of each caption's digit."""
    latents, digits = WORLD.every("train")
    return torch.stack([latents[digits == WORLD.parse(caption)].mean(0) for caption in CAPTIONS])


def test_the_judge_ranks_real_copied_blurred_and_wrong_images(judge: DigitsJudge) -> None:
    assert judge.accuracy > 0.9
    real = judge.evaluate(WORLD.real_videos_for(CAPTIONS, seed=7), CAPTIONS)
    assert set(METRICS) <= set(real)
    assert all(math.isfinite(value) for value in real.values())
    assert abs(real["fid"] - real["fid_floor"]) < 5 * real["fid_floor_sd"]
    assert real["fid_raw"] > 0
    assert real["digit_right"] > 0.9
    assert 0.9 < real["novelty"] < 1.1
    assert 0.85 < real["diversity"] < 1.2
    assert abs(real["intensity"] - real["intensity_real"]) < 5 * real["intensity_se"]
    assert real["clipped"] == 0
    copies = judge.evaluate(WORLD.real_videos_for(CAPTIONS, 7, "train"), CAPTIONS)
    assert copies["novelty"] < 0.01
    assert copies["fid"] < real["fid_floor"]
    blurred = judge.evaluate(class_means(), CAPTIONS)
    assert blurred["fid"] > 3 * real["fid"]
    assert blurred["diversity"] < 0.01
    wrong = judge.evaluate(WORLD.real_videos_for([*CAPTIONS[1:], CAPTIONS[0]], seed=7), CAPTIONS)
    assert wrong["digit_right"] < 0.1
    assert abs(wrong["fid"] - real["fid"]) < 1


def test_a_judge_is_kept_and_says_what_it_cannot_judge(judge: DigitsJudge) -> None:
    real = WORLD.real_videos_for(CAPTIONS[:20], seed=0)
    again = DigitsJudge(WORLD, judge.path.parent)  # would train for all the steps
    assert again.accuracy == judge.accuracy
    assert again.evaluate(real, CAPTIONS[:20]) == judge.evaluate(real, CAPTIONS[:20])
    for problem, latents, captions in (
        (r"latents must be \[B, 1, 1, 8, 8\]", real[:, :, :, :4], CAPTIONS[:20]),
        ("one caption each; got 20 and 3", real, CAPTIONS[:3]),
        ("NaN or infinity", real / 0, CAPTIONS[:20]),
    ):
        with pytest.raises(ValueError, match=problem):
            judge.evaluate(latents, captions)


# ----------------------------------------------------------------------------------------------------------- training


def small_recipe(name: str) -> RunConfig:
    """A recipe of small random networks, from the first update on."""
    config = load_run(ROOT / "configs" / name)
    for network in (config.student, config.teacher, config.critic):
        if network is not None:
            network.init, network.overrides = None, dict(SMALL[name.split("/")[0]])
    config.training.critic_warmup_steps = 0
    config.training.global_batch_size = config.training.micro_batch_size = 4
    config.validation.every = None
    return config


def recipe(name: str, path: Path) -> Trainer:
    """A small recipe's trainer, which keeps no files."""
    return build_trainer(small_recipe(name), RunOptions(path, resume="never", wandb=False, save=False, visualize=False))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_all_that_it_trains(name: str, tmp_path: Path) -> None:
    run = recipe(name, tmp_path)
    trained = {**run.networks, **run.heads}
    method = name.split("/")[1]
    distils = method != "teacher.yaml"
    assert set(trained) == {"student"} | ({"critic"} if method not in ("teacher.yaml", "ladd.yaml") else set()) | (
        {"discriminator"} if distils else set()
    )
    if distils:
        assert isinstance(run.heads["discriminator"].net, ImageHeads)
    before = {(n, k): v.detach().clone() for n, network in trained.items() for k, v in network.net.named_parameters()}
    metrics = [run.training_step()]
    run.step += 1
    metrics.append(run.training_step())
    assert all(math.isfinite(value) for some in metrics for value in some.values())
    moved = {n for (n, k), v in before.items() if not torch.equal(v, trained[n].net.get_parameter(k))}
    assert moved == set(trained)


def state(run: Trainer) -> dict[str, Tensor]:
    """All weights, averages and moments of a run."""
    tensors, _ = save_run({**run.networks, **run.heads})
    return {f"{group}.{name}": value.clone() for group, some in tensors.items() for name, value in some.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resumes_exactly(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_now: list[int] = []

    def run(folder: str, steps: int) -> Trainer:
        config = small_recipe(name)
        config.checkpoint.every = 2
        config.training.max_steps = 4  # the schedule of the learning rate ends there
        made = build_trainer(config, RunOptions(tmp_path / folder, "auto", steps, wandb=False, visualize=False))
        step = made.training_step
        monkeypatch.setattr(made, "training_step", lambda: (made_now.append(made.step), step())[1])
        made.train()
        return made

    whole, _ = run("whole", 4), run("halves", 2)
    resumed = run("halves", 4)
    assert made_now == [0, 1, 2, 3, 0, 1, 2, 3]
    expected, found = state(whole), state(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_ladd_judges_at_the_noise_levels_that_it_is_told(tmp_path: Path) -> None:
    run = recipe("digits/ladd.yaml", tmp_path)
    adversary = run.losses.adversary  # type: ignore[attr-defined]
    noise = Noise(0, 0, range(4000), torch.device("cpu"))
    for mean in (-0.5, 1.0):
        run.config.objective.ladd_mean = mean
        sigma = adversary.sigma(noise, "x", run.task.latent_shape)
        assert abs(torch.logit(sigma.median()) - mean) < 0.06
        assert 0.02 <= sigma.min() < sigma.max() <= 0.98


@pytest.mark.parametrize("folder", SMALL)
def test_recipes_are_one_geometry_and_one_step_from_the_start_of_their_path(folder: str) -> None:
    configs = {path.name: load_run(path) for path in (ROOT / "configs" / folder).glob("*.yaml")}
    teacher = configs.pop("teacher.yaml")
    assert set(configs) == {"dmd2.yaml", "f_distill.yaml", "ladd.yaml"}
    for config in configs.values():
        (sigma,) = config.schedule.sigmas()
        assert abs(sigma - config.student.path.start) < 1e-5
        assert config.data == teacher.data
        for network in (config.student, config.teacher, config.critic):
            assert network is None or (network.geometry() == teacher.student.geometry() and network.init is not None)


@pytest.mark.parametrize("folder", SMALL)
def test_the_usual_evaluation_takes_this_judge(folder: str, judge: DigitsJudge, tmp_path: Path) -> None:
    run = recipe(f"{folder}/teacher.yaml", tmp_path)
    generator = Generator(run.config, run.networks["student"].score, torch.device("cpu"), task=run.task)
    assert isinstance(run.task, DigitsTask)
    row, latents = evaluate_generator("x", generator, judge, count=6, split="dev", sampling=Sampling(steps=2))  # type: ignore[arg-type]
    assert latents.shape == (6, 1, 1, 8, 8)
    assert row.evaluations == 2
    assert row.metrics["videos"] == 6
    real = evaluate_real(judge, count=40, split="dev")  # type: ignore[arg-type]
    assert real.metrics["digit_right"] > row.metrics["digit_right"]
    assert real.metrics["fid"] < row.metrics["fid"]
    assert run.task.decode(latents).shape == (6, 1, 3, 8, 8)


DIGITS: dict[str, Any] = {
    "data": {"kind": "digits"},
    "rollout": {"kind": "backward_simulation"},
    "objective": {"gan": {"heads": "image"}},
    **{name: {**NETWORK, "overrides": SMALL["digits"]} for name in ("student", "teacher", "critic")},
}
MANY = {"data": {"kind": "toy"}, **dict.fromkeys(("student", "teacher", "critic"), NETWORK)}
SYNTHETIC = {"kind": "synthetic", "synthetic": {"frames": 1, "height": 8, "width": 4}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            MANY,
            "objective.gan.heads image judges single images, not videos of 9 latent frames: choose video or register",
        ),
        ({"rollout": {"kind": "self_forcing"}}, "data.kind digits and causal.num_frame_per_block disagree: 1 latent"),
    ],
)
def test_what_cannot_work_is_refused_at_load(changes: dict[str, Any], problem: str) -> None:
    run_from_plain(merged(DISTILLATION, DIGITS))
    with pytest.raises(ConfigError, match=problem):
        run_from_plain(merged(merged(DISTILLATION, DIGITS), changes))


@pytest.mark.parametrize(
    ("base", "changes", "problem"),
    [
        (
            DIFFUSION,
            {"data": {"kind": "digits"}},
            "in_dim 4 and out_dim 4 do not fit data.kind digits: set both to its 1 ",
        ),
        (DISTILLATION, {**DIGITS, "data": SYNTHETIC}, "objective.gan.heads: image heads need square images, not 4x2"),
        (DISTILLATION, {**DIGITS, "objective": {"reward": {"name": "x"}}}, "this data has no rewards"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_built(
    base: dict[str, Any], changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    config = run_from_plain(merged(base, changes))
    with pytest.raises(ConfigError, match=problem):
        build_trainer(config, RunOptions(tmp_path, resume="never", wandb=False, save=False, visualize=False))
