"""Stored weights as the rest of the project sees them: names and shapes at once, values one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


class Stored(NamedTuple):
    """One stored tensor: its shape is known, `read` fetches it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Weights(Protocol):
    """Stored weights under the names that the family's network has.

    shapes: of all of them, known from headers alone.
    config: fields of the geometry that a config.json beside them says; None without one.
    """

    shapes: Shapes
    config: dict[str, Any] | None

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, value) in this order, as stored."""
        ...


def misfits(wanted: Shapes, theirs: Shapes) -> str:
    """Missing, unexpected and wrongly shaped names, in words; empty where they fit."""
    shared = [key for key in wanted if key in theirs]
    problems = {
        "missing": [key for key in wanted if key not in theirs],
        "unexpected": [key for key in theirs if key not in wanted],
        "of another shape": [
            f"{key} {list(theirs[key])} instead of {list(wanted[key])}" for key in shared if theirs[key] != wanted[key]
        ],
    }
    return "; ".join(
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if keys
    )


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}
