"""ODETrainer: a causal student learns from the ODE trajectories of a bidirectional or causal teacher.

B batch  S stored points  F latent frames
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.schema import RunConfig
from model.family import Network
from model.ode_regression import lacking_levels, ode_regression_loss, pick_stored, store_levels
from model.schedule import uniform_sigmas, velocity_to_x0
from model.score import ScoreNet
from model.types import Conditioning, LossOutput, Prompt
from pipeline.bidirectional_inference import euler_trajectory
from pipeline.causal import VideoShape
from pipeline.causal_inference import Branch, causal_trajectory
from pipeline.diffusion_forcing import CleanContext, per_frame, teacher_forced_velocity
from pipeline.sampling import cache_dtype
from tasks.first_frames import visual_reader
from tasks.stored import StoredPairs
from tasks.task import Task
from trainer.agreed import require_same_data
from trainer.base import Trainer
from trainer.micro_batch import MicroBatch
from utils import activity, distributed
from utils.agreement import on_main
from utils.compared import config_hash, differences
from utils.config import to_plain
from utils.data.stream import Stream
from utils.errors import ConfigError
from utils.logging import Progress, console
from utils.random import Noise, keyed_seed
from utils.space import free_space, size_text
from utils.tensor_files import save_file
from utils.writing import check_writable, whole_file


class ODETrainer(Trainer):
    """Regresses the student on trajectories: those of `ode.path`, or `ode.pairs` which it makes once and keeps in the
    run folder."""

    teacher: ScoreNet  # where it makes them

    def build(self) -> None:
        config, steps = self.config, self.config.training.max_steps
        self.stored: StoredPairs | None = None
        if config.ode.path is None:
            self.teacher = self.make.teacher()
            self.networks = {"student": self.make.trained("student", steps, teacher=self.teacher)}
            self.trajectories, self.sigmas_S = self._load_or_make()
            return
        self.networks = {"student": self.make.trained("student", steps)}
        shape = self.task.latent_shape
        takes = config.student.geometry().first_frame
        has_first_frame = config.data.has_first_frame(takes, real=False)
        visual_of = visual_reader(config.student, shape[0], self.device, has_first_frame=has_first_frame)
        self.stored = stored = StoredPairs(Path(config.ode.path), shape, config.seed, config.ode.sigmas, visual_of)
        require_same_data(lambda: {"ode.path": stored.index()})
        self.sigmas_S = stored.sigmas_S
        self.task.check_captions(stored.key, stored.captions)
        self._check_levels()

    def _check_levels(self) -> None:
        """Raises ConfigError unless the student's steps are all stored, as near as the teacher's grid comes to them,
        and the teacher that made the trajectories was causal where this run takes it to have been."""
        assert self.stored is not None
        kind = self._made_with("ode.causal_teacher")
        if kind:
            raise ConfigError(
                f"ode.path: {self.config.ode.path}: {kind[0]}: set it to what the trajectories were made with"
            )
        config, wanted = self.config.ode, self.config.schedule.sigmas()
        stored = self.sigmas_S.tolist()
        if lacking := lacking_levels(
            stored, wanted, uniform_sigmas(config.steps, config.shift, self.config.student.path.start)
        ):
            made = self._made_with(
                "ode.steps", "ode.shift", "schedule.denoising_step_list", "schedule.timestep_shift",
                "schedule.warp_denoising_step",
            )  # fmt: skip
            remedy = "set that list (and timestep_shift) to what is stored"
            if made:
                remedy = f"{'; '.join(made)}: set these keys to what the trajectories were made with"
            raise ConfigError(
                f"ode.path: {config.path} stores the noise levels {', '.join(f'{s:.4g}' for s in stored)}, and not "
                f"{', '.join(f'{s:.4g}' for s in lacking)} of schedule.denoising_step_list: {remedy}, or make "
                "trajectories with this config"
            )

    def _made_with(self, *keys: str) -> list[str]:
        """Which of these keys the stored trajectories were made with another value of, and both values."""
        assert self.stored is not None
        theirs, ours = self.stored.settings, to_plain(self.config)
        return differences(theirs, {section: ours[section] for section in theirs if section in ours}, keys)

    def streams(self) -> Sequence[Stream]:
        return [*self.task.streams, *([] if self.stored is None else [self.stored.stream])]

    def counts(self) -> dict[str, int]:
        made = {} if self.stored is not None else {"ODE pair": self.config.ode.pairs}
        return super().counts() | made

    def training_step(self) -> dict[str, float]:
        update = self.begin_update(self.networks["student"])
        for micro in update.over(self.batch("ode")):
            update.backward(self.loss(micro))
        return update.step()

    def loss(self, micro: MicroBatch) -> LossOutput:
        trajectory, conditioning = self._pairs(micro.positions)
        frames, points, after_causal = trajectory.shape[2], len(self.sigmas_S), self.config.ode.causal_teacher
        blocks = self.config.causal.blocks(frames)
        u = micro.noise.uniform("stored_index", (len(blocks),))
        known, _ = self.config.causal.split(conditioning.initial_frames, frames - conditioning.initial_frames)
        choices = torch.full((len(blocks),), points - int(after_causal), device=u.device)
        # the first block to generate is never given clean: all samples have something to learn from
        choices[len(known)] = points - 1
        index_BF = per_frame((u * choices).long(), blocks)
        index_BF[:, : conditioning.initial_frames] = points - 1
        x, sigma_BF = pick_stored(trajectory, self.sigmas_S.to(self.device), index_BF)
        student, clean = self.networks["student"].score, trajectory[:, -1]
        if after_causal:  # a block's trajectory is given the clean ends before it, so the student sees those
            velocity = teacher_forced_velocity(
                student, x, sigma_BF, CleanContext(clean, torch.zeros_like(sigma_BF)), conditioning, self.config.causal
            )
            return ode_regression_loss(velocity_to_x0(x, velocity, sigma_BF), clean, sigma_BF)
        x0 = student.x0(x, sigma_BF, conditioning, mask=self.config.causal.mask(frames))
        return ode_regression_loss(x0, clean, sigma_BF)

    def _pairs(self, positions: range) -> tuple[Tensor, Conditioning]:
        """Trajectories [B, S, F, C, H, W] and what each was made for."""
        if self.stored is not None:
            pairs = self.stored.read(positions)
            trajectory = pairs.trajectory
            conditioning = self.task.conditioning(pairs.captions, pairs.visual)
        else:
            numbers = [position % self.config.ode.pairs for position in positions]
            trajectory = self.trajectories[numbers]
            conditioning = Conditioning.joined([self.task.conditions(range(n, n + 1)) for n in numbers])
        return trajectory.to(self.device).float(), conditioning

    def _load_or_make(self) -> tuple[Tensor, Tensor]:
        key = config_hash(
            [self.config.ode, self.config.teacher, self.config.data, self.config.schedule, self.config.seed]
        )
        path = self.options.logdir / f"ode_pairs_{key[:12]}.safetensors"
        missing = distributed.all_reduce_scalars({"missing": float(distributed.is_main() and not path.is_file())})
        if missing["missing"]:
            on_main(lambda: self._check_room(path))
            pairs = self._make()
            on_main(lambda: _keep(path, pairs))
        distributed.barrier()
        stored = load_file(path)
        return stored["x"], stored["sigma"]

    def _check_room(self, path: Path) -> None:
        """Before hours of work: raises UserError where nothing can be written, warns where it seems too much."""
        check_writable(path, "--logdir")
        points = len(store_levels(self._grid, self.config.schedule.sigmas())) + 1
        size = 4 * self.config.ode.pairs * points * math.prod(self.task.latent_shape)
        if (free := free_space(path.parent)) < size:
            console.warning(
                "%s: %s free, trajectories of %s do not fit: free some space there, or make fewer (ode.pairs)",
                path.parent, size_text(free), size_text(size),
            )  # fmt: skip

    @property
    def _grid(self) -> tuple[float, ...]:
        """The noise levels of the teacher's steps."""
        return uniform_sigmas(self.config.ode.steps, self.config.ode.shift, self.teacher.path.start)

    @torch.no_grad()
    def _make(self) -> dict[str, Tensor] | None:
        """x [pairs, S, F, C, H, W] at the student's step levels and at 0, and those levels [S]; on rank 0, else None.

        The micro-batches are those of a single process, dealt to the data-parallel ranks in turn, so who makes one
        changes nothing in it. Where the last turn has none for a rank, it repeats another's, for a sharded teacher
        needs all ranks; that is not counted.
        """
        config, mesh, grid = self.config.ode, self.mesh, self._grid
        keep = [*store_levels(grid, self.config.schedule.sigmas()), len(grid)]
        size = self.config.training.micro_batch_size
        batches = [range(start, min(start + size, config.pairs)) for start in range(0, config.pairs, size)]
        x = torch.empty(config.pairs, len(keep), *self.task.latent_shape) if distributed.is_main() else None
        progress = Progress(config.pairs, desc="ODE pairs", is_main=distributed.is_main())
        for turn in range(0, len(batches), mesh.dp_size):
            dealt = batches[turn : turn + mesh.dp_size]
            activity.mark(f"ODE pairs from {dealt[0].start}")  # each turn has the watchdog's time, not all together
            before = self.evaluations.state()
            positions = dealt[min(mesh.dp_rank, len(dealt) - 1)]
            local = trajectories(self.config, self.teacher, self.task, positions, keep, self.device)
            if mesh.dp_rank >= len(dealt):
                self.evaluations.load(before)
            rows = [0] * mesh.world
            rows[: len(dealt) * mesh.sequence : mesh.sequence] = map(len, dealt)  # a sequence group's first rank sends
            made = distributed.gather_rows(local, rows)
            if x is not None and made is not None:
                x[dealt[0].start : dealt[-1].stop] = made
            progress.update(dealt[-1].stop, {})
        progress.close()
        return None if x is None else {"x": x, "sigma": torch.tensor([*grid, 0.0])[keep]}


