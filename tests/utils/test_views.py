"""What only shows a run says once that it cannot be written, and when it can be again with how much was lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from tests.utils.test_writing import files_of_at_most
from utils.views import Lines, View


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_an_outage_is_told_at_both_ends() -> None:
    said: list[str] = []
    view = View("pictures", "pictures", said.append)
    for broken in (False, True, True, True, False, False):
        with view.showing():
            if broken:
                fail(errno.ENOSPC)
    view.close()
    assert said == [
        "pictures cannot be written (No space left on device): the run goes on, and loses pictures until it can",
        "pictures can be written again: 3 pictures were lost",
    ]


def test_what_is_lost_to_the_end_is_told_there() -> None:
    said: list[str] = []
    view = View("metrics.jsonl", "lines", said.append)
    with view.showing():
        fail(errno.EROFS)
    view.close()
    view.close()
    assert said[1:] == ["metrics.jsonl could not always be written: 1 line was lost"]


def test_a_disk_that_comes_and_goes_does_not_fill_the_console() -> None:
    said: list[str] = []
    view = View("metrics.jsonl", "lines", said.append)
    for number in range(2000):
        with view.showing():
            if number % 2:
                fail(errno.ENOSPC)
    view.close()
    assert len(said) <= 2 * 10 + 1
    assert (
        sum(int(text.split(": ")[1].split()[0]) for text in said if " be written" in text and "cannot" not in text)
        == 1000
    )


def test_a_defect_is_no_matter_of_the_disk() -> None:
    view = View("metrics.jsonl", "lines", print)
    with pytest.raises(TypeError), view.showing():
        len(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("room", range(0, 60, 7))
def test_no_half_line_is_left_wherever_the_disk_fills(tmp_path: Path, room: int) -> None:
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.append(json.dumps({"step": 0}))
    size = lines.path.stat().st_size
    for step in (1, 2):
        with files_of_at_most(size + room), pytest.raises(OSError):
            lines.append(json.dumps({"step": step, "name": "n" * 80}))
    lines.append(json.dumps({"step": 3}))
    lines.close()
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [0, 3]


def test_a_line_after_half_a_line_is_a_line_of_its_own(tmp_path: Path) -> None:
    """Where half a line could not be taken back, or another program left it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st')
    Lines(path).append('{"step": 2}')
    assert path.read_text().splitlines() == ['{"step": 0}', '{"st', '{"step": 2}']


def test_a_device_that_takes_nothing_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    lines = Lines(path)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            lines.append("{}")
    path.unlink()
    lines.append("{}")
    assert path.read_text() == "{}\n"
