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
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from os import chdir
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome

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


def drawn(rooms: Sequence[str], seed: int) -> list[MutationSpec]:
    """All mutants of the rooms, in an order that the seed sets."""
    names = [name for name in sorted(operator_names()) if not name.removeprefix("core/").startswith(SKIPPED)]
    operators = {name: get_operator(name)() for name in names if not get_operator(name).arguments()}
    modules = [path for room in rooms for path in sorted(Path(room).rglob("*.py")) if path.name != "kernels.py"]
    mutants = [mutant for module in modules for mutant in mutants_of(module, operators)]
    random.Random(seed).shuffle(mutants)
    return mutants


def mutants_of(module: Path, operators: Mapping[str, Operator]) -> Iterator[MutationSpec]:
    nodes = list(ast_nodes(get_ast_from_path(module)))
    for name, operator in operators.items():
        places = (place for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (start, end) in enumerate(places):
            yield MutationSpec(module, name, occurrence, start, end)


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


def outcome(mutant: MutationSpec) -> str:
    """killed, survived, or nothing: an operator that has nothing to change at its place."""
    for tests in tests_of(mutant.module_path):
        result = mutate_and_test([mutant], tests, LIMIT)
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
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=ROOMS)
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    told = parser.parse_args()
    end = time.monotonic() + 60 * told.minutes
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copied(Path.cwd(), Path(folder))
        chdir(folder)
        mutants = drawn(told.rooms, told.seed)
        for mutant in mutants[: told.count]:
            if time.monotonic() > end:
                break
            counts[found := outcome(mutant)] += 1
            (line, column), name = mutant.start_pos, mutant.operator_name.removeprefix("core/")
            print(f"{found:9} {mutant.module_path}:{line}:{column + 1} {name}", flush=True)
        chdir("/")  # the folder goes
    print(f"{counts['killed']} killed, {counts['survived']} survived, of {len(mutants)} mutants, seed {told.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
