"""Classes that are found by their file, and those that a script or a notebook adds to them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

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


class Registry(Generic[T]):
    """Classes by their `kind`: those in the files of a package, looked for at first use, then those that were added.

    package, base: as `classes_in` takes them.
    first: the kind that is named first, for it is the default.
    """

    def __init__(self, package: str, base: type[T], first: str) -> None:
        self.package, self.base, self.first = package, base, first
        self._found: dict[str, type[T]] | None = None
        self._added: dict[str, type[T]] = {}

    def kinds(self) -> Mapping[str, type[T]]:
        if self._found is None:
            found = {_kind(cls): cls for cls in classes_in(self.package, self.base)}
            self._found = {kind: found[kind] for kind in sorted(found, key=lambda kind: kind != self.first)}
        return {**self._found, **self._added}

    def add(self, cls: type[T]) -> None:
        """Takes a class as if a file of the package defined it. One that was added before under its kind goes, for a
        notebook runs a cell again.

        Raises ValueError, one line, for a class of another base, and for a kind that the package has.
        """
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(f"{cls!r} cannot be registered: derive a class from {self.base.__name__}")
        kind = getattr(cls, "kind", None)
        if not isinstance(kind, str) or not kind.isidentifier():
            raise ValueError(f"{cls.__name__}: kind is {kind!r}: give it a name of letters, digits and _")
        if kind in self.kinds() and kind not in self._added:
            raise ValueError(f"{cls.__name__}: kind '{kind}' is taken, see {self.package}: choose another name")
        self._added[kind] = cls


def _kind(cls: Any) -> str:
    return str(cls.kind)
