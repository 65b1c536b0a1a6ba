"""All that one GPU can show in ten minutes: `python -m benchmarks.gpu_check [SECONDS] [--only tests,train] [--out DIR]`

The GPU tests first, then the benchmarks, what is worth most first, within SECONDS in all (default: 540). Each result is
written as it is made; a part that fails or is cut off stops no other. At the end there is one table: what was measured
and what others published. `summary.json` has the same, and which machine and revision it is of.
Installs nothing: needs torch, einops, omegaconf and safetensors, and uses pytest (with pytest-xdist), diffusers and
torchao where they are. Exit code: 1 if anything failed, 2 without CUDA, else 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import failures
from benchmarks.common import Clock, left_table, machine, write_json
from utils.cli import ShowDefaults

ROOT = Path(__file__).resolve().parent.parent
GROUPS = ("tests", "train", "streaming", "attention")
RESERVE = 5.0  # seconds for the table at the end, and for ending what is cut off
DONE, OUT_OF_TIME = "done", "out of time"

# H100 unless said
ITERATION = "Self-Forcing: at most 12 s; MFU 40.8 to 43.6 % (13B fine-tuning, GB200)"
STREAMS = {
    "vae": "Self-Forcing: 17.0 FPS, first 0.69 s; MotionStream: 16.7 FPS, 0.69 s",
    "tiny": "Light Forcing: 33.9 FPS (sparse, fp8); MotionStream: 29.5 FPS, first 0.39 s",
}
SPARSE = "FastVideo: 8.1x forward, 5.7x backward (40,768 tokens, 16 heads)"


@dataclass
class Row:
    """A line of the table. status: done, `skipped: ...`, `failed: ...` or out of time."""

    what: str
    measured: str = ""
    published: str = ""
    status: str = DONE


@dataclass(frozen=True)
class Part:
    """A program that writes its results into a file or folder while it runs.

    name: of its files.
    group: what --only selects.
    what: in words.
    module: what `python -m` runs.
    arguments: of the module.
    least: seconds without which it is not begun.
    most: seconds after which it is ended.
    rows: the table's lines of the results that are at this path so far.
    needs: packages beside those that every part needs.
    environment: variables for it alone.
    """

    name: str
    group: str
    what: str
    module: str
    arguments: tuple[str, ...]
    least: float
    most: float
    rows: Callable[[Path], list[Row]]
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def granted(part: Part, left: float) -> float | None:
    """Seconds that the part gets of those left; None: too few to begin."""
    share = min(part.most, left - RESERVE)
    return share if share >= part.least else None


# ------------------------------------------------------------------------------------------------------------ the parts


def tests_part(out: Path) -> Part:
    arguments = ["tests/gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "benchmarks.failures"]
    if importlib.util.find_spec("xdist") is not None:
        arguments += ["-n", str(max(min((os.cpu_count() or 1) - 2, 12), 1)), "--dist", "loadgroup"]
    # many processes that compile: each by itself, for pools of compilers would take the cores from each other
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    arguments += ["--record", str(out / "tests")]
    return Part(
        name="tests",
        group="tests",
        what="tests/gpu",
        module="pytest",
        arguments=tuple(arguments),
        least=20,
        most=160,
        rows=test_rows,
        needs=("pytest",),
        environment=environment,
    )


def parts(out: Path) -> list[Part]:
    """In the order in which they run. A part's results are in `out`, under its name."""
    options = ("--size", "1.3b+14b", "--precision", "bf16", "--checkpointing", "full", "--repeats", "1")
    size = "1.3B + 14B, 81x480x832"
    train = Part(
        name="train",
        group="train",
        what=f"iteration, {size}, eager",
        module="benchmarks.train_step",
        arguments=options,
        least=60,
        most=110,
        rows=train_rows,
    )
    compiled = replace(
        train,
        name="train_compiled",
        what=f"iteration, {size}, compiled",
        arguments=(*options, "--compile"),
        most=130,
    )
    streaming = Part(
        name="streaming",
        group="streaming",
        what="streaming",
        module="benchmarks.streaming",
        arguments=("--size", "1.3b"),
        least=30,
        most=190,
        rows=stream_rows,
    )
    attention = [
        Part(
            name=f"attention_{resolution}",
            group="attention",
            what=f"attention, {resolution}",
            module="benchmarks.attention",
            arguments=("--size", resolution, "--repeats", "5"),
            least=15,
            most=45,
            rows=attention_rows,
        )
        for resolution in ("720p", "480p")
    ]
    return [tests_part(out), train, compiled, streaming, *attention]


