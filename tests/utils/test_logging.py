"""Metrics survive kills and resumes; trackers never stop a run; progress is plain where there is no terminal."""

from __future__ import annotations

import itertools
import json
import logging as python_logging
import math
import resource
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.utils.test_writing import files_of_at_most
from utils import logging, wandb_log
from utils.logging import Progress, RunLogger, peak_memory_gib, read_jsonl


def write_run(folder: Path, steps: range) -> RunLogger:
    logger = RunLogger(folder, {})
    for step in steps:
        logger.scalars(step, {"loss": step / 7, "norm": torch.tensor(2.0)})  # type: ignore[dict-item]
    return logger


def steps_of(folder: Path) -> list[int]:
    return [entry["step"] for entry in read_jsonl(folder / "metrics.jsonl")]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(logging.console, "warning", lambda text, *args: said.append(text % args))
    return said


def test_one_object_a_line_with_exact_numbers(tmp_path: Path) -> None:
    before = time.time()
    logger = write_run(tmp_path, range(3))
    logger.scalars(3, {"loss": math.nan, "norm": math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # on disk before the logger is closed
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3]
    assert entries[1]["loss"] == 1 / 7
    assert entries[1]["norm"] == 2.0
    assert math.isnan(entries[3]["loss"])
    assert entries[3]["norm"] == math.inf
    assert before <= entries[0]["time"] <= entries[3]["time"] <= time.time()


def test_resume_leaves_no_doubled_points(tmp_path: Path) -> None:
    write_run(tmp_path, range(10)).close()
    logger = RunLogger(tmp_path, {})
    logger.truncate_after(4)
    logger.scalars(5, {"loss": 55.0})
    logger.truncate_after(5)  # with the file open
    logger.scalars(6, {"loss": 66.0})
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    assert [entry["loss"] for entry in read_jsonl(logger.path)[4:]] == [4 / 7, 55.0, 66.0]


def test_a_run_that_is_not_truncated_is_gone_on_with(tmp_path: Path) -> None:
    write_run(tmp_path, range(2)).close()
    write_run(tmp_path, range(2, 4)).close()
    assert steps_of(tmp_path) == [0, 1, 2, 3]


def test_half_a_last_line_is_dropped(tmp_path: Path) -> None:
    write_run(tmp_path, range(3)).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ti')
    assert steps_of(tmp_path) == [0, 1, 2]
    write_run(tmp_path, range(3, 5)).close()
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 4096,
        b'\0\0{"step": 9, "time": 1.0}',
        b'{"step": 9, "ti{"step": 9, "time": 1.0}',
        b'{"step": 9, "name": "\xff\xfe"}',
        b"[1, 2]",
        b'{"step": 9',
        b"{" + b'"a": {' * 20_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"time": 3.0}',
        b'{"step": null}',
    ],
    ids=["nul", "nul and a line", "torn", "not utf-8", "list", "half", "deep", "long number", "no step", "no number"],
)
def test_a_damaged_line_is_set_aside_and_the_run_goes_on(tmp_path: Path, warnings: list[str], line: bytes) -> None:
    write_run(tmp_path, range(4)).close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    logger = RunLogger(tmp_path, {})
    logger.truncate_after(2)
    logger.scalars(3, {"loss": 1.0})
    logger.close()
    assert steps_of(tmp_path) == [0, 1, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == line + b"\n"
    [said] = warnings
    assert "\n" not in said and str(tmp_path / "metrics.jsonl.damaged") in said


def test_zeros_at_the_end_are_set_aside_too(tmp_path: Path, warnings: list[str]) -> None:
    """What a power loss leaves of a block that was not written yet."""
    write_run(tmp_path, range(3)).close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 100)
    assert steps_of(tmp_path) == [0, 1, 2]  # whoever only reads is told
    assert warnings == [f"{tmp_path / 'metrics.jsonl'}: left out are damaged lines: 1"]
    write_run(tmp_path, range(3, 4)).close()
    assert steps_of(tmp_path) == [0, 1, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\0" * 100 + b"\n"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "run", {}, tensorboard=True, wandb=True, is_main=False)
    logger.truncate_after(0)
    logger.scalars(0, {"loss": 1.0})
    logger.video(0, "sample", tmp_path / "a.mp4")
    logger.close()
    assert not (tmp_path / "run").exists()


def test_video_is_named_relative_to_the_run(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "run", {})
    logger.video(7, "ema/0", tmp_path / "run" / "samples" / "a.mp4")
    (entry,) = read_jsonl(logger.path)
    assert entry["step"] == 7
    assert entry["video"] == {"ema/0": "samples/a.mp4"}


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = RunLogger(tmp_path, {}, tensorboard=True)
    logger.scalars(3, {"student/loss": 0.5})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("student/loss")] == [(3, 0.5)]


