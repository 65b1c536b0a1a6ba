"""Kernels that are counted instead of started, for a plan: it has no Triton, no GPU, and tensors without values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class KernelCounter(Protocol):
    def computed(self, flops: float) -> None:
        """A kernel would have been started here; flops: of its matrix products."""


_counter: ContextVar[KernelCounter | None] = ContextVar("kernel_counter", default=None)


def kernel_counter() -> KernelCounter | None:
    """Who counts; None where kernels are started."""
    return _counter.get()


@contextmanager
def kernels_counted_by(counter: KernelCounter) -> Iterator[None]:
    """Within, kernels only make their buffers, as on CUDA, and the counter is told of their products."""
    token = _counter.set(counter)
    try:
        yield
    finally:
        _counter.reset(token)