def command(part: Part, out: Path, seconds: float) -> list[str]:
    """What runs the part. Benchmarks are told to end by themselves a little before they are ended."""
    ends = (
        ()
        if part.group == "tests"
        else ("--seconds", f"{max(seconds - RESERVE, 1):.0f}", "--out", str(result(part, out)))
    )
    return [sys.executable, "-m", part.module, *part.arguments, *ends]


def result(part: Part, out: Path) -> Path:
    """Where the part writes."""
    return out / part.name if part.group == "tests" else out / f"{part.name}.json"


# ------------------------------------------------------------------------------------------------------- their results


def _read(path: Path) -> dict[str, Any]:
    """What the part has written so far, which is always a whole file (`write_json`); nothing: {}."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def _refused(reason: str) -> str:
    """The status of a result without numbers."""
    if "--seconds were over" in reason:
        return OUT_OF_TIME
    return f"skipped: {reason}" if reason.startswith("needs ") else f"failed: {reason.splitlines()[0]}"


def test_rows(folder: Path) -> list[Row]:
    counts = failures.counts(folder)
    if not counts:
        return []
    failure = failures.first_failure(folder)
    measured = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    return [Row("tests/gpu", measured, "", DONE if failure is None else f"failed: {failure}")]


def train_rows(path: Path) -> list[Row]:
    rows = []
    for r in _read(path).get("results", []):
        how = "compiled" if r.get("compiled") else "eager"
        row = Row(f"iteration, 1.3B + 14B, 81x480x832, {how}", published=ITERATION)
        if "refused" in r:
            row.status = _refused(r["refused"])
        else:
            mfu = r["iteration"]["mfu"]
            share = "" if mfu is None else f", MFU {mfu:.1%}"
            row.measured = f"{r['iteration']['seconds']:.2f} s{share}, {r['peak_gb']:.1f} GB"
        rows.append(row)
    return rows


def stream_rows(path: Path) -> list[Row]:
    rows = []
    for r in _read(path).get("results", []):
        option = r["option"]
        decoder = "" if option["decoder"] != "none" else ", no decoder"
        row = Row(f"stream 1.3B, 480x832, {option['name']}{decoder}", published=STREAMS.get(option["decoder"], ""))
        if "refused" in r:
            row.status = _refused(r["refused"])
        else:
            row.measured = f"{r['frames_per_second']:.1f} FPS, first {r['first_seconds']:.3f} s"
        rows.append(row)
    return rows


def attention_rows(path: Path) -> list[Row]:
    content = _read(path)
    rows = []
    for r in content.get("results", []):
        published = SPARSE if r["sparsity"] == 0.9 and "triton" in r["name"] else ""
        row = Row(f"{r['name']}, {content['tokens']:,} tokens, {content['heads']} heads", published=published)
        cells = [
            f"{name} {r[which] * 1000:.2f} ms" + (f" ({r[speedup]:.1f}x)" if r.get(speedup) else "")
            for name, which, speedup in (
                ("forward", "forward", "forward_speedup"),
                ("with backward", "forward_backward", "forward_backward_speedup"),
            )
            if which in r
        ]
        refusals = [r[name] for name in ("forward_refused", "forward_backward_refused") if name in r]
        row.measured, row.status = ", ".join(cells), _attention_status(r["name"], refusals)
        rows.append(row)
    return rows


def _attention_status(name: str, refusals: list[str]) -> str:
    """Other people's kernels may refuse a shape or a GPU; ours may not."""
    if not refusals:
        return DONE
    status = _refused(refusals[0])
    return status if status == OUT_OF_TIME or name.startswith("vsa") else status.replace("failed", "skipped", 1)


# ------------------------------------------------------------------------------------------------------------- running


