"""The folder ``checkpoints/`` of a run: what is in it, whether it is whole, how it is published and pruned."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.fields import show
from utils.reading import read_json
from utils.writing import sync

FORMAT = 2
NON_FINITE = "non_finite"  # of a state: which of the weights is not finite, null or missing for none
READABLE = (1, 2)  # 1: one process, no table, no checksums
LAST_GOOD = "last-good"  # of --resume
STATE, TABLE = "state.json", "tensors.json"
_NAME = re.compile(r"step_(\d{8,})")
TEMPORARY, REPLACED = ".tmp-", ".old-"

# ------------------------------------------------------------------------------------------------------------ contents


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under ``root``, oldest step first; none when there is no such folder."""
    if not Path(root).is_dir():
        return []
    found = [path for path in Path(root).iterdir() if _NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=step_of)


def latest(root: Path) -> Path | None:
    """The complete checkpoint of the highest step under ``root``, if there is one."""
    return next(reversed(list_checkpoints(root)), None)


def latest_sound(root: Path) -> Path | None:
    """The complete checkpoint of the highest step under ``root`` whose weights are finite, if there is one. Raises
    UserError for a damaged state."""
    return next((path for path in reversed(list_checkpoints(root)) if ruined(path) is None), None)


def ruined(path: Path) -> str | None:
    """What is not finite of checkpoint ``path``'s weights, as its state says; None for a sound one."""
    return _ruined(read_manifest(path))


def _ruined(manifest: Mapping[str, Any]) -> str | None:
    text: str | None = manifest["state"].get(NON_FINITE)
    return text


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        raise UserError(f"{path} is not a checkpoint: its name should be step_ and eight digits")
    return int(match[1])


def load_state(path: Path) -> dict[str, Any]:
    """The ``state`` that was saved. Raises UserError when ``state.json`` is missing, corrupt or of another format."""
    state: dict[str, Any] = read_manifest(path)["state"]
    return state


class _Harmed(UserError):
    """A checkpoint is not what was written. `_advised` adds what else there is."""


@contextmanager
def _advised(path: Path) -> Iterator[None]:
    """Inside, an error about a damaged checkpoint gets what `other_checkpoints` says."""
    try:
        yield
    except _Harmed as error:
        raise UserError(f"{error}; {other_checkpoints(path)}") from error


def check(path: Path) -> None:
    """Raises UserError unless every file of checkpoint ``path`` is there, of the size that was written."""
    with _advised(path):
        _check(Path(path))


def _check(path: Path) -> None:
    manifest = _manifest(path)
    _refuse_missing(path, manifest["files"], manifest["files"])


def refuse_missing(path: Path, files: Iterable[str]) -> None:
    """Raises UserError unless these files of checkpoint ``path`` are there, of the size that was written."""
    with _advised(path):
        _refuse_missing(path, files, _manifest(path)["files"])


def _refuse_missing(path: Path, files: Iterable[str], sizes: Mapping[str, int]) -> None:
    for name in sorted(files):
        file = path / name
        if not file.is_file():
            raise _Harmed(f"{file} is missing: the checkpoint is damaged")
        if name not in sizes:
            raise _Harmed(f"{path / STATE} does not name {name}: the checkpoint is damaged")
        if (size := file.stat().st_size) != sizes[name]:
            raise _Harmed(f"{file} is truncated or changed: {size} bytes of {sizes[name]}")


def read_manifest(path: Path) -> dict[str, Any]:
    """What ``state.json`` holds. Raises UserError when it is missing, corrupt or of another format."""
    with _advised(path):
        return _manifest(Path(path))


def _manifest(path: Path) -> dict[str, Any]:
    file = path / STATE
    if not file.exists():
        raise UserError(f"{path} is not a checkpoint: it has no {STATE}")
    try:
        manifest = read_json("state of a checkpoint", file, "")
    except UserError as error:
        raise _Harmed(str(error)) from error
    if not {"format", "step", "files", "state"} <= manifest.keys():
        raise _Harmed(f"{file} is not a checkpoint's state: it lacks format, step, files or state")
    kinds = {"format": int, "step": int, "files": dict, "state": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(manifest[name], kind)]:
        raise _Harmed(f"{file} is malformed ({wrong[0]} is {show(manifest[wrong[0]])})")
    if manifest["format"] not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise UserError(f"{file} has format {manifest['format']}, this code reads {known}: use the code that wrote it")
    checksums = manifest.get("crc32")
    of_state = checksums.get("state") if isinstance(checksums, dict) else None
    if manifest["format"] != 1 and checksum(manifest["state"]) != of_state:
        raise _Harmed(f"{file} is corrupt (its checksum is another)")
    return manifest