# ----------------------------------------------------------------------------------------------------------------- W&B


class FakeRun:
    id = "abc"

    def __init__(self, fail: bool = False):
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished, self.fail = False, fail

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.fail:
            raise ConnectionError("lost\nthe line")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_a_tensorboard_that_fails_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    logger = RunLogger(tmp_path, {}, tensorboard=True)
    for step in (1, 2):
        logger.scalars(step, {"loss": 0.5})
    logger.close()
    assert len(read_jsonl(logger.path)) == 2
    assert len(warnings) == 1
    assert "TensorBoard failed (" in warnings[0]
    assert "going on without it" in warnings[0]


def fake_wandb(monkeypatch: pytest.MonkeyPatch, init: Any) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def recorded(**options: Any) -> Any:
        calls.append(options)
        return init()

    module = SimpleNamespace(init=recorded, Settings=lambda **options: options, Video=lambda path: f"video {path}")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.mark.parametrize(
    ("key", "mode", "expected"),
    [(None, None, "offline"), ("k", None, "online"), ("k", "offline", "offline"), ("k", "disabled", "disabled")],
)
def test_wandb_is_offline_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, mode: str | None, expected: str
) -> None:
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", mode)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    run = FakeRun()
    calls = fake_wandb(monkeypatch, lambda: run)
    logger = RunLogger(tmp_path, {"seed": 1}, wandb=True)
    logger.scalars(2, {"loss": 0.5})
    logger.video(3, "sample", tmp_path / "a.mp4")
    logger.close()
    assert calls[0]["mode"] == expected
    assert calls[0]["config"] == {"seed": 1}
    assert calls[0]["id"] is None
    assert run.logged == [(2, {"loss": 0.5}), (3, {"sample": f"video {tmp_path / 'a.mp4'}"})]
    assert run.finished
    RunLogger(tmp_path, {}, wandb=True)
    assert calls[1]["id"] == "abc"  # a resume goes on in the same W&B run


@pytest.mark.parametrize("kept", [b"", b"\0" * 8, b"\xff\xfe", b"a/b?c"])
def test_a_damaged_id_begins_a_new_run_in_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], kept: bytes
) -> None:
    (tmp_path / "wandb_id.txt").write_bytes(kept)
    run = FakeRun()
    calls = fake_wandb(monkeypatch, lambda: run)
    RunLogger(tmp_path, {}, wandb=True).close()
    assert calls[0]["id"] is None
    assert (tmp_path / "wandb_id.txt").read_text() == "abc"
    assert (tmp_path / "wandb_id.txt.damaged").read_bytes() == kept + b"\n"
    assert len(warnings) == 1
    assert run.finished


