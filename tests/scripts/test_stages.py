"""scripts/stages.py: estimates on a fake clock, marks, failures, a clean stop."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from scripts.stages import Estimate, Runner, Stage, Stopped, Teller, clock_text
from utils.errors import UserError

COSTS = (10.0, 30.0, 20.0)


@pytest.mark.parametrize("slower", [0.5, 1.0, 2.5])
def test_an_estimate_is_right_for_a_machine_that_is_evenly_slower(slower: float) -> None:
    estimate, truth = Estimate(COSTS), sum(COSTS) * slower
    errors = []
    for paid in (0.0, 10.0, 25.0, 40.0, 55.0):
        left = estimate.left(paid * slower, paid)
        errors.append(abs(left - (truth - paid * slower)) / truth)
    assert errors == sorted(errors, reverse=True)  # the more has passed, the better it is known
    assert max(errors[1:]) < 0.28
    assert errors[-1] < 0.01
    assert estimate.left(truth, 60.0) == 0


def test_time_is_said_in_minutes_and_seconds() -> None:
    assert [clock_text(seconds) for seconds in (0, 7.4, 59.6, 151, 3600)] == ["0:00", "0:07", "1:00", "2:31", "60:00"]


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_that_changes_and_a_file_no_control_characters() -> None:
    clock, terminal, file = FakeClock(), Terminal(), io.StringIO()
    for out in (terminal, file):
        clock.now = 0.0
        teller = Teller(out, clock)
        teller.begins("1/2 teacher", 60)
        for now in (0.1, 0.2, 1.5, 1.6):
            clock.now = now
            teller.moves("1/2 teacher", now / 2, 60 - now)
        teller.line("1/2 teacher: took 0:02")
    assert file.getvalue() == "[0:00] 1/2 teacher (about 1:00 to the end of all)\n[0:02] 1/2 teacher: took 0:02\n"
    shown = terminal.getvalue().split("\r")
    assert [text.strip() for text in shown if "about" in text] == [
        "[0:00] 1/2 teacher: 5%, about 1:00 to the end of all",
        "[0:02] 1/2 teacher: 75%, about 0:58 to the end of all",
    ]
    assert terminal.getvalue().count("\n") == 1


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_stage_that_starts_up_for_a_while_and_then_shows_its_progress_is_estimated_evenly(factor: float) -> None:
    """A training of cost 50, of which 10 pass before its first iteration, then 1 a second at the costs' pace."""
    seen = 0.0
    stage = Stage("training", "training", 50.0, [], fraction=lambda: seen, start=10.0)
    for second in range(1, 51):
        seen = max(second - 10, 0) / 40
        assert stage.share(second * factor, factor) == pytest.approx(second / 50)
    assert Stage("silent", "silent", 20.0, []).share(5.0 * factor, factor) == 0.25
    assert Stage("silent", "silent", 20.0, []).share(1000.0, factor) == 1


def test_what_was_begun_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fails = python(f"import pathlib, sys; pathlib.Path({str(run)!r}).mkdir(exist_ok=True); sys.exit(1)")
    for made_of, said in (("a", "exit code 1"), ("a", "exit code 1"), ("b", "have changed since it was begun")):
        with pytest.raises(UserError, match=said):
            stages = runner(tmp_path, Stage("train", "train", 1, fails, made_of=made_of, resumes_in=run))
            stages.check()
            stages.run()
    run.rmdir()
    with pytest.raises(UserError, match="exit code 1"):
        runner(tmp_path, Stage("train", "train", 1, fails, made_of="b", resumes_in=run)).run()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def runner(folder: Path, *stages: Stage) -> Runner:
    return Runner(stages, folder, Teller(io.StringIO()), {})


def test_what_is_done_is_not_done_again_unless_it_is_made_of_something_else(tmp_path: Path) -> None:
    def stage(made_of: str) -> Stage:
        return Stage("count", "count", 1, python(f"open({str(tmp_path / 'n')!r}, 'a').write('x')"), made_of=made_of)

    for made_of, times in (("a", 1), ("a", 1), ("b", 2)):
        runner(tmp_path, stage(made_of)).run()
        assert (tmp_path / "n").read_text() == "x" * times


def test_a_failure_ends_what_runs_beside_it_and_is_one_line_with_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = python("import sys; print('the reason'); sys.exit(3)")
    stages = runner(tmp_path, Stage("two", "two", 1, python("import time; time.sleep(60)"), [bad]))
    began = time.monotonic()
    with pytest.raises(
        UserError, match="stage two: exit code 3, see above and .*two.beside1.log: the same command goes on"
    ):
        stages.run()
    assert time.monotonic() - began < 30
    assert "the reason" in capfd.readouterr().err
    assert not stages.is_done(stages.stages[0])


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="needs signals")
def test_a_signal_lets_a_stage_save_once_and_the_next_run_goes_on(tmp_path: Path) -> None:
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    code = (
        "import pathlib, signal, sys, time\n"
        f"def stop(*_): pathlib.Path({str(saved)!r}).open('a').write('x'); sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, stop); pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)"
    )
    first = Stage("first", "first", 1, python("pass"))
    stages = runner(tmp_path, first, Stage("long", "long", 1, python(code)))

    def interrupt() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one must not end it before it has saved

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped) as stopped:
        stages.run()
    thread.join()
    assert stopped.value.number == signal.SIGTERM
    assert saved.read_text() == "x"
    again = runner(tmp_path, first, Stage("long", "long", 1, python("pass")))
    assert [again.is_done(stage) for stage in again.stages] == [True, False]
    again.run()
