"""Classes that are found by their file."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

T = TypeVar("T")


def classes_in(package: str, base: type[T]) -> list[type[T]]:
    """The classes derived from `base` that the files of a package define, in the order of the files' names."""
    folder = importlib.import_module(package).__path__
    modules = [
        importlib.import_module(f"{package}.{name}") for name in sorted(m.name for m in pkgutil.iter_modules(folder))
    ]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
