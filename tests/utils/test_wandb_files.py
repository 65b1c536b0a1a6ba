"""Which steps W&B has: read from its files, and what a resume adds to them."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from utils.logging import RunLogger
from utils.wandb_files import keep_last, last_step, steps


def write_file(path: Path, histories: list[tuple[int, str]]) -> None:
    """A file of W&B with these steps and values, its records cut at the blocks as LevelDB cuts them."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data = bytearray(7)
    for step, value in histories:
        record = Record()
        record.history.step.num = step
        record.history.item.add(key="value", value_json=value)
        rest, kinds = record.SerializeToString(), (1, 2)
        while kinds:
            if (left := 32768 - len(data) % 32768) < 7:
                data += bytes(left)
                continue
            piece, rest = rest[: left - 7], rest[left - 7 :]
            data += struct.pack("<IHB", 0, len(piece), kinds[bool(rest)]) + piece
            kinds = (4, 3) if rest else ()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_the_last_step_is_read_over_blocks_and_runs(tmp_path: Path) -> None:
    assert last_step(tmp_path, "abc") is None
    large = [(step, "7" * size) for step, size in enumerate((10, 40_000, 90_000, 5, 32_700, 3))]
    first, second, other = (
        tmp_path / f"wandb/{kind}run-2026{number}-{run}/run-{run}.wandb"
        for number, (kind, run) in enumerate([("offline-", "abc"), ("", "abc"), ("offline-", "xyz")])
    )
    write_file(first, large)
    assert list(steps(first)) == [0, 1, 2, 3, 4, 5]
    write_file(second, [(6, "1")])
    write_file(other, [(9, "1")])
    assert last_step(tmp_path, "abc") == 6
    second.write_bytes(second.read_bytes()[:-1])  # what a kill leaves
    assert last_step(tmp_path, "abc") == 5
    keep_last(tmp_path, "abc", 7)
    assert (last_step(tmp_path, "abc"), last_step(tmp_path, "xyz")) == (7, 9)
    for damaged in (b"", b"\0" * 8, b"abc", b"abc x", b"abc -3"):
        (tmp_path / "wandb_step.txt").write_bytes(damaged)
        assert last_step(tmp_path, "abc") == 5


def test_wandbs_files_have_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of W&B itself: a run to step 6, and again from step 3."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for done, last in ((0, 6), (2, 8)):
        logger = RunLogger(tmp_path, {}, wandb=True)
        logger.truncate_after(done)
        for step in range(done + 1, last + 1):
            logger.scalars(step, {"loss": float(step)})
        logger.close()
    found, until = [], time.monotonic() + 60
    while len(found) < 8 and time.monotonic() < until:  # W&B still writes when it says that it has finished
        files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        found = [step for file in files for step in steps(file)]
    assert found == [1, 2, 3, 4, 5, 6, 7, 8]
