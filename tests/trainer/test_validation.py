"""Validation videos: what they show, whatever the batches they are sampled in, and what they leave alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.sections import SampleWeights
from model.types import Conditioning
from tests.nets import relative
from tests.small import DISTILLATION, save_networks, trainer, with_weights
from tests.trainer.test_trainer import curve
from trainer.validation import sample_pixels, shown_weights
from utils.random import Noise


def test_validation_writes_videos_without_touching_the_run(tmp_path: Path) -> None:
    trainer(tmp_path / "with", max_steps=4, validation={"every": 2, "weights": "both"}).train()
    trainer(tmp_path / "without", max_steps=4).train()
    assert sorted(p.name for p in (tmp_path / "with/validation").iterdir()) == [
        "step_000002_ema.mp4", "step_000002_raw.mp4", "step_000004_ema.mp4", "step_000004_raw.mp4",
    ]  # fmt: skip
    steps = [entry for entry in curve(tmp_path / "with") if "critic/loss" in entry]
    assert steps == curve(tmp_path / "without")


def test_videos_are_sampled_in_micro_batches_and_are_those_of_one_batch(tmp_path: Path) -> None:
    """No more videos at a time than training has, whatever their number; each from its own prompt and noise."""
    save_networks(tmp_path)
    changes = {"training": {"micro_batch_size": 2}, "validation": {"count": 5}}
    run = trainer(tmp_path / "run", with_weights(DISTILLATION, tmp_path), **changes)
    sizes: list[int] = []

    def sampler(conditioning: Conditioning, negative: dict[str, Tensor], noise: Noise) -> Tensor:
        sizes.append(conditioning.batch)
        assert negative["text"].shape[0] == len(noise.sample_ids) == conditioning.batch
        return run.sample(conditioning, negative, noise)

    prompts, seed = run.validation_prompts, run.config.validation.seed
    pixels = sample_pixels(sampler, run.task, prompts, run.config, run.device)
    assert sizes == [2, 2, 1]
    assert pixels is not None
    with torch.no_grad():
        whole = run.sample(run.task.conditioning(prompts), run.task.negative(5), Noise(seed, 0, range(5)))
    assert relative(pixels, run.task.decode(whole)) < 1e-5
    assert all(relative(a, b) > 0.1 for i, a in enumerate(pixels) for b in pixels[:i])


@pytest.mark.parametrize(
    ("wanted", "with_average", "without"),
    [("ema", ["ema"], ["raw"]), ("raw", ["raw"], ["raw"]), ("both", ["ema", "raw"], ["raw"])],
)
def test_without_an_average_the_raw_weights_are_shown(wanted: str, with_average: list[str], without: list[str]) -> None:
    assert shown_weights(SampleWeights(wanted), True) == with_average
    assert shown_weights(SampleWeights(wanted), False) == without
