"""A rank whose launcher is gone notices: by its parent, by the launcher's store. A real one: tests/distributed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small import DIFFUSION, SHORT, merged, trainer
from utils import activity, checkpoint, launcher
from utils.launcher import LauncherGone, LauncherTimes, LauncherWatch

TIMES = LauncherTimes(look=0.01, store_every=0.02, store_gone=0.2, stuck=0.3, slow=100)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_gone", None)
    monkeypatch.setattr(launcher, "_parent", os.getppid())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def within(seconds: float, is_so: Callable[[], object]) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(is_so())


def test_before_the_first_iteration_a_rank_without_a_launcher_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also while it joins the others: the main thread is not asked."""
    codes: list[int] = []
    with LauncherWatch(TIMES, codes.append):
        time.sleep(0.1)
        assert codes == []
        monkeypatch.setattr(launcher, "_parent", 4711)
        assert within(20, lambda: codes == [75])
    said = capfd.readouterr().err
    assert said.startswith("rank 0: the launcher (process 4711) is gone: ended at step ")
    assert said.count("\n") == 1


def test_a_process_that_no_launcher_started_may_lose_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setattr(launcher, "_parent", 4711)
    assert launcher.gone() is None
    with LauncherWatch(TIMES, lambda _: pytest.fail("it ended")) as watch:
        assert not watch._thread.is_alive()


def test_a_store_that_is_away_for_long_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port := server.getsockname()[1]))
    codes: list[int] = []
    with LauncherWatch(TIMES, codes.append):
        time.sleep(0.4)
        assert launcher.gone() is None
        server.close()
        assert within(20, lambda: codes == [75])
    assert launcher.gone() == f"the launcher's store (127.0.0.1:{port})"


def test_within_the_loop_it_waits_for_the_ranks_as_long_as_they_move(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(launcher, "_parent", 4711)
    with launcher.agreeing(), LauncherWatch(TIMES, codes.append):
        for step in range(10):
            activity.begin(step)
            time.sleep(0.1)
        assert codes == []
        assert within(20, lambda: codes == [75])  # stuck


def test_a_run_without_a_launcher_saves_after_its_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, merged(DIFFUSION, SHORT), max_steps=4, checkpoint={"every": 100})
    step = run.training_step

    def training_step() -> dict[str, float]:
        if run.step == 2:
            launcher.lose("the launcher (process 4711)")
        return step()

    run.training_step = training_step  # type: ignore[method-assign]
    with pytest.raises(
        LauncherGone, match=r"the launcher \(process 4711\) is gone: step 3 of 4 is saved in "
    ) as caught:
        run.train()
    assert "\n" not in str(caught.value)
    assert checkpoint.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step_00000003"
