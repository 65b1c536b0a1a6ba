"""A checkpoint is a folder of safetensors files, a table of what lies where in them, and one ``state.json``; no pickle.

    checkpoints/step_00000100/  student.safetensors ...                  of one process
                                student-00001-of-00004.safetensors ...   of four: each wrote its shards
                                tensors.json   where each tensor's pieces are, with their checksums
                                state.json     format, step, size of each file, state

Any number of ranks writes, any number reads. It is written to ``checkpoints/.tmp-step_00000100``, fsynced, and renamed
once every rank is done: a folder named ``step_*`` is complete, so a killed save never stands in the way of a good one.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils import shards
from utils.checkpoint_folder import (
    FORMAT,
    LAST_GOOD,
    NON_FINITE,
    STATE,
    TABLE,
    TEMPORARY,
    check,
    checksum,
    latest,
    latest_sound,
    list_checkpoints,
    load_state,
    other_checkpoints,
    prune,
    publish,
    read_manifest,
    refuse_missing,
    resolve_resume,
    restore,
    ruined,
    step_of,
    sweep,
    write,
)
from utils.errors import AgreedError, UserError
from utils.logging import console
from utils.reading import reading, reason
from utils.shards import Damaged, Groups, Table, is_finite
from utils.writing import refusal, sync

# the folder's functions are this module's as well: callers need not know where the line is
__all__ = [
    "FORMAT", "NON_FINITE", "Saver", "check", "files_of", "find_resume", "latest", "latest_sound", "layout",
    "list_checkpoints", "load_into", "load_state", "load_tensors", "on_main", "prune", "resolve_resume", "save",
    "step_of", "tensor_names",
]  # fmt: skip

_GROUP = re.compile(r"[\w.]+")

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------- save


class Saver:
    """Saves a run into ``root``. Every rank makes one, and calls ``save`` and ``wait`` at the same points.

    background: ``save`` returns once the tensors are copied to the host; a thread writes them, at most one at a time.
    It talks to the other ranks over a process group of its own, so training's collectives keep their order.
    timeout: how long ranks that have written wait for the slowest, None for torch's own.
    allowed: called on rank 0 before anyone writes; the UserError that it may raise is raised on every rank.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int | None = None,
        keep_every: int | None = None,
        *,
        background: bool = False,
        timeout: timedelta | None = None,
        allowed: Callable[[], None] = lambda: None,
    ) -> None:
        self.timeout, self.allowed = timeout, allowed
        self.root, self.keep_last, self.keep_every, self.background = Path(root), keep_last, keep_every, background
        self.step: int | None = None  # of the last save, finished or not
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    @functools.cached_property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks over gloo, for checkpoints alone; None where there is one process. The first use is collective."""
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return dist.new_group(backend="gloo", timeout=self.timeout) if many else None

    def save(self, step: int, tensors: Groups, state: Mapping[str, Any], *, prunes: bool = True) -> None:
        """Save as ``save`` below does, after the save before is through. Raises what went wrong with that one.

        prunes: older checkpoints beyond ``keep_last`` may go, for this one takes their place.
        """
        self.wait()
        self.step = step
        job = _Save(
            self.root, step, tensors, state,
            group=self.group, keep_last=self.keep_last if prunes else None, keep_every=self.keep_every,
            copy=self.background,
        )  # fmt: skip
        job.allowed = self.allowed
        # not a daemon: a run that ends by an error still finishes the write that it began
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"save {step}", daemon=False)
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written. Raises UserError, on every rank alike, when it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def settle(self) -> None:
        """Return when nothing is being written, whatever came of it."""
        if self._thread is not None:
            self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether the last save is known here to have failed. Ranks learn it at different times: agree, then act."""
        return self._problem is not None

    def _run(self, job: _Save) -> None:
        try:
            job.run()
        except BaseException as problem:  # carried to wait()
            self._problem = problem


def save(root: Path, step: int, tensors: Groups, state: Mapping[str, Any]) -> Path:
    """Write checkpoint ``step`` of this process alone under ``root``; return its folder. One of that step is replaced.

    Each key of ``tensors`` becomes ``<key>.safetensors``. Tensors may be non-contiguous, aliased, 0-d, on any device.
    ``state`` is JSON-able. Raises UserError when it cannot be written (disk full, no permission); what was there before
    is intact then.
    """
    job = _Save(Path(root), step, tensors, state, group=None, keep_last=None, keep_every=None, copy=False)
    job.run()
    return job.final


