"""What the main thread is doing, for the report when nothing moves: one tuple, replaced as a whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Activity(NamedTuple):
    """step: iterations done. what: in words. slow: may take longer than a part of an iteration usually does."""

    step: int
    what: str
    slow: bool


_now = Activity(0, "start-up", slow=True)


def current() -> Activity:
    """The activity of the main thread. A new mark is a new object, even if it says the same."""
    return _now


def begin(step: int, *, slow: bool = False) -> None:
    """An iteration begins."""
    global _now
    _now = Activity(step, "iteration", slow)


def mark(what: str) -> None:
    """From here on the activity is `what`, until the next mark or the end of the `doing` around it."""
    global _now
    _now = Activity(_now.step, what, _now.slow)


@contextmanager
def doing(what: str, *, slow: bool = False) -> Iterator[None]:
    """Inside, the activity is `what`, a part of the one before. Also a decorator. Does nothing in other threads.

    An exception leaves the mark where it happened, so that a report can tell.
    """
    global _now
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = _now
    _now = Activity(outer.step, f"{outer.what}: {what}", outer.slow or slow)
    yield
    _now = Activity(*outer)  # a new object: the outer activity has moved on
