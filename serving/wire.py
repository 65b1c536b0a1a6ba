"""Ends a connection at once, by a function that the protocols of `serving/bounded.py` put into its scope."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

ABORT = "fewstep.abort"


def abort(scope: MutableMapping[str, Any]) -> None:
    """Drops the connection and what is on its way: `close` would wait until all of it has been read."""
    scope[ABORT]()
