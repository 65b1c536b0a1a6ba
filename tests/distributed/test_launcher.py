"""torchrun killed by -9 under a run of two ranks: they save, end with code 75, print no stacks, and leave the folder.
A rank killed by -9 under a torchrun that may start them again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import forked
from tests.small import DIFFUSION, SHORT, config, merged
from utils import checkpoint
from utils.config import to_yaml
from utils.logging import read_jsonl

pytestmark = pytest.mark.slow


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.2)
    return is_so()


def test_ranks_whose_launcher_was_killed_save_and_end(tmp_path: Path) -> None:
    yaml, run, codes = tmp_path / "run.yaml", tmp_path / "run", tmp_path / "codes"
    codes.mkdir()
    long = {"training": {"max_steps": 100_000, "micro_batch_size": 2}, "checkpoint": {"every": 50_000}}
    yaml.write_text(to_yaml(config(merged(DIFFUSION, SHORT), **long)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    with (tmp_path / "stderr").open("wb") as stderr:
        launcher = subprocess.Popen(
            [*command, "--config_path", str(yaml), "--logdir", str(run)],
            cwd=forked.ROOT,
            env=forked.environment() | {"EXIT_CODES": str(codes)},
            stdout=stderr,
            stderr=stderr,
        )
    try:
        assert within(200, lambda: len(read_jsonl(run / "metrics.jsonl")) >= 2), (tmp_path / "stderr").read_text()
    finally:
        launcher.kill()
        launcher.wait()
    assert within(60, lambda: len(list(codes.iterdir())) == 2), (tmp_path / "stderr").read_text()
    time.sleep(0.5)
    assert {path.name: path.read_text() for path in codes.iterdir()} == {"rank_0": "75\n", "rank_1": "75\n"}
    said = (tmp_path / "stderr").read_text()
    [line] = [line for line in said.splitlines() if "error: " in line]
    saved = checkpoint.latest(run / "checkpoints")
    assert saved is not None
    assert f"is gone: step {checkpoint.step_of(saved)} of 100000 is saved in {run}" in line
    assert "frame #" not in said and "Traceback" not in said
    assert within(20, lambda: not (run / "run.lock").exists())
    assert len(read_jsonl(run / "metrics.jsonl")) == checkpoint.step_of(saved)
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and runs_in(int(pid), run)]


def test_torchrun_starts_the_ranks_again_after_one_was_killed(tmp_path: Path) -> None:
    """They find each other in the store that held the first attempt's keys, and go on from the last checkpoint."""
    yaml, run = tmp_path / "run.yaml", tmp_path / "run"
    brief = {"training": {"max_steps": 4, "micro_batch_size": 2}, "checkpoint": {"every": 1}}
    yaml.write_text(to_yaml(config(merged(DIFFUSION, SHORT), **brief)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max_restarts", "2", "-m", "tests.distributed.faulty_train"]
    done = subprocess.run(
        [*command, "--config_path", str(yaml), "--logdir", str(run)],
        cwd=forked.ROOT,
        env=forked.environment() | {"FAULT": "killed once", "NOTES": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4]


def runs_in(pid: int, folder: Path) -> bool:
    try:
        return str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
