"""What every Slurm script says in its head, and mistakes that are one line before anything starts. No Slurm is needed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.slurm"))
NAMES = [path.name for path in SCRIPTS]


def head_and_rest(script: Path) -> tuple[str, str]:
    """Comments down to the first command, and the rest."""
    lines = script.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end]), "\n".join(lines[end:])


def launched(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script as the first node runs it; nothing answers it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    command = ["bash", str(ROOT / "slurm" / script)]
    return subprocess.run(command, env=env | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_a_head_says_what_a_cluster_asks_for(script: Path) -> None:
    head, rest = head_and_rest(script)
    for word in ("--partition", "--account", "modules", "conda", "SETUP=", "PYTHON=", "CONTAINER=", "docs/slurm.md"):
        assert word in head
    assert "sbatch" in head
    # settings that the head shows are those that the scripts read
    read = rest + (ROOT / "slurm/common.sh").read_text() + (ROOT / "slurm/training.sh").read_text()
    for name in re.findall(r"\b([A-Z_]{2,})=", head):
        assert re.search(rf"\b{name}\b", read), name


def test_scripts_begin_alike() -> None:
    begins = {head_and_rest(script)[1].split('common.sh"\n')[0] for script in SCRIPTS}
    assert len(begins) == 1


@pytest.mark.parametrize(
    ("script", "environment", "words"),
    [
        *((name, {"SLURM_JOB_ID": "1", "FEWSTEP_ROOT": "/nowhere"}, "set FEWSTEP_ROOT") for name in NAMES),
        ("distill_14b.slurm", {}, "submit it with sbatch"),
        ("distill_14b.slurm", {"SLURM_JOB_ID": "1", "SLURM_EXPORT_ENV": "NONE"}, "--export=NONE keeps the settings"),
        ("preprocess_video.slurm", {"SLURM_JOB_ID": "1"}, "set VIDEOS"),
        ("preprocess_video.slurm", {"SLURM_JOB_ID": "1", "VIDEOS": "a", "IMAGES": "b"}, "set one of them"),
        ("preprocess_ode.slurm", {"SLURM_JOB_ID": "1"}, "set OUT"),
        ("preprocess_ode.slurm", {"SLURM_JOB_ID": "1", "SETUP": "no.sh"}, "no.sh: there is no such file"),
        (
            "preprocess_ode.slurm",
            {"SLURM_JOB_ID": "1", "OUT": "out"} | dict.fromkeys(["SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MAX"], "16")
            | {"SLURM_ARRAY_TASK_COUNT": "16"},
            "leave parts out",
        ),
        ("evaluate.slurm", {"SLURM_JOB_ID": "1", "RUN": str(ROOT), "NPROC": "2"}, "ask for one GPU"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(script: str, environment: dict[str, str], words: str) -> None:
    root = {} if "FEWSTEP_ROOT" in environment else {"FEWSTEP_ROOT": str(ROOT)}
    done = launched(script, **root, **{"SLURM_JOB_NODELIST": "n"}, **environment)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "scontrol" not in line]  # which asks for the nodes in vain
    assert line.startswith("slurm: error: ")
    assert words in line
