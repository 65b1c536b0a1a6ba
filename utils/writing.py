"""The one boundary of files that somebody asked for: each appears whole or not at all, and a refusal is one line.

A file is written to a hidden neighbour, synced, and renamed: what was there before stays until the new one is whole.
What only shows a run is for utils/views.py; checkpoints, which several ranks write, are for utils/checkpoint.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from utils.errors import UserError

SPACE = "free some space there, or give another place"
PLACE = "give another place"
NAME_BYTES = 255  # of a file's name, on all common file systems
_TOKEN = 16  # hexadecimal digits that make a temporary name nobody else's
_LACK_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what a disk or a place on it refuses, whoever asks: never a defect of ours
REFUSALS = (*_LACK_SPACE, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EIO)
_IN_RUST = re.compile(r"I/O error: .*\(os error (\d+)\)")  # of a SafetensorError


class Unwritten(UserError):
    """One line: what could not be written, where, why, and what to do. why: that part alone."""

    def __init__(self, what: str, path: Path, why: str, remedy: str) -> None:
        super().__init__(f"{what} {path} could not be written: {why}: {remedy}".lstrip())
        self.why = why


@contextlib.contextmanager
def writing(what: str, path: Path, within: Path | None = None) -> Iterator[None]:
    """What a disk refuses inside becomes Unwritten. An OSError about a file elsewhere stays as it is.

    what: what the path is, such as "--out"; may be empty.
    path: the file or folder that is written.
    within: the temporary file or folder that becomes it, None for none.
    """
    try:
        yield
    except (OSError, SafetensorError) as problem:
        if (refused := refusal(problem, *filter(None, (path, within)))) is None:
            raise
        raise Unwritten(what, path, *refused) from problem


def refusal(problem: BaseException, *paths: Path) -> tuple[str, str] | None:
    """(why one of these paths could not be written, what to do); None where something else went wrong."""
    if isinstance(problem, SafetensorError):
        found = _IN_RUST.search(str(problem))
        return None if found is None else refusal(OSError(int(found[1]), os.strerror(int(found[1]))))
    if not isinstance(problem, OSError) or problem.errno is None:  # a library's own words are about no disk
        return None
    named = [Path(os.fsdecode(name)) for name in (problem.filename, problem.filename2) if isinstance(name, str | bytes)]
    if named and paths and not any(_concerns(name, path) for name in named for path in paths):
        return None
    if isinstance(problem, FileExistsError | NotADirectoryError) and (file := _file_among(paths)) is not None:
        return f"{file} is a file and no folder", PLACE
    if problem.errno == errno.EISDIR:
        return "it is a folder", PLACE
    # the system's words: a library's own are long
    why = os.strerror(problem.errno) if problem.errno in errno.errorcode else " ".join(str(problem).split())
    return why, SPACE if problem.errno in _LACK_SPACE else PLACE


def _concerns(name: Path, path: Path) -> bool:
    """Whether a file is `path`, lies in it, or is a folder on the way to it."""
    return name == path or path in name.parents or name in path.parents


def _file_among(paths: tuple[Path, ...]) -> Path | None:
    """The first file on the way to these paths, where a folder should be."""
    with contextlib.suppress(OSError):
        return next((on for path in paths for on in (*reversed(path.parents), path) if on.is_file()), None)
    return None


def neighbour(path: Path) -> Path:
    """A hidden name beside `path` that is nobody else's, and no longer than a name may be."""
    kept = os.fsencode(path.name)[: NAME_BYTES - _TOKEN - 2]
    return path.with_name(f".{os.fsdecode(kept)}.{uuid.uuid4().hex[:_TOKEN]}")


@contextlib.contextmanager
def whole_file(path: Path, what: str = "") -> Iterator[Path]:
    """A hidden neighbour to write to, which becomes `path` on success and vanishes on failure.

    path: the file; folders on the way are made.
    what: names it in the error, such as "--out".

    Raises Unwritten, before anything inside runs where that can be known.
    """
    temporary = neighbour(path)
    with writing(what, path, temporary):
        _prepare(path)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        finally:
            _drop(temporary)


@contextlib.contextmanager
def whole_folder(path: Path, what: str = "") -> Iterator[Path]:
    """As `whole_file`, for a folder that is new or empty; its files are to be synced by whoever writes them."""
    temporary = neighbour(path)
    with writing(what, path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkdir(temporary)
        try:
            yield temporary
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was renamed


def write_text(path: Path, text: str, what: str = "") -> None:
    """A text file in UTF-8, whole or not at all. Raises Unwritten."""
    with whole_file(path, what) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(path: Path, what: str, *, folder: bool = False) -> None:
    """Raises Unwritten where a file cannot be written, or files in a folder: before hours of work, not after them.

    Folders on the way are made. Nothing else is left.
    """
    file = path / "file" if folder else path
    trial = neighbour(file)
    with writing(what, path, trial):
        _prepare(file)
        try:
            trial.write_bytes(b"\n")
        finally:
            _drop(trial)


def drop_partials(path: Path) -> None:
    """Removes what processes left beside `path` that were killed while they wrote it. Nobody may be writing it."""
    ours = rf"{re.escape(neighbour(path).name[:-_TOKEN])}[0-9a-f]{{{_TOKEN}}}"
    older = rf"\.{re.escape(path.stem)}\.\d+{re.escape(path.suffix)}"  # as version 0.2 named them
    partial = re.compile(f"{ours}|{older}")
    for file in path.parent.glob(".*") if path.parent.is_dir() else ():
        if partial.fullmatch(file.name):
            _drop(file)


def _prepare(path: Path) -> None:
    """Makes the folders on the way. Raises OSError for a path that no file can have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.stat()  # a name that is too long would otherwise be noticed at the end
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def sync(path: Path) -> None:
    """What is left in memory of a file, or of a folder's entries, reaches the disk, or its refusal reaches us: some
    file systems tell only now."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _drop(path: Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here says more
        path.unlink(missing_ok=True)
