"""Safetensors files that others may read as the umask says: the library itself makes them their owner's alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from safetensors import torch as library
from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file. Raises OSError, and the library's SafetensorError."""
    library.save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(_mode())


@cache
def _mode() -> int:
    """Of a file that is opened plainly. While the mask is looked at, another thread's file gets a stricter one."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask
