"""Base weights with LoRAs (arXiv 2106.09685) added as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from model.weights import Shapes, Stored, Weights


@dataclass
class Change:
    """What a file does to one module.

    down, up: the factors.
    alpha: of alpha / rank; None for the rank.
    diff, bias: added to its weight and bias as they are.
    """

    down: Stored | None = None
    up: Stored | None = None
    alpha: Stored | None = None
    diff: Stored | None = None
    bias: list[Stored] = field(default_factory=list)

    def shape(self) -> tuple[int, ...] | None:
        """Of the weight that it fits; None where it only changes the bias. Raises ValueError for half a pair."""
        if (self.down is None) != (self.up is None):
            raise ValueError(f"has no {'up' if self.up is None else 'down'} matrix")
        if self.down is None or self.up is None:
            return None if self.diff is None else self.diff.shape
        if any(len(shape) < 2 for shape in (self.up.shape, self.down.shape)):
            raise ValueError(f"has factors {list(self.up.shape)} and {list(self.down.shape)}, which are no matrices")
        if not self.down.shape[0]:
            raise ValueError("has rank 0")
        if self.alpha is not None and math.prod(self.alpha.shape) != 1:
            raise ValueError(f"has an alpha {list(self.alpha.shape)}, which is no number")
        if self.up.shape[1] != self.down.shape[0]:
            raise ValueError(f"has ranks {self.down.shape[0]} and {self.up.shape[1]}")
        return (self.up.shape[0], *self.down.shape[1:])


class Lora(Protocol):
    """The changes of one LoRA by the name of the module, e.g. `blocks.0.self_attn.q`.

    path: where it comes from, for messages.
    """

    @property
    def path(self) -> str | Path: ...

    @property
    def changes(self) -> Mapping[str, Change]: ...

    def factor(self, module: str, change: Change) -> float:
        """alpha / rank of a module."""
        ...


class StoredLora:
    """The changes of an adapter as our own checkpoints keep it: `blocks.0.self_attn.q.lora_A.weight` and so on.

    scale: alpha / rank.
    """

    def __init__(self, stored: Weights, scale: float, path: str | Path) -> None:
        self.path, self.scale = path, scale
        self.changes: dict[str, Change] = {}
        for name, shape in stored.shapes.items():
            module, part, _ = name.rsplit(".", 2)
            change = self.changes.setdefault(module, Change())
            setattr(change, "down" if part == "lora_A" else "up", Stored(tuple(shape), partial(_read, stored, name)))

    def factor(self, _module: str, _change: Change) -> float:
        return self.scale


def _read(stored: Weights, name: str) -> Tensor:
    ((_, value),) = stored.read([name])
    return value


class MergedWeights:
    """Base weights with LoRAs added, still read one tensor at a time.

    base: the weights without them.
    loras: each with the scale by which it counts.

    Raises ValueError in one line when a LoRA changes what the base does not have.
    """

    def __init__(self, base: Weights, loras: Sequence[tuple[Lora, float]]) -> None:
        self.base, self.shapes, self.config, self.loras = base, base.shapes, base.config, list(loras)
        for lora, _ in self.loras:
            _check(lora, base.shapes)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, value) in this order. The sum is made in fp32 and rounded once, to what the base is stored in."""
        for name, value in self.base.read(names):
            yield name, self._merged(name, value)

    def _merged(self, name: str, value: Tensor) -> Tensor:
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            module, leaf = name, "weight"  # a bare parameter, such as a modulation
        out = value
        for lora, scale in self.loras:
            change = lora.changes.get(module)
            if change is None:
                continue
            out = out.float()
            for stored in change.bias if leaf == "bias" else [change.diff] if change.diff is not None else []:
                out = out + scale * stored.read().float()
            if leaf == "weight" and change.down is not None and change.up is not None:
                up, down = change.up.read().float().flatten(1), change.down.read().float().flatten(1)
                out = out + (scale * lora.factor(module, change)) * (up @ down).view(out.shape)
        return out.to(value.dtype)


def _check(lora: Lora, shapes: Shapes) -> None:
    misfits = []
    for module, change in lora.changes.items():
        shape, bias = change.shape(), f"{module}.bias"
        weight = module if module in shapes else f"{module}.weight"
        if shape is not None and shapes.get(weight) != shape:
            misfits.append(f"{weight} {list(shape)} instead of {list(shapes[weight]) if weight in shapes else 'none'}")
        if any(shapes.get(bias) != stored.shape for stored in change.bias):
            misfits.append(f"{bias} {list(change.bias[0].shape)} instead of {list(shapes.get(bias, ()))}")
    if misfits:
        raise ValueError(
            f"{lora.path}: the LoRA does not fit these weights: {len(misfits)} changes ({', '.join(misfits[:3])}"
            f"{', ...' if len(misfits) > 3 else ''}): use the base that it was trained on"
        )
