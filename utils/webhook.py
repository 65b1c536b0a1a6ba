"""Events of a run, posted as JSON to a URL. Nothing here can stop a run or make it wait longer than a few seconds.

Such a URL is a password: whoever has it may post. It is written nowhere, and no message shows more than its host.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from utils.logging import console

SECONDS = 5.0  # for one answer, and for all that is still to be sent when a run ends
WAITING = 100  # events; a server that is slower than they come misses some
HIDDEN = "***"


def check_url(url: str) -> None:
    """Raises ValueError for what is no web address. The message does not show it."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # of a port or of brackets
        good = False
    if not good or not url.isascii() or any(letter.isspace() or not letter.isprintable() for letter in url):
        raise ValueError("is no URL of http or https: give one, or leave it out")


def hidden(url: str | None) -> str | None:
    """The URL as it may be seen: scheme and host."""
    if url is None:
        return None
    parts = urlsplit(url)
    port = "" if parts.port is None else f":{parts.port}"
    return f"{parts.scheme}://{parts.hostname}{port}/{HIDDEN}"


def is_hidden(url: str) -> bool:
    """Whether it is what `hidden` made of a URL."""
    return url == hidden(url)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET of another place."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Webhook:
    """Sends events in order from a thread of its own, each with `seconds` for the answer.

    One that is lost costs a warning, the first time. url: None sends nothing.
    """

    def __init__(self, url: str | None, seconds: float = SECONDS) -> None:
        self.url, self.seconds = url, seconds
        self._warned = False
        self._events: queue.Queue[bytes | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._opener = urllib.request.build_opener(_NoRedirects)

    def send(self, event: Mapping[str, Any]) -> None:
        """Returns at once. event: what JSON can say; numbers that are not finite become text."""
        if self.url is None:
            return
        body = json.dumps(_finite(event), allow_nan=False).encode()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
            self._thread.start()
        try:
            self._events.put_nowait(body)
        except queue.Full:
            self._warn("it is slower than the events come")

    def close(self) -> None:
        """Waits for what is on its way, but not for longer than `seconds`."""
        if self._thread is None:
            return
        until = time.monotonic() + self.seconds
        try:
            self._events.put(None, timeout=self.seconds)
        except queue.Full:
            self._warn("the run is over, and not all events are sent")
            return
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"no answer in {self.seconds:g} s")
        self._thread = None

    def _work(self) -> None:
        while (body := self._events.get()) is not None:
            try:
                self._post(body)
            except Exception as error:  # whatever a server does, a run goes on
                self._warn(_reason(error, self.seconds))

    def _post(self, body: bytes) -> None:
        assert self.url is not None
        headers = {"Content-Type": "application/json", "User-Agent": "fewstep"}
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        with self._opener.open(request, timeout=self.seconds):
            pass  # what it says is of no use to a run

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            console.warning("webhook %s: an event was lost (%s): the run goes on", hidden(self.url), why)


def _reason(error: Exception, seconds: float) -> str:
    """What went wrong, without the URL, which some messages quote."""
    if isinstance(error, urllib.error.HTTPError):
        return f"status {error.code}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer in {seconds:g} s"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return type(cause).__name__


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
