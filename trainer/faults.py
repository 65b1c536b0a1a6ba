"""Corrupt samples of all ranks, counted as one: each rank reads its own part of the data, and the limit is for all."""

from __future__ import annotations

from collections.abc import Sequence

from utils import distributed
from utils.data.stream import Stream, TooManyCorrupt
from utils.errors import UserError


class SharedFaults:
    """The corrupt samples of a run's streams, the same list on every rank."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.streams = streams
        self._agreed = 0.0

    @property
    def count(self) -> float:
        """Samples that this rank met, or was told of, and that could not be read."""
        return float(sum(len(stream.faults.reasons) for stream in self.streams))

    def agree(self, total: float) -> dict[str, float]:
        """What to log. total: the sum of all ranks' `count`; where it changed the ranks tell each other what they met.

        A collective then, on every rank alike. Raises UserError, on every rank alike, where there are too many.
        """
        if total != self._agreed:
            for stream in self.streams:
                try:
                    stream.faults.join(distributed.union(stream.faults.reasons))
                except TooManyCorrupt as problem:
                    raise UserError(str(problem)) from None
            self._agreed = self.count * distributed.world_size()
        return {"corrupt_samples": self.count} if self.streams else {}
