"""A run's numbers and videos in W&B, which stops no run and is told no step twice."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.damaged import set_aside
from utils.wandb_files import keep_last, last_step
from utils.writing import write_text

_SECONDS = 60  # how long W&B may take to start or to finish before the run goes on without it

console = logging.getLogger("fewstep")


class WandbRun:
    """W&B's run of a run folder. Its id is kept there, so that a resume goes on in it.

    It works offline unless WANDB_API_KEY is set, and is given up with one warning when it fails. What it was told of
    steps that a resume does again, it keeps.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self.run_dir = run_dir
        self._run: Any = None  # None: it did not start, or failed
        self._told = self._known = -1  # the last steps that it has: now, and before this process
        started: list[tuple[Any, int]] = []  # what comes too late stays here
        _within(
            _SECONDS, lambda: started.append(self._start(config)), "W&B did not start: metrics are in metrics.jsonl"
        )
        if started:
            self._run, self._known = started[0]
            self._told = self._known

    def _start(self, config: Mapping[str, Any]) -> tuple[Any, int]:
        """W&B's run, and the last step that it has, -1 for none."""
        import wandb

        online = bool(os.environ.get("WANDB_API_KEY")) and os.environ.get("WANDB_MODE", "online") == "online"
        mode = "disabled" if os.environ.get("WANDB_MODE") == "disabled" else "online" if online else "offline"
        id_file = self.run_dir / "wandb_id.txt"
        known = _known_id(id_file)
        told = None if known is None else last_step(self.run_dir, known)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project="fewstep",
            name="/".join(self.run_dir.resolve().parts[-2:]),
            id=known,
            resume="allow" if online else None,
            dir=str(self.run_dir),
            config=dict(config),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(init_timeout=_SECONDS / 2, silent=True, console="off"),
        )
        write_text(id_file, str(run.id))
        return run, -1 if told is None else told

    def resumed(self, step: int) -> None:
        """Says what a resume from this step does not log again."""
        if self._run is not None and self._known > step:
            console.info(
                "W&B has steps up to %d from before this resume: it is told again from step %d on",
                self._known, self._known + 1,
            )  # fmt: skip

    def log(self, step: int, values: Mapping[str, Any], videos: Mapping[str, Path] = {}) -> None:
        """Numbers and video files of a step, by name."""
        if self._run is None or step <= self._known:
            return
        try:
            import wandb

            shown = {name: wandb.Video(str(path)) for name, path in videos.items()}
            self._run.log({**values, **shown}, step=step)
            self._told = max(self._told, step)
        except Exception as error:  # a tracker must not end a run, whatever it raises
            console.warning("W&B failed (%s): going on without it", " ".join(str(error).split()))
            self._run = None

    def close(self) -> None:
        """Waits for W&B, for a bounded time."""
        if self._run is not None:
            _within(_SECONDS, self._finish, "W&B did not finish: `wandb sync` can upload the run later")
            self._run = None

    def _finish(self) -> None:
        run = self._run
        run.finish()
        if self._told >= 0:
            keep_last(self.run_dir, str(run.id), self._told)


def _known_id(file: Path) -> str | None:
    """The id in `file`; None where there is none, or none that W&B can have given."""
    if not file.is_file():
        return None
    text = file.read_bytes()
    if re.fullmatch(rb"\s*[\w.-]{1,128}\s*", text):
        return text.decode().strip()
    set_aside(file, text)
    return None


def _within(seconds: float, action: Callable[[], object], lament: str) -> None:
    """Run ``action`` in a thread; when it fails or takes longer than ``seconds``, warn in one line and go on."""
    failure: list[str] = []

    def guarded() -> None:
        try:
            action()
        except Exception as error:  # a tracker must not end a run, whatever it raises
            failure.append(" ".join(f"{type(error).__name__}: {error}".split()))

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        failure.append(f"no answer in {seconds:.0f} s")
    if failure:
        console.warning("%s (%s)", lament, failure[0])
