"""What a report says and when a wait is excused. Runs that really hang: tests/distributed."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pytest
import torch.distributed as dist

from configs.load import run_from_plain
from utils import activity, distributed
from utils.errors import ConfigError
from utils.watchdog import Place, Watchdog, WatchdogConfig, describe, is_collective_error

# ------------------------------------------------------------------------------------------------------------ activity


def test_an_activity_is_restored_after_its_parts_and_an_error_leaves_it_where_it_arose() -> None:
    activity.begin(7)
    activity.mark("critic update")
    before = activity.current()
    with activity.doing("checkpoint", slow=True):
        with activity.doing("wait for all ranks"):
            assert activity.current() == (7, "critic update: checkpoint: wait for all ranks", True)
        assert activity.current() == (7, "critic update: checkpoint", True)
    assert activity.current() == before
    assert activity.current() is not before  # it has moved on
    with pytest.raises(KeyError), activity.doing("reduce"):
        raise KeyError
    assert activity.current().what == "critic update: reduce"
    activity.begin(8)
    assert activity.current() == (8, "iteration", False)


def test_other_threads_say_nothing_about_the_main_one() -> None:
    activity.begin(1)
    seen: list[activity.Activity] = []

    @activity.doing("background save")
    def work() -> None:
        seen.append(activity.current())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(1, "iteration", False)]
    work()
    assert seen[1] == (1, "iteration: background save", False)


# -------------------------------------------------------------------------------------------------------------- report


def place(step: int, what: str, held: float, *, slow: bool = False, beat: int = 1, **more: Any) -> Place:
    return Place(step, what, slow, held, beat, "12:00:00", **more)


def test_the_rank_that_is_elsewhere_comes_first_and_shows_its_stack() -> None:
    places = {rank: place(8, "reduce", 64, stack=f"  of {rank}") for rank in range(8)}
    places[2] = place(7, "student update", 65, stack="  of 2")
    text = describe(places, set(range(8)), 8, asker=5)
    assert text == (
        "rank 2 is at step 7 in 'student update' for 65 s; ranks 0-1, 3-7 are at step 8 in 'reduce' for 64 s\n"
        "rank 2:\n  of 2\nrank 5:\n  of 5"
    )


@pytest.mark.parametrize(
    ("other", "behind"),
    [(place(7, "b", 1), 1), (place(9, "b", 99), 0), (place(8, "b", 99), 1), (place(8, "b", 1), 0)],
    ids=["earlier step", "later step", "same step, longer there", "same step, came later"],
)
def test_of_two_ranks_the_one_behind_is_named_first(other: Place, behind: int) -> None:
    assert describe({0: place(8, "a", 50), 1: other}, {0, 1}, 2, asker=0).startswith(f"rank {behind} is")


def test_ranks_that_are_gone_come_before_those_that_are_elsewhere() -> None:
    places = {rank: place(3, "reduce", 60) for rank in range(6)}
    places[1] = place(2, "rollout", 4)  # as it last said, but it does not answer
    places[4] = place(3, "batch", 0, ended="KeyError: 'x'")
    del places[5]
    line = describe(places, {0, 2, 3, 4}, 6, asker=0)
    gone = [
        "rank 5 never began",
        "rank 1 is silent since 12:00:00 (dead or stopped), last at step 2 in 'rollout'",
        "rank 4 left at step 3 in 'batch' at 12:00:00 (KeyError: 'x')",
    ]
    assert line == "; ".join([*gone, "ranks 0, 2-3 are at step 3 in 'reduce' for 60 s"])


def test_values_are_grouped_by_rank() -> None:
    assert distributed.grouped(["a", "a", "b", "a"]) == "ranks 0-1, 3: a, rank 2: b"


# ------------------------------------------------------------------------------------------------------------ patience


@pytest.fixture
def dog() -> Watchdog:
    """Rank 0 of 2, over a store in memory, its thread not started."""
    dog = Watchdog(WatchdogConfig(stuck_after_seconds=10, slow_after_seconds=100))
    dog.size, dog._store = 2, dist.HashStore()
    activity.begin(5)
    dog._tick()
    return dog


def says(dog: Watchdog, what: Place) -> None:
    assert dog._store is not None
    dog._store.set("at/1", json.dumps(asdict(what)))


def test_only_time_in_one_activity_counts(dog: Watchdog) -> None:
    for _ in range(3):
        dog._tick()
    assert dog._held == 3 * dog.period == 6.0
    activity.mark("iteration")  # the same words, but a new mark
    dog._tick()
    assert dog._held == 0


def test_waiting_for_slow_work_is_excused_as_long_as_it_lives_and_is_in_time(dog: Watchdog) -> None:
    says(dog, place(5, "iteration", 12))
    assert not dog._excused()
    for beat in (3, 4):
        dog._held = 11
        says(dog, place(5, "validation", 50, slow=True, beat=beat))
        assert dog._excused()
        assert dog._held == 0
    assert not dog._excused()  # no new sign of life since
    says(dog, place(5, "validation", 101, slow=True, beat=9))
    assert not dog._excused()


def test_slow_work_has_its_own_limit_and_nobody_waits_long_for_one_that_failed() -> None:
    dog = Watchdog(WatchdogConfig(stuck_after_seconds=600, slow_after_seconds=3600))
    dog.size, dog._store = 2, dist.HashStore()
    with activity.doing("checkpoint", slow=True):
        dog._tick()
        assert dog._limit() == 3600
    dog._tick()
    assert dog._limit() == 600
    dog._store.set("failed", "1")
    says(dog, place(5, "validation", 1, slow=True))
    dog._listen()
    assert dog._limit() == 30
    assert not dog._excused()


def test_who_refuses_has_time_to_say_why_however_long_others_waited_for_it(dog: Watchdog) -> None:
    assert dog._store is not None
    dog.config = WatchdogConfig(stuck_after_seconds=600, slow_after_seconds=3600)
    dog._held = 60
    dog._listen()
    assert dog._limit() == 600
    dog._store.set("refused", "1")
    dog._listen()
    assert dog._limit() == 65
    dog._held = 0  # it has moved on
    dog._listen()
    assert dog._limit() == 5
    dog._store = None  # it ended with the rank that kept it
    assert dog._is_refused()


def test_rank_0_keeps_its_store_until_the_others_know_that_it_refused(dog: Watchdog) -> None:
    other = Watchdog(dog.config)
    other.rank, other.size, other._store = 1, 2, dog._store
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(dog._end, "UserError: no file", "refused")
        while not other._is_refused():
            assert not ending.done()
        other._listen()
        ending.result()
    assert dog._store is not None
    assert dog._store.check(["heard/1"])


def test_without_the_store_a_rank_reports_itself(capfd: pytest.CaptureFixture[str], dog: Watchdog) -> None:
    class Gone(dist.HashStore):
        def add(self, *_: Any) -> int:
            raise dist.DistNetworkError("Connection refused")

    dog._store = Gone()
    dog._report("rank 0 has not moved for 12 s")
    said = capfd.readouterr().err
    assert "has not moved for 12 s; the other ranks cannot be asked (Connection refused)\nrank 0:\n" in said
    assert "in test_without_the_store_a_rank_reports_itself: dog._report(" in said


def test_errors_of_a_backend_are_told_from_others() -> None:
    assert is_collective_error(dist.DistBackendError("NCCL error"))
    assert is_collective_error(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert not is_collective_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_collective_error(ConfigError("gloo"))


def test_limits_are_checked_and_process_groups_outlast_them() -> None:
    with pytest.raises(ConfigError, match=r"^watchdog.stuck_after_seconds must be positive, or null for ever, got 0"):
        run_from_plain({"watchdog": {"stuck_after_seconds": 0}})
    with pytest.raises(ConfigError, match=r"^watchdog.slow_after_seconds 5.0 is less than stuck_after_seconds 600.0"):
        run_from_plain({"watchdog": {"slow_after_seconds": 5}})
    timeout = WatchdogConfig(stuck_after_seconds=600, slow_after_seconds=3600).group_timeout()
    assert timeout is not None
    assert timeout.total_seconds() > 3600 + 600
    assert WatchdogConfig(stuck_after_seconds=None).group_timeout() is None
