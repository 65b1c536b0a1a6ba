"""How the 14B recipe scales, from the planner: no GPU is needed. `python -m benchmarks.scaling [--gpu h200]`

The recipe's global batch on 1, 8, 64 and 512 GPUs: the least time of an iteration by the data sheet (the mean over the
run), what part of it is communication that nothing hides, and whether it would fit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import table, write_json
from configs.load import load_run
from planning.hardware import find_gpu, needed_gb
from planning.plan import Cluster, Plan, make_plan
from utils.cli import ShowDefaults, run_cli

ROOT = Path(__file__).parents[1]
RECIPE = "configs/wan2.1_14b/self_forcing_dmd.yaml"
SPLITS = {1: (1, 1, 1), 8: (1, 2, 4), 64: (2, 8, 4), 512: (8, 8, 8)}  # replicate, shard, sequence


def plan(world: int, gpu: str) -> Plan:
    """The recipe on so many GPUs, eight a node."""
    names = ("replicate", "shard", "sequence")
    ways = [f"parallel.{name}={value}" for name, value in zip(names, SPLITS[world], strict=True)]
    each = min(world, 8)
    return make_plan(load_run(ROOT / RECIPE, ways), Cluster(world // each, each, gpu, find_gpu(gpu)))


def row(world: int, done: Plan) -> dict[str, Any]:
    steps = sum(item.kind.count for item in done.iterations)
    seconds = done.seconds / steps
    compute = sum(item.bound.compute * item.kind.count for item in done.iterations) / steps
    moving = sum(item.bound.communication * item.kind.count for item in done.iterations) / steps
    return {
        "gpus": world, "split": "{} x {} x {}".format(*done.split), "seconds": seconds, "compute_seconds": compute,
        "communication_seconds": moving, "exposed_share": 1 - compute / seconds,
        "communication_share": moving / (moving + compute), "needed_gb": needed_gb(done.peak), "fits": done.fits,
        "gpu_hours": done.gpu_hours,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> str:
    header = [
        "GPUs", "replicate x shard x sequence", "least s/iteration", "arithmetic s", "communication s",
        "not hidden", "communication share", "GB needed", "fits", "GPU-hours",
    ]  # fmt: skip
    return table(
        header,
        [
            [
                str(r["gpus"]), r["split"], f"{r['seconds']:.2f}", f"{r['compute_seconds']:.2f}",
                f"{r['communication_seconds']:.2f}", f"{r['exposed_share']:.1%}", f"{r['communication_share']:.1%}",
                f"{r['needed_gb']:.0f}", "yes" if r["fits"] else "no", f"{r['gpu_hours']:.0f}",
            ]
            for r in rows
        ],
    )  # fmt: skip


def draw(rows: list[dict[str, Any]], gpu: str, path: Path) -> None:
    """Time and communication over the number of GPUs, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpus = [r["gpus"] for r in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.loglog(gpus, [r["seconds"] for r in rows], "o-", label="least time of an iteration")
    left.loglog(gpus, [rows[0]["seconds"] / n for n in gpus], "--", color="grey", label="of one GPU, divided")
    left.set(xlabel="GPUs", ylabel="seconds", title=f"14B recipe on {gpu}, by data sheet")
    right.semilogx(gpus, [100 * r["communication_share"] for r in rows], "o-", label="communication, of all work")
    right.semilogx(gpus, [100 * r["exposed_share"] for r in rows], "s-", label="not hidden by arithmetic, of the time")
    right.set(xlabel="GPUs", ylabel="%", ylim=(0, None), title="Communication share")
    for axis in (left, right):
        axis.set_xticks(gpus, [str(n) for n in gpus])
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.scaling", description="The 14B recipe on 1 to 512 GPUs, planned.", formatter_class=ShowDefaults
    )
    parser.add_argument("--gpu", default="h200", help="planned for")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for PNG and JSON")
    space = parser.parse_args()
    rows = [row(world, plan(world, space.gpu)) for world in SPLITS]
    print(show(rows))
    write_json(space.out / "scaling.json", {"recipe": RECIPE, "gpu": space.gpu, "rows": rows})
    draw(rows, space.gpu, space.out / "scaling.png")
    return 0


if __name__ == "__main__":
    run_cli(main)
