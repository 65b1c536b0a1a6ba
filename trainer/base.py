"""The training loop: micro-batches, accumulation, one update of a network, logging, checkpoints, resume, preemption."""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from configs.earlier import going_on
from configs.schema import RunConfig
from model.score import ScoreNet
from model.types import Conditioning, Evaluations, Prompt
from pipeline.sampling import sample
from tasks.build import build_task
from trainer.agreed import require_same_data
from trainer.drawn_sizes import DrawnSizes
from trainer.ended import Ended
from trainer.faults import SharedFaults
from trainer.micro_batch import MicroBatch, micro_batches
from trainer.networks import Trained, TrainedNetwork
from trainer.notices import Notices
from trainer.options import RunOptions
from trainer.progress import Extent, Setting, closing, finished_before, opening, stopped
from trainer.provenance import KEY as MADE_WITH
from trainer.provenance import changed_since, config_changes, versions
from trainer.reduction import over_ranks
from trainer.room import Room, bytes_of, room_for
from trainer.run_folder import RUN_FILES, keep_config, set_aside
from trainer.run_networks import RunNetworks
from trainer.state import load_run, save_run
from trainer.update import Skips, Update
from trainer.validation import average_warning, read_prompts, sample_pixels, shown_weights, way_of
from trainer.zero import absorb, portable
from utils import activity, checkpoint, distributed, launcher
from utils.config import to_plain
from utils.data.stream import Stream
from utils.errors import UserError
from utils.finite import first_ruined
from utils.launcher import LauncherGone
from utils.logging import Progress, RunLogger, console, peak_memory_gib, warn
from utils.metrics import luma, saturation
from utils.parallel.mesh import build_mesh
from utils.random import Noise, keyed_seed
from utils.signals import handled
from utils.video import grid, write_video
from utils.views import View


class Extra(Protocol):
    """What is neither weights nor an optimizer and belongs to a run's state."""

    def state(self) -> dict[str, list[float]]: ...

    def load(self, state: dict[str, list[float]]) -> None: ...


