"""What only shows a run (metrics, pictures, trackers): where it cannot be written, the run says so and goes on."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.reading import reason
from utils.writing import Unwritten


class View:
    """A kind of output that a run can do without.

    what: its name, such as "metrics.jsonl".
    unit: what is lost where it cannot be written, such as "lines".
    say: shows a warning.

    The first refusal is told, and when it is over, with how much was lost. Of later ones the 2nd, 4th, 8th, ... are
    told: a disk that is full every other minute must not fill the console too.
    """

    def __init__(self, what: str, unit: str, say: Callable[[str], object]) -> None:
        self.what, self.unit, self.say = what, unit, say
        self.lost = 0  # since it was last told
        self._fails, self._times = False, 0

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """What a disk refuses inside is told and counted. Anything else is raised."""
        try:
            yield
        except (OSError, Unwritten) as problem:
            self.lost += 1
            if not self._fails:
                self._fails, self._times = True, self._times + 1
                if self._is_told:
                    why = problem.why if isinstance(problem, Unwritten) else reason(problem)
                    self.say(
                        f"{self.what} cannot be written ({why}): the run goes on, and loses {self.unit} until it can"
                    )
        else:
            if self._fails:
                self._fails = False
                if self._is_told:
                    self.say(f"{self.what} can be written again: {self._count()} lost")

    def close(self) -> None:
        """Tells what was lost and not told yet."""
        if self.lost:
            self.say(f"{self.what} could not always be written: {self._count()} lost")

    def _count(self) -> str:
        lost, self.lost = self.lost, 0
        return f"{lost} {self.unit if lost > 1 else self.unit.removesuffix('s')} {'were' if lost > 1 else 'was'}"

    @property
    def _is_told(self) -> bool:
        return self._times & (self._times - 1) == 0


@functools.cache
def silence_threads(package: str) -> None:
    """Threads of a package's own print no traceback of an error: for packages that raise it to their caller as well."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith(f"{package}."):
            before(args)

    threading.excepthook = hook


class Lines:
    """A file that grows by lines, on disk at once. What is refused leaves no half line in it, or one that is ended.

    path: the file; it is opened, and its folder made, by the first line and after a refusal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def append(self, line: str) -> None:
        """Raises OSError for a line that could not be written."""
        file, data = self._open(), line.encode() + b"\n"
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data  # after half a line that could not be taken back
        try:
            while data:
                data = data[os.write(file, data) :]  # of a disk that fills, as much as fits
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file, size)
            with contextlib.suppress(OSError):
                self.close()
            raise

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def close(self) -> None:
        """Raises OSError where the disk refuses what it had taken."""
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def _open(self) -> int:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._file
