"""Evaluation of a run: `python evaluate.py --run logs/x [--suite toy|fid|vbench] [--out rows.json]`.

toy: the toy world's judge, which knows the truth. fid: Frechet distance to real videos on any features. vbench:
VBench's protocol and scores. One module a suite; this one is the command line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from evaluation import fid_suite, vbench_suite
from evaluation.toy_suite import (
    COLUMNS,
    SPLITS,
    Row,
    eval_prompts,
    evaluate_generator,
    evaluate_real,
    generate_all,
    judge_of,
    table,
    write_rows,
)
from generation.batch import MOST, chosen_batch, free_memory
from generation.generator import Generator
from generation.sampling import Sampling, StudentChoice
from model.network import Expert
from utils import checkpoint, distributed
from utils.cli import Parser, refuse_several_ranks, text_encoding
from utils.errors import UserError
from utils.reading import UTF8
from utils.writing import check_writable, write_text

__all__ = [  # the toy world's functions too, which scripts take from here
    "COLUMNS", "SPLITS", "Row", "eval_prompts", "evaluate_generator", "evaluate_real", "generate_all", "main", "table",
    "write_rows",
]  # fmt: skip
ENOUGH = 256  # videos below which a Frechet distance says more of their number than of their look
# options that only these suites read; the other suites refuse them
_OF_SUITES = {
    ("toy", "fid"): ("count", "split", "cache"),
    ("fid",): ("features", "real"),
    ("fid", "vbench"): ("prompts", "batch", "encoding"),
    ("vbench",): (
        *("videos", "augmented", "originals", "dimensions", "vbench_python", "download", "only_videos", "fps", "seed"),
    ),
}


def evaluation_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description="Judge a run's videos.")
    parser.add_argument("--run", type=Path, required=True, help="run or checkpoint folder")
    parser.add_argument("--low_run", type=Path, help="run of the low-noise expert, beside --run of the high-noise one")
    parser.add_argument("--suite", choices=("toy", "fid", "vbench"), default="toy", help="what judges")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as trained)")
    parser.add_argument("--guidance", type=float, help="of a many-step network (default: as validation has it)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="ema is the average")
    parser.add_argument("--out", type=Path, help="write the rows as JSON too")
    some = parser.add_argument_group("toy and fid")
    some.add_argument("--count", type=int, help="videos judged (default: 400)")
    some.add_argument("--split", choices=tuple(SPLITS), help="seeds, and the toy world's prompts (default: test)")
    some.add_argument("--cache", type=Path, help="where the toy world's judge is kept (default: logs/cache)")
    fid = parser.add_argument_group("fid")
    fid.add_argument(
        "--features",
        metavar="toy|DIR",
        help="a folder of transformers' image or video encoder (default: the toy world's)",
    )
    fid.add_argument("--real", type=Path, metavar="DIR", help="real videos or images (default: the toy world's own)")
    both = parser.add_argument_group("fid and vbench")
    both.add_argument("--prompts", type=Path, help="fid: a prompt file; vbench: a VBench_full_info.json")
    both.add_argument(
        "--encoding", type=text_encoding, help="of fid's --prompts, of --augmented and --originals (default: UTF-8)"
    )
    both.add_argument(
        "--batch", type=int, help="videos made at once (default: what fits, at most 8; of the toy world 50)"
    )
    vbench = parser.add_argument_group("vbench")
    vbench.add_argument("--videos", type=Path, metavar="DIR", help="where its videos go (default: RUN/vbench)")
    vbench.add_argument("--augmented", type=Path, metavar="FILE", help="longer prompts to make videos from")
    vbench.add_argument("--originals", type=Path, metavar="FILE", help="VBench's own prompts, in --augmented's order")
    vbench.add_argument("--dimensions", metavar="A,B", help="of VBench's 16 (default: all)")
    vbench.add_argument("--vbench_python", metavar="FILE", help="an interpreter that has vbench (default: this one)")
    vbench.add_argument("--download", action="store_true", default=None, help="let VBench fetch the models it lacks")
    vbench.add_argument("--only_videos", action="store_true", default=None, help="make its videos, score nothing")
    vbench.add_argument("--fps", type=int, help="of its videos (default: the run's)")
    vbench.add_argument("--seed", type=int, help="of its videos' noise, beside each video's own key (default: 0)")
    return parser


def main() -> int:
    args = evaluation_parser().parse_args()
    for suites, names in _OF_SUITES.items():
        if args.suite not in suites and (misplaced := [name for name in names if getattr(args, name) is not None]):
            raise UserError(f"--{misplaced[0]} is for --suite {' or '.join(suites)}: leave it out")
    for name in ("batch", "fps"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: give a number of at least 1")
    if args.suite != "vbench":
        refuse_several_ranks(f"evaluate.py --suite {args.suite}")
        args.count = 400 if args.count is None else args.count
        args.split, args.cache = args.split or "test", args.cache or Path("logs/cache")
        if args.count < 2:
            raise UserError(f"--count {args.count}: a distance needs at least 2 videos, 400 to be worth reading")
    if args.out is not None:
        check_writable(args.out, "--out")
    generator = _generator(args)
    {"toy": _toy, "fid": _fid, "vbench": _vbench}[args.suite](generator, args)
    return 0


def _generator(args: argparse.Namespace) -> Generator:
    device = distributed.device()
    if args.low_run is None:
        return Generator.load(args.run, device, student=StudentChoice(args.weights))
    high, low = (
        Generator.load(run, device, student=StudentChoice(args.weights, expert=expert))
        for run, expert in ((args.run, Expert.high), (args.low_run, Expert.low))
    )
    return high.with_low(low)


def _toy(generator: Generator, args: argparse.Namespace) -> None:
    judge = judge_of(generator.task, args.cache)
    if judge is None:
        raise UserError(
            f"--run {args.run}: its data is {generator.config.data.kind}: only the toy worlds have a judge: use "
            "--suite fid or vbench"
        )
    sampling = Sampling(steps=args.steps, guidance=args.guidance)
    row, _ = evaluate_generator(str(args.run), generator, judge, count=args.count, split=args.split, sampling=sampling)
    rows = [evaluate_real(judge, count=args.count, split=args.split), row]
    print(table(rows))
    _warn_of_few(args.count)
    if args.out:
        write_rows(args.out, rows)


def _warn_of_few(videos: int, what: str = "videos") -> None:
    if videos < ENOUGH:
        print(
            f"evaluate.py: warning: {videos} {what}: distances of fewer than {ENOUGH} say little, for they grow as "
            "videos become fewer: judge more, and compare only distances of the same numbers of videos",
            file=sys.stderr,
        )


def _fid(generator: Generator, args: argparse.Namespace) -> None:
    asked = fid_suite.FidArgs(
        features=args.features,
        real=args.real,
        prompts=args.prompts,
        count=args.count,
        split=args.split,
        cache=args.cache,
        batch=args.batch,
        encoding=args.encoding or UTF8,
    )
    rows = fid_suite.evaluate_fid(generator, asked, Sampling(steps=args.steps, guidance=args.guidance))
    print(fid_suite.report(rows))
    fewest = min(rows, key=lambda name: rows[name]["videos"])
    _warn_of_few(int(rows[fewest]["videos"]), "real videos (--real)" if fewest == "real" else "videos")
    _write(args.out, rows)


def _vbench(generator: Generator, args: argparse.Namespace) -> None:
    sampling = Sampling(steps=args.steps, guidance=args.guidance, seed=args.seed or 0)
    asked = vbench_suite.VBenchArgs(
        videos=args.videos or args.run / "vbench",
        python=args.vbench_python or sys.executable,
        prompts=args.prompts,
        augmented=args.augmented,
        originals=args.originals,
        dimensions=vbench_suite.parse_dimensions(args.dimensions),
        download=bool(args.download),
        only_videos=bool(args.only_videos),
        batch=args.batch or chosen_batch(generator, sampling, MOST, free_memory(generator.device)),
        fps=args.fps or generator.config.fps,
        encoding=args.encoding or UTF8,
    )
    runs = [args.run] if args.low_run is None else [args.run, args.low_run]
    folders = [str(checkpoint.resolve_resume(str(run), run)) for run in runs]
    source = ", ".join([*folders, args.weights])
    scores = vbench_suite.evaluate_vbench(generator, asked, sampling, source)
    if scores is not None:
        print(vbench_suite.report(scores))
        _write(args.out, {"scores": scores, "totals": vbench_suite.totals(scores)})


def _write(path: Path | None, rows: object) -> None:
    """JSON, replaced as a whole."""
    if path is not None:
        write_text(path, json.dumps(rows, indent=1), "--out")
