"""What a check found, and how a check that crashes in someone else's library becomes such a finding."""

# Python's own library alone: these lines must run where nothing is installed yet.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    name: what was looked at.
    ok: whether it is as it should be.
    what: what was found; of a failed check also what does not work without it.
    remedy: how to put a failed check right, empty for one that did not fail.
    needed: whether a failure stands in the way of a start.
    """

    name: str
    ok: bool
    what: str
    remedy: str = ""
    needed: bool = True

    @property
    def blocks(self) -> bool:
        return self.needed and not self.ok


@dataclass(frozen=True)
class Lack:
    """What is said where a trial fails. without: what does not work then. remedy: how to put it right."""

    without: str
    remedy: str
    needed: bool = False


def tried(name: str, trial: Callable[[], str], lack: Lack) -> Finding:
    """The finding of a trial, which gives what it found, and fails by raising anything."""
    try:
        return Finding(name, True, trial(), needed=lack.needed)
    except Exception as problem:  # of someone else's library: it is this check's result, and the next one is made
        return Finding(name, False, f"{first_line(problem)}: {lack.without}", lack.remedy, lack.needed)


def first_line(problem: BaseException) -> str:
    """The first line of an error's message, or its class where it says nothing."""
    lines = str(problem).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(problem).__name__
