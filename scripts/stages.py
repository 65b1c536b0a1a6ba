"""Stages of a long command: one line each, with how long is left; stopped cleanly, and gone on with where it stopped.

A stage is one or several processes. What they print goes to a file. A finished stage leaves a mark with the digest of
what it was made of, and is skipped the next time.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from utils.errors import UserError
from utils.signals import handled
from utils.writing import write_text

POLL = 0.5  # seconds between two looks at the processes
WIDTH = 100  # of a line that is written over
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Stage:
    """A part of a long command.

    name: of its log and its mark.
    title: in words.
    cost: seconds that it took on the machine where the costs of all stages were measured.
    command: makes its results.
    beside: commands that work ahead at the same time. They end with it, wherever they are.
    made_of: what it depends on beside its command, as text: settings, marks of stages before it.
    fraction: how much of it is done, from 0 to 1, once it can be seen; None goes by the clock.
    start: seconds of the cost before anything of it can be seen.
    resumes_in: a folder with what a broken-off one has saved, with which it goes on; None begins anew.
    result: where its results are.
    """

    name: str
    title: str
    cost: float
    command: Sequence[str]
    beside: Sequence[Sequence[str]] = ()
    made_of: str = ""
    fraction: Callable[[], float] | None = None
    start: float = 0.0
    resumes_in: Path | None = None
    result: str = ""

    @property
    def digest(self) -> str:
        """Of all that its results depend on."""
        return hashlib.sha256("\0".join([*self.command, self.made_of]).encode()).hexdigest()

    def share(self, seconds: float, factor: float) -> float:
        """How much of it is done, from 0 to 1. seconds: since it began; factor: by which this machine is slower."""
        clock, start = seconds / factor, self.cost if self.fraction is None else self.start
        seen = 0.0 if self.fraction is None else min(self.fraction(), 1.0)
        return min(start, clock) / self.cost if seen == 0 else (start + seen * (self.cost - start)) / self.cost


@dataclass(frozen=True)
class Estimate:
    """How long stages take here, by their costs elsewhere and by what has passed.

    The machine's factor is the time that has passed for the costs that were paid. At first it is taken as 1, as if
    `trust` seconds had passed and been right.
    """

    costs: Sequence[float]
    trust: float = 5.0

    def factor(self, passed: float, paid: float) -> float:
        return (self.trust + passed) / (self.trust + paid)

    def left(self, passed: float, paid: float) -> float:
        """Seconds to the end. passed: seconds so far; paid: the costs of what is done."""
        return max(sum(self.costs) - paid, 0.0) * self.factor(passed, paid)


def clock_text(seconds: float) -> str:
    """0:07, 2:31."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


class Teller:
    """Says where a command is: on a terminal in one line that changes, into a file in one line when a stage begins and
    one when it ends. clock: seconds. out: where to."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic, every: float = 1.0) -> None:
        self.out, self.clock, self.every = out, clock, every
        self.is_terminal = out.isatty()
        self.began, self._last = clock(), -every

    def line(self, text: str) -> None:
        """A line that stays."""
        clear = "\r" + " " * WIDTH + "\r" if self.is_terminal else ""
        print(f"{clear}[{clock_text(self.clock() - self.began)}] {text}", file=self.out, flush=True)

    def begins(self, text: str, left: float) -> None:
        if not self.is_terminal:
            self.line(f"{text} (about {clock_text(left)} to the end of all)")

    def moves(self, text: str, share: float, left: float) -> None:
        now = self.clock()
        if self.is_terminal and now - self._last >= self.every:
            self._last = now
            said = f"[{clock_text(now - self.began)}] {text}: {share:.0%}, about {clock_text(left)} to the end of all"
            print("\r" + said[:WIDTH].ljust(WIDTH), end="", file=self.out, flush=True)


class Stopped(Exception):
    """A signal asked to stop. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def signals_stop() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Stopped once; further ones are ignored while processes save."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    with handled(stop, SIGNALS):
        yield


