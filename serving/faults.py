"""What visitors do wrong, in the log: one counted line a minute at most for each kind of fault."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from utils.logging import console

SECONDS = 60.0  # between two lines about one kind
KINDS = 32  # that are told apart: what visitors send may make more
OTHERS = "faults of other kinds"


class VisitorFaults(logging.Filter):
    """Says the first fault of a kind at once, and the number of those that followed with a later one or at the end.

    All methods may be called from any thread. As a filter it counts warnings, by their text, and keeps them out of the
    log: uvicorn warns of what clients send. Errors, which are the server's own, and their tracebacks pass.

    say: writes a line into the log.
    clock: seconds, of which only differences count.
    """

    def __init__(self, say: Callable[[str], None] = console.warning, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._say, self._clock = say, clock
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}  # when a line about a kind was written
        self._unsaid: dict[str, int] = {}

    def count(self, kind: str) -> None:
        with self._lock:
            now = self._clock()
            if kind not in self._said and len(self._said) >= KINDS:
                kind = OTHERS
            if kind not in self._said:
                self._said[kind] = now
                self._say(f"demo: refused: {kind}")
            else:
                self._unsaid[kind] = self._unsaid.get(kind, 0) + 1
            self._tell([kind for kind in self._unsaid if now - self._said[kind] >= SECONDS], now)

    def close(self) -> None:
        """Says what has been counted and not been said."""
        with self._lock:
            self._tell(list(self._unsaid), self._clock())

    def _tell(self, kinds: list[str], now: float) -> None:
        for kind in kinds:
            number = self._unsaid.pop(kind)
            self._say(f"demo: refused {number} more in {now - self._said[kind]:.0f} s: {kind}")
            self._said[kind] = now

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING or record.exc_info:
            return True
        self.count(record.getMessage())
        return False
