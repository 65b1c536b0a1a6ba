"""Run folders of an earlier version go on where they stopped, and sample what they sampled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.load import load_run
from generation.generator import Generator
from generation.sampling import Sampling
from tests.nets import relative
from trainer.base import RunOptions
from trainer.build import build_trainer

FOLDER = Path("tests/fixtures/old_runs")
PROMPTS = ["the digit three moving left", "the digit seven moving up"]


@pytest.mark.parametrize("name", ["gan", "adapters"])
def test_an_old_run_goes_on_as_it_would_have(name: str, tmp_path: Path) -> None:
    run = tmp_path / name
    shutil.copytree(FOLDER / name, run)
    build_trainer(load_run(run / "config.yaml"), RunOptions(run, "auto", None, wandb=False)).train()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = json.loads((FOLDER / "expected.json").read_text())[name]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for actual, line in zip(lines[2:], expected, strict=True):
        assert {key: actual[key] for key in line} == pytest.approx(line, rel=1e-5)


@pytest.mark.parametrize("name", ["gan", "adapters"])
def test_an_old_run_samples_what_it_sampled(name: str) -> None:
    expected = load_file(FOLDER / f"{name}_samples.safetensors")["x0"]
    actual = Generator.load(FOLDER / name, torch.device("cpu"))(PROMPTS, Sampling(seed=5), [0, 1])
    assert relative(actual, expected) < 1e-5
