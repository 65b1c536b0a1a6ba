"""What is imported plans and trains: each recipe of `recipes/`, with its networks and its videos made tiny."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from configs.load import load_run
from configs.schema import RunConfig
from planning.hardware import GPUS
from planning.plan import Cluster
from planning.report import plan_text
from tests import ROOT
from tests.importers.cases import cases, dialect_of, imported
from trainer.base import RunOptions
from trainer.build import build_trainer

TINY = ROOT / "configs/wan_tiny.yaml"
NETWORKS = ("student", "teacher", "critic")


def small(files: tuple[Path, ...], folder: Path) -> RunConfig:
    """The imported run at tiny sizes, on random videos; method, steps, shifts and optimizers stay the recipe's."""
    recipe, run = imported(dialect_of(files[0]), *files)
    (folder / "ours.yaml").write_text(yaml.safe_dump(recipe.values))
    overrides = [f"{name}.init=null" for name in NETWORKS if getattr(run, name) is not None]
    overrides += ["data.kind=synthetic", "data.prompts=null", "validation.every=null", "parallel.compile=false"]
    overrides += ["data.latents=null"] if run.data.kind == "wan" and run.data.latents else []
    if run.rollout.kind == "self_forcing":
        overrides += ["rollout.num_training_frames=null", "causal.num_frame_per_block=3"]
    return load_run(folder / "ours.yaml", [str(TINY), *overrides])


@pytest.mark.parametrize("files", [pytest.param(files, id=files[0].name) for files in cases()])
def test_an_imported_run_plans_and_trains(files: tuple[Path, ...], tmp_path: Path) -> None:
    """Two updates of the student, with losses that are numbers and gradients that are not zero."""
    config = small(files, tmp_path)
    training = config.training
    training.max_steps = training.critic_warmup_steps + training.generator_update_interval + 1
    assert "GB" in plan_text(config, Cluster(1, 1, "h200", GPUS["h200"]))
    run = tmp_path / "run"
    build_trainer(config, RunOptions(run, wandb=False)).train()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "student/loss" in line]
    assert len(updates) >= 2
    assert all(math.isfinite(line["student/loss"]) and line["student/grad_norm"] > 0 for line in updates)
