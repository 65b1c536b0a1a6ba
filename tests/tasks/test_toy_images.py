"""Image-to-video on the toy world: samples begin with real videos' first frames, each of its own caption's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.toy_suite import generate_all
from generation.generator import Generator
from generation.sampling import Sampler, Sampling
from model.family import FirstFrame
from model.score import ScoreNet
from tasks.build import build_task
from tasks.kinds.toy import ToyTask
from tests.nets import random_net
from tests.small import DIFFUSION, DISTILLATION, config, merged, trainer
from trainer.distillation import ScoreDistillationTrainer
from utils.errors import ConfigError

CPU = torch.device("cpu")
FRAMES = 5  # the given one, and two blocks of two
IMAGES: dict[str, Any] = merged(
    DISTILLATION,
    {
        "data": {"first_frame": True, "toy": {"frames": FRAMES}},
        "causal": {"num_frame_per_block": 2, "independent_first_frame": True},
        "training": {"max_steps": 2, "critic_warmup_steps": 0},
    },
)


def toy_task(base: dict[str, Any] = IMAGES) -> ToyTask:
    task = build_task(config(base), CPU)
    assert isinstance(task, ToyTask)
    return task


def student(base: dict[str, Any] = IMAGES) -> Generator:
    """A generator whose network has no zero weights."""
    run = config(base)
    return Generator(run, ScoreNet(random_net(3, run.student.geometry()), "student"), CPU, sampler=Sampler(causal=True))


def test_samples_are_given_the_first_frame_of_videos_of_their_own_captions() -> None:
    task, positions = toy_task(), range(3, 9)
    videos, made = task.world.batch(positions, "train"), task.conditions(positions)
    assert made.initial is not None
    assert torch.equal(made.initial, videos.latents_BFCHW[:, :1])
    assert torch.equal(made.prompt["text"], task.conditioning(videos.captions).prompt["text"])
    assert task.prompts(positions) == videos.captions  # what ODE pairs and rewards go by
    assert toy_task(merged(IMAGES, {"data": {"first_frame": None}})).conditions(positions).initial is None


def test_a_rollout_goes_on_from_the_frame_and_no_loss_judges_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, IMAGES, resume="never")
    assert isinstance(run, ScoreDistillationTrainer)
    (micro,) = run.batch("generator")
    made, conditioning = run.rollout(micro, with_gradient=False)
    assert conditioning.initial is not None
    assert torch.allclose(made.x0[:, :1], conditioning.initial, atol=1e-5)
    assert made.frame_mask is not None
    assert made.frame_mask.tolist() == [False, True, True, True, True]
    assert run.train() == 0


def test_each_video_has_its_own_frame_whatever_is_made_beside_it() -> None:
    generator = student()
    task, sampling = generator.task, Sampling(seed=4)
    assert isinstance(task, ToyTask)
    prompts = task.world.captions[::9][:5]
    first_frames = task.first_frames(prompts, 4)
    for caption, video in zip(prompts, task.world.real_videos_for(prompts, 4), strict=True):
        digit, direction = task.world.parse(caption)
        assert video.shape == (FRAMES, 4, 8, 8)
        assert 0 <= digit < 10
        assert direction
    made = generate_all(generator, prompts, sampling, batch=2)
    assert made.shape == (5, FRAMES, 4, 8, 8)
    # latents -> pixels in [0, 1] -> latents
    assert torch.allclose(made[:, :1], first_frames, atol=1e-5)
    pixels = task.decode(first_frames)
    for i, prompt in enumerate(prompts):
        alone = generator([prompt], sampling, [i], pixels[i])
        assert torch.allclose(alone, made[i : i + 1], atol=1e-4)
        assert not torch.allclose(generator([prompt], sampling, [i], pixels[i - 1])[:, 1:], alone[:, 1:], atol=1e-3)


def test_the_baseline_is_run_on_the_student_s_videos() -> None:
    teacher = config(merged(DIFFUSION, {"data": {"toy": {"frames": 6}}}))
    made = student()
    naive = Generator(teacher, made.score, CPU).as_causal(made.config)
    prompts = made.task.validation_prompts(2)
    assert torch.equal(generate_all(naive, prompts, Sampling()), generate_all(made, prompts, Sampling()))


def test_validation_gives_frames_that_fit_its_prompts() -> None:
    task = toy_task()
    prompts = task.validation_prompts(4)
    first_frames = task.validation_visual(range(4), prompts).initial
    assert first_frames is not None
    assert torch.equal(first_frames, task.world.real_videos_for(prompts, 0)[:, :1])


def test_runs_that_have_no_frames_to_give_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="first_frame True and data.real False, but t2v networks .*: set both to true"
    ):
        trainer(tmp_path, merged(IMAGES, {"data": {"real": False}}))
    with pytest.raises(ValueError, match="set causal.independent_first_frame to true"):
        config(merged(IMAGES, {"causal": {"independent_first_frame": False}, "data": {"toy": {"frames": 6}}}))
    assert replace(config(IMAGES).data, first_frame=None).has_first_frame(FirstFrame.none, real=True) is False
