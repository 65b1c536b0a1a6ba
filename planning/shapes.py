"""Fake tensors fast: FakeTensorMode asks about each operator anew, which takes most of a plan's time."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

CPU = torch.device("cpu")


class _Kind(Enum):
    PURE = auto()  # new tensors, whose shapes follow from those of the operands
    IN_PLACE = auto()  # the first operand
    VIEW = auto()
    OTHER = auto()


class ShapeCache:
    """Calls operators on fake tensors. Those that only make new tensors are asked of FakeTensorMode once for each
    signature; views go to their meta kernel directly; all others are FakeTensorMode's."""

    # of the process: a second plan meets the shapes of the first
    _kinds: ClassVar[dict[Any, _Kind]] = {}
    _known: ClassVar[dict[Any, Any]] = {}

    def __init__(self) -> None:
        self.fake: FakeTensorMode | None = None

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind is _Kind.OTHER or self.fake is None:
            return func(*args, **kwargs)
        signature = _signature((func, args, tuple(kwargs.items())))
        if signature is None:  # a tensor that is not fake, or on another device
            return func(*args, **kwargs)
        if kind is _Kind.IN_PLACE:
            return args[0]
        if kind is _Kind.VIEW:
            with in_kernel_invocation_manager(self.fake):
                out = func(*args, **kwargs)
            return [self._fake(t) for t in out] if isinstance(out, (list, tuple)) else self._fake(out)
        known = self._known.get(signature)
        if known is None:
            out = func(*args, **kwargs)
            self._known[signature] = _recipe(out)
            return out
        if known is _Kind.OTHER:
            return func(*args, **kwargs)
        with in_kernel_invocation_manager(self.fake):
            made = [item and torch.empty_strided(item[0], item[1], dtype=item[2], device="meta") for item in known[1]]
        fakes = [item if item is None else self._fake(item) for item in made]
        return known[0](fakes) if known[0] is not None else fakes[0]

    def _fake(self, tensor: Tensor) -> Tensor:
        return FakeTensor(self.fake, tensor, CPU)


def _kind(func: Any) -> _Kind:
    schema = func._schema
    if func.namespace != "aten" or any(argument.is_out for argument in schema.arguments):
        return _Kind.OTHER
    if any(torch.Tag.nondeterministic_seeded == tag or torch.Tag.data_dependent_output == tag for tag in func.tags):
        return _Kind.OTHER
    aliases = [value.alias_info for value in schema.returns]
    writes = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not any(aliases):
        return _Kind.OTHER if writes else _Kind.PURE
    if len(aliases) == 1 and aliases[0].is_write and writes == [schema.arguments[0]]:
        # these change what a tensor is, not only its values
        return _Kind.OTHER if "resize" in schema.name or "set_" in schema.name else _Kind.IN_PLACE
    return _Kind.VIEW if func.is_view and not writes and "lift" not in schema.name else _Kind.OTHER


def _signature(value: Any) -> Any:
    """Hashable, the same for operands of the same shapes; None where a tensor is not a fake one on the CPU."""
    if isinstance(value, Tensor):
        if type(value) is not FakeTensor or value.fake_device != CPU:
            return None
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        items = tuple(_signature(item) if isinstance(item, (Tensor, tuple, list)) else item for item in value)
        return None if any(new is None and old is not None for new, old in zip(items, value, strict=True)) else items
    return value


def _recipe(out: Any) -> Any:
    """How to make `out` again; OTHER where its tensors are not plain ones with memory of their own."""
    items = list(out) if isinstance(out, (tuple, list)) else [out]
    for item in items:
        if item is None:
            continue
        if type(item) is not FakeTensor or item.fake_device != CPU or item.storage_offset() or item.is_sparse:
            return _Kind.OTHER
        extent = 1 + sum((size - 1) * step for size, step in zip(item.shape, item.stride(), strict=True))
        if item.untyped_storage().nbytes() != (extent if item.numel() else 0) * item.itemsize:
            return _Kind.OTHER
    made = [item if item is None else (item.shape, item.stride(), item.dtype) for item in items]
    return (type(out) if isinstance(out, (tuple, list)) else None), made
