"""Ends a run that no longer moves, with a report of who is where, instead of leaving it to hang.

Collectives wait for all ranks, so one rank that died, stopped or took another turn holds up every other one. A thread
of each rank publishes what its main thread is doing (`utils/activity.py`) to a store. A rank that stays in one activity
for too long asks all others, reports once for all, and every rank leaves.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from utils import activity, distributed, launcher, rendezvous
from utils.errors import UserError
from utils.launcher import EXIT_STUCK
from utils.limits import SECONDS, check_within
from utils.logging import console

_FRAMES = 8  # of a stack are shown
_STACKS = 3  # of odd ranks are shown
_FAILED, _REFUSED = "failed", "refused"  # keys: a rank ended by a defect, or by what its user can put right
# seconds that a rank may wait for another one after it heard that this one has ended: who refused has said why by then
_AFTER = {_FAILED: 30.0, _REFUSED: 5.0}
EXIT_REFUSED = 2  # of a rank that refused to run, and of those that wait for it


@dataclass
class WatchdogConfig:
    """stuck_after_seconds: how long a rank may be in one part of an iteration before the run is ended; null for ever.

    slow_after_seconds: the same for start-up, the first iteration, checkpoints and validation.
    """

    stuck_after_seconds: float | None = 600.0
    slow_after_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if self.stuck_after_seconds is not None and self.stuck_after_seconds <= 0:
            raise ValueError(f"stuck_after_seconds must be positive, or null for ever, got {self.stuck_after_seconds}")
        check_within(self, stuck_after_seconds=f"(0, {SECONDS:g}]", slow_after_seconds=f"(0, {SECONDS:g}]")
        if self.slow_after_seconds < (self.stuck_after_seconds or 0):
            raise ValueError(
                f"slow_after_seconds {self.slow_after_seconds} is less than stuck_after_seconds "
                f"{self.stuck_after_seconds}: raise it"
            )

    def group_timeout(self) -> timedelta | None:
        """For process groups: so long that the report comes first. None where nothing is watched."""
        if self.stuck_after_seconds is None:
            return None
        return timedelta(seconds=self.slow_after_seconds + 2 * self.stuck_after_seconds + 60)


class RefusedElsewhere(RuntimeError):
    """A collective failed because another rank has refused to run, and has said why. Nothing more is to be said."""

    code = EXIT_REFUSED


class CollectiveError(RuntimeError):
    """A collective failed because another rank is gone; the backend's own error is the cause. Reported already."""

    code = EXIT_STUCK


@dataclass(frozen=True)
class Place:
    """Where a rank is, as it says itself.

    step: of training.
    what: the activity.
    slow: whether it may take as long as slow work.
    held: seconds in this activity.
    beat: a counter that shows the rank alive.
    clock: its time of day.
    ended: why it left, if it did.
    stack: of its main thread, when asked.
    """

    step: int
    what: str
    slow: bool
    held: float
    beat: int
    clock: str
    ended: str | None = None
    stack: str = ""


