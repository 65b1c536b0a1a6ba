"""Sharded training is the training of one process: the same losses, gradients and weights, whatever the split.

Each world size is launched once; its processes run all cases of tests/distributed/sharding.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import forked
from tests.distributed import sharding
from tests.small import save_networks

Seen = dict[str, Tensor]
PARTS = ("grad/0/student", "grad/0/critic", "grad/1/student", "grad/1/critic", "weight/student", "weight/critic", "ema")


class Runs(Mapping[str, Seen]):
    """What rank 0 saw, by `world_case`. A world size is launched when the first of its cases is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.launched = folder, set[tuple[int, bool]]()

    def __getitem__(self, case: str) -> Seen:
        world, name = int(case.split("_")[0]), case.split("_", 1)[1]
        more = name in sharding.MORE
        if (world, more) not in self.launched:
            if world == 1:
                sharding.main(self.folder, more)
            else:
                arguments = [str(self.folder), "more" if more else "core"]
                done = forked.run(world, "tests.distributed.sharding", *arguments)
                assert done.returncode == 0, done.stderr[-4000:]
            self.launched.add((world, more))
        return load_file(self.folder / f"{case}.safetensors")

    def __iter__(self) -> Iterator[str]:
        return (f"{world}_{name}" for world, cases in sharding.CASES.items() for name in cases)

    def __len__(self) -> int:
        return len(list(iter(self)))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("sharding")
    save_networks(folder)
    return Runs(folder)


def numbers(result: Seen) -> Seen:
    """Losses, gradients, weights: all but the counts of collectives and of bytes held."""
    left_out = ("calls", "held")
    return {key: value for key, value in result.items() if not key.startswith(left_out)}


def distance(result: Seen, expected: Seen, part: str) -> float:
    """|a - b| / |b| over all tensors of a part."""
    keys = [key for key in expected if key.startswith(part)]
    assert keys
    assert keys == [key for key in result if key.startswith(part)]
    a, b = (torch.cat([s[key].double().flatten() for key in keys]) for s in (result, expected))
    return float((a - b).norm() / b.norm())


EXACT = [
    f"{world}_{name}"
    for world, cases in sharding.CASES.items()
    for name in cases
    if name not in ("bf16", "whole") and not (world == 1 and name in sharding.OTHERS)
]


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT)
def test_any_split_trains_alike(seen: Mapping[str, Seen], case: str) -> None:
    """Ranks, copies, accumulation, resharding, offload, other losses: the numbers of one process, from losses to averages."""
    name = case.split("_", 1)[1]
    result, whole = seen[case], seen[f"1_{name if name in sharding.OTHERS else 'whole'}"]
    trained = ("student",) if name == "ode" else ("student", "critic")
    assert all(whole[f"metric/{step}/{network}/loss"] != 0 for step in range(2) for network in trained)
    for key in (key for key in whole if key.startswith("metric/")):
        assert float(result[key]) == pytest.approx(float(whole[key]), rel=2e-6, abs=1e-9), key
    for part in (part for part in PARTS if "critic" not in part or "critic" in trained):
        assert distance(result, whole, part) < 2e-6, part
    assert result["evaluations"] == whole["evaluations"]


@pytest.mark.slow
def test_ode_pairs_are_shared_out_and_the_same_for_any_number_of_ranks(seen: Mapping[str, Seen]) -> None:
    """Three micro-batches on two ranks, and on two groups of two: one rank has none in the last turn."""
    pairs_1, pairs_2, pairs_4 = (seen[f"{world}_ode"]["pairs"] for world in (1, 2, 4))
    assert len({tuple(pair.flatten().tolist()) for pair in pairs_1}) == len(pairs_1) == 5
    assert distance({"x": pairs_2}, {"x": pairs_1}, "x") < 2e-6
    assert distance({"x": pairs_4}, {"x": pairs_1}, "x") < 2e-6
    for world in (1, 2, 4):
        assert int(seen[f"{world}_ode"]["evaluations"]) == 5 * 4 * 2 * 6  # pairs x steps x guidance x frames


@pytest.mark.slow
def test_what_stays_gathered_changes_no_number_but_saves_gathers(seen: Mapping[str, Seen]) -> None:
    sharded, kept, gathered = (seen[f"2_{name}"] for name in ("sharded", "kept", "gathered"))
    for other in (kept, gathered, seen["2_offloaded"]):
        assert numbers(other).keys() == numbers(sharded).keys()
        assert all(torch.equal(value, other[key]) for key, value in numbers(sharded).items())
    for step in range(2):
        calls = [int(result[f"calls/{step}/gather"]) for result in (sharded, kept, gathered)]
        assert calls[0] > calls[1] > calls[2] > 0, calls


@pytest.mark.slow
def test_gradients_are_reduced_with_the_last_micro_batch_only(seen: Mapping[str, Seen]) -> None:
    """Of two micro-batches one reduces, by less than both would."""
    once = int(seen["2_sharded"]["calls/0/reduce_scatter"])
    assert once == 2 * 3  # two networks of two blocks and a root
    assert once <= int(seen["2_accumulated"]["calls/0/reduce_scatter"]) < 2 * once
    assert int(seen["2_synced"]["calls/0/reduce_scatter"]) == 2 * once


@pytest.mark.slow
def test_hybrid_sharding_sums_its_copies_once(seen: Mapping[str, Seen]) -> None:
    """It may scatter with each micro-batch."""
    hybrid, synced = seen["4_hybrid"], seen["4_hybrid_synced"]
    assert int(synced["calls/0/reduce_scatter"]) == 2 * int(hybrid["calls/0/reduce_scatter"])
    assert int(synced["calls/0/allreduce"]) == int(hybrid["calls/0/allreduce"])


@pytest.mark.slow
def test_bf16_shards_and_precision(seen: Mapping[str, Seen]) -> None:
    """Frozen shards take two bytes, trained ones four; what the blocks gather in bf16 is what autocast would make."""
    sharded, single = seen["2_bf16"], seen["1_bf16"]
    assert int(sharded["held/student"]) == int(sharded["held/critic"]) == 2 * int(sharded["held/teacher"])
    assert all(value.dtype == torch.float32 for key, value in sharded.items() if key.startswith("grad/"))
    for name in ("student/loss", "student/score_gap"):
        key = f"metric/0/{name}"
        assert float(sharded[key]) == pytest.approx(float(single[key]), rel=1e-6), key
    # gradients of matrices leave the blocks in bf16 (2^-9), as they do under autocast
    assert distance(sharded, single, "grad/0/student") < 2**-9
    assert distance(sharded, single, "grad/0/critic") < 2**-9


@pytest.mark.slow
@pytest.mark.parametrize(("case", "ways"), [("2_sharded", 2), ("4_sharded", 4), ("4_hybrid", 2)])
def test_ranks_hold_their_part(seen: Mapping[str, Seen], case: str, ways: int) -> None:
    """Half the weights on two ranks, a quarter on four, all in copies; rows that do not divide cost a little more."""
    whole = int(seen["2_replicated"]["held/student"])
    assert whole / ways <= int(seen[case]["held/student"]) < 1.1 * whole / ways
