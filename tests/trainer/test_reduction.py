"""Logged numbers are those of the global batch, however it is split."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from model.gan import with_term
from model.types import LossOutput
from trainer import reduction
from trainer.reduction import Reduced
from utils.distributed import Reduction

SAMPLES = torch.tensor([0.5, -2.0, 3.0, 1.0, 0.25, -1.0, 4.0, 2.0])


def output(samples: torch.Tensor) -> LossOutput:
    metrics = {"mean": samples.mean(), "max": samples.max(), "min": samples.min(), "sum": samples.sum()}
    return LossOutput(samples.mean(), metrics, reduced={"max": "max", "min": "min", "sum": "sum"})


def logged(ranks: int, parts: int, sequence: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What each rank logs of SAMPLES. Ranks run one after the other, first to say what they bring to a collective, then
    to hear what comes of it."""
    held: list[Reduced] = []
    groups = SAMPLES.chunk(ranks)
    for rank in range(ranks * sequence):
        held.append(Reduced())
        for part in groups[rank // sequence].chunk(parts):
            held[-1].add(output(part), len(part) / len(SAMPLES))
    said: dict[str, list[Mapping[str, float]]] = {}

    def tell(values: Mapping[str, float], op: Reduction = "sum") -> dict[str, float]:
        said.setdefault(op, []).append(values)
        return dict(values)

    def hear(values: Mapping[str, float], op: Reduction = "sum") -> dict[str, float]:
        made = {"sum": sum, "max": max, "min": min}[op]
        return {name: made(rank[name] for rank in said[op]) for name in values}  # type: ignore[operator]

    for collective in (tell, hear):
        monkeypatch.setattr(reduction.distributed, "all_reduce_scalars", collective)
        out = [mine.over_ranks(sequence) for mine in held]
    return out


@pytest.mark.parametrize("sequence", [1, 2])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_split_logs_the_same(ranks: int, parts: int, sequence: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for mine in logged(ranks, parts, sequence, monkeypatch):
        assert mine == {"mean": float(SAMPLES.mean()), "max": 4.0, "min": -2.0, "sum": float(SAMPLES.sum())}


def test_a_number_that_is_not_finite_is_not_lost_among_the_others() -> None:
    for order in ([math.nan, 1.0], [1.0, math.nan]):
        mine = Reduced()
        for value in order:
            mine.add(LossOutput(torch.tensor(0.0), {"most": torch.tensor(value)}, reduced={"most": "max"}), 0.5)
        assert math.isnan(mine.values["most"])


def test_a_sum_of_two_losses_keeps_how_each_number_is_reduced() -> None:
    term = LossOutput(torch.tensor(1.0), {"least": torch.tensor(2.0)}, reduced={"least": "min"})
    assert with_term(output(SAMPLES), term, 0.5).reduced == {"max": "max", "min": "min", "sum": "sum", "least": "min"}
