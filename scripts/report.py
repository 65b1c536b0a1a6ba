"""`python -m scripts.report --root logs/quickstart`: judges every method of the quickstart in the world of shapes and
writes report.html, table.txt, comparison.mp4, .gif and .png, and evaluation/rows.json. What is done already is not done
again."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.command import SPLITS, Row, eval_prompts, write_rows
from scripts import report_html as html
from scripts import report_samples as samples
from scripts.quickstart import CAUSAL_INIT, DMD, TEACHER, TEACHER_ASSET
from scripts.report_plots import Panel, curves, held, short, side_by_side, write_comparison
from scripts.report_samples import RUNS, Method, Part, Place
from tasks.kinds.shapes import ShapesData
from utils.cli import Parser, run_cli
from utils.config import to_yaml
from utils.data.prompts import load_prompts
from utils.errors import UserError
from utils.logging import read_jsonl
from utils.video import write_video
from utils.writing import write_text
from worlds.shapes import ShapesWorld
from worlds.shapes_judge import ShapesJudge

FPS = 8
SHOW_SEED = 0  # the seed of inference.sh, whose videos of these prompts are the same ones


class Evaluation:
    """All methods on one set of prompts: the parts to make, and what they gave."""

    def __init__(self, place: Place, prompts_file: Path, count: int, split: str) -> None:
        self.place, self.count, self.split = place, count, split
        self.methods, self.missing = samples.available(place)
        present = next((method.run for method in self.methods if method.run), None)
        if present is None:
            raise UserError(
                f"--root {place.root}, --teacher {place.teacher}: no weights there ({', '.join(RUNS)}): run "
                "`make quickstart`"
            )
        data = place.config(present).data
        if not isinstance(data, ShapesData):
            raise UserError(f"{place.of(present)} has data of kind {data.kind}: the report is about kind shapes")
        self.world = ShapesWorld(data.shapes)
        self.prompts = eval_prompts(self.world.captions, count, split)
        self.shown_prompts = load_prompts(prompts_file)
        made = [method for method in self.methods if method.run]
        self.judged = {m: samples.parts(place, m, split, self.prompts, SPLITS[split]) for m in made}
        self.shown = {m: samples.parts(place, m, "shown", self.shown_prompts, SHOW_SEED, 1000) for m in made}

    def todo(self) -> list[Part]:
        listed = [part for parts in (*self.judged.values(), *self.shown.values()) for part in parts]
        return [part for part in listed if not samples.is_done(part)]

    def run(self, workers: int, runs: Sequence[str] = tuple(RUNS)) -> None:
        """Makes what these runs' methods lack."""
        todo = [part for part in self.todo() if part.method.run in runs]
        if todo:
            bar = tqdm(samples.make(todo, workers), total=len(todo), desc="sampling", unit="part", mininterval=5)
            for _ in bar:
                pass

    def rows(self, judge: ShapesJudge) -> list[Row]:
        out = []
        for method in self.methods:
            if method.run is None:
                latents = self.world.real_videos_for(self.prompts, seed=SPLITS[self.split])
                out.append(Row(method.key, judge.evaluate(latents, self.prompts), 0.0, 0.0))
            else:
                made = samples.load(self.judged[method])
                out.append(Row(method.key, judge.evaluate(made.latents, self.prompts), made.evaluations, made.seconds))
        return out

    def shown_pixels(self, method: Method) -> Tensor:
        """[P, T, 3, H, W] in [0, 1]."""
        if method.run is None:
            return self.world.decode(self.world.real_videos_for(self.shown_prompts, seed=SHOW_SEED))
        return self.world.decode(samples.load(self.shown[method]).latents)


def build(evaluation: Evaluation, rows: Sequence[Row]) -> html.Page:
    """The page's content; writes the comparison files on the way."""
    place, root = evaluation.place, evaluation.place.root
    pixels = {method: evaluation.shown_pixels(method) for method in evaluation.methods}
    labels = [method.label for method in pixels]
    write_comparison(root, labels, evaluation.shown_prompts, torch.stack(list(pixels.values())), FPS)
    strips = {m: _clip(root / "evaluation" / f"{m.key}.mp4", videos) for m, videos in pixels.items()}
    found = {row.name: row for row in rows}
    entries = {run: read_jsonl(place.of(run) / "metrics.jsonl") for run in RUNS}  # an asset has none
    real = found["real"].metrics["saturation"]
    return html.Page(
        summary=_summary(found),
        prompts=tuple(short(prompt) for prompt in evaluation.shown_prompts),
        clips=tuple(html.Clip(m.group, m.short, mp4) for m, mp4 in strips.items()),
        lines=tuple(html.Line(m.group, m.label, m.short, found.get(m.key)) for m in samples.METHODS),
        notes=_notes(evaluation, found["real"]),
        curves=tuple(curves(_panels(entries, real))),
        stages=(*_training_stages(entries), _evaluation_stage(rows, evaluation.count)),
        commands=_commands(root),
        configs=tuple((RUNS[run], to_yaml(place.config(run))) for run in RUNS if place.is_trained(run)),
        machine=_machine(),
    )


def _clip(path: Path, videos: Tensor) -> bytes:
    return write_video(path, side_by_side(held(videos)), FPS, scale=4).read_bytes()


