"""One try of a run: a launcher that can be killed, and its ranks, forked from a process that has imported them.

The launcher does what torchrun's does: it keeps the store, and ends the other ranks once one of them has failed. It is
the ranks' parent, so that its death is seen as that of torchrun is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import ROOT
from tests.forked import GRACE, environment, of_rank

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)


def adopt_orphans() -> None:
    """Ranks whose launcher is killed become this process's children, which sees when they end."""
    if ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


class Try:
    """`train.py` with its arguments on some ranks.

    codes: a folder in which each rank leaves its exit code.
    clock: seconds by which their time of day is wrong.
    """

    def __init__(self, ranks: int, arguments: Sequence[str], codes: Path, clock: float = 0.0) -> None:
        codes.mkdir()
        self.codes, self._said = codes, b""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        receive, send = os.pipe()
        self._output, output = os.pipe()  # a file would be limited, too
        self.launcher = _forked(lambda: _launch(ranks, port, send, arguments, output, codes, clock))
        os.close(send)
        os.close(output)
        os.set_blocking(self._output, False)
        with os.fdopen(receive) as pids:
            self.ranks = [int(pid) for pid in pids.readline().split()]
        self._left = {self.launcher, *self.ranks}

    @property
    def said(self) -> str:
        """What the ranks printed so far."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._output, 1 << 16):
                self._said += data
        return self._said.decode(errors="replace")

    def close(self) -> None:
        os.close(self._output)

    def alive(self) -> set[int]:
        """Those of its processes that have not ended."""
        _ = self.said  # or a full pipe would hold them up
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._left.clear()
                break
            if not pid:
                break
            self._left.discard(pid)
        # a rank whose launcher waits for it is the launcher's child
        return {pid for pid in self._left if pid == self.launcher or _exists(pid)}

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within that time."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def kill(self, pids: Sequence[int]) -> list[int]:
        """-9, for those that are there. Returns them."""
        there = [pid for pid in pids if pid in self.alive()]
        for pid in there:
            os.kill(pid, signal.SIGKILL)
        return there

    def limit_files(self, size: int) -> None:
        """No rank's file may grow beyond so many bytes; RLIM_INFINITY takes the limit away."""
        for pid in set(self.ranks) & self.alive():
            try:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            except ProcessLookupError:
                continue

    def exit_codes(self) -> list[int]:
        """Those of the ranks that came to an end of their own."""
        return sorted(int(text) for file in self.codes.iterdir() if (text := file.read_text()))


def _exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _forked(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return pid


def _launch(ranks: int, port: int, send: int, arguments: Sequence[str], output: int, codes: Path, clock: float) -> int:
    children = {
        _forked(lambda rank=rank: _rank(rank, ranks, port, arguments, output, codes, clock)) for rank in range(ranks)
    }  # type: ignore[misc]
    os.write(send, (" ".join(map(str, children)) + "\n").encode())
    os.close(send)
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    failed, deadline = 0, float("inf")
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            children.discard(pid)
            if status and not failed:
                failed, deadline = status, time.monotonic() + GRACE
                for child in children:
                    os.kill(child, signal.SIGTERM)
        if time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    del store
    return 1 if failed else 0


def _rank(rank: int, ranks: int, port: int, arguments: Sequence[str], output: int, codes: Path, clock: float) -> int:
    """Becomes the program."""
    import torch

    for number in (1, 2):
        os.dup2(output, number)
    os.environ.update(environment() | of_rank(rank, ranks, port) | {"EXIT_CODES": str(codes)})
    true_time, true_nanoseconds = time.time, time.time_ns
    time.time = lambda: true_time() + clock
    time.time_ns = lambda: true_nanoseconds() + int(clock * 1e9)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = ["train.py", *arguments]
    sys.path[0] = str(ROOT)
    try:
        runpy.run_path("train.py", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0