class Watchdog:
    """`with Watchdog(config):` around a run, once the process group exists. One rank, or no limit: does nothing."""

    def __init__(self, config: WatchdogConfig) -> None:
        self.config = config
        self.rank, self.size = distributed.rank(), distributed.world_size()
        self.period = min(2.0, (config.stuck_after_seconds or 8.0) / 4)
        self._seen = activity.current()
        self._held = 0.0
        self._beat = 0
        self._heard: dict[str, float] = {}  # by key: how long this rank had been in its activity when it heard of it
        self._excuses: dict[int, int] = {}  # by rank: the beat at which its slow work last excused our waiting
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._store: dist.Store | None = None
        self._stack: str | None = None  # where an error arose, once there is one

    def __enter__(self) -> Watchdog:
        if self.size > 1 and self.config.stuck_after_seconds is not None:
            self._store = _own_store()
            self._publish()
            self._thread.start()
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        if self.size == 1:
            return
        lost = error is not None and is_collective_error(error)
        if lost and self._is_refused():
            raise RefusedElsewhere from error
        if lost:
            # the launcher ends this process as soon as it misses the other one: first the report
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if launcher.gone() is not None:
            self._store = None
        self._seen = activity.current()
        if error is not None and lost:
            where = f"step {self._seen.step} in '{self._seen.what}'"
            line = f"rank {self.rank} lost another rank at {where}: {_one_line(error)}"
            self._stack = _shown(traceback.extract_tb(error.__traceback__))
            self._report(line)
            raise CollectiveError(line) from error
        why = "finished" if error is None else f"{type(error).__name__}: {_one_line(error)}"
        self._end(why, None if error is None else _REFUSED if isinstance(error, UserError) else _FAILED)

    # ------------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        while not self._stop.wait(self.period):
            self._tick()
            if launcher.gone() is not None:
                self._store = None  # torch prints a stack each time that a lost store is asked
            try:
                if self._store is not None:
                    self._publish()
                    self._listen()
                over = self._held > self._limit() and not self._excused()
            except RuntimeError as problem:  # of the store: its host is gone
                launcher.lose(f"the store of the ranks ({_one_line(problem)})")
                self._store, over = None, False
            if over and self._is_refused():
                os._exit(EXIT_REFUSED)
            if over:
                self._report(f"rank {self.rank} has not moved for {self._held:.0f} s")
                os._exit(EXIT_STUCK)

    def _tick(self) -> None:
        """Counts periods, not time: a run that was suspended as a whole has not been stuck."""
        now = activity.current()
        self._held = self._held + self.period if now is self._seen else 0.0
        self._seen = now

    def _own_limit(self) -> float:
        assert self.config.stuck_after_seconds is not None
        return self.config.slow_after_seconds if self._seen.slow else self.config.stuck_after_seconds

    def _limit(self) -> float:
        return min([self._own_limit(), *(held + _AFTER[key] for key, held in self._heard.items())])

    def _listen(self) -> None:
        """Remembers that another rank has ended: the store may end with it. Tells a rank that waits to be heard."""
        assert self._store is not None
        for key in _AFTER:
            if key in self._heard:
                self._heard[key] = min(self._heard[key], self._held)  # it has moved on since
            elif self._store.check([key]):
                self._heard[key] = self._held
                self._store.set(f"heard/{self.rank}", "")

    def _is_refused(self) -> bool:
        """Whether another rank has refused to run. False where that is not known and cannot be asked."""
        try:
            return _REFUSED in self._heard or (self._store is not None and self._store.check([_REFUSED]))
        except RuntimeError:  # of the store: its host is gone
            return False

    def _excused(self) -> bool:
        """Whether another rank is alive in slow work of its own, for which this one may have to wait."""
        if self._store is None or self._seen.slow or self._heard:
            return False
        for rank, place in self._places("at").items():
            alive = place.beat > self._excuses.get(rank, -1)
            if rank != self.rank and place.slow and alive and place.held <= self.config.slow_after_seconds:
                self._excuses[rank] = place.beat
                self._held = 0.0
                return True
        return False

    # --------------------------------------------------------------------------------------------------- the store

    def _publish(self, ended: str | None = None) -> None:
        """Says where this rank is; with its stack once somebody asks; leaves once somebody has reported."""
        assert self._store is not None
        self._beat += 1
        now = self._seen
        clock = time.strftime("%H:%M:%S")
        place = Place(now.step, now.what, now.slow, held=self._held, beat=self._beat, clock=clock, ended=ended)
        self._store.set(f"at/{self.rank}", json.dumps(asdict(place)))
        if self._store.check(["asked"]):
            answer = asdict(place) | {"stack": self._stack or _main_stack()}
            self._store.set(f"answer/{self.rank}", json.dumps(answer))
            if self._store.check(["reported"]) and threading.current_thread() is self._thread:
                os._exit(EXIT_STUCK)

    def _places(self, key: str) -> dict[int, Place]:
        """What ranks have published under `key`."""
        assert self._store is not None
        known = [rank for rank in range(self.size) if self._store.check([f"{key}/{rank}"])]
        return {rank: Place(**json.loads(self._store.get(f"{key}/{rank}"))) for rank in known}

    def _end(self, why: str, key: str | None) -> None:
        """Says that this rank leaves, and why. key: tells the others not to wait for it."""
        if self._store is None:
            return
        try:
            self._publish(ended=why)
            if key is not None:
                self._store.set(key, str(self.rank))
            if key == _REFUSED and self.rank == 0 and not rendezvous.launcher_keeps_store():
                self._wait_until_heard()
        except RuntimeError as problem:
            console.warning("watchdog: could not tell the other ranks: %s", _one_line(problem))

    def _wait_until_heard(self) -> None:
        """On the rank that keeps the store, which ends with it: until all others know that it refused, or have left."""
        assert self._store is not None
        deadline = time.monotonic() + _AFTER[_REFUSED]
        while time.monotonic() < deadline:
            left = {rank for rank, place in self._places("at").items() if place.ended is not None}
            heard = {rank for rank in range(self.size) if self._store.check([f"heard/{rank}"])}
            if len(left | heard) == self.size:
                return
            time.sleep(0.05)

    # -------------------------------------------------------------------------------------------------- the report

    def _report(self, introduction: str) -> None:
        """Prints where all ranks are, unless another rank does, and tells them that it is done."""
        try:
            unwatched = f"the other ranks are not watched\nrank {self.rank}:\n{self._stack or _main_stack()}"
            text = unwatched if self._store is None else self._ask()
        except RuntimeError as problem:
            stack = self._stack or _main_stack()
            text = f"the other ranks cannot be asked ({_one_line(problem)})\nrank {self.rank}:\n{stack}"
        if text is None:
            return
        # not through sys.stderr: the main thread may be stuck in it, with its lock
        os.write(2, f"watchdog: {introduction}; {text}\n".encode())
        try:
            if self._store is not None:
                self._store.set("reported", "1")
        except RuntimeError as problem:
            console.warning("watchdog: could not tell the other ranks: %s", _one_line(problem))

    def _ask(self) -> str | None:
        """The report, from the answers of all that answer in time. None if another rank was first to ask."""
        assert self._store is not None
        deadline = time.monotonic() + 2 * self.period + 1.0
        if self._store.add("asked", 1) > 1:
            while not self._store.check(["reported"]) and time.monotonic() < deadline:
                self._publish()
                time.sleep(0.1)
            return None
        while True:
            self._publish()
            places, answers = self._places("at"), self._places("answer")
            gone = {rank for rank, place in places.items() if place.ended is not None}
            if len(answers.keys() | gone) == self.size or time.monotonic() > deadline:
                return describe(places | answers, answers.keys() | gone, self.size, self.rank)
            time.sleep(0.1)