def _summary(rows: dict[str, Row]) -> str:
    """The most important numbers in words, without a verdict."""
    named = (
        ("real", "Real videos"), ("teacher_50", "The teacher in 50 steps"), ("teacher_2", "The teacher in two"),
        ("causal_init", "The causal network before distillation"), ("dmd", "The distilled causal student"),
    )  # fmt: skip
    said = []
    for key, name in named:
        if key in rows:
            number, error = html.cell(rows[key], html.COLUMNS[0])
            spent = f" with {rows[key].evaluations:.1f} network evaluations a video" if rows[key].evaluations else ""
            said.append(f"{name}: {number} ± {error} % of prompts right{spent}.")
    return " ".join(said)


def _notes(evaluation: Evaluation, real: Row) -> tuple[str, ...]:
    m = real.metrics
    return (
        f"n = {evaluation.count} videos a row, of prompts and seeds of the split '{evaluation.split}'. "
        "Hyper-parameters were chosen on the split 'dev', which shares neither prompt list nor noise with 'test'. "
        "± is one standard error from the number of videos alone: training again with another seed varies too.",
        "The appearance distance of as many real held-out videos, which no generator can be expected to undercut, is "
        f"{m['appearance_fd_floor']:.2f} ± {m['appearance_fd_floor_sd']:.2f}. The fewer the videos, the larger it is.",
    )


def _panels(entries: dict[str, list[dict[str, Any]]], real_saturation: float) -> list[Panel]:
    teacher, init, dmd = (entries[run] for run in (TEACHER, CAUSAL_INIT, DMD))
    return [
        Panel("Teacher: flow-matching loss", (("loss", "student/loss", teacher),), log=True),
        Panel("Causal initialisation: loss", (("loss", "student/loss", init),)),
        Panel("Causal initialisation: gradient norm", (("before clipping", "student/grad_norm", init),), log=True),
        Panel("DMD: critic's loss", (("loss", "critic/loss", dmd),)),
        Panel("DMD: student's loss (size means little)", (("loss", "student/loss", dmd),)),
        Panel("DMD: norm of the distribution-matching gradient", (("norm", "student/dmd_gradient_norm", dmd),)),
        Panel("DMD: gradient norms before clipping", (
            ("student", "student/grad_norm", dmd), ("critic", "critic/grad_norm", dmd)), log=True),
        Panel("DMD: colourfulness of the student's videos", (("student", "student/saturation", dmd),),
              level=("real", real_saturation)),
    ]  # fmt: skip


def _training_stages(entries: dict[str, list[dict[str, Any]]]) -> list[html.Stage]:
    out = []
    for run, lines in entries.items():
        steps = [line for line in lines if "step_seconds" in line]
        if steps:
            seconds = sum(line["step_seconds"] for line in steps)
            memory, last = max(line["peak_memory_gib"] for line in steps), steps[-1]
            out.append(html.Stage(RUNS[run], last["step"], seconds, last["network_evaluations"], memory))
    return out


def _evaluation_stage(rows: Sequence[Row], count: int) -> html.Stage:
    seconds, evaluations = sum(row.seconds for row in rows), sum(row.evaluations for row in rows)
    return html.Stage(f"Evaluation, {count} videos a row", 0, seconds * count, evaluations * count, 0.0)


def _commands(root: Path) -> str:
    """What scripts/quickstart.py noted."""
    path = root / "commands.txt"
    return path.read_text().strip() if path.is_file() else ""


def _machine() -> tuple[tuple[str, str], ...]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    facts = [
        ("Processor", models[0] if models else platform.processor() or platform.machine()),
        ("Cores", str(os.cpu_count())),
        ("Python", platform.python_version()),
        ("PyTorch", torch.__version__),
        ("System", platform.system()),
    ]
    if torch.cuda.is_available():
        facts.insert(2, ("GPU", torch.cuda.get_device_name()))
    return tuple(facts)


def main() -> int:
    parser = Parser(prog="python -m scripts.report", description="Judge the quickstart's methods and write its report.")
    parser.add_argument("--root", type=Path, required=True, help="folder of the runs; the report is written there")
    parser.add_argument("--teacher", type=Path, default=TEACHER_ASSET, help="a run, or a folder of exported weights")
    parser.add_argument("--count", type=int, default=100, help="videos judged a row")
    parser.add_argument("--split", choices=tuple(SPLITS), default="test", help="prompts and seeds")
    parser.add_argument("--prompts", type=Path, default=Path("configs/shapes/prompts.txt"), help="file of those shown")
    parser.add_argument("--workers", type=int, default=1, help="processes that sample")
    parser.add_argument("--sample", nargs="+", choices=tuple(RUNS), metavar="RUN", help="only make these runs' videos")
    args = parser.parse_args()
    if args.workers < 1 or args.count < 2:
        raise UserError(f"--workers {args.workers} --count {args.count}: at least 1 worker and 2 videos")
    evaluation = Evaluation(Place(args.root, args.teacher), args.prompts, args.count, args.split)
    evaluation.run(args.workers, args.sample or tuple(RUNS))
    if args.sample:
        return 0
    rows = evaluation.rows(ShapesJudge(evaluation.world))
    write_rows(args.root / "evaluation" / "rows.json", rows)
    content = build(evaluation, rows)
    report = args.root / "report.html"
    write_text(report, html.page(content), "--root")
    table = "\n".join([html.text_table(content.lines), "", *content.notes])
    write_text(args.root / "table.txt", f"{table}\n", "--root")
    print(f"{table}\n\nreport: {report.resolve()}")
    return 0


if __name__ == "__main__":
    run_cli(main)
