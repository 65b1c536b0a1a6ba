"""Generation from a run: what inference.py, evaluation and the report use.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs.experts import starts_from_noise
from configs.load import run_from_state
from configs.schema import RunConfig
from configs.sizes import trained_frames
from generation.acceleration import UNCHANGED, Acceleration
from generation.levels import chosen_levels, schedule_of
from generation.refusals import beyond_training, refuse_inputs, refuse_unused, warn_once
from generation.run_data import change_data
from generation.sampling import Sampler, Sampling, StudentChoice
from generation.two_experts import joined, refuse_half
from model.attention.checkpointing import Checkpointing
from model.attention.kv_cache import KVCache
from model.experts import Experts
from model.family import FirstFrame
from model.network import InitWeights, NetworkConfig
from model.schedule import ScheduleConfig
from model.score import ScoreNet
from model.types import Conditioning, Evaluations
from pipeline.bidirectional_inference import Solver, SolverGrid, from_clip, many_step_sample
from pipeline.causal import CausalConfig, VideoShape
from pipeline.causal_inference import CausalStream, StreamConfig, block_noise
from pipeline.sampling import few_step_stream, student_with_cache
from tasks.build import build_task, task_to_sample
from tasks.task import Task
from trainer.run_networks import build_for_inference, compute_dtype
from trainer.weight_sources import lag_of
from utils import checkpoint
from utils.errors import UserError
from utils.fields import member_of
from utils.logging import warn
from utils.random import Noise


class Generator:
    """A trained network with its task, ready to sample.

    config: the config of the network's run.
    score: the network.
    device: where it is.
    task: the task that decodes and conditions, None builds the run's.
    sampler: which kind of sampling the network was made for.
    acceleration: changes the network in place.
    checkpoints: folders that the weights are from.

    Raises UserError for an acceleration that this machine cannot do.
    """

    def __init__(
        self,
        config: RunConfig,
        score: ScoreNet,
        device: torch.device,
        *,
        task: Task | None = None,
        sampler: Sampler = Sampler(),
        acceleration: Acceleration = UNCHANGED,
        checkpoints: tuple[str, ...] = (),
    ) -> None:
        self.config, self.score, self.device, self.checkpoints = config, score, device, checkpoints
        self.causal = config.is_causal if sampler.causal is None else sampler.causal
        self.few_steps = config.few_steps if sampler.few_steps is None else sampler.few_steps
        self.task = build_task(config, device) if task is None else task
        self.solver, self.guidance_2 = sampler.solver, sampler.guidance_2
        self.first_block, self.start_scale = sampler.first_block, sampler.start_scale
        self.acceleration = acceleration
        self._idle: list[tuple[object, tuple[ScoreNet, KVCache]]] = []  # of ended recorded videos, with their geometry
        acceleration.apply([score.net.high, score.net.low] if isinstance(score.net, Experts) else [score.net], device)

    @property
    def first_frame(self) -> FirstFrame:
        return self.config.student.geometry().first_frame

    @property
    def context_frames(self) -> int:
        """Latent frames of a video that this network goes on from: a block, or 1 for image-to-video networks."""
        if not self.causal or self.first_frame is FirstFrame.channels:
            return 1
        return self.config.causal.num_frame_per_block + self.config.causal.independent_first_frame

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device,
        *,
        student: StudentChoice = StudentChoice(),
        image_encoder: str | None = None,
        size: tuple[int, int] | None = None,
        tiny_decoder: str | None = None,
        acceleration: Acceleration = UNCHANGED,
    ) -> Generator:
        """The student of a run.

        path: the run's folder, or one checkpoint's.
        device: where to load it.
        student: which of the run's weights.
        image_encoder: a folder that takes the place of the run's data.image_encoder.
        size: height and width of videos in pixels, None for the run's.
        tiny_decoder: taehv's file, which decodes in place of the VAE.
        acceleration: changes the network in place.

        Raises UserError.
        """
        folder = None if str(path) in ("auto", "never") else checkpoint.resolve_resume(str(path), path)
        if folder is None:
            raise UserError(f"no run in {path}: give a run's folder, or a checkpoint's")
        state = checkpoint.load_state(folder)
        config = run_from_state(state["config"])
        if student.lora_scale != 1 and config.student.lora is None:
            raise UserError(
                f"--lora_scale {student.lora_scale}: this run trained no adapter: give --lora, or leave it out"
            )
        if lag := lag_of(folder, student.weights):
            warn(f"{folder}: {lag}: choose the raw weights (--weights raw)")
        if student.expert is None:  # not half of a pair
            refuse_half(config)
        change_data(config, image_encoder, size, tiny_decoder)
        network: NetworkConfig = replace(
            config.student,
            init=str(folder),
            init_weights=member_of(InitWeights, student.weights, "weights"),
            init_lora_scale=student.lora_scale,
            expert=student.expert,
            loras=list(student.loras),
            checkpointing=Checkpointing.none,
        )
        net = build_for_inference(network, "student", device, compute_dtype(config))
        if net.sparse is not None:
            net.sparse.begin(max(state["step"] - 1, 0))  # as in the last iteration
        score = ScoreNet(
            net, "student", Evaluations(), compute_dtype(config), pins_initial=network.pins_initial, path=network.path
        )
        task = task_to_sample(config, device)
        return cls(config, score, device, task=task, acceleration=acceleration, checkpoints=(str(folder.resolve()),))

    def with_low(self, low: Generator) -> Generator:
        """This high-noise expert and a low-noise one as one student. Raises UserError where they are no such pair."""
        config, boundary = joined(self.config, low.config)
        score = ScoreNet(
            Experts(self.score.net, low.score.net, boundary), "student", Evaluations(), self.score.compute_dtype,
            pins_initial=self.score.pins_initial, path=self.score.path,
        )  # fmt: skip
        both = self.checkpoints + low.checkpoints
        return Generator(config, score, self.device, task=self.task, checkpoints=both)

    def as_causal(self, student: RunConfig) -> Generator:
        """The same weights, sampled as a causal student is: its undistilled baseline, of the same blocks and levels."""
        config = replace(student, student=self.config.student)
        task = self.task if student.data == self.config.data else None
        return Generator(config, self.score, self.device, task=task, sampler=Sampler(causal=True))

    def schedule(self, frames: int | None = None) -> ScheduleConfig:
        """The noise schedule of videos of so many latent frames in all, None: the run's. Raises UserError."""
        length, *frame = self.task.latent_shape
        shape = (length if frames is None else frames, *frame)
        return schedule_of(self.config, self.score.net, shape, few_steps=self.few_steps)

    def step_list(self, steps: int | None, frames: int | None = None) -> tuple[float, ...]:
        """`chosen_levels` for videos of so many latent frames in all, None: the run's. Raises UserError."""
        return chosen_levels(self.schedule(frames), steps)

    def __call__(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        ids: Sequence[int],
        first_frames: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> Tensor:
        """Latents [B, F, C, H, W]: all that `stream` yields, joined. The arguments are those of `stream`."""
        return torch.cat(list(self.stream(prompts, sampling, ids, first_frames, clip)), dim=1)

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        ids: Sequence[int],
        first_frames: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yields latents [B, f, C, H, W] as they are done: block by block from a causal student (first frames that are
        given come first), all at once from a bidirectional network.

        prompts: one for each of B videos.
        sampling: how to sample.
        ids: key each video's draws beside the seed, so a video is the same in any batch.
        first_frames: pixels in [0, 1] that the videos start with, [B, T, C, h, w], or [T, C, h, w] for all.
        clip: pixels [T, C, h, w] in [0, 1] that all videos start from, noised as `sampling.strength` says.

        Raises UserError for what this network cannot do.
        """
        self._refuse(sampling, first_frames, clip)
        conditioning = self._conditioning(prompts, sampling, first_frames, clip)
        source = Noise(sampling.seed, 0, ids, self.device)
        frames = self._frames(sampling, conditioning)
        kept = conditioning.initial_frames if self.causal else 0  # other networks make first frames again, or pin them
        causal = self._causal(sampling, frames, kept) if self.causal else None
        warn_once(beyond_training(frames - kept, causal, self.trained_frames))
        blocks = [] if causal is None else causal.split(kept, frames - kept)[1]
        noise = self._noise(source, frames - kept, blocks) if causal is None or clip is not None else None
        start = None if clip is None or noise is None else self._start(clip, noise)
        if not self.few_steps:
            assert noise is not None
            noise = noise if start is not None else self.score.path.start_noise(noise)
            yield self._many_steps(noise, conditioning, sampling, start, self.schedule(frames).timestep_shift)
            return
        sigmas = self.step_list(sampling.steps, frames)
        if start is None and not starts_from_noise(self.config, (frames, *self.task.latent_shape[1:])):
            raise UserError(
                f"--run: its first step is at noise level {sigmas[0]:.3g}, so it cannot start from noise: give it as "
                "--low_run beside its high-noise expert's --run, or --video with --strength"
            )
        if noise is not None and start is not None and sampling.strength is not None:
            noise, sigmas = from_clip(start, noise, sigmas, sampling.strength)
        if causal is None:
            assert noise is not None
            noise = noise if start is not None else self.start_scale * self.score.path.start_noise(noise)
            yield from few_step_stream(self.score, noise, conditioning, sigmas, None, source)
            return
        if conditioning.initial is not None:
            yield conditioning.initial.to(torch.float32)
        video = self._open(conditioning, sampling, sigmas, causal, source, frames)
        # drawn block by block where nothing else needs it all: a long video's is large
        parts = [None] * len(blocks) if noise is None else noise.split(list(blocks), 1)
        for part in parts:
            yield video.make(video.noise(self.task.latent_shape[1:]) if part is None else part)
        self.keep(video, frames)

    @torch.no_grad()
    def endless(
        self, prompts: Sequence[str], sampling: Sampling, ids: Sequence[int], first_frames: Tensor | None = None
    ) -> CausalStream:
        """A causal student's videos without end, a block at a time. They are those of `stream`, and `keep` takes them
        once they are no longer wanted.

        A student that has no window gets one of as many frames as it was trained on. Raises UserError for what this
        network cannot do.
        """
        if not self.causal or self.first_frame is FirstFrame.channels:
            raise UserError("a video without end needs a causal student that takes given frames as latents (not i2v)")
        if sampling.frames is not None:
            raise UserError(f"--frames {sampling.frames}: this video has no end: leave it out")
        if sampling.window is None and self.config.causal.window_frames is None:
            sampling = replace(sampling, window=self.trained_frames)
        self._refuse(sampling, first_frames, None)
        conditioning = self._conditioning(prompts, sampling, first_frames, None)
        initial, trained = conditioning.initial_frames, self.config.causal
        block = 1 if trained.independent_first_frame and not initial else trained.num_frame_per_block
        causal = self._causal(sampling, initial + block, initial)
        warn_once(beyond_training(None, causal, self.trained_frames))
        source = Noise(sampling.seed, 0, ids, self.device)
        sigmas = self.step_list(sampling.steps, self.trained_frames)
        return self._open(conditioning, sampling, sigmas, causal, source, None)

    def keep(self, video: CausalStream, frames: int | None = None) -> None:
        """Keeps the cache of a video that has ended, and what is recorded of its passes: the next video of its geometry
        begins at once. frames: those that it was opened for. Nothing may use the video afterwards."""
        if self.acceleration.records(self.device):
            self._idle.append((_geometry(video.conditioning, frames, video.causal), (video.student, video.cache)))

    def _take(self, geometry: object) -> tuple[ScoreNet, KVCache] | None:
        """What was kept of a video of this geometry. What was kept of others is dropped: memory may not hold both."""
        self._idle = [kept for kept in self._idle if kept[0] == geometry]
        return self._idle.pop()[1] if self._idle else None

    @property
    def trained_frames(self) -> int:
        """Latent frames of the longest video that this network was trained on."""
        return trained_frames(self.config)

    def _open(
        self,
        conditioning: Conditioning,
        sampling: Sampling,
        sigmas: Sequence[float],
        causal: CausalConfig,
        source: Noise,
        frames: int | None,
    ) -> CausalStream:
        """Videos of so many latent frames in all, None: without end."""
        shown = self.trained_frames if frames is None else frames
        schedules: list[Sequence[float]] = [self.step_list(steps, shown) for steps in sampling.block_steps]
        if self.first_block and not schedules and sampling.steps is None and sampling.strength is None:
            schedules = [self.first_block, sigmas]
        config = StreamConfig(schedules or [sigmas], sampling.noisy_context)
        kept = self._take(_geometry(conditioning, frames, causal))
        if kept is None:
            videos = VideoShape(conditioning.batch, frames, *self.task.latent_shape[2:])
            student, cache = student_with_cache(
                self.score, causal, videos, conditioning.device, self.trained_frames,
                recorded=self.acceleration.records(self.device),
            )  # fmt: skip
        else:
            student, cache = kept
            cache.reset()
        return CausalStream(student, conditioning, config, causal, source, cache)

    def _noise(self, source: Noise, frames: int, blocks: Sequence[int]) -> Tensor:
        frame = self.task.latent_shape[1:]
        return block_noise(source, blocks, frame) if self.causal else source.normal("noise", (frames, *frame))

    def _frames(self, sampling: Sampling, conditioning: Conditioning) -> int:
        """Latent frames in all, first frames that are given included."""
        initial = conditioning.initial_frames
        frames = self.task.latent_shape[0] if sampling.frames is None else sampling.frames
        if sampling.frames is None and self.causal and not self.config.causal.independent_first_frame:
            frames += initial
        if frames <= initial:
            raise UserError(
                f"--frames {frames}: {initial} of them are given, nothing is left to generate: ask for more"
            )
        return frames

    def _refuse(self, sampling: Sampling, first_frames: Tensor | None, clip: Tensor | None) -> None:
        """Raises UserError for what this network cannot do."""
        has_experts = isinstance(self.score.net, Experts)
        refuse_unused(sampling, self.config, causal=self.causal, few_steps=self.few_steps, has_experts=has_experts)
        refuse_inputs(sampling, first_frames, clip, causal=self.causal, takes=self.first_frame)

    def _conditioning(
        self, prompts: Sequence[str], sampling: Sampling, first_frames: Tensor | None, clip: Tensor | None
    ) -> Conditioning:
        if first_frames is None and clip is not None and self.first_frame is FirstFrame.channels:
            first_frames = clip[:1]
        try:
            if first_frames is None:
                return self.task.conditioning(prompts)
            each = first_frames if first_frames.ndim == 5 else first_frames[None]
            return self.task.image_conditioning(prompts, each, sampling.frames)
        except ValueError as problem:
            raise UserError(str(problem)) from None

    def _start(self, clip: Tensor, noise: Tensor) -> Tensor:
        """Latents of a clip [T, C, h, w] for each video, as the noise [B, F, C, H, W] is."""
        try:
            latents = self.task.encode(clip[None])
        except ValueError as problem:
            raise UserError(str(problem)) from None
        if latents.shape[1] != noise.shape[1]:
            raise UserError(f"--video: {latents.shape[1]} latent frames for videos of {noise.shape[1]}: give as many")
        return latents.expand(noise.shape)

    def _many_steps(
        self, noise: Tensor, conditioning: Conditioning, sampling: Sampling, start: Tensor | None, shift: float
    ) -> Tensor:
        validation, net = self.config.validation, self.score.net
        guidance = validation.guidance if sampling.guidance is None else sampling.guidance
        default = self.guidance_2 if sampling.guidance is None else None
        low = next((w for w in (sampling.guidance_2, default) if w is not None), guidance)
        steps = validation.steps if sampling.steps is None else sampling.steps
        if steps < 1:
            raise UserError(f"--steps {steps}: give at least 1")
        solver = self.solver if sampling.solver is None else Solver(sampling.solver)
        if solver is Solver.unipc and self.score.path.start != 1:
            raise UserError("--solver unipc begins at pure noise, which this family's networks do not know: use euler")
        return many_step_sample(
            self.score,
            noise,
            conditioning,
            self.task.negative(conditioning.batch),
            grid=SolverGrid(steps, shift, solver, self.score.path.start),
            guidance=partial(net.each_step, high=guidance, low=low) if isinstance(net, Experts) else guidance,
            clip=start,
            strength=1.0 if sampling.strength is None else sampling.strength,
        )

    def _causal(self, sampling: Sampling, frames: int, initial: int) -> CausalConfig:
        trained = self.config.causal
        try:
            causal = replace(
                trained,
                # one initial frame is a block of its own, whatever the student was trained with
                independent_first_frame=trained.independent_first_frame or initial == 1,
                window_frames=trained.window_frames if sampling.window is None else sampling.window,
                sink_frames=trained.sink_frames if sampling.sinks is None else sampling.sinks,
            )
            causal.split(initial, frames - initial)
        except ValueError as problem:
            raise UserError(str(problem)) from None
        return causal


def _geometry(conditioning: Conditioning, frames: int | None, causal: CausalConfig) -> object:
    """What is equal for videos whose passes have the same shapes."""
    return conditioning.batch, frames, causal
