"""`python -m scripts.report --root logs/quickstart`: judges every method of the quickstart on the toy world and writes
report.html, comparison.mp4, .gif and .png, and evaluation/rows.json. What is done already is not done again."""

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
from scripts.report_plots import Panel, curves, held, short, side_by_side, write_comparison
from scripts.report_samples import CAUSAL_INIT, DMD, DMD_2STEP, RUNS, TEACHER, Method, Part
from tasks.kinds.toy import ToyData
from utils.cli import Parser, run_cli
from utils.config import to_yaml
from utils.data.prompts import load_prompts
from utils.errors import UserError
from utils.logging import read_jsonl
from utils.video import write_video
from worlds.toy import ToyWorld
from worlds.toy_judge import ToyJudge

FPS = 8
SHOW_SEED = 0  # the seed of inference.sh, whose videos of these prompts are the same ones


class Evaluation:
    """All methods on one set of prompts: the parts to make, and what they gave."""

    def __init__(self, root: Path, prompts_file: Path, count: int, split: str) -> None:
        self.root, self.count, self.split = root, count, split
        self.methods, self.missing = samples.available(root)
        if not any(method.run for method in self.methods):
            raise UserError(f"--root {root}: no run with a checkpoint in it ({', '.join(RUNS)}): run `make quickstart`")
        present = next(method.run for method in self.methods if method.run)
        data = samples.run_config(root, present).data
        if not isinstance(data, ToyData):
            raise UserError(f"--root {root}: {present} has data of kind {data.kind}: the report is about the toy world")
        self.world = ToyWorld(data.toy)
        self.prompts = eval_prompts(self.world.captions, count, split)
        self.shown_prompts = load_prompts(prompts_file)
        made = [method for method in self.methods if method.run]
        self.judged = {m: samples.parts(root, m, split, self.prompts, SPLITS[split]) for m in made}
        self.shown = {m: samples.parts(root, m, "shown", self.shown_prompts, SHOW_SEED, 1000) for m in made}

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

    def rows(self, judge: ToyJudge) -> list[Row]:
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


def build(evaluation: Evaluation, rows: Sequence[Row], root: Path) -> html.Page:
    """The page's content; writes the comparison files on the way."""
    pixels = {method: evaluation.shown_pixels(method) for method in evaluation.methods}
    labels = [method.label for method in pixels]
    write_comparison(root, labels, evaluation.shown_prompts, torch.stack(list(pixels.values())), FPS)
    strips = {m: _clip(root / "evaluation" / f"{m.key}.mp4", videos) for m, videos in pixels.items()}
    found = {row.name: row for row in rows}
    entries = {run: read_jsonl(root / run / "metrics.jsonl") for run in RUNS}
    real = found["real"].metrics["intensity"]
    return html.Page(
        summary=_summary(found),
        prompts=tuple(short(prompt) for prompt in evaluation.shown_prompts),
        clips=tuple(html.Clip(m.group, m.short, mp4) for m, mp4 in strips.items()),
        lines=tuple(html.Line(m.group, m.label, m.short, found.get(m.key)) for m in samples.METHODS),
        notes=_notes(evaluation, found["real"]),
        curves=tuple(curves(_panels(entries, real))),
        stages=(*_training_stages(entries), _evaluation_stage(rows, evaluation.count)),
        commands=_commands(root),
        configs=tuple((RUNS[run], to_yaml(samples.run_config(root, run))) for run in RUNS if _trained(evaluation, run)),
        machine=_machine(),
    )


def _clip(path: Path, videos: Tensor) -> bytes:
    return write_video(path, side_by_side(held(videos)), FPS, scale=6).read_bytes()


def _trained(evaluation: Evaluation, run: str) -> bool:
    return any(method.run == run for method in evaluation.methods)


def _summary(rows: dict[str, Row]) -> str:
    """The most important numbers in words, without a verdict."""
    named = (
        ("real", "Real videos"), ("teacher_50", "The teacher at 50 steps"),
        ("dmd_4", "The causal student distilled to 4 steps"), ("dmd_2", "The causal student distilled to 2 steps"),
        ("causal_init_4", "The causal network before distillation, at 4 steps"),
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
        f"{m['appearance_fd_floor']:.2f} ± {m['appearance_fd_floor_sd']:.2f}; the mean intensity of real videos is "
        f"{m['intensity_real']:.4f}.",
    )


def _panels(entries: dict[str, list[dict[str, Any]]], real_intensity: float) -> list[Panel]:
    teacher, init, four, two = (entries[run] for run in (TEACHER, CAUSAL_INIT, DMD, DMD_2STEP))

    def both(key: str) -> tuple[tuple[str, str, list[dict[str, Any]]], ...]:
        return (("4 steps", key, four), ("2 steps", key, two))

    return [
        Panel("Teacher: flow-matching loss", (("loss", "student/loss", teacher),), log=True),
        Panel("Causal initialisation: loss", (("loss", "student/loss", init),)),
        Panel("Gradient norm before clipping", (
            ("teacher", "student/grad_norm", teacher), ("initialisation", "student/grad_norm", init)), log=True),
        Panel("DMD: critic's loss", both("critic/loss")),
        Panel("DMD: student's loss (size means little)", both("student/loss")),
        Panel("DMD: norm of the distribution-matching gradient", both("student/dmd_gradient_norm")),
        Panel("DMD: student's gradient norm", both("student/grad_norm")),
        Panel("DMD: critic's gradient norm", both("critic/grad_norm")),
        Panel("DMD: brightness of the student's videos", both("student/luma"), level=("real", real_intensity)),
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
    """What scripts/quickstart.sh noted for each stage."""
    return "\n".join(path.read_text().strip() for path in sorted((root / "commands").glob("*.txt")))


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
    parser.add_argument("--count", type=int, default=400, help="videos judged a row")
    parser.add_argument("--split", choices=tuple(SPLITS), default="test", help="prompts and seeds")
    parser.add_argument("--prompts", type=Path, default=Path("configs/toy/prompts.txt"), help="file of those shown")
    parser.add_argument("--cache", type=Path, default=Path("logs/cache"), help="where the judge is kept")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes that sample")
    parser.add_argument("--sample", nargs="+", choices=tuple(RUNS), metavar="RUN", help="only make these runs' videos")
    args = parser.parse_args()
    if args.workers < 1 or args.count < 2:
        raise UserError(f"--workers {args.workers} --count {args.count}: at least 1 worker and 2 videos")
    evaluation = Evaluation(args.root, args.prompts, args.count, args.split)
    evaluation.run(args.workers, args.sample or tuple(RUNS))
    if args.sample:
        return 0
    rows = evaluation.rows(ToyJudge(evaluation.world, args.cache))
    write_rows(args.root / "evaluation" / "rows.json", rows)
    content = build(evaluation, rows, args.root)
    report = args.root / "report.html"
    partial = report.with_suffix(".partial")
    partial.write_text(html.page(content), encoding="utf-8")
    os.replace(partial, report)
    print(html.text_table(content.lines))
    print("\n".join(["", *content.notes, "", f"report: {report.resolve()}"]))
    return 0


if __name__ == "__main__":
    run_cli(main)
