"""What a run tells a webhook: each validation, and how the run ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from configs.sections import LoggingConfig
from utils.errors import UserError
from utils.logging import console
from utils.webhook import Webhook, check_url, hidden, is_hidden

VARIABLE = "FEWSTEP_WEBHOOK"
LONGEST = 500  # letters of an exit reason


def webhook_url(config: LoggingConfig) -> str | None:
    """The URL that the environment or else the config names, None for none. Raises UserError."""
    if url := os.environ.get(VARIABLE):
        try:
            check_url(url)
        except ValueError as problem:
            raise UserError(f"{VARIABLE} {problem}") from None
        return url
    return config.webhook


class Notices:
    """Events of one run, from its first step to its end; a context, whose error is the event of a run that failed.

    Each event is a JSON object with these keys:

    event: validation, finished, stopped (by a signal) or failed.
    run: the run's name.
    text: the same in a line for people.
    step: iterations done; null before the first.
    time: seconds since the epoch.
    metrics: the latest numbers by name, as in metrics.jsonl.
    paths: `folder` of the run, and the `checkpoint` or `videos` that the event is about.
    exit_reason: why the run ended; null at validation.

    name, folder: of the run.
    url: None tells nobody.
    """

    def __init__(self, name: str, folder: Path, url: str | None) -> None:
        if url is not None and is_hidden(url):
            console.warning("logging.webhook %s: a run does not keep the whole URL: set %s", hidden(url), VARIABLE)
            url = None
        self.name, self.folder, self.hook = name, folder, Webhook(url)
        self.step: int | None = None
        self.metrics: Mapping[str, float] = {}

    def __enter__(self) -> Notices:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._say("failed", " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST])
        self.hook.close()

    def reached(self, step: int, metrics: Mapping[str, float]) -> None:
        """Where the run is. Sends nothing."""
        self.step, self.metrics = step, metrics

    def validated(self, statistics: Mapping[str, float], videos: Sequence[Path]) -> None:
        """statistics: beside the run's latest numbers."""
        self._say("validation", None, {**self.metrics, **statistics}, videos=[str(path.resolve()) for path in videos])

    def ended(self, number: int | None, checkpoint: Path | None) -> None:
        """number: of the signal that stopped it; None for a run that came to its end."""
        event, why = ("finished", "finished") if number is None else ("stopped", signal.Signals(number).name)
        self._say(event, why, checkpoint=None if checkpoint is None else str(checkpoint.resolve()))

    def _say(self, event: str, why: str | None, metrics: Mapping[str, float] | None = None, **paths: Any) -> None:
        at = "" if self.step is None else f" at step {self.step}"
        reason = "" if why in (None, event) else f": {why}"
        self.hook.send(
            {
                "event": event,
                "run": self.name,
                "text": f"{self.name}: {event}{at}{reason}",
                "step": self.step,
                "time": time.time(),
                "metrics": self.metrics if metrics is None else metrics,
                "paths": {"folder": str(self.folder.resolve()), **paths},
                "exit_reason": why,
            }
        )