class Trainer(ABC):
    """One run. Subclasses make the networks and say what an iteration does; this class does what all runs share."""

    def __init__(self, config: RunConfig, options: RunOptions) -> None:
        self.config, self.options, self.observer = config, options, options.observer
        self.notices = options.notices or Notices(config.name, options.logdir, None)
        self.device = distributed.device()
        self.mesh = options.mesh or build_mesh(config.parallel, distributed.world_size(), self.device)
        distributed.set_timeout(config.watchdog.group_timeout(), self.mesh.groups)
        self.evaluations = Evaluations()
        self.task = build_task(config, self.device)
        self.sizes = DrawnSizes(config, self.task.latent_shape)
        self.make = RunNetworks(config, self.evaluations, self.device, self.mesh)
        self.micro_batches_per_rank = micro_batches(config.training, self.mesh.dp_size)
        self.changed = False  # the config is not that of the checkpoint
        self.step = 0
        self.cursor = 0
        self.skips = Skips(config.training.non_finite_limit)
        self.ended: Ended | None = None  # why the run ends after this iteration
        self.ruined: str | None = None  # which weights were not finite when they were last saved
        self.stop_signal: int | None = None
        self.orphaned = False  # a launcher is gone: the ranks save and end
        self.latest: dict[str, float] = {}
        self.room: Room | None = None
        self.videos = View("validation videos", "videos", warn)
        self.validation_prompts = read_prompts(config.validation, self.task)
        shown = {} if config.validation.prompts is None else {"validation.prompts": self.validation_prompts}
        require_same_data(lambda: {**self.task.contents(), **shown})
        self.networks: dict[str, TrainedNetwork] = {}
        self.heads: dict[str, Trained] = {}
        self.extras: dict[str, Extra] = {}
        self.build()
        self.faults = SharedFaults(self.streams())
        self.checkpoints = options.logdir / "checkpoints"
        cadence = config.checkpoint
        self.saver = checkpoint.Saver(
            self.checkpoints, cadence.keep_last, cadence.keep_every,
            background=cadence.background, timeout=config.watchdog.group_timeout(),
            allowed=options.lock.check if options.lock is not None else lambda: None,
        )  # fmt: skip
        if options.save:
            _ = self.saver.group  # now: later there may be no store to make it by
        if options.resume == "never":
            set_aside(options.logdir, [options.logdir / name for name in RUN_FILES])
        self._resume()
        self.logger = RunLogger(
            options.logdir, to_plain(config), tensorboard=config.logging.tensorboard,
            wandb=config.logging.wandb and options.wandb, is_main=options.log and distributed.is_main(),
        )  # fmt: skip
        self.logger.truncate_after(self.step)  # also what a run logged that died before its first save

    # ------------------------------------------------------------------------------------------- what subclasses say

    teacher: ScoreNet | None = None

    @abstractmethod
    def build(self) -> None:
        """Fills `self.networks` and whatever else the trainer needs: `self.heads`, what is trained beside them;
        `self.extras`, what else a checkpoint must hold."""

    @abstractmethod
    def training_step(self) -> dict[str, float]:
        """One iteration: rollout -> loss -> backward -> update. Returns what to log."""

    def sample(self, conditioning: Conditioning, negative: Prompt, noise: Noise) -> Tensor:
        """Latents [B, F, C, H, W] from the student as it is."""
        shape = self.task.latent_shape
        way = way_of(self.config, shape)
        return sample(way, self.networks["student"].score, shape, conditioning, negative, noise)

    # ------------------------------------------------------------------------------------------------------ the loop

    def train(self) -> int:
        """Trains to the end and returns the exit code: 0, or 128 + n after signal n, whose state was saved first."""
        total = min(self.config.training.max_steps, self.options.max_steps or self.config.training.max_steps)
        extent = Extent(self.config, self.options.logdir, total, self.step, self.options.save)
        speaks = self.options.log and distributed.is_main()
        if self.step < total:
            self._say(opening(extent, Setting(self.trained, self.teacher, self.mesh, self.device, self.counts())))
            keep_config(self.config, self.options.logdir)
            self.room = room_for(self.trained, extent) if self.options.save else None
        else:
            self._say([finished_before(extent, changed=self.changed)])
        progress = Progress(total, self.step, desc=self.config.name, every=None, first=3, is_main=speaks)
        unlogged: dict[str, float] = {}
        activity.begin(self.step, slow=True)  # the first iteration compiles and allocates
        with handled(self._on_signal), launcher.agreeing():
            while self.step < total and not self._stopping():
                started = time.perf_counter()
                sparsity = self._ramp_sparsity()
                metrics = self.training_step() | sparsity
                self.step += 1
                activity.begin(self.step)
                unlogged |= metrics | self._vitals(time.perf_counter() - started)
                self.latest |= unlogged
                self.notices.reached(self.step, self.latest)
                if self.step % self.config.training.log_every == 0 or self.step == total:
                    self.logger.scalars(self.step, unlogged)
                    unlogged = {}
                progress.update(self.step, {k: self.latest[k] for k in self.headline if k in self.latest})
                self._refuse_ended()
                with progress.pausing():
                    self._between(total)
                self._refuse_ended()
            if self.orphaned and self.step < total:
                raise self._last_words(total)
            if self.stop_signal is not None and self.step < total:
                self.save_checkpoint()
            self._refuse_ended()
            self.finish_saving()
        progress.close()
        self.logger.close()
        self.videos.close()
        distributed.barrier()
        self._say(self._ending(extent))
        if extent.begins < total:
            self._notify_end(extent)
        # a signal that came after the last step stopped nothing, and maybe only some ranks had it
        return 0 if self.stop_signal is None or self.step >= total else 128 + self.stop_signal

    def _between(self, total: int) -> None:
        """What is due between two iterations."""
        if self.step % self.config.checkpoint.every == 0 or self.step == total:
            self.save_checkpoint()
        every = self.config.validation.every
        if every and self.ended is None and (self.step % every == 0 or self.step == total):
            self.validate()

    def _last_words(self, total: int) -> LauncherGone:
        """Saves, if all ranks can, and says how the run ended."""
        what = launcher.gone() or "the launcher of another rank"
        saved = f"step {self.step} of {total} is saved in {self.options.logdir}" if self.options.save else "--no_save"
        try:
            self.save_checkpoint()
            self.finish_saving()
        except UserError as problem:
            saved = " ".join(str(problem).split())
        return LauncherGone(f"{what} is gone: {saved}: start the same command again")

    def _refuse_ended(self) -> None:
        """Saves and raises UserError where the run must not go on."""
        ended = self.skips.ended or self.ended
        if ended is None:
            return
        self.save_checkpoint()
        self.finish_saving()
        sound = checkpoint.latest_sound(self.checkpoints) if self.ruined else None
        raise UserError(ended.line(saves=self.options.save, ruined=self.ruined, sound=sound))

    def _say(self, lines: Sequence[str]) -> None:
        for line in lines if self.options.log and distributed.is_main() else ():
            console.info("%s", line)

    def _notify_end(self, extent: Extent) -> None:
        stopped_by = self.stop_signal if self.step < extent.total else None
        self.notices.ended(stopped_by, checkpoint.latest(self.checkpoints) if self.options.save else None)

    def _ending(self, extent: Extent) -> list[str]:
        if self.stop_signal is not None and self.step < extent.total:
            return [stopped(extent, self.stop_signal, self.step, self.mesh.world)]
        writes = self.options.save or self.step == extent.begins
        newest = checkpoint.latest(self.checkpoints) if writes else None
        return closing(extent, newest, self.networks["student"].optimizer.updates, self.validation_prompts[0])

    @property
    def trained(self) -> dict[str, Trained]:
        """All that is trained, by name."""
        return {**self.networks, **self.heads}

    def counts(self) -> dict[str, int]:
        """How much data there is to train on, by name."""
        stored = sum(stream.order.size for stream in self.streams())
        counts = {"prompt": len(self.task.library), "stored sample": stored}
        return {name: count for name, count in counts.items() if count}

    def _ramp_sparsity(self) -> dict[str, float]:
        """Gives sparse networks this iteration's sparsity, and says it. Constant within a step, for backward computes
        passes again."""
        sparse = {name: trained.net.sparse for name, trained in self.networks.items()}
        ramps = {name: ramp for name, ramp in sparse.items() if ramp is not None}
        for ramp in ramps.values():
            ramp.begin(self.step)
        return {f"{name}/sparsity": ramp.level for name, ramp in ramps.items()}

    headline: tuple[str, ...] = (
        "student/loss",
        "student/grad_norm",
        "samples_per_second",
        "peak_memory_gib",
        "network_evaluations",
    )

    def _vitals(self, seconds: float) -> dict[str, float]:
        sums = distributed.all_reduce_scalars(
            {"frames": float(self.evaluations.total_frames), "corrupt": self.faults.count}
        )
        return {
            "step_seconds": seconds,
            "samples_per_second": self.config.training.global_batch_size / seconds,
            "peak_memory_gib": distributed.all_reduce_scalars({"gib": peak_memory_gib()}, "max")["gib"],
            # videos through a network so far, in training, over all ranks: latent frames evaluated / frames of a video
            # of the data's own size. Frames count alike, whatever their height and width
            "network_evaluations": sums["frames"] / self.mesh.sequence / self.task.latent_shape[0],
            "skipped_updates": float(self.skips.total),
            **self.sizes.metrics(),
            **self.faults.agree(sums["corrupt"]),
        }

    def streams(self) -> Sequence[Stream]:
        """What the run reads samples from."""
        return self.task.streams

    def summed(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the batches that run at a time: the ranks of a sequence group share one, and count once."""
        return over_ranks(values, dict.fromkeys(values, "sum"), self.mesh.sequence)

    # ----------------------------------------------------------------------------------------------------- an update

    def batch(self, phase: str) -> list[MicroBatch]:
        """This data-parallel rank's part of the next global batch, drawn by (seed, phase, step, sample number)."""
        training = self.config.training
        size, parts = training.micro_batch_size, self.micro_batches_per_rank
        first = self.cursor + self.mesh.dp_rank * size * parts
        self.cursor += training.global_batch_size
        shape = self.sizes.shape(phase, self.step)
        out = []
        for part in range(parts):
            positions = range(first + part * size, first + (part + 1) * size)
            noise = Noise(keyed_seed(self.config.seed, phase), self.step, positions, self.device)
            out.append(MicroBatch(positions, noise, size / training.global_batch_size, shape))
        return self.observer.chosen(out)

    def begin_update(self, trained: Trained, beside: Sequence[Trained] = ()) -> Update:
        """An update of `trained`, and of what its loss trains beside it; see `Update`."""
        return Update(trained, beside, self.observer, self.skips, self.mesh.sequence, self.step)

    # ---------------------------------------------------------------------------------------------------- validation

    @activity.doing("validation", slow=True)
    @torch.no_grad()
    def validate(self) -> None:
        """Videos of the fixed prompt library from a fixed seed, with the average, the raw weights, or both."""
        if not self.options.visualize:
            return
        student = self.networks["student"]
        ema, warning = student.ema, average_warning(self.config, student.optimizer.updates)
        statistics: dict[str, float] = {}
        videos: list[Path] = []
        for which in shown_weights(self.config.validation.weights, ema is not None):
            if which == "ema":
                warn(warning)
            with ema.applied() if which == "ema" and ema is not None else nullcontext():
                self._validation_video(which, statistics, videos)
        self.notices.validated(statistics, videos)

    def _validation_video(self, which: str, statistics: dict[str, float], videos: list[Path]) -> None:
        """Adds what it measured and where the video lies."""
        before = self.evaluations.state()
        pixels = sample_pixels(self.sample, self.task, self.validation_prompts, self.config, self.device)
        self.evaluations.load(before)  # the count is training's
        if pixels is None:
            return
        path = self.options.logdir / "validation" / f"step_{self.step:06d}_{which}.mp4"
        with self.videos.showing():
            write_video(path, grid(pixels), self.config.fps, scale=max(1, 96 // pixels.shape[-1]))
            self.logger.video(self.step, f"validation/{which}", path)
            self._say([f"validation after step {self.step}, {which} weights: {path}"])
            videos.append(path)
        means = {"luma": luma(pixels).mean(), "saturation": saturation(pixels).mean()}
        values = {f"validation/{which}_{name}": float(value) for name, value in means.items()}
        self.logger.scalars(self.step, values)
        statistics |= values

    # --------------------------------------------------------------------------------------------- state and signals

    @activity.doing("checkpoint", slow=True)
    def save_checkpoint(self) -> None:
        """Begins a save; `finish_saving` ends it. A step that was saved, or is being saved, is not saved again.

        The weights of a run that has gone wrong take no good checkpoint's place; if they are not finite, the run ends.
        """
        if not self.options.save or self.saver.step == self.step:
            return
        evaluations = self.summed_evaluations()
        tensors, state = save_run(portable(self.trained))
        weights = [name for trained in self.trained for name in (trained, f"{trained}_ema") if name in tensors]
        self.ruined = first_ruined({name: tensors[name] for name in weights})
        if self.ruined is not None:
            why = f"the weights are not finite after step {self.step} ({self.ruined})"
            self.ended = self.ended or Ended(why, "lower the learning rate or look at the data")
        state |= {
            "step": self.step,
            "cursor": self.cursor,
            "skipped": self.skips.total,
            "skipped_in_a_row": self.skips.in_a_row,
            checkpoint.NON_FINITE: self.ruined,
            "evaluations": evaluations,
            "config": to_plain(self.config),
            MADE_WITH: versions(self.device),
            "extras": {name: extra.state() for name, extra in self.extras.items()},
        }
        self.saver.settle()  # half a save would be counted
        if self.room is not None:
            warn(self.room.before_save(self.step, bytes_of(tensors)))
        prunes = not self.skips.is_in_streak and self.ended is None
        self.saver.save(self.step, tensors, state, prunes=prunes)

    @activity.doing("checkpoint", slow=True)
    def finish_saving(self) -> None:
        """Waits for the save that was begun. Raises UserError, on every rank alike, when it could not be written."""
        self.saver.wait()

    def summed_evaluations(self) -> dict[str, dict[str, int]]:
        """The counts of all networks; a rank that never ran one of them still takes part."""
        counted, names = self.evaluations.state(), [*self.networks, "teacher"]
        flat = {f"{kind}.{name}": float(counts.get(name, 0)) for kind, counts in counted.items() for name in names}
        out: dict[str, dict[str, int]] = {kind: {} for kind in counted}
        for key, value in self.summed(flat).items():
            kind, name = key.split(".", 1)
            out[kind][name] = round(value)
        return out

    def _resume(self) -> None:
        if self.options.resume == "never":
            return
        found = checkpoint.find_resume(self.options.resume, self.checkpoints, self.saver.group)
        if found is None:
            return
        path, state, layout = found
        networks = portable(self.trained, values=False)
        load_run(networks, path, state, layout, self.saver.group)
        absorb(self.trained, networks)
        for name, kept in state.get("extras", {}).items():
            self.extras[name].load(kept)
        if path.parent.resolve() == self.checkpoints.resolve():
            # the run's other future: the newest checkpoint must be the one to go on from
            saved = checkpoint.list_checkpoints(self.checkpoints)
            set_aside(self.options.logdir, [other for other in saved if checkpoint.step_of(other) > state["step"]])
        self.step, self.cursor = state["step"], state["cursor"]
        self.skips.total, self.skips.in_a_row = state["skipped"], dict(state["skipped_in_a_row"])
        # the count is over all batches, and one rank carries it on; what a new start has cost is not in it
        self.evaluations.load(state["evaluations"] if self.mesh.dp_rank == 0 else Evaluations().state())
        self.notices.reached(self.step, {})
        self._say([f"resumed from {path} at step {self.step}"])
        self.config = going_on(self.config, state["config"])
        changes = config_changes(state, self.config)
        self.changed = bool(changes)
        changed = changed_since(state, changes, versions(self.device))
        warn(changed or None)

    def _stopping(self) -> bool:
        # Agreed by all: a rank that stopped alone would leave the others waiting in a collective.
        mine = self.stop_signal  # a signal that arrives from here on is seen by the next call
        lost = self.options.lock.lost if self.options.lock is not None else None
        now = {"signal": float(mine or 0), "unsaved": float(self.saver.failed), "lost": float(lost is not None)}
        now["orphaned"] = float(launcher.gone() is not None)
        now = distributed.all_reduce_scalars(now, "max")
        if now["lost"]:
            raise UserError(lost or f"{self.options.logdir} was taken by another run")
        if now["unsaved"]:
            self.saver.wait()  # raises what went wrong, on every rank that knows
            raise UserError("a checkpoint could not be written on another rank: its log says why")
        self.orphaned = bool(now["orphaned"])
        agreed = int(now["signal"])
        if agreed and mine is None:
            self.stop_signal = agreed
        return agreed != 0 or self.orphaned

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.stop_signal = number
        first = "saving after this step, then stopping" if self.options.save else "stopping after this step (--no_save)"
        warn(f"{signal.Signals(number).name}: {first}")
