"""Ranks of one attempt share a name, which no other attempt on the same store has, whatever killed ranks left in it."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from utils import rendezvous
from utils.errors import UserError
from utils.rendezvous import name_attempt

LONG, SHORT = timedelta(seconds=60), timedelta(seconds=0.3)


def attempt(store: dist.Store, size: int) -> set[str]:
    with ThreadPoolExecutor(size) as ranks:
        return set(ranks.map(lambda rank: name_attempt(store, rank, size, LONG), range(size)))


def test_each_attempt_has_one_name_of_its_own() -> None:
    store = dist.HashStore()
    names = [attempt(store, 4), attempt(store, 4), attempt(store, 3)]
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


def test_what_killed_ranks_left_behind_is_no_part_of_the_next_attempt() -> None:
    store = dist.HashStore()
    with pytest.raises(UserError, match=r"^rank 0 has not come within 0 s: look at its log$"):
        name_attempt(store, 1, 3, SHORT)  # asked, and never answered
    store.add("fewstep/asked", 1)  # killed before it said its question
    with pytest.raises(UserError, match=r"^rank 1 has not come within 0 s: look at its log$"):
        name_attempt(store, 0, 2, SHORT)
    assert len(attempt(store, 3)) == 1


def test_without_torchrun_a_rank_waits_for_the_others_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 keeps the store. A rank that ended before it came is told of, and so is a port that is not free."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "JOIN", SHORT)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match=r"^127.0.0.1:\d+, where ranks meet, is taken.*: give another MASTER_PORT"):
            rendezvous.joined_store(0, 2, LONG)
    with pytest.raises(UserError, match="rank 1 has not come within 0 s"):
        rendezvous.joined_store(0, 2, LONG)
    with pytest.raises(UserError, match="where ranks meet, has nobody: look at rank 0's log"):
        rendezvous.joined_store(1, 2, LONG)