def checksum(state: Any) -> int:
    """CRC-32 of what JSON keeps of ``state``: the same before it is written and after it is read."""
    return zlib.crc32(json.dumps(state).encode())


def other_checkpoints(path: Path) -> str:
    """What an error about checkpoint ``path`` says of the other checkpoints."""
    others = [other for other in list_checkpoints(Path(path).parent) if other.name != Path(path).name]
    good = next((other for other in reversed(others) if is_good(other)), None)
    if good is None:
        return f"there is no {'whole' if others else 'other'} checkpoint beside it"
    return f"the newest whole one is {good.name}: --resume {LAST_GOOD} goes on from it, and sets the damaged aside"


# -------------------------------------------------------------------------------------------------------- coming, going


def publish(temporary: Path, final: Path) -> None:
    """Give a written, synced folder its name, in place of the folder that had it."""
    replaced = final.with_name(REPLACED + final.name)
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def restore(root: Path) -> None:
    """Undo a ``publish`` that was killed between its two renames: the older one of that step is the good one."""
    for path in root.iterdir() if root.is_dir() else ():
        original = root / path.name.removeprefix(REPLACED)
        if path.name.startswith(REPLACED) and not original.exists():
            os.rename(path, original)


def sweep(root: Path) -> None:
    """Clear what killed saves and prunes left behind."""
    restore(root)
    for path in root.iterdir():
        if path.name.startswith((TEMPORARY, REPLACED)):
            shutil.rmtree(path)


def write(path: Path, data: bytes) -> None:
    """Write a file, synced to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def resolve_resume(arg: str, root: Path) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start.

    ``"auto"``: the latest sound one under ``root``, if any. ``"never"``: None. Else a path: a checkpoint, a folder of
    checkpoints or a run folder with ``checkpoints/`` in it. Raises UserError, naming what is there, when there is none,
    or none whose weights are finite.
    """
    if arg == "never":
        return None
    path = Path(arg)
    if arg == "auto":
        folders, found = [root], latest_sound(root)
    elif (path / STATE).is_file():
        if (what := ruined(path)) is not None:
            raise UserError(f"{path}: its weights are not finite ({what}); {other_checkpoints(path)}")
        return path
    else:
        folders = [path / "checkpoints", path]
        found = latest_sound(folders[0]) or latest_sound(path)
    if found is None and (present := [path for folder in folders for path in list_checkpoints(folder)]):
        last = present[-1]
        raise UserError(
            f"no checkpoint in {last.parent} has finite weights (of the last: {ruined(last)}): start anew with a lower "
            "learning rate and --resume never"
        )
    if found is None and arg != "auto":
        raise UserError(f"no checkpoint in {arg}: {_whats_there(path)}; give a run's folder, or a checkpoint's")
    return found


def _whats_there(path: Path) -> str:
    if path.is_file():
        return "it is a file"
    while not path.is_dir():
        path = path.parent
    names = sorted(child.name for child in path.iterdir())
    return f"{path} has {', '.join(names[:10]) or 'nothing'}{' ...' if len(names) > 10 else ''}"


def prune(root: Path, keep_last: int, keep_every: int | None = None) -> list[Path]:
    """Delete all but the last ``keep_last`` good checkpoints and those whose step divides by ``keep_every``.

    One with a missing or truncated file, or with weights that are not finite, does not count as kept: the only good one
    is never deleted. Returns what was deleted. Raises ValueError for ``keep_last`` < 1 or ``keep_every`` < 1.
    """
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
        raise ValueError(f"keep_last={keep_last}, keep_every={keep_every}: give whole numbers of at least 1")
    found = list_checkpoints(root)
    good = 0
    while found and good < keep_last:
        good += is_good(found.pop())
    doomed = [path for path in found if keep_every is None or step_of(path) % keep_every]
    for path in doomed:
        # renamed first: half a deletion must not look like a checkpoint
        os.rename(path, path.with_name(TEMPORARY + path.name))
        shutil.rmtree(path.with_name(TEMPORARY + path.name))
    return doomed


def is_good(path: Path) -> bool:
    """Whether all files of checkpoint ``path`` are there, of the size that was written, and its weights are finite."""
    try:
        _check(path)
    except UserError:
        return False
    return _ruined(_manifest(path)) is None
