"""What is asked for is on disk whole or not at all, and a refusal is one line; nothing that was there is lost."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import ROOT
from tests.test_layers import PACKAGES
from utils.video import write_video
from utils.writing import (
    NAME_BYTES,
    Unwritten,
    check_writable,
    drop_partials,
    neighbour,
    whole_file,
    whole_folder,
    write_text,
    writing,
)

ROOMS = PACKAGES - {"tests", "benchmarks"}
PIXELS = torch.rand(4, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """In this process no file grows beyond so many bytes: as on a disk that fills in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def through_a_file(folder: Path) -> Path:
    (folder / "file").write_text("kept")
    return folder / "file" / "deep" / "x"


def a_folder(folder: Path) -> Path:
    (folder / "x").mkdir()
    (folder / "x" / "kept").write_text("kept")
    return folder / "x"


def a_long_name(folder: Path) -> Path:
    return folder / ("n" * (NAME_BYTES + 1))


PLACES: list[Callable[[Path], Path]] = [through_a_file, a_folder, a_long_name]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_place_where_no_file_can_be_is_refused_before_the_work(place: Callable[[Path], Path], tmp_path: Path) -> None:
    path = place(tmp_path)
    before = names(tmp_path)
    for attempt in (lambda: check_writable(path, "--out"), lambda: write_text(path, "text", "--out")):
        with pytest.raises(Unwritten) as refused:
            attempt()
        said = str(refused.value)
        assert said.startswith(f"--out {path} could not be written: ") and said.endswith(": give another place")
        assert "\n" not in said
    with pytest.raises(Unwritten), whole_file(path):
        raise AssertionError("hours of work that nobody will see")
    assert names(tmp_path) == before


def test_the_file_that_stands_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unwritten, match=f"could not be written: {tmp_path / 'file'} is a file and no folder: give"):
        check_writable(through_a_file(tmp_path), "--out")
    with pytest.raises(Unwritten, match=f"{tmp_path / 'file'} is a file and no folder"):
        check_writable(tmp_path / "file", "--out", folder=True)


def test_the_longest_name_that_a_file_may_have_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * (NAME_BYTES // 2) + "n")
    write_text(path, "text")
    assert names(tmp_path) == [path.name]


def test_a_disk_that_fills_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "before")
    with files_of_at_most(4096), pytest.raises(Unwritten) as refused:
        write_text(path, "after" * 1000, "--out")
    assert str(refused.value) == (
        f"--out {path} could not be written: File too large: free some space there, or give another place"
    )
    assert path.read_text() == "before"
    assert names(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_video_is_whole_wherever_the_disk_fills(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"x{suffix}", PIXELS, 8)
    whole = path.read_bytes()
    path.write_bytes(b"before")
    for most in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        refused = pytest.raises(Unwritten, match=r"x\.\w+ could not be written: .*: free some space")
        with files_of_at_most(most), refused:
            write_video(path, PIXELS, 8)
        assert path.read_bytes() == b"before" and names(tmp_path) == [path.name], most
    with files_of_at_most(len(whole)):
        write_video(path, PIXELS, 8)
    assert path.read_bytes() == whole


def test_what_a_library_written_in_rust_says_is_one_line_too(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    refused = pytest.raises(Unwritten, match="could not be written: File too large: free")
    with files_of_at_most(100), refused, whole_file(path) as temporary:
        save_file({"x": torch.zeros(1000)}, temporary)
    assert names(tmp_path) == []


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    refused = pytest.raises(Unwritten, match="--out .* could not be written: File too large")
    with files_of_at_most(10), refused, whole_folder(tmp_path / "out", "--out") as temporary:
        (temporary / "part").write_text("short")
        (temporary / "other").write_text("longer than that")
    assert names(tmp_path) == []
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "part").write_text("short")
    assert names(tmp_path) == ["out", "part"]
    umask = os.umask(0o22)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask  # not its writer's alone


def test_an_error_about_another_file_is_not_blamed_on_this_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), writing("--out", tmp_path / "x"):
        (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(ValueError, match="^no video$"), whole_file(tmp_path / "x"):
        raise ValueError("no video")


def test_looking_leaves_nothing_behind_and_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("kept")
    check_writable(tmp_path / "x", "--out")
    check_writable(tmp_path / "folder", "--out", folder=True)
    assert names(tmp_path) == ["folder", "x"]
    assert (tmp_path / "x").read_text() == "kept"


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "x.mp4", tmp_path / "y.mp4"
    for partial in (neighbour(path), neighbour(path), neighbour(other), tmp_path / ".x.mp4.notes"):
        partial.write_text("half")
    drop_partials(path)
    drop_partials(tmp_path / "absent" / "x.mp4")
    left = [name.split(".")[1:3] for name in names(tmp_path)]
    assert left == [["x", "mp4"], ["y", "mp4"]]  # its notes, and the other one's


# files whose writes land in a folder that `whole_folder` made, or that nobody's run depends on
ELSEWHERE = {
    "utils/writing.py": "the boundary itself",
    "utils/cli.py": "an exit code, for a launcher",
    "generation/export.py": "in a folder that is renamed when it is whole",
    "model/wan/save.py": "in export's folder",
    "scripts/tiny_models.py": "samples for tests",
    "scripts/shapes_teacher.py": "in export's folder",
}


def test_every_file_is_written_through_the_boundary() -> None:
    """A write of its own ends in a traceback and half a file when the disk is full."""
    direct = re.compile(r"\.write_text\(|\.write_bytes\(|\bos\.replace\(|\.savefig\([^b]")
    sources = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in ROOT.glob(f"{room}/**/*.py"))]
    found = {
        f"{file.relative_to(ROOT).as_posix()}:{number}"
        for file in sources
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if direct.search(line) and "temporary.write_" not in line and "partial.write_" not in line
    }
    files = {place.split(":")[0] for place in found}
    left = sorted(place for place in found if place.split(":")[0] not in ELSEWHERE)
    assert left == [], "write it with utils.writing: whole_file, whole_folder or write_text"
    assert ELSEWHERE.keys() <= files, "it writes nothing of its own any more: take it out"
