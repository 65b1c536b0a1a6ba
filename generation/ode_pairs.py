"""`[torchrun] preprocess.py ode --config_path X --out DIR`: a teacher's ODE trajectories, made once by any ranks.

The config is that of the run that learns from them: its `teacher`, `ode` and `data` sections, and the schedule's steps,
at whose noise levels states are stored. Trajectory i is what that run would make itself, for its own i-th prompt.
"""

# B batch  S stored points  F latent frames  C channels  H W latent size

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from configs.load import load_run
from configs.schema import RunConfig
from configs.sections import TrainerKind
from model.family import presets
from model.ode_regression import store_levels
from model.schedule import uniform_sigmas
from model.types import Conditioning, Evaluations
from tasks.build import build_task
from tasks.task import Task
from trainer.command import OVERRIDES
from trainer.ode import trajectories
from trainer.run_networks import RunNetworks
from utils import distributed
from utils.cli import Parser
from utils.config import to_plain
from utils.data.preprocessing import Job, MakeTrajectories, Share, write_ode
from utils.errors import UserError
from utils.parallel.mesh import Mesh, build_mesh

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def preprocess_ode(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    known = f"presets of networks, as in teacher.preset=1.3b: {', '.join(presets())}"
    parser = Parser(prog="preprocess.py ode", description="A teacher's ODE trajectories, file by file.", epilog=known)
    parser.add_argument("--config_path", "--config-path", type=Path, required=True, help="the run that will use them")
    parser.add_argument("overrides", nargs="*", metavar="key=value|YAML", help=OVERRIDES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the files; those that are there are skipped")
    parser.add_argument("--rows", type=int, default=64, help="trajectories to a file")
    parser.add_argument("--share", default="0/1", metavar="i/n", help="files i, i + n, ... for one of n jobs, from 0")
    parser.add_argument("--dtype", default="fp32", choices=PRECISIONS, help="stored precision")
    args = parser.parse_intermixed_args(argv)
    config = load_run(args.config_path, args.overrides)
    if config.trainer is not TrainerKind.ode or config.teacher is None:
        raise UserError(f"{args.config_path} is no recipe of ODE initialisation: it needs trainer: ode and a teacher")
    try:
        share = Share.parse(args.share)
    except ValueError as problem:
        raise UserError(f"--share: {problem}") from None
    distributed.init()
    mesh = build_mesh(config.parallel, distributed.world_size())
    task = build_task(config, distributed.device())
    make, levels = making(config, mesh, task)
    try:
        job = Job(
            args.out,
            {key: to_plain(config)[key] for key in ("ode", "teacher", "data", "schedule", "seed")},
            rows=args.rows,
            batch=config.training.micro_batch_size,
            share=Share(share.index * mesh.dp_size + mesh.dp_rank, share.count * mesh.dp_size),
            dtype=PRECISIONS[args.dtype],
            show=distributed.is_main(),
        )
        report = write_ode(
            task.prompts(range(config.ode.pairs)),
            make,
            levels,
            job,
            together=_most if mesh.world > 1 else None,
            writes=mesh.sequence_rank == 0,
            visual=lambda positions: _stored(config, task.conditions(positions)),
        )
    except (ValueError, OSError) as problem:
        raise UserError(str(problem)) from None
    if distributed.is_main():
        print(f"{args.out}: {report.made} files made, {report.present} were there")
    return 0


def making(config: RunConfig, mesh: Mesh, task: Task) -> tuple[MakeTrajectories, list[float]]:
    """What makes trajectories [B, S, F, C, H, W] on the CPU, drawn by position, and the stored levels [S]."""
    assert config.teacher is not None
    device = distributed.device()
    teacher = RunNetworks(config, Evaluations(), device, mesh).teacher(shared=False)
    grid = uniform_sigmas(config.ode.steps, config.ode.shift, teacher.path.start)
    keep = sorted({*store_levels(grid, config.schedule.sigmas()), len(grid)})

    @torch.no_grad()
    def make(positions: range, _prompts: Sequence[str]) -> Tensor:
        made = trajectories(config, teacher, task, positions, keep, device)
        if any(stream.faults.reasons for stream in task.streams):
            # another image took its place, and the files would say the caption of this one
            raise UserError("data.images: an image cannot be read, the line above names it: repair it or remove it")
        return made

    return make, [[*grid, 0.0][index] for index in keep]


def _stored(config: RunConfig, conditioning: Conditioning) -> dict[str, Tensor]:
    """What trajectories were made from beside their prompts, by the name of Sample's field."""
    channels = conditioning.channels
    latents = None if channels is None else config.student.codecs.latents_of(channels)
    fields = {"first_latents": latents, "clip": conditioning.image}
    return {name: value for name, value in fields.items() if value is not None}


def _most(count: int) -> int:
    return int(distributed.all_reduce_scalars({"calls": float(count)}, "max")["calls"])
