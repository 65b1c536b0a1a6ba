"""How long a disk lasts: saves are counted one by one, as a run makes and deletes them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from utils.space import Saves, free_space, share_for_good, shortage, size_text

GB = 10**9


def counted(saves: Saves, free: int, most: int = 10_000) -> float:
    """As a disk would count: write, then delete the oldest one beyond `keep_last`, but some for good."""
    room, stored, number = float(free), saves.stored, 0
    while room >= saves.size and number < most:
        number += 1
        room -= saves.size + saves.logs
        stored += 1
        if saves.keep_last is not None and stored > saves.keep_last:
            stored -= 1
            room += saves.size * (1 - saves.for_good)
    return math.inf if number == most else number


@pytest.mark.parametrize("free", [0, 1, 2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize(
    "saves",
    [
        Saves(2, 0, 1),
        Saves(2, 0, 3),
        Saves(2, 3, 3),
        Saves(2, 5, 3),
        Saves(2, 0, None),
        Saves(2, 1, 2, logs=1),
        Saves(2, 0, 2, for_good=0.5),
        Saves(2, 4, 2, for_good=1.0, logs=1),
    ],
    ids=str,
)
def test_so_many_saves_fit_as_a_disk_would_count(saves: Saves, free: int) -> None:
    assert saves.fitting(free) == counted(saves, free)


def test_a_run_that_prunes_needs_room_for_one_more_than_it_keeps() -> None:
    saves = Saves(size=2 * GB, stored=0, keep_last=3)
    assert saves.fitting(8 * GB - 1) == 3  # the fourth fails
    assert saves.fitting(8 * GB) == math.inf


def test_share_for_good_is_of_the_saves_that_are_made() -> None:
    assert share_for_good(100, None) == 0
    assert share_for_good(100, 1000) == 0.1
    assert share_for_good(100, 250) == 0.2  # 500, 1000, ...
    assert share_for_good(1000, 100) == 1


def test_hours_left_are_saves_that_fit_times_their_distance() -> None:
    saves = Saves(2 * GB, stored=2, keep_last=2, for_good=1.0)
    assert shortage(saves, 7 * GB, to_come=50, hours=1.5) == (
        "7.0 GB free, room for 3 more saves of 2.0 GB (of 50 to come): it lasts 4.5 hours"
    )
    assert shortage(saves, 7 * GB, to_come=50, hours=8.0) is None  # a day
    assert shortage(saves, 3 * GB, to_come=50, hours=30.0) == (
        "3.0 GB free, room for 1 more save of 2.0 GB (of 50 to come): it lasts 30.0 hours"
    )
    assert shortage(saves, 3 * GB, to_come=1, hours=30.0) is None  # the run ends first
    assert shortage(saves, GB, to_come=1, hours=1.0) == "1.0 GB free, a save of 2.0 GB does not fit"


def test_logs_alone_fill_a_disk_too() -> None:
    saves = Saves(2 * GB, stored=2, keep_last=2, logs=GB)
    assert shortage(saves, 6 * GB, to_come=50, hours=1.0) == (
        "6.0 GB free, room for 5 more saves of 2.0 GB (of 50 to come): it lasts 5.0 hours"
    )


def test_before_a_run_a_disk_is_short_that_does_not_last_to_the_end() -> None:
    saves = Saves(2 * GB, stored=0, keep_last=3)
    assert shortage(saves, 8 * GB, to_come=50, hours=None) is None
    assert shortage(saves, 7 * GB, to_come=3, hours=None) is None
    assert shortage(saves, 7 * GB, to_come=50, hours=None) == (
        "7.0 GB free, room for 3 more saves of 2.0 GB (of 50 to come)"
    )


def test_free_space_is_that_of_the_folder_that_will_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "a" / "b", tmp_path / "file" / "b", tmp_path / ("n" * 300)):
        assert free_space(folder) > 0
    assert [size_text(count) for count in (1_500, 2_500_000, 3.25e9)] == ["1.5 kB", "2.5 MB", "3.2 GB"]
