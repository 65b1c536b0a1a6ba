"""A program in a child process that has little memory and time, and how it ended."""

from __future__ import annotations

import functools
import importlib
import os
import resource
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from tests import ROOT
from tests.forked import PRELOAD

MORE = ("generation.export", "planning.doctor")
MEMORY, SECONDS = 4 << 30, 60  # beyond what is there already


def limit(memory: int = MEMORY, seconds: int = SECONDS) -> None:
    """For this process: so much more address space, and processor time, than it has used."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    cpu = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))


@functools.cache
def preload() -> None:
    """Imports what programs need: once, and not in each child."""
    torch.set_num_threads(1)
    for name in (*PRELOAD, *MORE):
        importlib.import_module(name)


def ended(program: str, arguments: Sequence[str], said: Path) -> str:
    """ "0" or "2" (after one line), or else what is wrong with the end of `python PROGRAM ARGUMENTS`.

    program: a file of the repository's root.
    said: the file that gets what it prints.
    """
    preload()
    child = os.fork()
    if child == 0:
        try:
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(file, number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has put its own there
            limit()
            sys.argv = [program, *arguments]
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    text = said.read_text(errors="replace")
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}: {text[-500:]}"
    code = os.WEXITSTATUS(status)
    if program == "doctor.py" and code == 1 and "MISSING" in text and "Traceback" not in text:
        return "2"  # its table says what is wrong, and 1 is its code for that
    if "Traceback" in text or code not in (0, 2):
        return f"exit code {code}: {text[-1500:]}"
    errors = [line for line in text.splitlines() if "error: " in line]
    if code == 2 and (len(errors) != 1 or len(errors[0]) > 1500):
        return f"exit code 2 without one line: {text[-1500:]}"
    return str(code)
