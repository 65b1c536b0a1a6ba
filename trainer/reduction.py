"""How logged numbers come together: over the micro-batches of a rank, and over ranks.

A number is the mean over the samples of the global batch unless what makes it says otherwise, in `LossOutput.reduced`.
Then one rank and four log the same, in any number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping

from model.types import LossOutput
from utils import distributed
from utils.distributed import Reduction


def over_ranks(values: Mapping[str, float], reduced: Mapping[str, Reduction], sequence: int) -> dict[str, float]:
    """Numbers by name over all ranks; a collective for each kind of reduction.

    values: this rank's. Of a mean, its part: all ranks' parts add up to it.
    reduced: the reduction of each name; a mean for those that it does not have.
    sequence: ranks that share a batch, and count once.
    """
    by_kind: dict[Reduction, dict[str, float]] = {}
    for name, value in values.items():
        kind = reduced.get(name, "mean")
        by_kind.setdefault("sum" if kind == "mean" else kind, {})[name] = value
    out: dict[str, float] = {}
    for kind in sorted(by_kind):
        agreed = distributed.all_reduce_scalars(by_kind[kind], kind)
        out |= {name: value / sequence for name, value in agreed.items()} if kind == "sum" else agreed
    return {name: out[name] for name in values}


class Reduced:
    """The metrics of a rank's micro-batches."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}  # of a mean, this rank's part of it
        self.reduced: dict[str, Reduction] = {}

    def add(self, output: LossOutput, weight: float) -> None:
        """A micro-batch's metrics. weight: its share of the global batch's samples."""
        self.reduced |= output.reduced
        for name, value in output.metrics.items():
            self._add(name, float(value), weight)

    def _add(self, name: str, value: float, weight: float) -> None:
        kind, before = self.reduced.get(name, "mean"), self.values.get(name)
        if kind in ("mean", "sum"):
            self.values[name] = (before or 0.0) + value * (weight if kind == "mean" else 1.0)
        elif before is None or value != value:  # a NaN stays
            self.values[name] = value
        elif before == before:
            self.values[name] = max(before, value) if kind == "max" else min(before, value)

    def over_ranks(self, sequence: int) -> dict[str, float]:
        """Of the global batch, the same on every rank: a collective. sequence: ranks that share a batch."""
        return over_ranks(self.values, self.reduced, sequence)
