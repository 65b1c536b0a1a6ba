"""The store by which ranks find each other, apart from that of an earlier attempt of the same launcher.

`torchrun --max_restarts` keeps its store when it starts the ranks again. Keys of ranks that were killed are still in
it, and new ranks would wait for those. Its count of restarts is a node's own. So rank 0 makes up a name for the attempt
and tells it to each rank that asks.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from utils.errors import UserError

_ASKED = "fewstep/asked"  # how many ranks have asked, in all attempts
_LOOK = 0.02  # seconds between two looks of rank 0

# how long ranks wait for each other where no launcher ends them: one may have ended over a mistake before it came
JOIN = timedelta(minutes=10)

_attempt = ""


def attempt() -> str:
    """The name of this attempt, the same on all ranks."""
    return _attempt


def launcher_keeps_store() -> bool:
    """Whether torchrun keeps the store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def joined_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """This attempt's part of the store that torchrun, or else rank 0, keeps.

    timeout: how long ranks wait for each other under torchrun. Without it they wait for JOIN at most.

    Raises UserError if a rank does not come, or the port is taken.
    """
    global _attempt
    kept = launcher_keeps_store()
    patience = timeout if kept else min(timeout, JOIN)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    begins = rank == 0 and not kept
    try:
        store = dist.TCPStore(
            host, port, is_master=begins, timeout=patience, wait_for_workers=False, multi_tenant=begins
        )
    except dist.DistError as error:
        what = (
            "is taken, or not this machine's: give another MASTER_PORT"
            if begins
            else "has nobody: look at rank 0's log"
        )
        raise UserError(f"{host}:{port}, where ranks meet, {what} ({' '.join(str(error).split())[:120]})") from None
    _attempt = name_attempt(store, rank, size, patience)
    return dist.PrefixStore(_attempt, store)


def name_attempt(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """The name that rank 0 makes up; all ranks call it together. Raises UserError if a rank does not come."""
    if rank == 0:
        return _tell(store, size, timeout)
    question = secrets.token_hex(8)
    place = store.add(_ASKED, 1)
    store.set(f"{_ASKED}/{place}", question)
    try:
        store.wait([f"fewstep/answer/{question}"], timeout)
    except dist.DistStoreError:
        raise UserError(f"rank 0 has not come within {timeout.total_seconds():.0f} s: look at its log") from None
    name = store.get(f"fewstep/answer/{question}").decode()
    store.set(f"{name}/heard/{rank}", "")
    return name


def _tell(store: dist.Store, size: int, timeout: timedelta) -> str:
    """On rank 0: answers whoever asks, ranks of earlier attempts too, until all ranks of this one have heard."""
    name, deadline = f"fewstep/attempt/{secrets.token_hex(8)}", time.monotonic() + timeout.total_seconds()
    answered: set[int] = set()
    while missing := [rank for rank in range(1, size) if not store.check([f"{name}/heard/{rank}"])]:
        if time.monotonic() > deadline:
            raise UserError(f"rank {missing[0]} has not come within {timeout.total_seconds():.0f} s: look at its log")
        for place in set(range(1, store.add(_ASKED, 0) + 1)) - answered:
            if store.check([f"{_ASKED}/{place}"]):  # a rank can be killed before it says its question
                store.set(f"fewstep/answer/{store.get(f'{_ASKED}/{place}').decode()}", name)
                answered.add(place)
        time.sleep(_LOOK)
    return name