def describe(places: dict[int, Place], heard: set[int], size: int, asker: int) -> str:
    """One line of who is where, those that are not where most are first; then stacks of these and of the asker.

    heard: ranks that answered, or said that they left. Equal groups: the earlier step, then the longest wait, is odd.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for rank in range(size):
        place = places.get(rank)
        where = None if place is None else (place.step, place.what, place.ended)
        groups.setdefault((where, rank in heard), []).append(rank)

    def order(members: list[int]) -> tuple[object, ...]:
        place = places.get(members[0])
        is_lost = members[0] not in heard or place is None or place.ended is not None
        held = max((places[rank].held for rank in members if rank in places), default=0.0)
        return (not is_lost, len(members), -1 if place is None else place.step, -held)

    ordered = sorted(groups.values(), key=order)
    line = "; ".join(_group_line(members, places, heard) for members in ordered)
    shown = [members[0] for members in ordered[:-1]][:_STACKS]
    shown += [asker] if asker not in shown else []
    stacks = [f"rank {rank}:\n{places[rank].stack}" for rank in shown if rank in places and places[rank].stack]
    return "\n".join([line, *stacks])


def _group_line(members: list[int], places: dict[int, Place], heard: set[int]) -> str:
    who, plural = distributed.ranks(members), len(members) > 1
    present = [places[rank] for rank in members if rank in places]
    if not present:
        return f"{who} never began"
    place, held = present[0], max(place.held for place in present)
    where = f"at step {place.step} in '{place.what}'"
    if place.ended is not None:
        return f"{who} left {where} at {place.clock} ({place.ended})"
    if members[0] not in heard:
        return f"{who} {'are' if plural else 'is'} silent since {place.clock} (dead or stopped), last {where}"
    return f"{who} {'are' if plural else 'is'} {where} for {held:.0f} s"


def is_collective_error(error: BaseException) -> bool:
    """Whether a collective's backend raised this: NCCL and the store by type, gloo by what it says."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    return type(error) is RuntimeError and ("gloo" in str(error) or "by peer" in str(error))


def _own_store() -> dist.Store:
    """A connection of the thread's own: the main thread may be waiting in the other one, which then serves nobody."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)
    return dist.PrefixStore(f"{rendezvous.attempt()}/watchdog", store)


def _main_stack() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ""
    return _shown(traceback.extract_stack(frame))


def _shown(stack: traceback.StackSummary) -> str:
    lines = [f"  {Path(e.filename).name}:{e.lineno} in {e.name}: {e.line or ''}" for e in stack[-_FRAMES:]]
    return "\n".join(lines)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
