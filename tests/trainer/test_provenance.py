"""A resume says in one line what has changed since its checkpoint: config and versions."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import RunConfig
from tests.small import BRIEF, config, trainer
from trainer import base
from trainer.provenance import changed_since, code, config_changes, source_digests, versions
from utils.checkpoint import load_state
from utils.config import to_plain
from utils.logging import console

NOW = {"fewstep": "0.2.0 (b)", "python": "3.12.1", "torch": "2.12.0", "cuda": "12.8"}


def saved(made_with: dict[str, str | None] | None) -> dict[str, Any]:
    state: dict[str, Any] = {"config": to_plain(config(BRIEF))}
    return state if made_with is None else {**state, "made_with": made_with}


def since(state: dict[str, Any], run: RunConfig, mine: dict[str, str | None]) -> str:
    return changed_since(state, config_changes(state, run), mine)


def test_the_versions_of_a_run_are_told_apart() -> None:
    mine = versions(torch.device("cpu"))
    assert mine["torch"] == torch.__version__
    assert mine["cuda"] is None
    assert mine["fewstep"] is not None
    assert mine["fewstep"].startswith("0.")
    assert json.loads(json.dumps(mine)) == mine
    assert since(saved(mine), config(BRIEF), mine) == ""


def test_what_has_changed_is_in_one_line() -> None:
    assert since(saved({**NOW, "torch": "2.11.0", "cuda": None}), config(BRIEF, seed=7), NOW) == (
        "the config is not that of the checkpoint: seed is 0 there and 7 here; the checkpoint was made with other "
        'versions: cuda is null there and "12.8" here; torch is "2.11.0" there and "2.12.0" here'
    )


@pytest.mark.parametrize("made_with", [None, {}, {"torch": "2.12.0"}, {**NOW, "something else": "1"}])
def test_what_a_checkpoint_does_not_know_has_not_changed(made_with: dict[str, str | None] | None) -> None:
    assert since(saved(made_with), config(BRIEF), NOW) == ""


def test_a_resume_under_another_torch_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "propagate", True)
    caplog.set_level(logging.WARNING, "fewstep")
    trainer(tmp_path, BRIEF, max_steps=1).train()
    mine = versions(torch.device("cpu"))
    assert load_state(tmp_path / "checkpoints/step_00000001")["made_with"] == mine
    monkeypatch.setattr(base, "versions", lambda device: {**mine, "torch": "9.9.9"})
    trainer(tmp_path, BRIEF, max_steps=1)
    line = f'the checkpoint was made with other versions: torch is "{mine["torch"]}" there and "9.9.9" here'
    assert set(caplog.messages) == {line}  # a set: pytest hears a logger twice that once did not propagate


def test_sources_are_the_same_wherever_they_lie_and_whether_or_not_git_is_there(tmp_path: Path) -> None:
    def write(root: Path) -> Path:
        for name in ("train.py", "model/__init__.py", "model/attention/rope.py", "logs/snapshot/old.py"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"# {name}\n")
        return root

    first, other = write(tmp_path / "a"), write(tmp_path / "b")
    (other / "logs/snapshot/old.py").write_text("edited")
    subprocess.run(["git", "init", "-q", str(other)], check=True)
    subprocess.run(
        [
            "git",
            "-C",
            str(other),
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "x",
        ],
        check=True,
    )
    same = source_digests(first)
    assert list(same) == ["model/__init__.py", "model/attention/rope.py", "train.py"]
    assert same == source_digests(other)
    assert re.fullmatch(r"\w{12}", code(first, same))
    assert re.fullmatch(r"\w{10}\+" + code(first, same), code(other, same))
    (other / "model/attention/rope.py").write_text("edited")
    assert [path for path, digest in source_digests(other).items() if digest != same[path]] == [
        "model/attention/rope.py"
    ]
    assert code(first, source_digests(other)) != code(first, same)
