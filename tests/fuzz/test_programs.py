"""Programs whose input is damaged: each ends with code 2 after one line, or with 0, within a memory and a CPU limit.

`python -m tests.fuzz.test_programs` prints the counts.
"""

from __future__ import annotations

import functools
import itertools
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.fuzz.program import ended
from tests.fuzz.test_readers import KINDS
from tests.importers.cases import RECIPES

MUTATIONS, MANY = 4, 16
RUN = ROOT / "tests/fixtures/old_runs/gan"
STATE = "run/checkpoints/step_00000002/state.json"


@dataclass(frozen=True)
class Case:
    """program: with arguments, in which FOLDER is the folder of its input. file: the one that is damaged there."""

    program: str
    arguments: str
    file: str


def _weights_of_run(folder: Path) -> str:
    return str(next((folder / "run/checkpoints").glob("*/student_ema.safetensors")).relative_to(folder))


SAMPLING = "--run FOLDER/run --frames 6 --out FOLDER/out"
TRAINING = "--config_path FOLDER/run/config.yaml --logdir FOLDER/out --max_steps 1"
CASES = {
    "train, recipe": Case("train.py", TRAINING, "run/config.yaml"),
    "train, weights": Case("train.py", f"{TRAINING} student.init=FOLDER/run", "WEIGHTS"),
    "train, prompts": Case("train.py", f"{TRAINING} data.prompts=FOLDER/p.csv", "p.csv"),
    "train, resume": Case("train.py", "--config_path FOLDER/run/config.yaml --logdir FOLDER/run --max_steps 3", STATE),
    "doctor, recipe": Case("doctor.py", "FOLDER/run/config.yaml", "run/config.yaml"),
    "inference, state": Case("inference.py", f"{SAMPLING} --prompt digit", STATE),
    "inference, weights": Case("inference.py", f"{SAMPLING} --prompt digit", "WEIGHTS"),
    "inference, prompts": Case("inference.py", f"{SAMPLING} --prompts FOLDER/p.csv", "p.csv"),
    "export, state": Case("export.py", "--run FOLDER/run --format native --out FOLDER/out", STATE),
    "export, weights": Case("export.py", "--run FOLDER/run --format native --out FOLDER/out", "WEIGHTS"),
    "evaluate, state": Case("evaluate.py", "--run FOLDER/run --suite toy --count 2", STATE),
    "import": Case("import_recipe.py", "self_forcing FOLDER/r.yaml", "r.yaml"),
}


def good(folder: Path) -> None:
    """Input that every case accepts."""
    shutil.copytree(RUN, folder / "run")
    (folder / "p.csv").write_text('prompt\n"the digit three moving left"\n"the digit zero moving up"\n')
    shutil.copy(RECIPES / "self_forcing.yaml", folder / "r.yaml")


def tried(case: Case, folder: Path, change: Callable[[bytes], bytes]) -> str:
    """How it ends when its file is damaged by `change`."""
    good(folder)
    file = folder / (_weights_of_run(folder) if case.file == "WEIGHTS" else case.file)
    file.write_bytes(change(file.read_bytes()))
    arguments = case.arguments.replace("FOLDER", str(folder)).split()
    return ended(case.program, arguments, folder / "said")


def damages(name: str, count: int) -> Iterator[Callable[[bytes], bytes]]:
    """`count` seeded mutations, each kind in turn."""
    for number, kind in zip(range(count), itertools.cycle(KINDS)):
        yield functools.partial(kind, draw=random.Random(f"{name} {number}"))


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_input_is_one_line_and_code_2(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert tried(CASES[name], tmp_path / "good", lambda data: data) == "0", (tmp_path / "good/said").read_text()
    found = Counter(tried(CASES[name], tmp_path / str(i), change) for i, change in enumerate(damages(name, MUTATIONS)))
    assert found["0"] + found["2"] == MUTATIONS, found
    assert found["2"], "no damage was noticed"


if __name__ == "__main__":
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    for name in sys.argv[1:] or CASES:
        counts: Counter[str] = Counter()
        for change in damages(name, MANY):
            with tempfile.TemporaryDirectory() as made:
                counts[tried(CASES[name], Path(made) / "x", change)] += 1
        print(f"{name}: {dict(counts)}", flush=True)
        total += counts
    print(f"all: {dict(total)}")
