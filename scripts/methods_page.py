"""docs/methods.md: tables with spreads over seeds, verdicts against the naive few-step teachers, strips of samples."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from scripts.methods_run import Job, pictures
from scripts.methods_table import GROUPS, Group, Method
from scripts.report_plots import write_strips
from utils.metrics import binomial_error
from utils.writing import write_text

# head, key of the judge's metrics, format, which way is better
Columns = Sequence[tuple[str, str, str, str]]
TOY = (
    ("prompt right", "prompt_right", "{:.1%}", "up"),
    ("appearance FD, %", "appearance_fd", "{:.1f}", "down"),
    ("motion error", "motion_error", "{:.3f}", "down"),
    ("jitter, px", "jitter", "{:.2f}", "down"),
    ("intensity", "intensity", "{:.4f}", "real"),
    ("diversity", "diversity", "{:.2f}", "real"),
)
DIGITS = (
    ("digit right", "digit_right", "{:.1%}", "up"),
    ("FID-like, %", "fid", "{:.2f}", "down"),
    ("intensity", "intensity", "{:.4f}", "real"),
    ("diversity", "diversity", "{:.2f}", "real"),
)
SURE = 2.0  # standard deviations by which a student must be ahead to be called clearly better


@dataclass(frozen=True)
class Line:
    """A row's results, one a seed."""

    method: Method
    jobs: tuple[Job, ...]
    results: tuple[dict[str, Any], ...]

    def values(self, key: str) -> list[float]:
        return [result["metrics"][key] for result in self.results]

    def training(self, key: str) -> float | None:
        """Mean over seeds of a cost of training, None for what was not trained."""
        values = [result["training"][key] for result in self.results if key in result["training"]]
        return mean(values) if values else None


def write_page(path: Path, jobs: Sequence[Job]) -> None:
    """The page at `path`, its pictures and numbers in the folder of the same name beside it."""
    lines = _lines(jobs)
    beside = path.parent / path.stem
    beside.mkdir(parents=True, exist_ok=True)
    options = jobs[0].options
    seeds = max(len(line.jobs) for line in lines)
    parts = [_head(options.count, seeds, options.split, options.quick)]
    for group in GROUPS:
        shown = [line for line in lines if line.method.group == group.key]
        naive = next((line for line in lines if line.method.key == group.naive), None)
        if shown:
            parts.append(_section(group, shown, naive, beside))
    parts.append(_how(lines))
    write_text(path, "\n\n".join(parts) + "\n")
    judged = [line for line in lines if line.method.group]
    numbers = [
        {"row": line.method.key, "label": line.method.label, "seeds": [_public(result) for result in line.results]}
        for line in judged
    ]
    write_text(beside / "results.json", json.dumps(numbers, indent=1) + "\n")


def _public(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("seed", "metrics", "evaluations", "training")}


def _lines(jobs: Sequence[Job]) -> list[Line]:
    rows: dict[str, list[Job]] = {}
    for job in jobs:
        rows.setdefault(job.method.key, []).append(job)
    return [
        Line(group[0].method, tuple(group), tuple(json.loads(job.result.read_text()) for job in group))
        for group in rows.values()
    ]


def _head(count: int, seeds: int, split: str, quick: bool) -> str:
    trial = "**This is a trial of a few iterations each: its numbers mean nothing.**\n\n" if quick else ""
    return f"""# Every method on the toy world

{trial}Written by `make methods`, which trains all of it from nothing: each row of a table is a YAML of
`configs/methods` or `configs/digits` with the overrides listed at the end. The world (a handwritten digit that glides
over a torus, six frames of 16 x 16 pixels), the networks (0.3M parameters) and the budgets (100 updates of the student)
are toys: a row shows that a method does what it says and what it costs, not how it ranks at scale.

A cell is the mean over {seeds} trainings with seeds of their own, ± their standard deviation; {count} videos are judged
in each, of prompts and noise of the split `{split}`. Where there is one training, ± is the error of a share of {count}.
Hyper-parameters were chosen on the split `dev`, which shares neither. "Clearly better" means that prompts are right
more often and that the distance is smaller than in the naive row (of images: the distance), by more than {SURE:g}
standard deviations of the student's seeds.

Early-stop guards (`guard`) have no row: a run whose samples stay within their bounds is the same to the bit.

Training costs are the row's own stage alone: evaluations of any network, in whole videos, and the most memory that the
process held beyond what it holds when idle."""


