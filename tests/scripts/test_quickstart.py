"""scripts/quickstart.py: its stages are commands that a user could type, each begins with what the last one made."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load_run
from generation.command import inference_args
from scripts.quickstart import FIRST_RECIPE, Quickstart, locked, next_commands, steps_done
from scripts.stages import Stage
from tests import ROOT
from trainer.command import train_args
from utils.errors import UserError
from utils.logging import read_jsonl
from utils.video import read_video

NAMES = ["look", "causal_init", "self_forcing_dmd", "report"]


def quickstart(root: Path, *overrides: str, from_scratch: bool = False, cores: int = 2) -> Quickstart:
    return Quickstart(root, 8, from_scratch, overrides, cores)


def arguments(stage: Stage) -> list[str]:
    """What follows the program's name."""
    command = list(stage.command)
    return command[next(i for i, word in enumerate(command) if word.endswith(".py")) + 1 :]


@pytest.mark.parametrize("from_scratch", [False, True])
def test_each_stage_begins_with_what_the_ones_before_it_made(tmp_path: Path, from_scratch: bool) -> None:
    stages = quickstart(tmp_path, from_scratch=from_scratch).stages()
    by_name = {stage.name: stage for stage in stages}
    assert list(by_name) == (["teacher", "teacher_details"] if from_scratch else []) + NAMES
    teacher = str(tmp_path / "teacher_details") if from_scratch else "assets/shapes_teacher"
    start = {"causal_init": {"student": teacher}, "teacher_details": {"student": str(tmp_path / "teacher")}}
    start["self_forcing_dmd"] = {"student": str(tmp_path / "causal_init"), "teacher": teacher, "critic": teacher}
    for name in [name for name in by_name if name not in ("look", "report")]:
        args = train_args(arguments(by_name[name]))
        assert args.logdir == by_name[name].resumes_in == tmp_path / name
        config = load_run(args.config_path, args.overrides)
        for network, init in start.get(name, {}).items():
            assert getattr(config, network).init == init
    source = inference_args(arguments(by_name["look"])).source
    assert str(getattr(source, "path", source)) == teacher
    report = by_name["report"].command
    assert report[report.index("--teacher") + 1] == teacher
    assert all((ROOT / word).exists() for stage in stages for word in stage.command if word.startswith("configs/"))


def test_videos_of_what_is_trained_are_made_beside_the_next_training_where_there_are_two_cores(tmp_path: Path) -> None:
    for cores, expected in ((0, []), (1, []), (2, [["teacher"], ["teacher", "causal_init"]])):
        beside = [
            list(command[command.index("--sample") + 1 :])
            for stage in quickstart(tmp_path, cores=cores).stages()
            for command in stage.beside
        ]
        assert beside == expected


def test_a_setting_reaches_all_trainings_and_makes_them_others(tmp_path: Path) -> None:
    before, after = quickstart(tmp_path).stages(), quickstart(tmp_path, "seed=1").stages()
    assert [a.digest != b.digest for a, b in zip(before, after, strict=True)] == [False, True, True, True]
    assert [stage.name for stage in after if "seed=1" in stage.command] == ["causal_init", "self_forcing_dmd"]


def test_progress_is_the_last_step_of_the_log(tmp_path: Path) -> None:
    assert steps_done(tmp_path) == 0
    (tmp_path / "config.yaml").write_text("training: {max_steps: 8}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    assert steps_done(tmp_path) == 0.25


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    held = locked(tmp_path)
    try:
        with pytest.raises(UserError, match="another quickstart is at work"):
            locked(tmp_path)
    finally:
        os.close(held)
    os.close(locked(tmp_path))


def test_it_ends_with_commands_that_exist(tmp_path: Path) -> None:
    said = next_commands(quickstart(tmp_path))
    assert "it needs 2 GPUs with 80 GB" in said
    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("  ")]
    assert [command[1] for command in commands] == ["demo.py", "inference.py", "doctor.py"]
    inference_args(commands[1][2:])
    assert (ROOT / commands[2][2]) == ROOT / FIRST_RECIPE


def test_the_whole_way_in_a_few_iterations(tmp_path: Path) -> None:
    few = ["training.max_steps=4", "training.critic_warmup_steps=1", "generator_training.lr_schedule.warmup_steps=1"]
    command = [sys.executable, "-m", "scripts.quickstart", "--root", str(tmp_path), "--count", "4", *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("[") and "->" in line] == ["1/4", "4/4"]
    assert "\r" not in done.stdout
    assert "Self-Forcing + DMD" in (tmp_path / "table.txt").read_text()
    assert len(list((tmp_path / "teacher_videos").glob("*.gif"))) == 8
    assert read_video(tmp_path / "comparison.gif").shape[0] >= 6
    assert [
        line["step"] for line in read_jsonl(tmp_path / "self_forcing_dmd" / "metrics.jsonl") if "critic/loss" in line
    ]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert again.stdout.count("done before") == 4
