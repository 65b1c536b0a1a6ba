"""Plain data parallelism over gloo, by the command that a user types and by ranks forked as it starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_run
from tests import forked
from tests.small import DIFFUSION, DISTILLATION, ODE, SHORT, config, save_networks, with_weights
from tests.trainer.test_trainer import curve, tensors
from trainer.base import RunOptions
from trainer.build import build_trainer
from utils import checkpoint
from utils.config import to_yaml


def run(ranks: int, yaml: Path, logdir: Path, *, max_steps: int | None = None) -> None:
    """Several ranks are forked; a single one is this process."""
    if ranks == 1:
        assert build_trainer(load_run(yaml), RunOptions(logdir, "auto", max_steps, wandb=False)).train() == 0
        return
    more = () if max_steps is None else ("--max_steps", str(max_steps))
    done = forked.run(ranks, "train.py", "--config_path", str(yaml), "--logdir", str(logdir), *more)
    assert done.returncode == 0, done.stderr[-3000:]


def torchrun(ranks: int, yaml: Path, logdir: Path) -> None:
    """The command that a user types."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["train.py", "--config_path", str(yaml), "--logdir", str(logdir)]
    done = subprocess.run(
        command, cwd=forked.ROOT, env=forked.environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(a: Path, b: Path) -> None:
    curve_a, curve_b = curve(a), curve(b)
    assert len(curve_a) == len(curve_b) == 6
    for x, y in zip(curve_a, curve_b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            # fp32 sums in another order, over six updates of AdamW, which amplifies rounding where a gradient is near zero
            assert x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-6), (x["step"], key)


@pytest.mark.parametrize("base", [DISTILLATION, DIFFUSION], ids=["distillation", "diffusion"])
def test_defect_11_ranks_share_the_global_batch_and_give_its_losses(base: dict[str, Any], tmp_path: Path) -> None:
    """One rank, two ranks, and a resume on the other number of ranks: one curve."""
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        to_yaml(config(base, training={"max_steps": 6, "micro_batch_size": 1}, checkpoint={"every": 3}, **SHORT))
    )
    run(1, yaml, tmp_path / "one")
    (torchrun if base is DIFFUSION else run)(2, yaml, tmp_path / "two")
    assert_close(tmp_path / "one", tmp_path / "two")
    if base is DIFFUSION:  # it resumes as the other does
        return
    run(2, yaml, tmp_path / "mixed", max_steps=3)
    run(1, yaml, tmp_path / "mixed")
    assert_close(tmp_path / "one", tmp_path / "mixed")
    assert tensors(tmp_path / "one").keys() == tensors(tmp_path / "mixed").keys()


def test_ranks_that_ran_other_networks_save_and_resume_together(tmp_path: Path) -> None:
    """Ranks share the ODE pairs, unevenly; after a resume one rank carries the count of networks the others never ran."""
    save_networks(tmp_path)
    yaml = tmp_path / "ode.yaml"
    yaml.write_text(to_yaml(config(with_weights(ODE, tmp_path), training={"max_steps": 2, "micro_batch_size": 2})))
    run(2, yaml, tmp_path / "ode")
    assert all(entry["student/loss"] > 0 for entry in curve(tmp_path / "ode"))
    state = checkpoint.load_state(tmp_path / "ode/checkpoints/step_00000002")
    assert state["evaluations"]["frames"]["teacher"] == 6 * 6 * 2 * 9  # pairs x steps x guidance x frames
    yaml = tmp_path / "dmd.yaml"
    few = {"max_steps": 6, "micro_batch_size": 2, "generator_update_interval": 3}
    yaml.write_text(to_yaml(config(training=few, checkpoint={"every": 1, "keep_last": 9}, **SHORT)))
    run(2, yaml, tmp_path / "dmd", max_steps=3)
    run(2, yaml, tmp_path / "dmd")
    yaml.write_text(to_yaml(config(training={**few, "micro_batch_size": 4}, checkpoint={"every": 6}, **SHORT)))
    run(1, yaml, tmp_path / "whole")
    ends = [checkpoint.load_state(tmp_path / name / "checkpoints/step_00000006") for name in ("dmd", "whole")]
    assert ends[0]["evaluations"]["frames"] == ends[1]["evaluations"]["frames"]


def test_defect_10_killed_run_resumes_and_sigterm_saves(tmp_path: Path) -> None:
    """SIGKILL loses at most what came after the last save; SIGTERM to the ranks saves first. The curve has no seam."""
    yaml = tmp_path / "run.yaml"
    yaml.write_text(to_yaml(config(training={"max_steps": 400}, checkpoint={"every": 7}, **SHORT)))
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 128 + 15)):
        before = len(checkpoint.list_checkpoints(tmp_path / "run/checkpoints"))
        running = forked.Running(1, "train.py", "--config_path", str(yaml), "--logdir", str(tmp_path / "run"))
        deadline = time.monotonic() + 120
        first = checkpoint.latest(tmp_path / "run/checkpoints")
        while checkpoint.latest(tmp_path / "run/checkpoints") == first and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(running.processes[0].pid or 0, number)
        done = running.wait(60)
        assert done.codes == [code], done.stderr[-2000:]
        assert len(checkpoint.list_checkpoints(tmp_path / "run/checkpoints")) >= max(before, 1)
    stopped = checkpoint.latest(tmp_path / "run/checkpoints")
    assert stopped is not None
    steps = checkpoint.step_of(stopped)
    assert [entry["step"] for entry in curve(tmp_path / "run")] == list(range(1, steps + 1))
    run(1, yaml, tmp_path / "whole", max_steps=steps)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
