"""What every benchmark needs: which machine this is, clocks, fresh processes, a table, a JSON file."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.writing import write_text

# settings of the C allocator that move peak memory and page faults; a fresh process inherits them
ALLOCATOR = (
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "THP_MEM_ALLOC_ENABLE",
    "LD_PRELOAD",
)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    info: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "allocator": {name: os.environ[name] for name in ALLOCATOR if name in os.environ},
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def cpu_model() -> str:
    """The processor's name as /proc/cpuinfo has it, else the platform's."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median over `repeats` of a call's time: this process's CPU seconds, or on CUDA the device's own by events."""
    return statistics.median(_once(run, device) for _ in range(repeats))


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


def peak_gb(device: torch.device) -> float:
    """Most memory so far, in 10^9 bytes: allocated by tensors on CUDA, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Clock:
    """The time that a benchmark may take, in seconds from now; None: as long as it needs."""

    def __init__(self, limit: float | None) -> None:
        self.limit, self.end = limit, math.inf if limit is None else time.monotonic() + limit

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.left <= 0

    @property
    def refusal(self) -> str:
        """Why something has no numbers that was not done in time."""
        return f"left out: the {self.limit:g} s of --seconds were over"


def fresh_process(module: str, arguments: Sequence[str], threads: int, clock: Clock | None = None) -> dict[str, Any]:
    """Runs `python -m module arguments` with so many threads and reads the JSON on its last line.

    Peak memory is a process's own, so every configuration gets one. Raises RuntimeError with its last line of error, or
    when the clock runs out before it is done.
    """
    clock = clock or Clock(None)
    if clock.is_over:
        raise RuntimeError(clock.refusal)
    count = str(threads)
    environment = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", module, *arguments]
    try:
        left = None if clock.limit is None else clock.left
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=left)
    except subprocess.TimeoutExpired:
        raise RuntimeError(clock.refusal) from None
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {done.returncode}: {last}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def attempt(module: str, arguments: Sequence[str], threads: int, clock: Clock) -> dict[str, Any]:
    """As `fresh_process`, or why there are no numbers, as `refused`: one configuration that fails stops no other."""
    try:
        return fresh_process(module, arguments, threads, clock)
    except RuntimeError as error:
        return {"refused": str(error)}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def left_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As `table`, with text in all columns: all of them to the left."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = (header, ["-" * width for width in widths], *rows)
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a result, making its folder. Whoever reads finds the old content or the new, never a part of it."""
    write_text(path, json.dumps(content, indent=1) + "\n")
