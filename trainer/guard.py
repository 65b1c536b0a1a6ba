"""Ends a run whose student's samples no longer look like videos, before it spends the night on them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from configs.sections import GuardConfig
from trainer.ended import Ended


class Guard:
    """Counts updates in a row beyond a bound; the counts are part of the run."""

    def __init__(self, config: GuardConfig) -> None:
        upper = None if config.clipped is None else [-math.inf, config.clipped]
        bounds = {"luma": config.luma, "saturation": config.saturation, "clipped": upper}
        self.bounds = {name: (pair[0], pair[1]) for name, pair in bounds.items() if pair is not None}
        self.patience = config.patience
        self.beyond = dict.fromkeys(self.bounds, 0)

    def check(self, metrics: Mapping[str, float]) -> Ended | None:
        """Why the run is to end, None while it may go on.

        metrics: of an update of the student, the same on all ranks.
        """
        for name, (least, most) in self.bounds.items():
            value = metrics.get(f"student/{name}")
            if value is None:
                continue
            self.beyond[name] = 0 if least <= value <= most else self.beyond[name] + 1
            if self.beyond[name] >= self.patience:
                return Ended(
                    f"guard.{name}: the student's samples are at {value:.3g}, beyond [{least:g}, {most:g}] for "
                    f"{self.patience} updates in a row",
                    "go on from an earlier checkpoint with a lower learning rate, or widen the bound",
                )
        return None

    def state(self) -> dict[str, list[float]]:
        return {name: [float(count)] for name, count in self.beyond.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        self.beyond |= {name: int(count) for name, (count,) in state.items() if name in self.bounds}
