"""What the worlds of digits share: scikit-learn's bundled handwriting, 8x8 grey glyphs of the ten digits, and random
draws that are hashes. Nothing is downloaded."""

# B batch  N glyphs  K uniform draws

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Split = Literal["train", "test"]

DIGIT_WORDS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GLYPH: Final = 8  # pixels a side of a digit
TRAIN_GLYPHS: Final = 1400  # of 1797; the other 397 are held out


def check_draws(world: str, indices: Sequence[int], split: str) -> None:
    """Raises ValueError on an unknown split or a negative index, naming the world."""
    if split not in ("train", "test"):
        raise ValueError(f"{world}: split must be 'train' or 'test', got {split!r}")
    if any(index < 0 for index in indices):
        raise ValueError(f"{world}: sample indices must be >= 0, got {min(indices)}")


@functools.cache
def _digits() -> tuple[Tensor, tuple[int, ...]]:
    """All glyphs [1797, 8, 8] in [0, 1] and their labels, in a fixed shuffled order (the file is sorted by writer)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.argsort(uniform([0], np.arange(len(data.target), dtype=np.uint64), draws=1)[:, 0], kind="stable")
    return torch.from_numpy(data.images[order] / 16).float(), tuple(int(label) for label in data.target[order])


def glyphs() -> Tensor:
    """All glyphs [1797, 8, 8] in [0, 1], those of the training split first."""
    return _digits()[0]


@functools.cache
def glyph_indices(split: Split) -> tuple[tuple[int, ...], ...]:
    """For each digit, the glyphs of this split that show it. The splits share no glyph."""
    labels = _digits()[1]
    chosen = range(TRAIN_GLYPHS) if split == "train" else range(TRAIN_GLYPHS, len(labels))
    return tuple(tuple(i for i in chosen if labels[i] == digit) for digit in range(10))


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's step and finaliser (Steele et al. 2014): one well-mixed 64-bit word per input word."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(key: Sequence[int], indices: NDArray[np.uint64], draws: int) -> NDArray[np.float64]:
    """U[0, 1) draws [B, K], each a hash of (key, index, number of the draw): no state, so no order to depend on."""
    state = np.zeros(1, dtype=np.uint64)
    for word in key:
        state = _mix64(state ^ np.array([word % 2**64], dtype=np.uint64))
    state_BK = _mix64(_mix64(state ^ indices)[:, None] ^ np.arange(draws, dtype=np.uint64))
    return (state_BK >> np.uint64(11)).astype(np.float64) * math.ldexp(1, -53)
