"""Whether the launcher of this rank is still there: what torchrun's agent was, and the store that it keeps.

A launcher that is killed tells its ranks nothing. Their collectives go on working, and a run that was started again
would meet them in its folder. A thread of each rank looks at its parent process and at the store's port. Before the
first iteration a rank whose launcher is gone ends at once. Within the loop the ranks agree to save first: `gone`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from utils import activity

EXIT_STUCK = 75  # EX_TEMPFAIL of sysexits.h: the run may be started again from its last checkpoint

_parent = os.getppid()  # as early as can be: it is another one once the launcher is gone
_gone: str | None = None
_agrees = False


class LauncherGone(Exception):
    """The run ended because its launcher was gone. One line; exit code EXIT_STUCK."""


@dataclass(frozen=True)
class LauncherTimes:
    """Seconds.

    look: between two looks at the parent process.
    store_every: between two looks at the store.
    store_gone: how long the store must be unreachable without a break.
    stuck, slow: how long a rank whose launcher is gone may stay in one activity of an iteration, or in slow work.
    """

    look: float = 1.0
    store_every: float = 10.0
    store_gone: float = 30.0
    stuck: float = 600.0
    slow: float = 3600.0


def _forked() -> None:
    """In a process that was forked with this module loaded: the parent is the one that forked."""
    global _parent, _gone
    _parent, _gone = os.getppid(), None


os.register_at_fork(after_in_child=_forked)


def gone() -> str | None:
    """What is gone, in words; None while all is there, and for a process that no launcher of torch has started."""
    if _gone is None and _is_launched() and os.getppid() != _parent:
        lose(f"the launcher (process {_parent})")
    return _gone


def lose(what: str) -> None:
    """Says that this is gone: whoever finds a connection to the launcher's store broken knows it first."""
    global _gone
    _gone = _gone or what


@contextmanager
def agreeing() -> Iterator[None]:
    """Inside, the main thread asks `gone` now and then, and ends the run in order."""
    global _agrees
    _agrees = True
    try:
        yield
    finally:
        _agrees = False


def _is_launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


class LauncherWatch:
    """`with LauncherWatch():` around a run, before it joins the other ranks. Does nothing without a launcher.

    leave: ends this process with a code, at once.
    """

    def __init__(self, times: LauncherTimes = LauncherTimes(), leave: Callable[[int], object] = os._exit) -> None:
        self.times, self.leave = times, leave
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="launcher", daemon=True)

    def __enter__(self) -> LauncherWatch:
        if _is_launched():
            self._thread.start()
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._stop.set()

    def _watch(self) -> None:
        reached = looked = time.monotonic()
        while gone() is None:
            if self._stop.wait(self.times.look):
                return
            now = time.monotonic()
            if _keeps_store() and now - looked >= self.times.store_every:
                looked = now
                reached = time.monotonic() if _reachable() else reached
                if time.monotonic() - reached > self.times.store_gone:
                    lose(f"the launcher's store ({_address()[0]}:{_address()[1]})")
        self._end()

    def _end(self) -> None:
        """Leaves the rest to a main thread that asks, for as long as it moves."""
        last, since = activity.current(), time.monotonic()
        while _agrees:
            if self._stop.wait(self.times.look):
                return
            if activity.current() is not last:
                last, since = activity.current(), time.monotonic()
            elif time.monotonic() - since > (self.times.slow if last.slow else self.times.stuck):
                break
        if self._stop.is_set():
            return
        # not through sys.stderr: the main thread may be stuck in it, with its lock
        rank, where = os.environ.get("RANK", "0"), f"step {last.step} in '{last.what}'"
        os.write(2, f"rank {rank}: {gone()} is gone: ended at {where} with exit code {EXIT_STUCK}\n".encode())
        self.leave(EXIT_STUCK)


def _keeps_store() -> bool:
    """Whether the launcher keeps the store: then it is there before any rank is."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "MASTER_PORT" in os.environ


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _reachable() -> bool:
    try:
        socket.create_connection(_address(), timeout=5).close()
    except OSError:
        return False
    return True
