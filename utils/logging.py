"""What a run says: metrics (JSONL always; TensorBoard and W&B when asked), a progress bar, the console, peak memory."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from utils import distributed
from utils.damaged import set_aside
from utils.reading import reason
from utils.views import Lines, View, silence_threads
from utils.wandb_log import WandbRun
from utils.writing import Unwritten, write_text

console = logging.getLogger("fewstep")


class _Handler(logging.StreamHandler[TextIO]):
    """Writes above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(self.format(record), file=sys.stderr)
        else:
            super().emit(record)


def setup_console(rank: int = 0, world_size: int = 1, level: int = logging.INFO) -> logging.Logger:
    """Set up and return ``console``: time and (with several processes) rank; other ranks than 0 only speak to warn."""
    handler = _Handler(sys.stderr)
    who = f" [rank {rank}]" if world_size > 1 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s{who} %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    console.handlers[:] = [handler]
    console.setLevel(level if rank == 0 else logging.WARNING)
    console.propagate = False
    return console


def warn(text: str | None) -> None:
    """A warning that is true of the whole run, and not of one rank: rank 0 says it. None says nothing."""
    if text is not None and distributed.is_main():
        console.warning("%s", text)


# ------------------------------------------------------------------------------------------------------------- metrics


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line cut short by a kill is left out, a damaged one is warned of. None for a
    missing file."""
    entries, damaged = _read_lines(path)
    if damaged:
        console.warning("%s: left out are damaged lines: %d", path, len(damaged))
    return entries


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """(objects, lines that are none): NUL bytes and torn blocks are what a power loss leaves."""
    entries: list[dict[str, Any]] = []
    damaged: list[bytes] = []
    if not path.is_file():
        return entries, damaged
    *lines, tail = path.read_bytes().split(b"\n")
    for line in filter(None, lines):
        try:
            entry = json.loads(line.decode())
        except (ValueError, RecursionError):  # not UTF-8, not JSON, a number of 5,000 digits, nested too deep
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            damaged.append(line)
    if b"\0" in tail:  # else it is "", or half a line of a killed process
        damaged.append(tail)
    return entries, damaged


class RunLogger:
    """Metrics of a run: ``metrics.jsonl`` (one object a line: step, time, ...) and, when asked, TensorBoard and W&B.

    They stop no run: what cannot be written is told once and counted. ``time`` is in seconds since the epoch. NaN and
    inf are written as Python's json does. Other processes than the main one write nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        config_dict: Mapping[str, Any],
        *,
        tensorboard: bool = False,
        wandb: bool = False,
        is_main: bool = True,
    ):
        self.run_dir, self.is_main = Path(run_dir), is_main
        self.path = self.run_dir / "metrics.jsonl"
        self._lines = Lines(self.path)
        self._unchanged = False  # it could not be cut or mended, and that was told
        self._view = View(str(self.path), "lines", lambda text: console.warning("%s", text))
        self._board: Any = None
        self._wandb: WandbRun | None = None
        self._want_board = tensorboard and is_main
        self._purge_step: int | None = None
        if not is_main:
            return
        self._rewrite(lambda entry: True)
        if wandb:
            self._wandb = WandbRun(self.run_dir, config_dict)

    def truncate_after(self, step: int) -> None:
        """Drop what was logged beyond ``step``, from which the run is resumed: no curve has doubled points."""
        if self.is_main:
            self._rewrite(lambda entry: entry["step"] <= step)
            self._purge_step = step + 1
            if self._wandb is not None:
                self._wandb.resumed(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name at ``step``."""
        if not self.is_main:
            return
        numbers = {name: float(value) for name, value in values.items()}
        self._write({"step": step, "time": time.time(), **numbers})
        self._to_tensorboard(lambda board: [board.add_scalar(name, value, step) for name, value in numbers.items()])
        if self._wandb is not None:
            self._wandb.log(step, numbers)

    def video(self, step: int, name: str, path: Path) -> None:
        """Log a video file that lies at ``path``: its place in the JSONL and TensorBoard, the file itself in W&B."""
        if not self.is_main:
            return
        self._write({"step": step, "time": time.time(), "video": {name: os.path.relpath(path, self.run_dir)}})
        self._to_tensorboard(lambda board: board.add_text(name, str(path), step))
        if self._wandb is not None:
            self._wandb.log(step, {}, {name: path})

    def close(self) -> None:
        """Flush and close everything; W&B gets a bounded time for it."""
        if self._lines.is_open:
            with self._view.showing():
                self._lines.close()
        self._view.close()
        if self._board is not None:
            self._to_tensorboard(lambda board: board.close())
            self._board = None
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None

    def _write(self, entry: Mapping[str, Any]) -> None:
        with self._view.showing():
            self._lines.append(json.dumps(entry))

    def _rewrite(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep some lines, no damaged ones and no half line at the end. A kill on the way loses nothing."""
        try:
            self._lines.close()
            self._keep(keep)
        except (OSError, Unwritten) as problem:
            why = problem.why if isinstance(problem, Unwritten) else reason(problem)
            if not self._unchanged:
                console.warning("%s cannot be changed (%s): the run goes on; steps may be in it twice", self.path, why)
            self._unchanged = True

    def _keep(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        if not self.path.is_file():
            return
        entries, damaged = _read_lines(self.path)
        strange = [entry for entry in entries if type(entry.get("step")) is not int]
        if damaged or strange:
            set_aside(self.path, b"\n".join([*damaged, *(json.dumps(entry).encode() for entry in strange)]))
        entries = [entry for entry in entries if entry not in strange and keep(entry)]
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        if self.path.read_bytes().startswith(text.encode()):
            os.truncate(self.path, len(text.encode()))  # a disk that is full allows that too
        else:
            write_text(self.path, text)

    def _to_tensorboard(self, write: Callable[[Any], object]) -> None:
        if not self._want_board:
            return
        try:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter

                silence_threads("tensorboard")
                self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self._purge_step)
            write(self._board)
        except Exception as error:  # it only shows what metrics.jsonl has, so it must not end a run
            console.warning("TensorBoard failed (%s): going on without it", " ".join(str(error).split()))
            self._want_board, self._board = False, None


# ------------------------------------------------------------------------------------------------------------ progress


class Progress:
    """Progress over `total` steps with time left and the numbers that matter; silent on other ranks.

    On a terminal it is a bar. Elsewhere it is plain lines: of the first steps, of every so many, at the end, and in
    between whenever the next line would come too late.

    total: steps in all.
    initial: steps that were done before; pace and time left are those of this process.
    desc: what makes progress.
    every: steps between two lines, None for no such lines.
    first: how many of this process's first steps have a line each.
    seconds: the longest time between two lines while steps are shorter; longer steps have a line each.
    is_main: whether this process speaks.
    clock: seconds that only grow, None for `time.monotonic`.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        *,
        desc: str = "train",
        every: int | None = 50,
        first: int = 0,
        seconds: float = 30.0,
        is_main: bool = True,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.total, self.initial, self.desc = total, initial, desc
        self.every, self.first, self.seconds = every, first, seconds
        self._clock = clock or time.monotonic
        self._done, self._is_main = initial, is_main
        self._bar: Any = None
        self._paused = 0.0
        self._from = (initial, self._now())  # where pace is counted from
        self._stepped = self._now()
        self._spoke = self._clock()
        if is_main and sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"  # its own pace would count pauses
            self._bar = tqdm(
                total=total, initial=initial, desc=desc, dynamic_ncols=True, file=sys.stderr, bar_format=layout
            )

    def _now(self) -> float:
        """Seconds on the clock that were spent in steps."""
        return self._clock() - self._paused

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """What happens inside is no step: pace and time left do not count it."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def update(self, step: int, numbers: Mapping[str, float]) -> None:
        """`step` steps are done; `numbers` are shown in their order."""
        if not self._is_main:
            return
        now = self._now()
        lasted, self._stepped = now - self._stepped, now
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(step, numbers), refresh=False)
            self._bar.update(step - self._done)
        elif self._is_due(step, lasted):
            self._spoke = self._clock()
            print(self._line(step, numbers), file=sys.stderr, flush=True)
        if self._done == self.initial < step:
            self._from = (step, now)  # the first step compiles, allocates and loads: it is not the pace of the others
        self._done = step

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _is_due(self, step: int, lasted: float) -> bool:
        periodic = self.every is not None and step % self.every == 0
        late = self._clock() - self._spoke + lasted > self.seconds
        return periodic or late or step - self.initial <= self.first or step == self.total

    def _line(self, step: int, numbers: Mapping[str, float]) -> str:
        return f"{self.desc} {step}/{self.total}  {self._text(step, numbers)}".rstrip()

    def _text(self, step: int, numbers: Mapping[str, float]) -> str:
        begun, at = self._from
        rate = (step - begun) / max(self._now() - at, 1e-9)
        left = _clock((self.total - step) / rate) if rate > 0 else "?"
        return f"{rate:.2f} it/s  {left} left  {_compact(numbers)}".rstrip()


def _compact(numbers: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in numbers.items())


def _clock(seconds: float) -> str:
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def peak_memory_gib() -> float:
    """Most memory (GiB) in use so far: allocated on this process's GPU, or without CUDA resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        # not ru_maxrss: Linux carries that over from the process which started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    # bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
