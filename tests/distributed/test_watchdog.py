"""Runs in which one rank dies, stays away, runs something else, or spoils an update: said in words, and over."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests import forked
from tests.small import DIFFUSION, config
from utils import checkpoint
from utils.config import to_yaml
from utils.watchdog import EXIT_STUCK

pytestmark = pytest.mark.slow
FAULTY = "tests.distributed.faulty_train"


def faulty(fault: str, ranks: int, path: Path, *more: str) -> tuple[str, set[int], list[list[str]]]:
    """What the ranks of a failing run said, their exit codes, and the lines that each noted. No process of it is left."""
    yaml = path / "run.yaml"
    yaml.write_text(
        to_yaml(config(DIFFUSION, training={"max_steps": 8, "global_batch_size": 6, "micro_batch_size": 1}))
    )
    arguments = ["--config_path", str(yaml), "--logdir", str(path / "run"), *more]
    done = forked.run(ranks, FAULTY, *arguments, env={"FAULT": fault, "NOTES": str(path)}, timeout=200)
    notes = [(path / f"rank{rank}.txt").read_text().splitlines() for rank in range(ranks)]
    for lines in notes:
        with pytest.raises(ProcessLookupError):
            os.kill(int(lines[0]), 0)
    return done.stderr, set(done.codes), [lines[1:] for lines in notes]


def reports(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("watchdog: ")]


def test_a_rank_that_stays_away_is_named_with_what_it_does_and_all_end(tmp_path: Path) -> None:
    stuck = ("watchdog.stuck_after_seconds=4", "watchdog.slow_after_seconds=60")
    stderr, codes, notes = faulty("absent", 3, tmp_path, *stuck)
    [report] = reports(stderr)
    away = r"rank 2 is at step 2 in 'iteration' for \d+ s"
    waiting = r"ranks 0-1 are at step 2 in 'student loss and backward' for \d+ s"
    assert re.fullmatch(rf"watchdog: rank \d has not moved for [45] s; {away}; {waiting}", report)
    stacks = stderr[stderr.index(report) :]
    assert re.search(r"rank 2:\n(  .*\n)*  faulty_train.py:\d+ in misbehave: time.sleep\(600\)\n", stacks)
    assert codes <= {EXIT_STUCK, -15}
    assert EXIT_STUCK in codes
    assert [len(lines) for lines in notes] == [2, 2, 2]


def test_a_killed_rank_is_reported_by_the_one_that_missed_it(tmp_path: Path) -> None:
    stderr, codes, _ = faulty("killed", 2, tmp_path)
    [report] = reports(stderr)
    where = "at step 2 in 'student loss and backward'"
    assert re.match(f"watchdog: rank 0 lost another rank {where}: .*[Cc]onnection.* by peer", report)
    assert re.search(r"; rank 1 is silent since [\d:]{8} \(dead or stopped\), last at step \d in ", report)
    assert re.search(f"; rank 0 is {where} for", report)
    assert codes == {-9, EXIT_STUCK}


def refused(path: Path, fault: str, *more: str) -> str:
    """The one line of a run that does not begin, without a report of the watchdog."""
    stderr, codes, notes = faulty(fault, 2, path, *more)
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("rank 0: ")]
    assert len(lines) == 1, stderr
    assert codes <= {2, -15}
    assert 2 in codes
    assert notes == [[], []]
    return lines[0].partition("error: ")[2]


def test_ranks_with_different_commands_do_not_start(tmp_path: Path) -> None:
    line = refused(tmp_path, "command")
    said = [
        "--resume differs: rank 0: auto, rank 1: never",
        "--max_steps differs: rank 0: None, rank 1: 6",
        "seed differs: rank 0: 0, rank 1: 1",
    ]
    assert line.startswith(f"the ranks do not run the same: {'; '.join(said)}: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mistake", ["student.presett=toy", "student.init=nowhere"], ids=["before", "after"])
def test_a_mistake_is_one_line_though_a_rank_comes_late(tmp_path: Path, mistake: str) -> None:
    """Found before the ranks have met, and after."""
    assert "student" in refused(tmp_path, "late", mistake)


LEFT, RIGHT, UP = (f"the digit two moving {way}" for way in ("left", "right", "up"))


DIFFER = f"number 2 differs: rank 0: {RIGHT}, rank 1: {UP}: "


@pytest.mark.parametrize(
    ("key", "other", "expected"),
    [
        ("data.prompts", [LEFT, UP], f"the ranks do not run the same: data.prompts, {DIFFER}"),
        ("validation.prompts", [LEFT, UP], f"the ranks do not run the same: validation.prompts, {DIFFER}"),
        ("data.prompts", [], "rank 1: data: prompts: no such file: prompts.txt"),
        ("data.prompts", [LEFT, RIGHT], "--logdir run: rank 1 on "),
    ],
    ids=["prompts", "validation", "no prompts", "folder"],
)
def test_ranks_on_nodes_with_other_files_do_not_start(
    tmp_path: Path, key: str, other: list[str], expected: str
) -> None:
    for name, prompts in {"disk0": [LEFT, RIGHT], "disk1": other}.items():
        (tmp_path / name).mkdir()
        if prompts:
            (tmp_path / name / "prompts.txt").write_text("\n".join(prompts))
    # prompts are compared on a folder that both see
    logdir = "run" if other == [LEFT, RIGHT] else str(tmp_path / "run")
    assert refused(tmp_path, "disks", f"{key}=prompts.txt", "--logdir", logdir).startswith(expected)


def test_one_ranks_bad_numbers_are_its_own_and_no_rank_takes_the_update(tmp_path: Path) -> None:
    stderr, codes, notes = faulty("nan", 2, tmp_path, "training.non_finite_limit=2")
    skipped = [line for line in stderr.splitlines() if "update skipped" in line]
    assert len(skipped) == 4  # each said once, not by every rank
    said = [re.search(r"step (\d): student: not finite: (.*); update skipped", line) for line in skipped]
    assert [match and match[1] for match in said] == ["1", "3", "5", "6"]
    for match in said:
        shards = r"gradient of [\w.]+ \(its shard\)"  # the reduction has spread it: the loss alone says whose it was
        whose = rf"{shards} on ranks 0-1" if match[1] == "3" else rf"{shards} on rank 0; loss, {shards} on rank 1"
        assert re.fullmatch(whose, match[2])
    assert notes[0] == notes[1]  # the same weights on both ranks, before and after each update
    kept = [step for step, before, after in map(str.split, notes[0]) if before == after]
    assert kept == ["1", "3", "5", "6"]
    assert len(notes[0]) == 7
    assert "2 updates of student in a row were not finite" in stderr
    assert 2 in codes
    assert checkpoint.latest(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step_00000007"
