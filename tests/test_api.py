"""fewstep from Python does what the commands do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewstep
from configs.load import load_run
from generation.generator import Generator
from tests.small import DISTILLATION, config, save_networks, with_weights
from utils.config import to_yaml
from utils.video import eight_bits


def test_a_run_is_trained_goes_on_and_streams_what_the_generator_makes(tmp_path: Path) -> None:
    save_networks(tmp_path)
    yaml, folder = tmp_path / "run.yaml", tmp_path / "logs"
    yaml.write_text(to_yaml(config(with_weights(DISTILLATION, tmp_path), training={"max_steps": 3})))
    assert fewstep.train(yaml, "training.max_steps=2", logdir=folder) == folder
    fewstep.train(yaml, logdir=folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3

    student, prompt = fewstep.load(folder, device="cpu"), "the digit three moving left"
    parts = list(student.stream(prompt, fewstep.Sampling(seed=3), number=1))
    assert len(parts) > 1
    generator = Generator.load(folder, torch.device("cpu"))
    pixels = generator.task.decode(generator([prompt], fewstep.Sampling(seed=3), [1]))[0]
    assert torch.equal(eight_bits(torch.cat(parts)), eight_bits(pixels))
    assert torch.equal(student.video(prompt, fewstep.Sampling(seed=3), number=1), torch.cat(parts))


def test_what_cannot_be_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(fewstep.UserError, match="no checkpoint in"):
        fewstep.load(tmp_path)
    with pytest.raises(fewstep.ConfigError, match=r"training\.max_step: unknown key"):
        fewstep.train("configs/toy/teacher.yaml", "training.max_step=1")
    with pytest.raises(fewstep.UserError, match="needs a logdir"):
        fewstep.train(load_run("configs/toy/teacher.yaml"))
    wrong = load_run("configs/toy/teacher.yaml")
    wrong.generator_training.optimizer.lr = "fast"  # type: ignore[assignment]
    with pytest.raises(fewstep.ConfigError, match=r"^generator_training\.optimizer\.lr: 'fast' is not allowed: give a"):
        fewstep.train(wrong, logdir=tmp_path / "wrong")
    with pytest.raises(fewstep.UserError, match="weights 'mean' are unknown: choose ema or raw"):
        fewstep.load(tmp_path, weights="mean")
    with pytest.raises(fewstep.UserError, match="there is no device abacus here: choose cpu"):
        fewstep.load(tmp_path, device="abacus")