def test_wandb_is_not_told_a_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume from before the last logged step does some steps again."""
    (tmp_path / "wandb_id.txt").write_text("abc")
    run = FakeRun()
    fake_wandb(monkeypatch, lambda: run)
    monkeypatch.setattr(wandb_log, "last_step", lambda folder, run_id: {(tmp_path, "abc"): 4}[folder, run_id])
    logger = RunLogger(tmp_path, {}, wandb=True)
    logger.truncate_after(2)
    for step in range(3, 7):
        logger.scalars(step, {"loss": float(step)})
        logger.video(step, "sample", tmp_path / "a.mp4")
    logger.close()
    assert sorted({step for step, _ in run.logged}) == [5, 6]
    assert (tmp_path / "wandb_step.txt").read_text() == "abc 6\n"
    assert sorted(set(steps_of(tmp_path))) == [3, 4, 5, 6]


def test_wandb_that_fails_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    def broken() -> None:
        raise RuntimeError("no\nnetwork")

    fake_wandb(monkeypatch, broken)
    logger = RunLogger(tmp_path, {}, wandb=True)
    logger.scalars(0, {"loss": 1.0})
    fake_wandb(monkeypatch, lambda: FakeRun(fail=True))
    logger = RunLogger(tmp_path, {}, wandb=True)
    logger.scalars(1, {"loss": 1.0})
    logger.scalars(2, {"loss": 1.0})
    logger.close()
    assert len(warnings) == 2
    assert not any("\n" in line for line in warnings)
    assert "no network" in warnings[0]
    assert "lost the line" in warnings[1]
    assert steps_of(tmp_path) == [0, 1, 2]


def test_wandb_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    monkeypatch.setattr(wandb_log, "_SECONDS", 0.05)
    release = threading.Event()
    fake_wandb(monkeypatch, lambda: release.wait(30))
    logger = RunLogger(tmp_path, {}, wandb=True)
    logger.scalars(0, {"loss": 1.0})
    release.set()
    assert len(warnings) == 1
    assert "no answer" in warnings[0]
    assert steps_of(tmp_path) == [0]


# ------------------------------------------------------------------------------------------------- progress and console


def test_progress_without_a_terminal_is_a_line_every_so_often(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(25, initial=5, every=10)
    for step in range(6, 26):
        progress.update(step, {"loss": step / 3, "norm": 1e-9})
    progress.close()
    out, lines = capsys.readouterr()
    assert out == ""
    assert [line.split()[1] for line in lines.splitlines()] == ["10/25", "20/25", "25/25"]
    assert "loss=3.333 norm=1e-09" in lines
    assert "0:00:0" in lines
    assert "it/s" in lines


def test_time_left_is_that_of_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: now[0])
    progress = Progress(10_000, initial=1000, every=1)
    now[0] += 50
    # 100 steps in 50 s leave 8900, that is 4450 s
    assert progress._line(1100, {}) == "train 1100/10000  2.00 it/s  1:14:10 left"


def test_progress_on_a_terminal_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(4, initial=1)
    progress.update(4, {"loss": 0.25})
    progress.close()
    assert "100%" in (shown := capsys.readouterr().err)
    assert "4/4" in shown
    assert "loss=0.25" in shown


def test_other_ranks_show_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(2, every=1, is_main=False)
    progress.update(2, {"loss": 1.0})
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_console_names_the_rank_and_other_ranks_only_warn(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        console = logging.setup_console(rank, 2)
        console.info("hello")
        console.warning("careful")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        *("[rank 0] I hello", "[rank 0] W careful", "[rank 1] W careful"),
    ]
    logging.console.handlers.clear()
    logging.console.setLevel(python_logging.NOTSET)
    logging.console.propagate = True


@pytest.mark.skipif(sys.platform != "linux", reason="units of Linux")
def test_peak_memory_is_between_what_is_resident_now_and_the_most_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    block = torch.ones(2**24)  # 64 MiB
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert 0.99 * now <= peak_memory_gib() <= 1.01 * most
    assert block.numel() * 4 / 2**30 < now


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("seconds_a_step", [0.1, 7.0, 29.0, 45.0])
def test_lines_come_for_the_first_steps_and_then_at_least_every_30_seconds(
    seconds_a_step: float, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    progress = Progress(2000, initial=100, every=None, first=3, clock=clock)
    spoken: list[tuple[int, float]] = []
    for step in range(101, 2001):
        clock.now += seconds_a_step
        progress.update(step, {})
        if line := capsys.readouterr().err:
            assert line.count("\n") == 1
            spoken.append((step, clock.now))
    steps, times = zip(*spoken, strict=True)
    assert steps[:3] == (101, 102, 103)
    assert steps[-1] == 2000
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert max(gaps) <= max(30, seconds_a_step) + 1e-6
    assert len(spoken) <= 5 + (times[-1] - times[0]) / 15  # and not many more


def test_pace_and_time_left_leave_out_pauses_and_the_first_step() -> None:
    clock = Clock()
    progress = Progress(1000, every=None, clock=clock)
    clock.now += 90  # compiles
    progress.update(1, {})
    for step in range(2, 102):
        clock.now += 0.5
        progress.update(step, {})
        if step % 10 == 0:
            with progress.pausing():
                clock.now += 500
    # 100 steps in 50 s: 899 steps are left, that is 449.5 s
    assert progress._line(101, {}) == "train 101/1000  2.00 it/s  0:07:30 left"


# ------------------------------------------------------------------------------------------------- a disk that refuses


def test_metrics_go_on_when_there_is_room_again(tmp_path: Path, warnings: list[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir()  # where the file should be
    logger = write_run(tmp_path, range(3))
    path.rmdir()
    logger.scalars(3, {"loss": 1.0})
    logger.close()
    assert steps_of(tmp_path) == [3]
    assert warnings == [
        f"{path} cannot be written (Is a directory): the run goes on, and loses lines until it can",
        f"{path} can be written again: 3 lines were lost",
    ]


def test_a_disk_that_fills_in_the_middle_of_a_line_leaves_none_of_it(tmp_path: Path, warnings: list[str]) -> None:
    logger = write_run(tmp_path, range(2))
    size = logger.path.stat().st_size
    with files_of_at_most(size + 10):
        logger.scalars(2, {"loss": 1.0})
        logger.scalars(3, {"loss": 1.0})
    assert logger.path.stat().st_size == size
    logger.scalars(4, {"loss": 1.0})
    logger.close()
    assert steps_of(tmp_path) == [0, 1, 4]
    assert [text.removeprefix(str(logger.path)) for text in warnings] == [
        " cannot be written (File too large): the run goes on, and loses lines until it can",
        " can be written again: 2 lines were lost",
    ]


def test_a_resume_on_a_full_disk_cuts_the_metrics_where_it_goes_on(tmp_path: Path, warnings: list[str]) -> None:
    write_run(tmp_path, range(5)).close()
    with files_of_at_most(0):
        logger = RunLogger(tmp_path, {})
        logger.truncate_after(2)
    logger.scalars(3, {"loss": 1.0})
    assert steps_of(tmp_path) == [0, 1, 2, 3]
    assert warnings == []


def test_damaged_metrics_on_a_full_disk_stay_as_they_are(tmp_path: Path, warnings: list[str]) -> None:
    write_run(tmp_path, range(3)).close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"torn\n", *lines[1:]]))
    before = path.read_bytes()
    with files_of_at_most(0):
        RunLogger(tmp_path, {}).close()
    assert path.read_bytes() == before
    [said] = warnings
    assert said == f"{path} cannot be changed (File too large): the run goes on; steps may be in it twice"


def test_a_tensorboard_whose_disk_is_full_says_so_in_one_line(
    tmp_path: Path, warnings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own thread writes, and would print a traceback."""
    pytest.importorskip("tensorboard")
    logger = RunLogger(tmp_path, {}, tensorboard=True)
    logger.scalars(0, {"loss": 1.0})
    with files_of_at_most(0):
        for step in range(1, 50):
            logger._to_tensorboard(lambda board, step=step: (board.add_scalar("loss", 1.0, step), board.flush()))
    logger.close()
    assert warnings == ["TensorBoard failed ([Errno 27] File too large): going on without it"]
    assert capsys.readouterr().err == ""


def test_wandb_that_cannot_show_a_video_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    def refused(path: str) -> None:
        raise OSError(28, "No space left on device")

    run = SimpleNamespace(log=lambda values, step: None, id="x", finish=lambda: None)
    fake_wandb(monkeypatch, lambda: run)
    monkeypatch.setattr(sys.modules["wandb"], "Video", refused)
    logger = RunLogger(tmp_path, {}, wandb=True)
    logger.video(1, "validation/ema", tmp_path / "x.mp4")
    assert len(warnings) == 1 and "W&B failed" in warnings[0]
    assert steps_of(tmp_path) == [1]
