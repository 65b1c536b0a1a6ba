"""Programs as `python` and `torchrun` run them, forked from a server that has imported torch and the trainers already.

To import them costs a process more than a small training does. What is torchrun's own (how it ends the ranks of a run
that fails, and what it reports) is left to the tests that launch it: test_watchdog.py, test_data_parallel.py, slurm/.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

import torch

from planning.packages import before_torch
from tests import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
# modules of ours, and what they import where they use it; none may start a thread
PRELOAD = [
    "train",
    "inference",
    "preprocess",
    "evaluation.command",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "sklearn.datasets",
    "tests.distributed.sequence_ranks",
]
PRELOAD += ["transformers.models.umt5.modeling_umt5", "transformers.tokenization_utils_tokenizers"]
GRACE = 30.0  # between SIGTERM and SIGKILL, as torchrun has it


def environment() -> dict[str, str]:
    return os.environ | before_torch() | {"OMP_NUM_THREADS": "1"}


def serve() -> None:
    """Begin to import, unless the server is there; its first fork waits until it is done."""
    with mock.patch.dict(os.environ, environment()):
        forkserver.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()


@dataclass(frozen=True)
class Done:
    """How each rank ended (a signal's number is negative), and all that they said."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        return next((code for code in self.codes if code != 0), 0)


class Running:
    """`program` (a file, or else a module's name) with its arguments, on one rank or as torchrun starts several."""

    def __init__(
        self, ranks: int, program: str, *arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None
    ) -> None:
        serve()
        self._folder = tempfile.TemporaryDirectory()
        self.files = {name: Path(self._folder.name, name) for name in ("stdout", "stderr")}
        variables: list[dict[str, str]] = [{}]
        if ranks > 1:  # the store is the launcher's: it outlives any rank
            self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            variables = [of_rank(rank, ranks, self._store.port) for rank in range(ranks)]
        self.processes: list[ForkServerProcess] = []
        for rank_env in variables:
            work = (program, arguments, cwd, environment() | (env or {}) | rank_env, list(self.files.values()))
            self.processes.append(CONTEXT.Process(target=run_program, args=work))
            self.processes[-1].start()

    def wait(self, timeout: float = 400) -> Done:
        """Until all have ended. As soon as one fails the others get SIGTERM. None is left, whatever happens."""
        try:
            self._watch(time.monotonic() + timeout)
        finally:
            for process in self.processes:
                process.kill()
        said = {name: path.read_text() for name, path in self.files.items()}
        self._folder.cleanup()
        return Done([process.exitcode or 0 for process in self.processes], **said)

    def _watch(self, deadline: float) -> None:
        failed = False
        while any(process.is_alive() for process in self.processes):
            if not failed and any(process.exitcode for process in self.processes):
                failed, deadline = True, time.monotonic() + GRACE
                for process in self.processes:
                    process.terminate()
            if time.monotonic() > deadline:
                if not failed:
                    raise TimeoutError(f"the ranks do not end; they said: {self.files['stderr'].read_text()[-4000:]}")
                for process in self.processes:
                    process.kill()
            time.sleep(0.1)


def run(ranks: int, program: str, *arguments: str, **options: object) -> Done:
    """Start, and wait for the end."""
    timeout = options.pop("timeout", 400)
    return Running(ranks, program, *arguments, **options).wait(timeout)  # type: ignore[arg-type]


def of_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """torchrun's variables on one node."""
    number, count = str(rank), str(ranks)
    return {
        "RANK": number, "LOCAL_RANK": number, "ROLE_RANK": number, "GROUP_RANK": "0", "ROLE_NAME": "default",
        "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "ROLE_WORLD_SIZE": count, "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip


def run_program(program: str, arguments: tuple[str, ...], cwd: Path, env: dict[str, str], files: list[Path]) -> None:
    """In the forked process: become the program."""
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path[0] = str(Path(program).resolve().parent)
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
