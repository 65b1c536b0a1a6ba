"""Ulysses sequence parallelism: 2 and 4 ranks compute what one computes, in every mode and for every loss."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.multiprocessing import start_processes

from tests import forked
from tests.distributed import sequence_ranks
from utils.parallel.sequence import SequenceParallel, check_degree

LAYERS = sequence_ranks.CONFIG.num_layers


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four ranks report. A group of two is half of them, so the two halves must not meet either."""
    folder = tmp_path_factory.mktemp("ranks")
    report = folder / "report.json"
    forked.serve()
    arguments = (4, str(folder / "store"), str(report))
    start_processes(sequence_ranks.main, args=arguments, nprocs=4, start_method="forkserver")
    return json.loads(report.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("case", sequence_ranks.CASES)
def test_a_group_of_ranks_computes_what_one_rank_computes(found: dict[str, Any], case: str, degree: int) -> None:
    """Outputs, losses, input gradients, caches; and gradients of parameters, once they are summed over the ranks."""
    errors = found[f"{case} {degree}"]
    alone = errors.pop("one rank alone", None)
    assert alone is None or alone > 0.1  # the sum is needed
    bound = 5e-3 if case == "bf16" else 1e-5
    assert {name: error for name, error in errors.items() if not error < bound} == {}


@pytest.mark.slow
def test_two_exchanges_a_layer_each_way(found: dict[str, Any]) -> None:
    """q, k and v go in one all-to-all, the result comes back in another; checkpointing repeats both in backward."""
    once = {"alltoall_base_": 2 * LAYERS, "_allgather_base_": 1}  # gathered: the output, or the input's gradient
    plain, checkpointed = found["collectives"], found["collectives_checkpointed"]
    assert plain["forward"] == checkpointed["forward"] == plain["backward"] == once
    assert checkpointed["backward"] == once | {"alltoall_base_": 4 * LAYERS}
    # fp32; two samples of 8 frames, 9 tokens each: 5 of them on this one of two ranks; 4 tensors a layer
    tokens, patch = 4 * 2 * 8 * 5, 4 * sequence_ranks.CONFIG.out_dim
    exchanged = 4 * LAYERS * tokens * sequence_ranks.CONFIG.dim
    assert plain["forward bytes"] == {"alltoall_base_": exchanged, "_allgather_base_": tokens * patch}


@pytest.mark.slow
def test_a_group_of_one_is_none_and_a_group_that_splits_no_heads_is_refused(found: dict[str, Any]) -> None:
    assert found["alone"] is True
    assert found["refusal"] == "sequence parallelism over 4 ranks cannot split 3 heads: use one of 1, 3"


@pytest.mark.slow
def test_numbers_that_any_rank_holds_are_known_to_all(found: dict[str, Any]) -> None:
    assert found["union"] == [[0, 1, 2], []]


@pytest.mark.parametrize(
    ("heads", "degree", "legal"),
    [(40, 16, "1, 2, 4, 5, 8, 10, 20, 40"), (12, 8, "1, 2, 3, 4, 6, 12"), (12, 0, "1, 2, 3, 4, 6, 12")],
)
def test_an_illegal_degree_names_the_legal_ones(heads: int, degree: int, legal: str) -> None:
    with pytest.raises(ValueError, match=f"over {degree} ranks cannot split {heads} heads: use one of {legal}$"):
        check_degree(heads, degree)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9])
def test_each_token_lies_on_one_rank_and_padding_is_zero(size: int, tokens: int) -> None:
    x = torch.arange(1.0, 2 * 5 * tokens * 3 + 1).reshape(2, 5 * tokens, 3)
    group: Any = None  # nothing is sent
    parts = [SequenceParallel(group, rank, size).frames(tokens).shard(x) for rank in range(size)]
    local = -(-tokens // size)
    assert {part.shape for part in parts} == {(2, 5 * local, 3)}
    frames = torch.cat([part.unflatten(1, (5, local)) for part in parts], 2)
    assert torch.equal(frames[:, :, :tokens].flatten(1, 2), x)
    assert not frames[:, :, tokens:].any()
