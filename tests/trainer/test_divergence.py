"""A run that diverges keeps its last good checkpoint, says what is saved, and is not gone on with from ruined weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import DIFFUSION, SHORT, config, merged, trainer
from trainer.base import RunOptions, Trainer
from trainer.build import build_trainer
from trainer.weight_sources import open_run
from utils import checkpoint
from utils.errors import UserError

BASE = merged(DIFFUSION, {**SHORT, "checkpoint": {"every": 1, "keep_last": 1}, "training": {"non_finite_limit": 3}})
HUGE = {"generator_training": {"optimizer": {"lr": 1e30}, "lr_schedule": {"warmup_steps": 0}}}


def names(path: Path) -> list[str]:
    return [folder.name for folder in checkpoint.list_checkpoints(path / "checkpoints")]


def clipped_by_nan(run: Trainer, steps: set[int]) -> Trainer:
    """`run`, whose optimizer would see NaN in these iterations: no loss and no gradient is at fault."""
    step, optimizer = run.training_step, run.networks["student"].optimizer
    bound = optimizer.config.clip_norm

    def training_step() -> dict[str, float]:
        optimizer.config = replace(optimizer.config, clip_norm=math.nan if run.step in steps else bound)
        return step()

    run.training_step = training_step  # type: ignore[method-assign]
    return run


def test_a_diverging_run_keeps_its_last_good_checkpoint_and_goes_on_from_it(tmp_path: Path) -> None:
    trainer(tmp_path, BASE, max_steps=2).train()
    good = tmp_path / "checkpoints/step_00000002"
    before = checkpoint.load_tensors(good, "student")
    with pytest.raises(
        UserError, match=r"not finite \(student: .* on rank 0\).*--resume auto goes on from .*step_00000002"
    ):
        trainer(tmp_path, BASE, **HUGE).train()
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    ruined = tmp_path / "checkpoints/step_00000003"
    assert checkpoint.load_state(ruined)["non_finite"].startswith("student: ")
    for told in (tmp_path, tmp_path / "checkpoints"):
        assert checkpoint.resolve_resume(str(told), tmp_path) == good
    with pytest.raises(
        UserError, match=r"step_00000003: its weights are not finite .*whole one is step_00000002: --resume last-good"
    ):
        checkpoint.resolve_resume(str(ruined), tmp_path)
    init = dict(open_run(tmp_path, "raw").read(["head.head.weight"]))  # as student.init
    assert torch.equal(init["head.head.weight"], before["head.head.weight"])
    again = trainer(tmp_path, BASE, max_steps=3)
    assert again.step == 2
    assert again.train() == 0
    assert names(tmp_path) == ["step_00000003"]  # the good one; the ruined one was moved aside
    assert checkpoint.load_state(ruined)["non_finite"] is None


def test_only_ruined_checkpoints_are_no_fresh_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no sound checkpoint"):
        trainer(tmp_path, BASE, **HUGE).train()
    with pytest.raises(UserError, match="no checkpoint in .* has finite weights .*--resume never"):
        trainer(tmp_path, BASE)


def test_no_save_within_a_streak_deletes_an_older_one(tmp_path: Path) -> None:
    """Nor does the one that ends the run; the first after it, whose update was taken, does."""
    with pytest.raises(
        UserError, match="3 updates of student in a row .* is saved, and no older checkpoint was deleted"
    ):
        clipped_by_nan(trainer(tmp_path, BASE), set(range(1, 20))).train()
    assert names(tmp_path) == [f"step_0000000{step}" for step in (1, 2, 3, 4)]
    again = clipped_by_nan(trainer(tmp_path, BASE, max_steps=6), {4})
    assert again.train() == 0
    assert names(tmp_path) == ["step_00000006"]


def test_gradients_that_clipping_makes_nan_ruin_no_weights(tmp_path: Path) -> None:
    run = clipped_by_nan(trainer(tmp_path, BASE, max_steps=1), {0})
    before = [p.detach().clone() for p in run.networks["student"].net.parameters()]
    run.train()
    assert run.skips.total == 1
    assert all(torch.equal(a, p) for a, p in zip(before, run.networks["student"].net.parameters(), strict=True))


def test_without_saves_nothing_claims_to_be_saved(tmp_path: Path) -> None:
    options: dict[str, Any] = {"wandb": False, "save": False, "visualize": False}
    run = build_trainer(config(BASE, **HUGE), RunOptions(tmp_path, **options))
    with pytest.raises(UserError, match="in a row were not finite .*; --no_save: nothing is saved: ") as caught:
        run.train()
    assert "is saved" not in str(caught.value).replace("nothing is saved", "")
    assert not (tmp_path / "checkpoints").exists()
