"""Who writes into a run's folder: one run at a time, on whatever node, over NFS too.

The lock is the file `run.lock`. It comes by a hard link, which is atomic over NFS as well, and its owner writes a new
beat into it every few seconds. `flock` is not used, for it means nothing to other nodes on many file systems. Whoever
finds a lock judges by its own monotonic clock whether the beat still changes: no two clocks are compared. An owner on
this machine is looked up among the processes instead, with what else belongs to its run.

Only runs that write take it. What reads a run (evaluation, inference, export) does not look at it.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from utils import distributed
from utils.agreement import on_main
from utils.errors import AgreedError, UserError
from utils.logging import console
from utils.writing import SPACE

NAME = "run.lock"
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}  # of file systems without them


@dataclass(frozen=True)
class LockTimes:
    """Seconds.

    beat: between two signs of life of an owner.
    stale: how long a beat that does not change is believed to be that of a living owner.
    patience: how long a run waits for a folder that another one holds: a run that was started again finds the one
        before on its way out.
    look: between two looks of one who waits.
    sight: how long a lock may take to be seen by the other ranks: a file system may remember that there was none.
    """

    beat: float = 5.0
    stale: float = 45.0
    patience: float = 90.0
    look: float = 0.5
    sight: float = 15.0


@dataclass(frozen=True)
class Process:
    """A process of this or another machine, so that its number cannot be taken for another's.

    machine: of one boot, and of one container where processes are numbered in containers; None where it is unknown.
    pid: its number.
    user: whose it is; those of others may be hidden.
    began: when, in the machine's ticks; None where it is unknown.
    """

    machine: str | None
    pid: int
    user: int
    began: str | None

    @classmethod
    def this(cls) -> Process:
        return cls(_machine(), os.getpid(), os.getuid(), _began(os.getpid()))

    def is_alive(self) -> bool | None:
        """None for a process that cannot be seen from here."""
        if self.machine is None or self.began is None or (self.machine, self.user) != (_machine(), os.getuid()):
            return None
        return _began(self.pid) == self.began


@dataclass(frozen=True)
class Owner:
    """Who holds a folder.

    token: of this hold alone.
    host, pid: of rank 0.
    since: its time of day, for people.
    processes: all ranks.
    beat: a number that changes while it lives.
    """

    token: str
    host: str
    pid: int
    since: str
    processes: tuple[Process, ...]
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def encoded(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, data: bytes) -> Owner | None:
        """None for what a lock does not hold: half a file, or that of another program."""
        try:
            found: dict[str, Any] = json.loads(data)
            processes = tuple(Process(**process) for process in found.pop("processes"))
            return cls(**found, processes=processes)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def lives(self) -> bool | None:
        """Whether a rank of it is alive; None where that cannot be seen from here."""
        seen = [process.is_alive() for process in self.processes]
        if any(seen):
            return True
        return False if seen and all(alive is False for alive in seen) else None


class RunLock:
    """`with RunLock(folder):` around all that writes into a run's folder. All ranks enter together; rank 0 holds it.

    Raises UserError, on every rank, where another run holds the folder for longer than `times.patience`, and where the
    folder cannot be written to. A hold ends with the block, but for an error among several ranks: then it ends with
    this process, for the others may still be writing.
    """

    def __init__(self, folder: Path, times: LockTimes = LockTimes()) -> None:
        self.folder, self.times = Path(folder), times
        self.path = self.folder / NAME
        self.lost: str | None = None  # who has taken the folder meanwhile; what is asked of rank 0
        self.owner: Owner | None = None
        self._file: int | None = None  # of the lock itself, by whatever name: a beat never lands in another's
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beats, name="run lock", daemon=True)

    def __enter__(self) -> RunLock:
        ranks = distributed.all_gather_text(json.dumps(asdict(Process.this())))
        on_main(lambda: self._enter([Process(**json.loads(rank)) for rank in ranks]))
        self._require_sight()
        return self

    def _require_sight(self) -> None:
        """Raises AgreedError, on every rank, unless all of them see the lock that rank 0 has taken."""
        token = distributed.all_gather_text(self.owner.token if self.owner is not None else "")[0]
        deadline = time.monotonic() + self.times.sight
        while not (seen := self._sees(token)) and time.monotonic() < deadline:
            time.sleep(self.times.look)
        blind = [
            (number, host)
            for number, host in enumerate(distributed.all_gather_text("" if seen else socket.gethostname()))
            if host
        ]
        if blind:
            hosts = ", ".join(dict.fromkeys(host for _, host in blind))
            raise AgreedError(
                f"--logdir {self.folder}: {distributed.ranks([number for number, _ in blind])} on {hosts} cannot see "
                "what rank 0 writes there: give a folder that all nodes share"
            )

    def _sees(self, token: str) -> bool:
        found = Owner.read(self._content() or b"")
        return found is not None and found.token == token

    def _enter(self, processes: Sequence[Process]) -> None:
        """On rank 0. Raises UserError."""
        try:
            self._acquire(processes)
        except OSError as error:
            why = error.strerror or str(error)
            raise UserError(f"--logdir {self.folder} cannot be written to: {why}: {SPACE}") from error

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        if error is None or distributed.world_size() == 1:
            self.release()

    def release(self) -> None:
        """Gives the folder free, if it is still ours. May be called again."""
        if self._file is None:
            return
        self._stop.set()
        self._thread.join(self.times.beat)
        if self._is_ours():
            self.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    # ------------------------------------------------------------------------------------------------------- to get it

    def _acquire(self, processes: Sequence[Process]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        token, now = secrets.token_hex(8), time.strftime("%Y-%m-%d %H:%M:%S")
        self.owner = Owner(token, socket.gethostname(), os.getpid(), now, tuple(processes))
        deadline = time.monotonic() + self.times.patience
        seen, changed, said = b"", time.monotonic(), False
        while True:
            data = self._content()
            if data is None:
                if self._place():
                    break
                continue
            if data != seen:
                seen, changed = data, time.monotonic()
            other = Owner.read(data)
            lives = None if other is None else other.lives()
            if lives is False or (lives is None and time.monotonic() - changed > self.times.stale):
                self._break(data, other)
                continue
            who = "another run" if other is None else f"another run ({other})"
            using = f"{self.folder} is in use by {who}"
            if time.monotonic() > deadline:
                raise UserError(f"{using}: wait for its end, or give another --logdir")
            if not said:
                console.warning("%s: waiting for its end, %.0f s at most", using, self.times.patience)
                said = True
            time.sleep(self.times.look)
        distributed.before_leaving(self.release)
        self._thread.start()

    def _place(self) -> bool:
        """Whether the lock is ours now. False if there is one."""
        assert self.owner is not None
        fresh = self.folder / f".{NAME}.{self.owner.token}"
        try:
            file = _write(fresh, self.owner.encoded())
            placed = False
            try:
                placed = _linked(fresh, self.path)
            finally:
                fresh.unlink()
                if not placed:
                    os.close(file)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                file, placed = _write(self.path, self.owner.encoded()), True
            except FileExistsError:
                placed = False
        if placed:
            self._file = file
        return placed

    def _content(self) -> bytes | None:
        try:
            return self.path.read_bytes()  # opened anew each time: NFS then asks the server
        except FileNotFoundError:
            return None

    def _break(self, data: bytes, other: Owner | None) -> None:
        """Takes a dead owner's lock away, unless somebody else was first."""
        assert self.owner is not None
        if self._content() != data:
            return
        aside = self.folder / f".{NAME}.{self.owner.token}.old"
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if aside.read_bytes() == data:
            console.warning("%s: the run that held it is gone (%s): going on", self.folder, other or "not known which")
        else:  # in that moment another one had taken it: it is given back
            _linked(aside, self.path)
        aside.unlink()

    # ------------------------------------------------------------------------------------------------------ to keep it

    def check(self) -> None:
        """Before something is written, on rank 0. Raises UserError where another run has taken the folder meanwhile."""
        if self.owner is None or self._is_ours():
            return
        found = Owner.read(self._content() or b"")
        who = "another run" if found is None else f"another run ({found})"
        self.lost = f"{self.folder} was taken by {who} while this one did not move: this one writes no more"
        raise UserError(self.lost)

    def _beats(self) -> None:
        beat, complained = 0, False
        while not self._stop.wait(self.times.beat):
            beat += 1
            try:
                if self._content() is None:  # somebody has deleted it
                    self._close()
                    self._place()
                self.check()
                if self.owner is not None and self._file is not None:
                    os.pwrite(self._file, replace(self.owner, beat=beat).encoded(), 0)
                    os.fsync(self._file)
                complained = False
            except UserError:
                return  # the main thread learns of it by `lost`
            except OSError as error:  # a server that is away for a while: who is away for long loses the folder
                if not complained:
                    console.warning("%s cannot be kept up: %s", self.path, error.strerror or error)
                complained = True

    def _is_ours(self) -> bool:
        return self.owner is not None and self._sees(self.owner.token)


def _write(path: Path, data: bytes) -> int:
    """A new file with this content, open. Raises FileExistsError."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(file, data)
        os.fsync(file)
    except OSError:
        os.close(file)
        path.unlink(missing_ok=True)
        raise
    return file


def _linked(source: Path, target: Path) -> bool:
    """Whether `target` is a second name of `source` now; False if there was a `target`."""
    try:
        os.link(source, target)
    except FileExistsError:
        # an answer of NFS that was lost on its way, and asked for again
        return source.stat().st_nlink == 2 and os.path.samefile(source, target)
    return True


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _began(pid: int) -> str | None:
    """When process `pid` of this machine began, None for none; a zombie is none."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in ("Z", "X") else rest[18]