class Runner:
    """Runs stages one after the other.

    folder: of their logs and marks.
    environment: of their processes, over this one's.
    teller: says where it is.
    lock: an open file that their processes hold too, None for none.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        folder: Path,
        teller: Teller,
        environment: Mapping[str, str],
        lock: int | None = None,
    ) -> None:
        self.stages, self.folder, self.teller = stages, folder, teller
        self.environment, self.lock = {**os.environ, **environment}, lock
        todo = [stage for stage in stages if not self.is_done(stage)]
        self.estimate = Estimate([stage.cost for stage in todo])
        self.paid = 0.0

    def mark(self, stage: Stage) -> Path:
        return self.folder / "stages" / f"{stage.name}.done"

    def log(self, stage: Stage, number: int = 0) -> Path:
        """Of its command, or of the one beside it of this number, from 1."""
        return self.folder / "stages" / (f"{stage.name}.beside{number}.log" if number else f"{stage.name}.log")

    def is_done(self, stage: Stage) -> bool:
        return _read(self.mark(stage)) == stage.digest

    def check(self) -> None:
        """Raises UserError if a stage would go on with what was begun with other settings."""
        for stage in self.stages:
            begun = _read(self.mark(stage).with_suffix(".begun"))
            if begun not in ("", stage.digest) and stage.resumes_in is not None and stage.resumes_in.exists():
                raise UserError(
                    f"{stage.resumes_in}: its settings, or what it starts from, have changed since it was begun: "
                    "remove that folder, or choose another with --root"
                )

    def run(self) -> None:
        """All stages that are not done. Raises UserError for one that fails, Stopped after a signal; what was done
        stays, and the next run goes on with it."""
        with signals_stop():
            for number, stage in enumerate(self.stages, 1):
                title = f"{number}/{len(self.stages)} {stage.title}"
                if self.is_done(stage):
                    self.teller.line(f"{title}: done before")
                    continue
                write_text(self.mark(stage).with_suffix(".begun"), stage.digest + "\n", "--root")
                self._run(stage, title)
                write_text(self.mark(stage), stage.digest + "\n", "--root")

    def _run(self, stage: Stage, title: str) -> None:
        began, factor = self.teller.clock(), self._factor()
        self.teller.begins(title, self._left(0.0, stage))
        processes = self._start(stage)
        try:
            codes: list[int | None] = []
            while (codes := [process.poll() for process in processes])[0] is None and not any(codes):
                share = stage.share(self.teller.clock() - began, factor)
                self.teller.moves(title, share, self._left(share, stage))
                time.sleep(POLL)
        finally:
            end_groups(processes)
        if failed := [number for number, code in enumerate(codes) if code]:  # not those that were ended because of it
            log = self.log(stage, failed[0])
            print("\n".join(log.read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
            raise UserError(
                f"stage {stage.name}: exit code {codes[failed[0]]}, see above and {log}: the same command goes on "
                "from here"
            )
        self.paid += stage.cost
        result = f" -> {stage.result}" if stage.result else ""
        self.teller.line(f"{title}: {clock_text(self.teller.clock() - began)}{result}")

    def _start(self, stage: Stage) -> list[subprocess.Popen[bytes]]:
        held = () if self.lock is None else (self.lock,)
        processes = []
        for number, command in enumerate([stage.command, *stage.beside]):
            with self.log(stage, number).open("ab") as log:
                processes.append(
                    subprocess.Popen(
                        command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        start_new_session=True, pass_fds=held,
                    )
                )  # fmt: skip
        return processes

    def _factor(self) -> float:
        return self.estimate.factor(self.teller.clock() - self.teller.began, self.paid)

    def _left(self, share: float, stage: Stage) -> float:
        return self.estimate.left(self.teller.clock() - self.teller.began, self.paid + share * stage.cost)


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def end_groups(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Asks what still runs to stop, once, and waits until it has."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        process.wait()
