"""Stored weights as the rest of the project sees them: names and shapes at once, values one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from utils.errors import UserError
from utils.shards import is_finite

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


class Stored(NamedTuple):
    """One stored tensor: its shape is known, `read` fetches it.

    dtype: as it is stored; None where that is not known beforehand.
    raw: fetches it where it may be no real numbers; None where that is not possible.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    dtype: torch.dtype | None = None
    raw: Callable[[], Tensor] | None = None


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


def real_numbers(value: Tensor, where: str) -> Tensor:
    """The tensor. Raises UserError for whole, boolean and complex numbers (one whole number alone may be, such as
    LoRA's alpha), and for NaN and infinity. The tensor is read once, and nothing of its size is made."""
    if not value.is_floating_point():
        if value.numel() > 1 or value.is_complex():
            raise UserError(f"{where} is of {value.dtype}, and weights are real numbers: fetch it again")
        return value
    if not value.is_meta and not is_finite(value):
        raise UserError(f"{where} holds NaN or infinity: the file is damaged, or the training that made it diverged")
    return value


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