class _Save:
    """One save: made where the tensors may change afterwards, run anywhere."""

    def __init__(
        self,
        root: Path,
        step: int,
        tensors: Groups,
        state: Mapping[str, Any],
        *,
        group: dist.ProcessGroup | None,
        keep_last: int | None,
        keep_every: int | None,
        copy: bool,
    ) -> None:
        from utils.dcp import (
            StagedPlanner,
        )  # torch.distributed.checkpoint: a third of a second that inference can do without

        if unusable := [name for name in tensors if not _GROUP.fullmatch(name)]:
            raise ValueError(f"{unusable[0]!r} cannot be a file's name: use letters, digits, _ and .")
        self.root, self.step, self.group, self.names = root, step, group, list(tensors)
        self.keep_last, self.keep_every = keep_last, keep_every
        self.allowed: Callable[[], None] = lambda: None
        self.final = root / f"step_{step:08d}"
        self.temporary = root / f"{TEMPORARY}{self.final.name}"
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.state = json.loads(json.dumps(dict(state)))  # now: its lists and counters go on
        self.planner = StagedPlanner(tensors, self.rank, self.ranks, copy=copy)

    def run(self) -> None:
        """Raises UserError for what a user can put right, on all ranks alike."""
        from utils import dcp

        writer = dcp.Writer(self.temporary, self.rank, self.ranks, self.prepare, self.publish)
        try:
            dcp.save(writer, self.planner, self.group)
        except dcp.Failed as failure:
            if self.rank == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)  # all ranks have stopped writing
            problem = failure.problem
            if not isinstance(problem, (OSError, MemoryError)):
                raise problem from failure
            raise self.unwritten(
                f"{f'rank {failure.rank}: ' if self.ranks > 1 else ''}{self.reason(problem)}"
            ) from failure
        except dcp.Unreachable as error:
            raise self.unwritten(f"another rank cannot be reached ({error})") from error

    def reason(self, problem: BaseException) -> str:
        refused = refusal(problem, self.temporary)
        return refused[0] if refused is not None else reason(problem)

    def unwritten(self, why: str) -> UserError:
        return UserError(
            f"checkpoint {self.final} could not be written: {why}; earlier checkpoints are intact: free some space "
            "there or choose another --logdir, then start again with --resume auto"
        )

    def prepare(self) -> None:
        """On rank 0, before anyone writes."""
        self.allowed()
        self.root.mkdir(parents=True, exist_ok=True)
        sweep(self.root)
        self.temporary.mkdir()

    def publish(self, table: Table) -> None:
        """On rank 0, after all ranks have written."""
        for name in self.names:
            table.setdefault(name, {})  # an optimizer that has not stepped
        text = json.dumps(shards.table_to_json(table), separators=(",", ":")).encode()
        write(self.temporary / TABLE, text)
        listed = {piece.file for of in table.values() for entry in of.values() for piece in entry.pieces}
        for file in sorted(listed):
            if not (self.temporary / file).is_file():
                raise FileNotFoundError(
                    2, f"{file}, which another rank wrote, is not there: --logdir must be a folder that all nodes share"
                )
        files = {path.name: path.stat().st_size for path in sorted(self.temporary.iterdir())}
        sums = {"tensors": zlib.crc32(text), "state": checksum(self.state)}
        head = {"format": FORMAT, "step": self.step, "ranks": self.ranks, "files": files, "crc32": sums}
        manifest = json.dumps(head | {"state": self.state}, indent=1)
        write(self.temporary / STATE, manifest.encode())
        sync(self.temporary)
        publish(self.temporary, self.final)
        if self.keep_last is not None:
            try:
                prune(self.root, self.keep_last, self.keep_every)
            except OSError as error:
                raise UserError(
                    f"{self.final} is written, but an older checkpoint could not be deleted: {error}: allow it, then "
                    "start again with --resume auto"
                ) from error


# ---------------------------------------------------------------------------------------------------------------- load


def layout(path: Path) -> Table:
    """Every tensor of a checkpoint by group: dtype, whole shape, and where its pieces are. Raises UserError."""
    path = Path(path)
    manifest = read_manifest(path)
    try:
        with reading("", path / TABLE, "", says="is malformed", error=Damaged):
            if manifest["format"] == 1:
                refuse_missing(path, manifest["files"])
                return shards.table_of_files(path, manifest["files"])
            refuse_missing(path, [TABLE])
            text = (path / TABLE).read_bytes()
            if zlib.crc32(text) != manifest["crc32"]["tensors"]:
                raise Damaged(f"{path / TABLE} is corrupt (its checksum is another)")
            return shards.table_from_json(json.loads(text))
    except Damaged as error:
        raise UserError(f"{error}; {other_checkpoints(path)}") from error


def tensor_names(path: Path) -> list[str]:
    """Names of the groups of tensors of a checkpoint, as ``load_tensors`` takes them."""
    return list(layout(path))


def files_of(path: Path, name: str) -> list[Path]:
    """The safetensors files of one group, in order."""
    return [Path(path) / file for file in sorted(_files(_entries(path, name)))]