def run_part(part: Part, out: Path, left: float, *, log: Path) -> list[Row]:
    """Runs it within what it is granted and returns its lines of the table: at least one, of what has been written."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return [Row(part.what, status=f"skipped: needs {' and '.join(missing)}")]
    seconds = granted(part, left)
    if seconds is None:
        return [Row(part.what, status=OUT_OF_TIME)]
    path = result(part, out)
    if path.is_file():  # of an earlier check: this one's must not be taken for it
        path.unlink()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"} | part.environment
    code = execute(command(part, out, seconds), seconds, log, environment)
    rows = part.rows(path)
    if code is None:
        return [*rows, Row(part.what, status=OUT_OF_TIME)]
    if code != 0 and not any(row.status != DONE for row in rows):  # it failed, and its results do not say how
        return [*rows, Row(part.what, status=f"failed: {last_line(log) or f'exit code {code}'}")]
    return rows or [Row(part.what, status="failed: it wrote no result")]


def execute(arguments: Sequence[str], seconds: float, log: Path, environment: dict[str, str]) -> int | None:
    """Exit code, or None when the time was over: then it is ended with all the processes that it started."""
    with log.open("w") as file:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # of an interrupt, too
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def check(chosen: Sequence[Part], out: Path, seconds: float, about: dict[str, Any]) -> list[Row]:
    """Runs the parts, and writes summary.json after each."""
    clock = Clock(seconds)
    rows: list[Row] = []
    for part in chosen:
        began = time.monotonic()
        print(f"{part.what}: {clock.left:.0f} s are left", flush=True)
        found = run_part(part, out, clock.left, log=out / f"{part.name}.log")
        rows += found
        for row in found:
            print("  " + ": ".join(text for text in (row.what, row.measured, row.status) if text), flush=True)
        print(f"  ({time.monotonic() - began:.0f} s)", flush=True)
        write_json(out / "summary.json", {"machine": about, "seconds": seconds, "rows": [asdict(row) for row in rows]})
    return rows


def has_failed(rows: Sequence[Row]) -> bool:
    return any(row.status.startswith("failed") for row in rows)


def report(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The table, and below it what it was measured on."""
    lines = [[row.what, row.measured or "-", row.published or "-", row.status] for row in rows]
    found = left_table(["what", "measured", "published", "status"], lines)
    return "\n".join([found, "", *(f"{name}: {value}" for name, value in about.items())])


def describe() -> dict[str, Any]:
    """Machine, software and revision."""
    about = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    about["driver"] = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    about["revision"] = _output("git", "describe", "--always", "--dirty", "--abbrev=40")
    for name in ("triton", "diffusers", "torchao", "xdist"):
        about[name] = _version(name)
    return about


def _output(*arguments: str) -> str | None:
    """What a program prints, None where it is not there or fails."""
    try:
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version({"xdist": "pytest-xdist"}.get(package, package))
    except PackageNotFoundError:
        return None


def selected(only: str) -> Iterator[str]:
    """The groups of `tests,train`. Raises ValueError for a name that is none."""
    for name in only.replace(",", " ").split():
        if name not in GROUPS:
            raise ValueError(f"{name!r} is no part: choose from {', '.join(GROUPS)}")
        yield name


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu_check", description=__doc__.splitlines()[0], formatter_class=ShowDefaults
    )
    parser.add_argument("seconds", type=float, nargs="?", default=540.0, help="in all; default: 540")
    parser.add_argument(
        "--only", default=os.environ.get("ONLY", ""), help=f"some of {','.join(GROUPS)}; default: $ONLY"
    )
    default = Path(os.environ.get("OUT") or "benchmarks/results/gpu")
    parser.add_argument("--out", type=Path, default=default, help="folder; default: $OUT or benchmarks/results/gpu")
    options = parser.parse_args(arguments)
    try:
        options.groups = list(selected(options.only)) or list(GROUPS)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu_check: needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = describe()
    rows = check([part for part in parts(out) if part.group in options.groups], out, options.seconds, about)
    text = report(rows, about)
    (out / "table.txt").write_text(text + "\n")
    print(f"\n{text}\n\nwrote {out}")
    return int(has_failed(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
