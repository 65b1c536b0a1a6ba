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


RUNNING = "JobState=RUNNING Reason=None Requeue=1 Restarts={restarts} PreemptTime=None"


def settled(
    folder: Path,
    codes: tuple[int, ...],
    *,
    signalled: str = "",
    terminated: str = "",
    restarts: int = 0,
    says: str = "",
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """How `settle` ends, and what it asks of Slurm, which holds `says` of the job."""
    for attempt, ended in {"attempt_0": (138, 138), "attempt_1": (75, 143), f"attempt_{restarts}": codes}.items():
        (folder / attempt / "exit_codes").mkdir(parents=True)
        for rank, code in enumerate(ended):
            (folder / attempt / f"exit_codes/rank_{rank}").write_text(f"{code}\n")
    before, now = "train.py: error: of the attempt before\n", "train.py: error: no such key\nsrun: error: task 0\n"
    (folder / "node0.log").write_text(now)
    (folder / "node1.log").write_text(before)
    (folder / f"attempt_{restarts}/node1.log.size").write_text(f"{len(before)}\n")
    asked = folder / "asked"
    asked.touch()
    for name, answer in {"scontrol": f"[ $1 != --oneliner ] || echo {says!r}", "scancel": ""}.items():
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f'#!/bin/bash\n{answer}\n[ "$2" = show ] || [ "$1" = show ] || echo {name} "$@" >> {asked}\n'
        )
        program.chmod(0o755)
    body = BODY.format(bin=folder / "bin", folder=folder, signalled=signalled, terminated=terminated)
    env = os.environ | {
        "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "2", "NPROC": "1", "ROOT": str(ROOT),
        "SLURM_RESTART_COUNT": str(restarts), "MAX_RESTARTS": "3",
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", body], cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    assert (folder / f"attempt_{restarts}/end.txt").read_text().strip() in done.stdout
    return done, asked.read_text().splitlines()


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
    says = RUNNING.format(restarts=restarts)
    done, asked = settled(tmp_path, codes, signalled=signalled, terminated=terminated, restarts=restarts, says=says)
    assert ("scontrol requeue 12" in asked) == requeued
    assert done.returncode == (status or 0)
    assert word.replace("code 2: ", "code 2, not requeued: ") in done.stdout


@pytest.mark.parametrize(
    ("says", "codes", "signalled", "terminated", "asks", "words"),
    [
        # what Slurm has decided counts, whatever the ranks say
        ("PENDING Reason=NodeFail Restarts=1", (75,), "", "1", "", "Slurm requeues this job by itself"),
        ("PENDING Reason=NodeFail Restarts=1", (1, 75), "", "1", "", "Slurm requeues this job by itself"),
        ("PENDING Reason=BeginTime Restarts=1", (143, 143), "", "1", "", "Slurm requeues this job by itself"),
        ("NODE_FAIL Reason=NodeFail Requeue=0 Restarts=0", (75,), "", "1", "", "does not requeue this job (Requeue=0)"),
        ("COMPLETING Reason=TimeLimit Restarts=0", (), "1", "1", "", "the time limit came before the state was saved"),
        ("COMPLETING Reason=None Requeue=0 Restarts=0", (75,), "", "1", "", "ended by Slurm, whose own line says why"),
        ("COMPLETING Reason=None Requeue=1 Restarts=0", (143, 143), "", "1", "", "cancelled, not requeued"),
        # it has decided nothing, or does not answer
        ("", (143, 143), "", "1", "", "stopped as asked (SIGTERM;"),
        ("RUNNING Restarts=0 PreemptTime=2026-01-01T00:00:00", (143, 143), "", "", "scontrol requeue", "a preemption"),
        ("RUNNING Restarts=0", (143, 143), "", "", "scancel", "stopped as asked (SIGTERM;"),
        ("RUNNING Restarts=0", (130, 130), "", "", "scancel", "stopped as asked (SIGINT;"),
        ("RUNNING Restarts=0", (138, 138), "", "", "scontrol requeue", "requeued"),  # USR1 to the ranks alone
        ("RUNNING Restarts=0", (143,), "", "", "", "failed, not requeued: ranks were killed"),  # the other was killed
    ],
)  # fmt: skip
def test_the_last_line_is_what_slurm_will_do(
    tmp_path: Path, says: str, codes: tuple[int, ...], signalled: str, terminated: str, asks: str, words: str
) -> None:
    done, asked = settled(tmp_path, codes, signalled=signalled, terminated=terminated, says=f"JobState={says}")
    assert asked == ([f"{asks} 12"] if asks else [])
    assert words in done.stdout
    assert ("sbatch again" in done.stdout) == ("not requeue" in done.stdout)