def _keep(path: Path, pairs: dict[str, Tensor] | None) -> None:
    """Raises UserError where they cannot be written."""
    assert pairs is not None
    with whole_file(path, "--logdir") as partial:
        save_file(pairs, partial)


def trajectories(
    config: RunConfig, teacher: ScoreNet, task: Task, positions: range, keep: Sequence[int], device: torch.device
) -> Tensor:
    """The teacher's states [B, S, F, C, H, W] at these of its steps and 0, on the CPU; draws by position."""
    source = Noise(keyed_seed(config.seed, "ode_pairs"), 0, positions, device)
    noise = teacher.path.start_noise(source.normal("noise", task.latent_shape))
    conditioning, negative = task.conditions(positions), task.negative(len(positions))
    grid = uniform_sigmas(config.ode.steps, config.ode.shift, teacher.path.start)
    if config.ode.causal_teacher:
        return _causal_trajectories(config, teacher, noise, conditioning, negative, source, grid, keep)
    states = enumerate(euler_trajectory(teacher, noise, conditioning, negative, grid, config.ode.guidance))
    points = {index: x.cpu() for index, x in states if index in keep}
    return torch.stack([points[index] for index in keep], dim=1)


def _causal_trajectories(
    config: RunConfig,
    teacher: ScoreNet,
    noise: Tensor,
    conditioning: Conditioning,
    negative: Prompt,
    source: Noise,
    grid: tuple[float, ...],
    keep: Sequence[int],
) -> Tensor:
    """`trajectories` of a causal teacher: given frames are clean at every level."""
    assert isinstance(teacher.net, Network)
    guidance, dtype = config.ode.guidance, cache_dtype(teacher)
    conditionings = [conditioning] if guidance == 1.0 else [conditioning, conditioning.with_prompt(negative)]
    branches = [
        Branch(conditioning, config.causal.new_cache(teacher.net, VideoShape.of(noise), dtype, noise.device))
        for conditioning in conditionings
    ]
    made = noise[:, conditioning.initial_frames :]
    new = causal_trajectory(teacher, made, branches, grid, guidance, config.causal, source)
    parts = [torch.stack([states[index].cpu() for index in keep], dim=1) for states in new]
    if conditioning.initial is not None:
        parts.insert(0, conditioning.initial.float().cpu()[:, None].expand(-1, len(keep), -1, -1, -1, -1))
    return torch.cat(parts, dim=2)
