"""One device for several visitors: a thread makes one block for each in turn, if somebody watches it.

T pixel frames of a block  H W pixel size
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from generation.live import Pace
from serving.faults import VisitorFaults
from serving.limits import Limits
from serving.protocol import one_line, without_paths, without_prompt
from utils.errors import UserError
from utils.logging import console
from utils.video import Frames, to_uint8


class Video(Protocol):
    """What is asked of a video in the making: see `generation.live.Live`."""

    def next_frames(self) -> Tensor: ...

    def switch(self, prompt: str, *, recache: bool = False) -> None: ...

    def close(self) -> None: ...

    @property
    def pace(self) -> Pace: ...

    @property
    def prompt(self) -> str: ...


class State(Enum):
    waiting = "waiting"  # in line for a place
    running = "running"  # has a place
    ended = "ended"  # has all frames that one video may have
    stopped = "stopped"  # by its visitor, or by the end of the server
    failed = "failed"


@dataclass(frozen=True)
class Block:
    """A block of a video.

    frames: [T, H, W, 3], 8 bits.
    first: number of its first frame.
    prompt: the one that it was made for; a block may have been begun before its prompt was changed.
    """

    frames: Frames
    first: int
    prompt: str


@dataclass(frozen=True)
class View:
    """A session as its visitor sees it.

    state: of the session.
    place: in line, from 1; 0 for a session that is not in line.
    made: frames of it so far.
    pace: how fast they are made.
    error: what ended it.
    """

    state: State
    place: int
    made: int
    pace: Pace
    error: str


class Full(Exception):
    """Every place, and the line for one, is taken."""


class Session:
    """One video of one visitor. Its fields belong to the scheduler: they change under its lock."""

    def __init__(self, prompt: str, seed: int, changed: Callable[[], None]) -> None:
        self.wanted: str | None = prompt  # for the next block; None keeps the prompt
        self.seed, self.changed = seed, changed
        self.state, self.error, self.notice = State.waiting, "", ""
        self.made, self.taken, self.shown, self.pace = 0, 0, 0, Pace()  # frames
        self.blocks: deque[Block] = deque()  # made, not yet taken
        self.video: Video | None = None
        self.since = 0.0  # when it got its place


class Scheduler:
    """Makes the videos of all sessions on one thread, one block each in turn.

    A session is passed over while `limits.ahead` of its frames have not been shown, so its queue is bounded, and a
    visitor who reads slowly slows nobody else. All methods may be called from any thread, and only `close` waits for
    the device.

    open_video: begins a video of (prompt, seed). The video is used and freed on that thread alone: freeing a device's
        memory on another thread could spoil a recording.
    limits: bounds of the server.
    recache: how a prompt is changed, see `Live.switch`.
    on_break: called on that thread when the device has failed; `broken` then says why.
    faults: prompts that are refused for what visitors may not read are counted there; None makes one of its own.
    """

    def __init__(
        self,
        open_video: Callable[[str, int], Video],
        limits: Limits,
        *,
        recache: bool = False,
        on_break: Callable[[], None] = lambda: None,
        faults: VisitorFaults | None = None,
    ) -> None:
        self._faults = faults or VisitorFaults()
        self._open, self._limits, self._recache, self._on_break = open_video, limits, recache, on_break
        self.broken = ""
        self._changed = threading.Condition()
        self._running: deque[Session] = deque()  # in order of their turns
        self._waiting: deque[Session] = deque()
        self._over: list[Video] = []  # of ended sessions, not yet closed by the device's thread
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="device")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends all sessions, and the thread after its current block. May be called again, and before `start`."""
        with self._changed:
            self._closed = True
            for session in [*self._running, *self._waiting]:
                self._end(session, State.stopped)
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def join(self, prompt: str, seed: int, changed: Callable[[], None]) -> Session:
        """A new session, running or in line. changed() is called, under the lock, when it has news. Raises Full."""
        with self._changed:
            if self._closed or len(self._running) + len(self._waiting) >= self._limits.users + self._limits.waiting:
                raise Full
            session = Session(prompt, seed, changed)
            self._waiting.append(session)
            self._admit()
            return session

    def switch(self, session: Session, prompt: str) -> None:
        """Another prompt from the next block on; of several in a row the last one counts."""
        with self._changed:
            session.wanted = prompt
            self._changed.notify_all()

    def shown(self, session: Session, frames: int) -> bool:
        """Notes that so many frames have been shown. Returns whether that was news.

        Raises ValueError for frames that were not taken: else a visitor could have frames made without reading them,
        and they would pile up.
        """
        with self._changed:
            if frames > session.taken:
                raise ValueError(f"frames: {session.taken} have been sent: more cannot have been shown")
            news = frames > session.shown
            session.shown = max(session.shown, frames)
            self._changed.notify_all()
            return news

    def is_owed(self, session: Session) -> bool:
        """Whether frames were taken that have not been shown."""
        with self._changed:
            return session.taken > session.shown

    def leave(self, session: Session) -> None:
        """Ends the session, if it has not ended, and drops what nobody has taken."""
        with self._changed:
            session.blocks.clear()
            self._end(session, State.stopped)

    def take(self, session: Session) -> Block | None:
        """The next block that was not taken yet."""
        with self._changed:
            if not session.blocks:
                return None
            block = session.blocks.popleft()
            session.taken += len(block.frames)
            return block

    def notice(self, session: Session) -> str:
        """Why the last change of prompt was refused, once; else nothing."""
        with self._changed:
            notice, session.notice = session.notice, ""
            return notice

    def view(self, session: Session) -> View:
        with self._changed:
            place = self._waiting.index(session) + 1 if session.state is State.waiting else 0
            return View(session.state, place, session.made, session.pace, session.error)

    def _admit(self) -> None:
        """Gives free places to the sessions that are first in line."""
        while self._waiting and len(self._running) < self._limits.users:
            session = self._waiting.popleft()
            session.state, session.since = State.running, time.monotonic()
            self._running.append(session)
            session.changed()
        for session in self._waiting:
            session.changed()
        self._changed.notify_all()

    def _end(self, session: Session, state: State, error: str = "") -> None:
        if session.state not in (State.waiting, State.running):
            return
        (self._running if session.state is State.running else self._waiting).remove(session)
        session.state, session.error = state, error
        if session.video is not None:
            self._over.append(session.video)
            session.video = None
        session.changed()
        if not self._closed:
            self._admit()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job()
            del job  # or this thread would hold an ended video until the next job
        self._put_away()

    def _next(self) -> Callable[[], None] | None:
        """The next job: closing ended videos, else a block of the session whose turn it is; None at the end."""
        with self._changed:
            while not self._closed:
                late = self._pass_on()
                if self._over:
                    return self._put_away
                for _ in range(len(self._running)):
                    session = self._running[0]
                    self._running.rotate(-1)
                    if session.made - session.shown < self._limits.ahead:
                        return partial(self._turn, session)
                self._changed.wait(late)
            return None

    def _put_away(self) -> None:
        with self._changed:
            over, self._over = self._over, []
        for video in over:
            video.close()

    def _pass_on(self) -> float | None:
        """Takes places from those who have had them too long while others wait.

        Returns the seconds until the next place is taken; None if nobody waits.
        """
        most = self._limits.place_seconds
        while self._waiting and self._running:
            first = min(self._running, key=lambda session: session.since)
            if (left := first.since + most - time.monotonic()) > 0:
                return left
            self._end(first, State.ended, f"others wait in line, and then a place is for {most} s at most")
        return None

    def _turn(self, session: Session) -> None:
        """One block, made without the lock. Whatever goes wrong ends this session alone."""
        with self._changed:
            if session.state is not State.running:  # its visitor left since it was its turn
                return
            video, wanted, session.wanted = session.video, session.wanted, None
        notice = ""
        try:
            if video is None:
                assert wanted is not None
                video = self._open(wanted, session.seed)
            elif wanted is not None:
                try:
                    video.switch(wanted, recache=self._recache)
                except UserError as problem:
                    notice = self._told(problem, wanted)
            frames = to_uint8(video.next_frames())
        except UserError as problem:
            self._fail(session, video, self._told(problem, wanted or ""))
        except Exception as problem:  # of one visitor's video: the others' go on, if the device does
            console.exception("demo: a video failed")
            if _ends_the_device(problem):
                self._break(one_line(problem))
            self._fail(session, video, f"the video failed ({type(problem).__name__}): the server's log says why")
        else:
            self._made(session, video, frames, notice)

    def _told(self, problem: UserError, prompt: str) -> str:
        """What a visitor reads of a prompt that was refused."""
        if (text := without_paths(problem, prompt)) is None:
            self._faults.count(without_prompt(problem, prompt))
        return text or "this prompt cannot be used here: the server's log says why"

    def _break(self, error: str) -> None:
        """Ends every session, since everything that is asked of the device from now on fails."""
        with self._changed:
            self._closed, self.broken = True, error
            for session in [*self._running, *self._waiting]:
                self._end(session, State.failed, "the device failed: the server has to be started again")
        self._on_break()

    def _fail(self, session: Session, video: Video | None, error: str) -> None:
        with self._changed:
            session.video = None  # of no more use, to the next one either
            self._over = [other for other in self._over if other is not video]
            self._end(session, State.failed, error)

    def _made(self, session: Session, video: Video, frames: Frames, notice: str) -> None:
        with self._changed:
            if session.state is not State.running:  # its visitor left meanwhile
                if all(video is not other for other in self._over):
                    self._over.append(video)  # had just begun
                return
            session.video, session.pace, session.notice = video, video.pace, notice or session.notice
            frames = frames[: self._limits.max_frames - session.made]
            session.blocks.append(Block(frames, session.made, video.prompt))
            session.made += len(frames)
            if session.made == self._limits.max_frames:
                self._end(session, State.ended)
            else:
                session.changed()


def _ends_the_device(problem: Exception) -> bool:
    """Whether it is an error of CUDA's context, after which every call fails; running out of memory is not."""
    return isinstance(problem, torch.AcceleratorError) or (
        isinstance(problem, RuntimeError) and "CUDA error" in str(problem)
    )
