"""Mutants of model/, pipeline/ and utils/ (Cosmic Ray's operators), and how many of them the tests kill: `make mutants`.

A drawn mutant changes one operator, comparison or constant in a copy of the tree. The tests of its room then run: those
that bear its module's name first, the others after them if these pass. No test of the project imports this file.
"""

from __future__ import annotations

import argparse
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from os import chdir
from pathlib import Path

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem

ROOMS = ("model", "pipeline", "utils")
# types are written with |, and what a function is decorated with or catches is no formula
SKIPPED = ("ReplaceBinaryOperator_BitOr", "RemoveDecorator", "ExceptionReplacer")
NO_TESTS = 5  # pytest's exit code
LIMIT = 300.0  # seconds for the tests of one mutant; a mutant that takes longer is killed


def copied(root: Path, to: Path) -> None:
    """The tracked files, and those that git does not ignore, beside the same environment."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, listed):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    (to / ".venv").symlink_to((root / ".venv").resolve())


def drawn(seed: int) -> list[WorkItem]:
    """All mutants of the rooms, in an order that the seed sets."""
    modules = [path for room in ROOMS for path in sorted(Path(room).rglob("*.py")) if path.name != "kernels.py"]
    with use_db("mutants.sqlite", WorkDB.Mode.create) as database:
        init(modules, database, {})
        items = sorted(
            (item for item in database.work_items if not operator(item).startswith(SKIPPED)),
            key=lambda item: (item.mutations[0].module_path, place(item), operator(item), item.mutations[0].occurrence),
        )
    random.Random(seed).shuffle(items)
    return items


def operator(item: WorkItem) -> str:
    return item.mutations[0].operator_name.removeprefix("core/")


def place(item: WorkItem) -> tuple[int, int]:
    return item.mutations[0].start_pos


@cache
def tests_of(module: Path) -> list[str]:
    """Commands of the tests that bear the module's name, and of those of its room.

    Raises ValueError where they fail without a mutant, as they would say nothing of one.
    """
    room = Path("tests", module.parent)
    room = next(folder for folder in (room, *room.parents) if any(folder.glob("test_*.py")))
    named = sorted(map(str, room.glob(f"test_{module.stem}*.py")))
    return [command(files) for files in (named, sorted(map(str, room.glob("test_*.py")))) if files and runs(*files)]


@cache
def runs(*files: str) -> bool:
    """Whether these have tests that are neither slow nor full; ValueError where they fail."""
    done = subprocess.run(shlex.split(command(files)), capture_output=True, text=True)
    if done.returncode not in (0, NO_TESTS):
        raise ValueError(f"tests fail without a mutant, so they say nothing of one:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def command(files: Sequence[str]) -> str:
    quick = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not full"]
    return shlex.join([".venv/bin/python", "-B", "-m", "pytest", *quick, *files])


def outcome(item: WorkItem) -> str:
    """killed, survived, or nothing: an operator that has nothing to change at its place."""
    for tests in tests_of(item.mutations[0].module_path):
        result = mutate_and_test(item.mutations, tests, LIMIT)
        if result.worker_outcome is WorkerOutcome.NO_TEST:
            return "nothing"
        if result.worker_outcome is not WorkerOutcome.NORMAL:
            raise ValueError(f"a mutant could not be made: {result.output}")
        if result.test_outcome is not TestOutcome.SURVIVED:
            return "killed"
    return "survived"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="no mutant is begun after them")
    parser.add_argument("--count", type=int, help="mutants at most")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    told = parser.parse_args()
    end = time.monotonic() + 60 * told.minutes
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copied(Path.cwd(), Path(folder))
        chdir(folder)
        items = drawn(told.seed)
        for item in items[: told.count]:
            if time.monotonic() > end:
                break
            counts[found := outcome(item)] += 1
            line, column = place(item)
            print(f"{found:9} {item.mutations[0].module_path}:{line}:{column + 1} {operator(item)}", flush=True)
        chdir("/")  # the folder goes
    print(f"{counts['killed']} killed, {counts['survived']} survived, of {len(items)} mutants, seed {told.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