def _section(group: Group, lines: Sequence[Line], naive: Line | None, beside: Path) -> str:
    columns = DIGITS if group.key == "digits" else TOY
    measured = [column for column in columns if column[1] in group.measures]
    heads = ["", *(head for head, *_ in columns), "evaluations a video", "training, evaluations", "memory, MB"]
    heads += ["clearly better than naive"] if naive else []
    published = any(line.method.published for line in lines)
    heads += ["CIFAR-10 FID, published (paper, FastGen)"] if published else []
    table = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    shown = [naive, *lines] if naive and naive not in lines else list(lines)
    for line in shown:
        cells = [*_cells(line, columns, naive, measured), *([line.method.published] if published else [])]
        table.append("| " + " | ".join(cells) + " |")
    picture = beside / f"{group.key}.png"
    videos = torch.stack([pictures(line.jobs[0]) for line in shown])
    count = 2 if videos.shape[2] > 1 else videos.shape[1]  # what fits beside each other
    write_strips(
        picture, [line.method.label for line in shown], lines[0].results[0]["shown"][:count], videos[:, :count]
    )
    text = [f"## {group.title}", group.intro, "\n".join(table)]
    if naive is not None:
        text += _verdicts(lines, naive, measured)
    text.append(f"![Samples: {group.title.lower()}]({beside.name}/{picture.name})")
    return "\n\n".join(text)


def _cells(line: Line, columns: Columns, naive: Line | None, measured: Columns) -> list[str]:
    cells = [line.method.label]
    for _, key, form, _ in columns:
        cells.append(_cell(line, key, form))
    cells.append(f"{line.results[0]['evaluations']:.3g}")
    evaluations, memory = line.training("network_evaluations"), line.training("peak_mb")
    cells += ["" if evaluations is None else f"{evaluations:,.0f}", "" if memory is None else f"{memory:.0f}"]
    if naive is not None:
        cells.append(verdict(line, naive, measured))
    return cells


def verdict(line: Line, naive: Line, measured: Columns) -> str:
    """Whether a student beats the naive row, yes or no; of one training nothing can be said."""
    if not line.method.is_student:
        return ""
    if len(line.results) < 2:
        return "one seed"
    return "no" if behind(line, naive, measured) else "yes"


def _cell(line: Line, key: str, form: str) -> str:
    values = line.values(key)
    if len(values) > 1:
        return f"{form.format(mean(values))} ± {form.format(stdev(values))}"
    if form.endswith("%}"):
        error = binomial_error(values[0], line.jobs[0].options.count)
        return f"{form.format(values[0])} ± {form.format(error)}"
    return form.format(values[0])


def behind(line: Line, naive: Line, measured: Columns) -> list[str]:
    """The measures in which a student is not clearly ahead of the naive row."""
    out = []
    for head, key, _, way in measured:
        values, other = line.values(key), mean(naive.values(key))
        gain = (mean(values) - other) * (1 if way == "up" else -1)
        doubt = stdev(values) if len(values) > 1 else math.inf
        if not gain > SURE * doubt:
            out.append(head)
    return out


def _verdicts(lines: Sequence[Line], naive: Line, measured: Columns) -> list[str]:
    """Why the rows that are not clearly better are not, as far as it is known."""
    said = []
    for line in lines:
        if verdict(line, naive, measured) == "no":
            lacking = behind(line, naive, measured)
            why = line.method.why or "Not explained."
            said.append(f"- {line.method.label}: not clearly better in {' and '.join(lacking)}. {why}")
    return ["\n".join(said)] if said else []


def _how(lines: Sequence[Line]) -> str:
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    machine = models[0] if models else platform.machine()
    rows = ["| row | run |", "|---|---|"]
    for line in lines:
        method = line.method
        if method.recipe is not None:
            folder = "digits" if method.group == "digits" else "methods"
            starts = ", ".join(f"{network} from `{row}`" for network, row in method.start.items())
            overrides = " ".join(f"`{override}`" for override in method.overrides)
            said = f"`configs/{folder}/{method.recipe}.yaml` {overrides}"
            rows.append(f"| `{method.key}` | {said}{': ' + starts if starts else ''} |")
    return f"""## How it was made

{machine}, Python {platform.python_version()}, PyTorch {torch.__version__}. All numbers, seed by seed, are in
`results.json` beside the pictures.

""" + "\n".join(rows)
