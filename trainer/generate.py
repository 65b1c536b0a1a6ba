"""Generation from a run: what inference.py, evaluation and the report use.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import RunConfig
from model.schedule import step_sigmas
from model.score import ScoreNet
from model.types import Conditioning, Evaluations
from model.wan.config import Checkpointing, NetworkConfig
from pipeline.causal import CausalConfig
from trainer.build import build_for_inference, build_task, compute_dtype, pins
from trainer.sampling import euler, few_step_stream
from trainer.task import Task
from utils import checkpoint
from utils.config import UserError, from_plain
from utils.random import Noise


@dataclass(frozen=True)
class Sampling:
    """How to sample. steps: null takes the run's own. frames: latent frames in all, given ones included; null takes the
    run's. window, sinks: of a causal student, null takes the run's. guidance: of a many-step teacher."""

    steps: int | None = None
    frames: int | None = None
    window: int | None = None
    sinks: int | None = None
    guidance: float | None = None
    seed: int = 0


class Generator:
    """A trained network with its task, ready to sample."""

    def __init__(
        self,
        config: RunConfig,
        score: ScoreNet,
        device: torch.device,
        *,
        causal: bool | None = None,
        few_steps: bool | None = None,
        task: Task | None = None,
    ) -> None:
        self.config, self.score, self.device = config, score, device
        self.causal = config.is_causal if causal is None else causal
        # whether this network is sampled by its own step list, and not by a many-step solver
        self.few_steps = self.causal or config.trainer.value != "diffusion" if few_steps is None else few_steps
        self.task = build_task(config, device) if task is None else task

    @classmethod
    def load(cls, path: Path, device: torch.device, *, weights: str = "ema") -> Generator:
        """From a run folder or one checkpoint; its average unless `weights` is 'raw'. Raises UserError."""
        folder = None if str(path) in ("auto", "never") else checkpoint.resolve_resume(str(path), path)
        if folder is None:
            raise UserError(f"no run in {path}: give a run's folder, or a checkpoint's")
        config = from_plain(RunConfig, checkpoint.load_state(folder)["config"])
        network: NetworkConfig = replace(
            config.student,
            init=str(folder),
            init_weights=weights,
            expert=None,
            loras=[],
            checkpointing=Checkpointing.none,
        )
        net = build_for_inference(network, "student", device, compute_dtype(config))
        score = ScoreNet(net, "student", Evaluations(), compute_dtype(config), pins_initial=pins(net))
        return cls(config, score, device)

    def as_causal(self, causal: CausalConfig, steps: Sequence[float]) -> Generator:
        """The same weights run block by block with a step list: the undistilled baseline of a causal student."""
        schedule = replace(self.config.schedule, denoising_step_list=list(steps), warp_denoising_step=False)
        return Generator(replace(self.config, causal=causal, schedule=schedule), self.score, self.device, causal=True)

    def step_list(self, steps: int | None) -> tuple[float, ...]:
        """The student's noise levels, or an even choice among them. Raises UserError for more steps than it has."""
        schedule = self.config.schedule
        own = schedule.denoising_step_list
        if steps is None:
            return schedule.sigmas()
        if not 1 <= steps <= len(own):
            raise UserError(f"--steps {steps}: this student has {len(own)} steps: choose 1 to {len(own)}")
        chosen = [own[i * len(own) // steps] for i in range(steps)]
        return step_sigmas(chosen, warp=schedule.warp_denoising_step, shift=schedule.timestep_shift)

    def __call__(
        self, prompts: Sequence[str], sampling: Sampling, ids: Sequence[int], first_frame: Tensor | None = None
    ) -> Tensor:
        """Latents [B, F, C, H, W]: all that `stream` yields, joined."""
        return torch.cat(list(self.stream(prompts, sampling, ids, first_frame)), dim=1)

    @torch.no_grad()
    def stream(
        self, prompts: Sequence[str], sampling: Sampling, ids: Sequence[int], first_frame: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yields latents [B, f, C, H, W] as they are done: block by block from a causal student (given frames first),
        all at once from a bidirectional network.

        ids: key each video's draws beside the seed, so a video is the same in any batch. first_frame: pixels
        [1, C, h, w] in [0, 1] that all videos start with. Raises UserError for what this network cannot do.
        """
        self._refuse_unused(sampling, first_frame)
        conditioning = self._conditioning(prompts, first_frame)
        source = Noise(sampling.seed, 0, ids, self.device)
        given = conditioning.initial_frames
        frames, *rest = self.task.latent_shape
        if sampling.frames is not None:
            frames = sampling.frames
        elif given and not self.config.causal.independent_first_frame:
            frames += given
        if frames <= given:
            raise UserError(f"--frames {frames}: {given} of them are given, nothing is left to generate: ask for more")
        shape = (frames - given, *rest)
        if not self.few_steps:
            yield self._many_steps(source, shape, conditioning, sampling)
            return
        causal = self._causal(sampling, frames, given) if self.causal else None
        noise, sigmas = source.normal("noise", shape), self.step_list(sampling.steps)
        if conditioning.initial is not None:
            yield conditioning.initial.to(noise.dtype)
        yield from few_step_stream(self.score, noise, conditioning, sigmas, causal, source)

    def _refuse_unused(self, sampling: Sampling, first_frame: Tensor | None) -> None:
        """UserError for what this network would silently ignore."""
        given: dict[str, object]
        if not self.causal:
            kind = "a bidirectional network"
            given = {"image": first_frame, "window": sampling.window, "sinks": sampling.sinks}
            instead = "use a causal student"
        else:
            kind, given, instead = "a causal student", {"guidance": sampling.guidance}, "leave it out"
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--{name}: {kind} takes none: {instead}")
        if self.few_steps and sampling.guidance is not None:
            raise UserError("--guidance: a distilled student takes none: leave it out")
        if sampling.sinks is not None and sampling.window is None and self.config.causal.window_frames is None:
            raise UserError(f"--sinks {sampling.sinks}: without a window nothing is ever dropped: give --window too")

    def _conditioning(self, prompts: Sequence[str], first_frame: Tensor | None) -> Conditioning:
        try:
            initial = None
            if first_frame is not None:
                initial = self.task.encode(first_frame[None]).expand(len(prompts), -1, -1, -1, -1)
            return self.task.conditioning(prompts, initial)
        except ValueError as problem:
            raise UserError(str(problem)) from None

    def _many_steps(self, source: Noise, shape: tuple[int, ...], given: Conditioning, sampling: Sampling) -> Tensor:
        validation = self.config.validation
        guidance = validation.guidance if sampling.guidance is None else sampling.guidance
        steps = validation.steps if sampling.steps is None else sampling.steps
        if steps < 1:
            raise UserError(f"--steps {steps}: give at least 1")
        shift = self.config.schedule.timestep_shift
        return euler(self.score, source, shape, given, self.task.negative(given.batch), steps, shift, guidance)

    def _causal(self, sampling: Sampling, frames: int, given: int) -> CausalConfig:
        own = self.config.causal
        try:
            causal = replace(
                own,
                # one given frame is a block of its own, whatever the student was trained with
                independent_first_frame=own.independent_first_frame or given == 1,
                window_frames=own.window_frames if sampling.window is None else sampling.window,
                sink_frames=own.sink_frames if sampling.sinks is None else sampling.sinks,
            )
            causal.split(given, frames - given)
        except ValueError as problem:
            raise UserError(str(problem)) from None
        return causal


def slug(prompt: str, most: int = 48) -> str:
    """A file name made of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:most].rstrip("-") or "empty"