def load_tensors(path: Path, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """One group, whole, on ``device``, whatever shards were saved. Raises UserError when missing or damaged."""
    entries = _entries(path, name)
    refuse_missing(Path(path), _files(entries))
    try:
        return shards.read_group(Path(path), entries, device)
    except Damaged as error:
        raise UserError(f"{error}; {other_checkpoints(path)}") from error


class StoredGroup:
    """One group, read one tensor at a time. Raises UserError when missing or damaged, or not finite."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.group, self.entries = Path(path), name, _entries(path, name)
        refuse_missing(self.path, _files(self.entries))
        self.shapes = {key: entry.shape for key, entry in self.entries.items()}
        self.config: dict[str, Any] | None = None  # shapes and the run's own config say what they are of

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, value) in this order, as stored."""
        for name in names:
            try:
                value = shards.read_group(self.path, {name: self.entries[name]})[name]
            except Damaged as error:
                raise UserError(f"{error}; {other_checkpoints(self.path)}") from error
            if not is_finite(value):
                raise UserError(
                    f"{self.path}: {name} of {self.group} holds NaN or infinity: the run diverged before it was saved: "
                    "take an earlier checkpoint"
                )
            yield name, value


def load_into(path: Path, table: Table, tensors: Groups, group: dist.ProcessGroup | None = None) -> None:
    """Fill ``tensors``, plain or sharded, from checkpoint ``path``, whose ``layout`` is ``table``.

    All of ``group`` call it; each rank reads what it holds. Raises UserError on all when one finds a file damaged.
    """
    from utils import dcp

    try:
        dcp.load(Path(path), table, tensors, group)
    except Damaged as error:
        raise UserError(f"{error}; {other_checkpoints(path)}") from error


def _entries(path: Path, name: str) -> dict[str, shards.Entry]:
    table = layout(path)
    if name not in table:
        raise UserError(f"{path} has no {name!r}: it has {', '.join(sorted(table)) or 'no tensors'}")
    return table[name]


def _files(entries: Mapping[str, shards.Entry]) -> set[str]:
    return {piece.file for entry in entries.values() for piece in entry.pieces}


def newest_whole(root: Path) -> Path:
    """The newest checkpoint under ``root`` whose files have the checksums of what was written, and whose weights are
    finite. Raises UserError where there is none."""
    found = list_checkpoints(root)
    for path in reversed(found):
        try:
            verify(path)
        except UserError as problem:
            console.warning("left out: %s", problem.__cause__ or problem)  # its cause advises nothing
            continue
        if (what := ruined(path)) is None:
            return path
        console.warning("left out: %s: its weights are not finite (%s)", path, what)
    names = f"none of {', '.join(path.name for path in found)} is whole" if found else "it holds no checkpoint"
    raise UserError(f"--resume {LAST_GOOD}: {root}: {names}: start anew with --resume never")


def verify(path: Path) -> None:
    """Reads all of a checkpoint. Raises UserError where anything is missing or damaged."""
    check(path)
    table = layout(path)
    for entries in table.values():
        refuse_missing(path, _files(entries))
    wanted = [(name, entry, piece) for of in table.values() for name, entry in of.items() for piece in entry.pieces]
    try:
        for _ in shards.read_pieces(path, wanted):
            pass
    except Damaged as error:
        raise UserError(str(error)) from error


def find_resume(
    arg: str, root: Path, group: dist.ProcessGroup | None = None
) -> tuple[Path, dict[str, Any], Table] | None:
    """(checkpoint to go on from, its state, its layout), or None for a fresh start: ``arg`` as ``resolve_resume``, or
    "last-good": the newest whole one under ``root``, of which every byte is read first.

    Rank 0 of ``group`` looks and checks that all files are whole; the others hear from it. Raises UserError on all.
    """

    def look() -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
        restore(root)
        path = newest_whole(root) if arg == LAST_GOOD else resolve_resume(arg, root)
        if path is None:
            return None
        check(path)
        return path, load_state(path), shards.table_to_json(layout(path))  # plain lists travel fast

    found = on_main(look, group)
    return None if found is None else (*found[:2], shards.table_from_json(found[2]))


def on_main(function: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What ``function`` gives on rank 0 of ``group``, on every rank; what it raises is raised on every rank.

    What a user can put right (UserError, OSError) is an AgreedError everywhere; rank 0 keeps the traceback of the rest.
    """
    if group is None:
        return function()
    found: T | None = None
    failure: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            found = function()
        except Exception as error:
            failure = error
    users = isinstance(failure, UserError | OSError)
    answer: list[Any] = [found, None if failure is None else (users, str(failure) if users else repr(failure))]
    dist.broadcast_object_list(answer, src=dist.get_global_rank(group, 0), group=group)
    if answer[1] is None:
        found = answer[0]
        return found  # type: ignore[return-value]
    users, text = answer[1]
    raise (AgreedError(text) if users else RuntimeError(f"rank 0 failed: {text}")) from failure
