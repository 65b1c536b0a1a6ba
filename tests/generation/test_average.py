"""A short run's average is almost the untrained student: whoever takes it is told, and told what to take instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from generation.export import find
from generation.generator import Generator
from generation.sampling import StudentChoice
from tests.small import BRIEF, DIFFUSION, trainer
from utils.logging import console

CPU = torch.device("cpu")


def test_each_use_of_an_average_that_lags_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "propagate", True)
    ema = {"decay": 0.99, "start": 0}

    def said() -> list[str]:
        lines = [
            record.getMessage()
            for record in caplog.records
            if record.levelname == "WARNING" and "average" in record.message
        ]
        caplog.clear()
        return lines

    run = tmp_path / "run"
    trainer(run, BRIEF, ema=ema, training={"max_steps": 2}, validation={"every": 2, "count": 1}).train()
    (validation,) = said()
    assert "2 of the student's 2 updates and looks back on about 100" in validation
    assert "98% of it is the student as it began: set validation.weights to raw" in validation
    Generator.load(run, CPU)
    find(run, "student", None)
    trainer(tmp_path / "next", DIFFUSION, student={"init": str(run)})
    sampled, exported, begun = said()
    assert sampled.endswith("choose the raw weights (--weights raw)")
    assert exported.endswith("choose the raw weights (--weights raw)")
    assert begun.endswith("set student.init_weights to raw")

    Generator.load(run, CPU, student=StudentChoice("raw"))
    find(run, "student", "raw")
    find(run, "critic", None)
    trainer(tmp_path / "raw", DIFFUSION, student={"init": str(run), "init_weights": "raw"})
    assert said() == []
    followed = {"ema": {"decay": 0.5, "start": 0}, "training": {"max_steps": 2}, "validation": {"every": 2, "count": 1}}
    trainer(tmp_path / "long", BRIEF, **followed).train()
    Generator.load(tmp_path / "long", CPU)
    assert said() == []
