"""`python -m scripts.methods`: trains every method from the same teachers, judges it, and writes docs/methods.md.

Rows and seeds run side by side, each in a fresh process; what is finished is not done again unless its config, or one
that it starts from, has changed.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from evaluation.command import SPLITS
from scripts.methods_page import write_page
from scripts.methods_run import Job, Options, perform
from scripts.methods_table import METHODS, chosen
from utils.cli import Parser, refuse_several_ranks, run_cli
from utils.errors import UserError

# loaded once, before each job's process is forked off
LOADED = ["scripts.methods_run", "trainer.distillation", "trainer.diffusion", "trainer.ode", "trainer.consistency",
          "transformers.models.umt5.modeling_umt5"]  # fmt: skip


def jobs(options: Options, seeds: int, only: Sequence[str] | None = None) -> list[Job]:
    """The jobs of the rows, one a seed or one in all, seed by seed. Raises UserError for an unknown row."""
    known = {method.key for method in METHODS}
    if unknown := sorted(set(only or ()) - known):
        raise UserError(f"--only {unknown[0]}: choose among {', '.join(sorted(known))}")
    return [
        Job(method, seed, options) for seed in range(seeds) for method in chosen(only) if seed == 0 or not method.once
    ]


def run_all(todo: Sequence[Job], workers: int) -> list[Job]:
    """Runs each job after those that it starts from. Returns those that failed, or start from one that failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    waiting = list(todo)
    failed: list[Job] = []
    running: dict[Future[None], Job] = {}
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        bar = tqdm(total=len(todo), desc="methods", unit="run", mininterval=1)
        while True:
            unfinished = [*waiting, *running.values(), *failed]
            for job in [job for job in waiting if not any(job.needs(other) for other in unfinished)]:
                waiting.remove(job)
                running[pool.submit(perform, job)] = job
            if not running:
                bar.close()
                return [*failed, *waiting]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if problem := future.exception():
                    failed.append(job)
                    bar.write(f"{job.method.key}, seed {job.seed}: {problem} (see {job.folder / 'log.txt'})")
                bar.update()


def main() -> int:
    parser = Parser(prog="python -m scripts.methods", description="Train, judge and describe every method.")
    parser.add_argument(
        "--root", type=Path, help="of the runs (default: logs/methods, with --quick logs/methods_quick)"
    )
    parser.add_argument("--page", type=Path, help="page to write (default: docs/methods.md, with --quick in --root)")
    parser.add_argument("--seeds", type=int, help="trainings of each row (default: 3, with --quick 1)")
    parser.add_argument("--count", type=int, help="videos judged a training (default: 400, with --quick 8)")
    parser.add_argument("--split", choices=tuple(SPLITS), default="test", help="'dev' to choose hyper-parameters")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows, and what they start from")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes of one thread")
    parser.add_argument("--quick", action="store_true", help="a trial of a few iterations each: nothing is learnt")
    args = parser.parse_args()
    refuse_several_ranks("scripts.methods")
    seeds = args.seeds or (1 if args.quick else 3)
    count = args.count or (8 if args.quick else 400)
    if args.workers < 1 or seeds < 1 or count < 2:
        raise UserError(f"--workers {args.workers} --seeds {seeds} --count {count}: at least 1, 1 and 2")
    root = args.root or Path("logs/methods_quick" if args.quick else "logs/methods")
    page = args.page or (root / "methods.md" if args.quick or args.only else Path("docs/methods.md"))
    todo = jobs(Options(root, count, args.split, args.quick), seeds, args.only)
    failed = run_all(todo, args.workers)
    write_page(page, [job for job in todo if job not in failed])
    print(f"page: {page}")
    if failed:
        names = ", ".join(f"{job.method.key} (seed {job.seed})" for job in failed)
        raise UserError(f"{len(failed)} of {len(todo)} runs have no result: {names}")
    return 0


if __name__ == "__main__":
    run_cli(main)
