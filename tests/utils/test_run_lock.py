"""One run at a time in a folder: a living owner is waited for and then named, a dead one is not in the way."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small import DIFFUSION, config
from trainer import run
from trainer.base import RunOptions
from utils import run_lock
from utils.errors import UserError
from utils.run_lock import LockTimes, Owner, Process, RunLock

TIMES = LockTimes(beat=0.02, stale=0.4, patience=1.5, look=0.02)
HASTY = dataclasses.replace(TIMES, patience=0.1)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(run_lock.console, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of this machine, alive."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def process_of(pid: int) -> Process:
    return dataclasses.replace(Process.this(), pid=pid, began=run_lock._began(pid))


ELSEWHERE = Process("another boot", 4711, 0, "99")


def left(folder: Path, *processes: Process, beat: int = 0) -> Path:
    """The lock of a run of these processes."""
    folder.mkdir(exist_ok=True)
    owner = Owner("abc", "node7", 4711, "2026-01-02 03:04:05", processes, beat)
    (folder / "run.lock").write_bytes(owner.encoded())
    return folder / "run.lock"


def test_a_second_run_waits_says_so_once_and_is_refused_in_one_line_that_names_the_first(
    tmp_path: Path, said: list[str]
) -> None:
    with RunLock(tmp_path, TIMES) as first:
        assert first.owner is not None
        with pytest.raises(UserError) as caught, RunLock(tmp_path, HASTY):
            raise AssertionError
        who = f"process {first.owner.pid} on {first.owner.host}, since {first.owner.since}"
        assert str(caught.value).startswith(f"{tmp_path} is in use by another run ({who}): ")
        assert "\n" not in str(caught.value)
        assert len(said) == 1 and who in said[0]
        first.check()
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path, HASTY):
        assert len(said) == 1


def test_a_restart_waits_for_the_run_before_to_end(tmp_path: Path, said: list[str]) -> None:
    first = RunLock(tmp_path, TIMES)
    first.__enter__()
    threading.Timer(0.2, first.release).start()
    with RunLock(tmp_path, TIMES) as second:
        second.check()
    assert len(said) == 1


def test_an_owner_elsewhere_is_judged_by_whether_its_lock_changes(tmp_path: Path, said: list[str]) -> None:
    """Its clock is not asked: it may be years ahead."""
    lock = left(tmp_path, ELSEWHERE)
    started, stop = time.monotonic(), threading.Event()

    def beats() -> None:
        beat = 0
        while not stop.wait(0.05):
            left(tmp_path, ELSEWHERE, beat=(beat := beat + 1))

    thread = threading.Thread(target=beats)
    thread.start()
    with pytest.raises(UserError, match=r"process 4711 on node7, since 2026-01-02 03:04:05"):
        RunLock(tmp_path, dataclasses.replace(TIMES, patience=0.8)).__enter__()
    assert time.monotonic() - started > 0.8
    stop.set()
    thread.join()
    with RunLock(tmp_path, TIMES) as taken:
        assert b"abc" not in lock.read_bytes()
        taken.check()
    assert "is gone (process 4711 on node7" in said[-1]


@pytest.mark.parametrize("content", [b"", b'{"token": "x"', b"\0" * 100, b"[]", b'{"processes": [3]}'])
def test_a_torn_lock_is_in_the_way_only_as_long_as_it_could_be_somebodys(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.lock").write_bytes(content)
    with pytest.raises(UserError, match="in use by another run: "):
        RunLock(tmp_path, HASTY).__enter__()
    with RunLock(tmp_path, dataclasses.replace(TIMES, stale=0.1)) as lock:
        lock.check()


def test_the_last_living_rank_holds_it_on_this_machine(
    tmp_path: Path, said: list[str], sleeper: subprocess.Popen[bytes]
) -> None:
    """Rank 0 is dead and beats no more; another rank is still there. Once it is gone nobody has to wait."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    ranks = (process_of(dead.pid), process_of(sleeper.pid))
    dead.wait()
    left(tmp_path, *ranks)
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path, dataclasses.replace(TIMES, stale=0.01, patience=0.2)).__enter__()
    sleeper.kill()
    sleeper.wait()
    started = time.monotonic()
    with RunLock(tmp_path, dataclasses.replace(TIMES, stale=100, patience=100)):
        assert time.monotonic() - started < 5


def test_a_number_that_another_process_has_now_is_not_the_owner(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    left(tmp_path, dataclasses.replace(process_of(sleeper.pid), began="1"))
    with RunLock(tmp_path, HASTY):
        pass


def test_of_many_that_find_a_dead_owner_one_gets_the_folder(tmp_path: Path, said: list[str]) -> None:
    left(tmp_path, ELSEWHERE)
    got: list[RunLock] = []
    refused: list[str] = []

    def enter() -> None:
        lock = RunLock(tmp_path, dataclasses.replace(TIMES, patience=1.0))
        try:
            got.append(lock.__enter__())
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [owner] = got
    assert len(refused) == 5
    owner.check()
    owner.release()
    assert list(tmp_path.iterdir()) == []


def test_one_who_was_away_finds_the_folder_taken_and_harms_nobody(tmp_path: Path) -> None:
    away = RunLock(tmp_path, dataclasses.replace(TIMES, beat=3600))  # as if stopped
    away.__enter__()
    lock = tmp_path / "run.lock"
    lock.rename(tmp_path / "old")
    with RunLock(tmp_path, HASTY) as second:
        with pytest.raises(UserError, match=r"was taken by another run \(process .* while this one did not move"):
            away.check()
        away.release()
        second.check()


def test_a_lock_that_somebody_deleted_comes_back(tmp_path: Path) -> None:
    with RunLock(tmp_path, TIMES) as lock:
        (tmp_path / "run.lock").unlink()
        deadline = time.monotonic() + 20
        while not lock.path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(UserError, match="in use"):
            RunLock(tmp_path, HASTY).__enter__()
        lock.check()


def test_file_systems_without_links_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(run_lock.os, "link", link)
    with RunLock(tmp_path, TIMES) as lock:
        lock.check()
        with pytest.raises(UserError, match="in use"):
            RunLock(tmp_path, HASTY).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--logdir .*/file/run cannot be written to: Not a directory"):
        RunLock(tmp_path / "file" / "run", HASTY).__enter__()


def test_training_touches_nothing_of_a_folder_that_another_run_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "LOCK_TIMES", dataclasses.replace(HASTY, beat=5.0))
    (tmp_path / "metrics.jsonl").write_text('{"step": 900}\n')
    left(tmp_path, ELSEWHERE)
    options = RunOptions(tmp_path, wandb=False)
    for logs in (options, dataclasses.replace(options, save=False)):  # --no_save has metrics, too
        with pytest.raises(UserError, match="in use by another run"):
            run.train(config(DIFFUSION), logs)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 900}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "run.lock"]
    (tmp_path / "run.lock").unlink()
    assert run.train(config(DIFFUSION, training={"max_steps": 1}), options) == 0
    assert not (tmp_path / "run.lock").exists()
    left(tmp_path / "elsewhere", ELSEWHERE)
    silent = dataclasses.replace(options, logdir=tmp_path / "elsewhere", save=False, visualize=False, log=False)
    assert run.train(config(DIFFUSION, training={"max_steps": 1}), silent) == 0  # writes nothing
