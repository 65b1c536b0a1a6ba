"""A pytest plugin that writes what happens at once, so that a run which is cut off is not lost.

    python -m pytest -p benchmarks.failures --record FOLDER ...

FOLDER/tests.jsonl gets a line a test: its name, outcome (passed, failed, skipped, error) and seconds.
FOLDER/failures.txt gets the text of each failure. With pytest-xdist the process that starts the workers writes, and
they do not.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

TESTS, FAILURES = "tests.jsonl", "failures.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="folder for tests.jsonl and failures.txt, written as tests end")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--record")
    if folder is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(folder), "fewstep-recorder")


class Recorder:
    """Appends to both files of a folder, each time opening and closing them: what was written stays."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tests, self.failures = folder / TESTS, folder / FAILURES
        for path in (self.tests, self.failures):
            path.write_text("")
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        spent = self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self._fail(report.nodeid, report.when, report.longreprtext)
        if report.when == "call" or (report.when == "setup" and not report.passed):
            outcome = "error" if report.failed and report.when == "setup" else report.outcome
            self._note(report.nodeid, outcome, spent)
        elif report.when == "teardown" and report.failed:
            self._note(report.nodeid, "error", spent)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._fail(report.nodeid, "collection", report.longreprtext)
            self._note(report.nodeid, "error", 0.0)

    def _note(self, name: str, outcome: str, seconds: float) -> None:
        with self.tests.open("a") as file:
            file.write(json.dumps({"test": name, "outcome": outcome, "seconds": round(seconds, 3)}) + "\n")

    def _fail(self, name: str, when: str | None, text: str) -> None:
        with self.failures.open("a") as file:
            file.write(f"#### {name} ({when})\n{text}\n\n")


def counts(folder: Path) -> dict[str, int]:
    """How many tests had each outcome; one that passed and was torn down badly is an error. Of a run that was cut off,
    a last line that is not whole is left out."""
    path = folder / TESTS
    outcomes: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:  # cut off while it was written
            continue
        outcomes[entry["test"]] = entry["outcome"]
    return dict(Counter(outcomes.values()))


def first_failure(folder: Path) -> str | None:
    """The first failed test's name, and the first line of pytest's that begins with E."""
    path = folder / FAILURES
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        return None
    reason = next((line[1:].strip() for line in lines[1:] if line.startswith("E  ")), lines[1] if lines[1:] else "")
    return f"{lines[0].removeprefix('#### ')}: {reason}"
