"""The teacher that ships: its first steps are made again, its digest is the recorded one, and recipes load it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from configs.load import load_run
from model.score import ScoreNet
from scripts.shapes_teacher import STAGES, WEIGHTS, digest, losses
from tests import ROOT
from trainer.base import RunOptions
from trainer.build import build_trainer
from utils.errors import UserError

ASSET = ROOT / "assets/shapes_teacher"
RECORD = json.loads((ASSET / "training/record.json").read_text())


def test_the_weights_are_those_of_the_record() -> None:
    assert {WEIGHTS: digest(ASSET / WEIGHTS)} == RECORD["sha256"]
    assert (ASSET / WEIGHTS).stat().st_size < 4e6
    assert [command.split("--config_path ")[1].split()[0] for command in RECORD["commands"]] == [
        f"configs/shapes/{stage}.yaml" for stage in STAGES
    ]


def test_its_first_steps_give_the_recorded_losses(tmp_path: Path) -> None:
    config = load_run(ASSET / "training/teacher.yaml")
    assert config == load_run(ROOT / "configs/shapes/teacher.yaml")  # whoever changes the recipe trains the asset again
    run = build_trainer(config, RunOptions(tmp_path, "never", wandb=False, visualize=False))
    recorded = [json.loads(line) for line in (ASSET / "training/teacher.jsonl").read_text().splitlines()]
    for line in recorded[:4]:
        found = run.training_step()
        run.step += 1
        for name in ("student/loss", "student/grad_norm"):
            assert found[name] == pytest.approx(line[name], rel=1e-4)


def test_it_has_learnt_and_is_where_the_recipes_look(tmp_path: Path) -> None:
    config = load_run(ROOT / "configs/shapes/causal_init.yaml")
    assert config.student.init == "assets/shapes_teacher"
    for stage in STAGES:
        lines = [json.loads(line) for line in (ASSET / f"training/{stage}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    config.student.init = str(ASSET)
    config.causal.num_frame_per_block = 6
    run = build_trainer(config, RunOptions(tmp_path, "never", wandb=False, visualize=False))
    score = run.networks["student"].score
    assert isinstance(score, ScoreNet)
    clips = run.task.real(range(4))
    noise = torch.randn(clips.latents.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    for captions in (clips.captions, clips.captions[1:] + clips.captions[:1]):
        with torch.no_grad():
            x0 = score.x0(0.5 * clips.latents + 0.5 * noise, torch.full((4, 6), 0.5), run.task.conditioning(captions))
        errors.append((x0 - clips.latents).square().mean() / clips.latents.square().mean())
    assert errors[0] < 0.1
    assert errors[0] < errors[1]


def test_a_run_that_is_not_done_is_no_asset(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "student/loss": 1.0}\n')
    with pytest.raises(UserError, match="1 iterations of 3: train it to the end"):
        losses(tmp_path, 3)
