"""What a job does with the end of its run, for every way in which a run can end. No Slurm: its commands are stubs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

BODY = """
export PATH={bin}:$PATH
. slurm/common.sh
RUN_SLURM={folder} ATTEMPT={folder}/attempt_$RESTART SIGNALLED={signalled} TERMINATED={terminated}
sleep() {{ :; }}
settle
"""


@pytest.mark.parametrize(
    ("codes", "signalled", "terminated", "restarts", "requeued", "status", "word"),
    [
        ((0, 0), "", "", 0, False, 0, "finished"),
        ((0, 0), "1", "", 0, False, 0, "finished"),  # USR1 after the last step
        ((138, 138), "1", "", 0, True, None, "requeued"),
        ((138,), "1", "", 0, True, None, "requeued"),  # the other rank's node was too slow to write it
        ((), "1", "", 0, True, None, "requeued"),  # killed before it could listen
        ((138, 138), "1", "", 3, False, 1, "MAX_RESTARTS"),
        ((138, 1), "1", "", 0, False, 1, "failed with code 1"),  # a rank's traceback
        ((2, 2), "", "", 0, False, 2, "failed with code 2: train.py: error: no such key"),
        ((2, 2), "1", "", 0, False, 2, "failed with code 2"),
        ((143, 143), "", "1", 0, False, 1, "sbatch again"),  # scancel
        ((138, 138), "1", "1", 0, False, 1, "sbatch again"),  # scancel after the signal
        ((), "", "", 0, False, 1, "sbatch again"),  # killed by the kernel
        ((75,), "", "", 0, True, None, "requeued after losing a rank"),  # the other rank is gone
        ((75, 143), "", "", 0, True, None, "requeued"),  # torchrun ended the rank that was not waiting
        ((75, 143), "", "1", 0, False, 1, "sbatch again"),  # scancel meanwhile
        ((75, 1), "", "", 0, False, 1, "failed with code 1"),  # one rank's traceback is why the other waited
        ((75,), "", "", 1, True, None, "requeued"),  # the attempt before was signalled
        ((75,), "", "", 2, False, 75, "failed with code 75"),  # and the next one was stuck as well
        ((75,), "", "", 3, False, 1, "MAX_RESTARTS"),
    ],
)
def test_settle(
    tmp_path: Path, codes: tuple[int, ...], signalled: str, terminated: str, restarts: int, requeued: bool,
    status: int | None, word: str,
) -> None:  # fmt: skip
    for attempt, ended in {"attempt_0": (138, 138), "attempt_1": (75, 143), f"attempt_{restarts}": codes}.items():
        (tmp_path / attempt / "exit_codes").mkdir(parents=True)
        for rank, code in enumerate(ended):
            (tmp_path / attempt / f"exit_codes/rank_{rank}").write_text(f"{code}\n")
    (tmp_path / "node0.log").write_text("train.py: error: no such key\nsrun: error: task 0\n")
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/bash\n[ "$1" = requeue ] && echo "$2" > {tmp_path}/asked\nexit 0\n')
    scontrol.chmod(0o755)
    body = BODY.format(bin=scontrol.parent, folder=tmp_path, signalled=signalled, terminated=terminated)
    env = os.environ | {
        "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n", "ROOT": str(ROOT), "SLURM_RESTART_COUNT": str(restarts),
        "MAX_RESTARTS": "3",
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", body], cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert (tmp_path / "asked").exists() == requeued
    assert done.stderr == ""
    assert done.returncode == (status or 0)
    assert word.replace("code 2: ", "code 2, not requeued: ") in done.stdout
