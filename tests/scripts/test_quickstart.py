"""scripts/quickstart.sh with a stand-in for Python: the order of the stages, going on after a failure, a clean stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import ROOT

STAGES = ["teacher", "causal_init", "self_forcing_dmd", "self_forcing_dmd_2step"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Notes its arguments. A run named in $FAIL fails; one named in $HANG waits for a signal and notes how it was stopped.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
run=none
for argument in "$@"; do [[ $last == --logdir ]] && run=${argument##*/}; last=$argument; done
[[ $run == "$FAIL" ]] && exit 7
if [[ $run == "$HANG" ]]; then
  trap 'sleep 0.3; echo "$run saved" >>"$CALLS"; exit 1' TERM
  echo "$run hangs" >>"$CALLS"
  while :; do sleep 0.05; done
fi
exit 0
"""


class Quickstart:
    def __init__(self, folder: Path) -> None:
        self.run_dir, self.calls = folder / "run", folder / "calls.txt"
        self.python = folder / "python"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def start(self, *overrides: str, fail: str = "", hang: str = "") -> subprocess.Popen[str]:
        variables = {"RUN_DIR": self.run_dir, "PYTHON": self.python, "CALLS": self.calls, "FAIL": fail, "HANG": hang}
        self.calls.write_text("")
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "quickstart.sh"), *overrides],
            env=os.environ | {name: str(value) for name, value in variables.items()},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            # a test run in the background ignores SIGINT and hands that down; bash cannot trap what it never gets
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def __call__(self, *overrides: str, fail: str = "") -> tuple[int, str]:
        """(exit code, stderr)."""
        process = self.start(*overrides, fail=fail)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    def trained(self) -> list[str]:
        """Runs whose training was started, by the order of the pipeline."""
        lines = self.calls.read_text().splitlines()
        found = {Path(line.split("--logdir ")[1].split()[0]).name for line in lines if "train.py" in line}
        return [stage for stage in STAGES if stage in found]

    def called(self, what: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if what in line]


@pytest.fixture
def quickstart(tmp_path: Path) -> Quickstart:
    return Quickstart(tmp_path)


def test_stages_run_in_order_with_their_starting_points(quickstart: Quickstart) -> None:
    code, errors = quickstart()
    assert (code, errors) == (0, "")
    assert quickstart.trained() == STAGES
    first, second = quickstart.called("train.py")[:2]
    assert "torch.distributed.run --standalone" in first
    assert "configs/toy/teacher.yaml" in first
    assert f"student.init={quickstart.run_dir}/teacher" in second
    for call in quickstart.called("configs/toy/self_forcing_dmd"):
        for network, start in (("student", "causal_init"), ("teacher", "teacher"), ("critic", "teacher")):
            assert f"{network}.init={quickstart.run_dir}/{start}" in call
    for call in quickstart.called("train.py"):
        ranks = int(call.split("--nproc_per_node ")[1].split()[0])
        assert f"training.micro_batch_size={16 // ranks}" in call
        assert "--resume auto" in call
    *_, inference, last = quickstart.calls.read_text().splitlines()
    assert inference.split()[0].endswith("inference.py")
    assert "--prompts configs/toy/prompts.txt" in inference
    assert last.startswith("-m scripts.report --root")
    assert "--sample" not in last
    notes = sorted(path.name for path in (quickstart.run_dir / "commands").iterdir())
    assert notes == [f"{n}_{stage}.txt" for n, stage in enumerate([*STAGES, "videos", "report"], 1)]


def test_finished_stages_are_skipped_and_a_failed_one_is_done_again(quickstart: Quickstart) -> None:
    code, errors = quickstart(fail="causal_init")
    assert code == 1
    assert "the stage causal_init failed (exit code 7" in errors
    assert "goes on from here" in errors
    assert quickstart.trained() == ["teacher", "causal_init"]
    assert quickstart.called("scripts.report") == quickstart.called("inference.py") == []
    code, _ = quickstart(fail="self_forcing_dmd_2step")
    assert code == 1
    assert set(quickstart.trained()) >= {"causal_init", "self_forcing_dmd_2step"}
    assert "teacher" not in quickstart.trained()
    assert quickstart()[0] == 0
    assert "self_forcing_dmd_2step" in quickstart.trained()
    assert "causal_init" not in quickstart.trained()
    assert quickstart()[0] == 0
    assert quickstart.trained() == []
    assert len(quickstart.called("scripts.report")) >= 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_stage_save_and_stops(quickstart: Quickstart, number: signal.Signals, code: int) -> None:
    process = quickstart.start(hang="causal_init")
    deadline = time.monotonic() + 30
    while not quickstart.called("causal_init hangs") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert quickstart.called("saved") == ["causal_init saved"], (
        "the stage was not left the time to save, or asked twice"
    )
    assert "the same command goes on from here" in errors
    assert quickstart()[0] == 0
    assert "teacher" not in quickstart.trained()
    assert "causal_init" in quickstart.trained()


def test_changed_settings_are_not_mixed_with_an_old_run(quickstart: Quickstart) -> None:
    assert quickstart("seed=1")[0] == 0
    assert all(" seed=1" in call for call in quickstart.called("train.py"))
    code, errors = quickstart("seed=2")
    assert code == 1
    assert f"since {quickstart.run_dir}/teacher was begun" in errors
    assert quickstart.trained() == []


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_two_at_once_do_not_mix(quickstart: Quickstart) -> None:
    process = quickstart.start(hang="teacher")
    deadline = time.monotonic() + 30
    while not quickstart.called("teacher hangs") and time.monotonic() < deadline:
        time.sleep(0.02)
    code, errors = quickstart()
    process.terminate()
    process.communicate(timeout=30)
    assert code == 1
    assert "another quickstart is at work" in errors
