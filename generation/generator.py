"""Generation from a run: what inference.py, evaluation and the report use.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs.load import run_from_plain
from configs.schema import RunConfig
from generation.acceleration import UNCHANGED, Acceleration
from generation.resize import resize
from generation.two_experts import joined, starts_from_noise
from model.experts import Experts
from model.schedule import step_sigmas
from model.score import ScoreNet
from model.types import Conditioning, Evaluations
from model.wan.config import Checkpointing, LoraWeights, NetworkConfig
from model.wan.kv_cache import KVCache
from pipeline.bidirectional_inference import Solver, SolverGrid, from_clip, many_step_sample
from pipeline.causal import CausalConfig
from pipeline.causal_inference import CausalStream, StreamConfig, block_noise
from pipeline.sampling import few_step_stream, open_stream
from tasks.build import build_task, task_to_sample
from tasks.task import Task
from trainer.run_networks import build_for_inference, compute_dtype, pins
from utils import checkpoint
from utils.errors import UserError
from utils.random import Noise


@dataclass(frozen=True)
class Sampling:
    """How to sample. steps: null takes the run's own. frames: latent frames in all, given ones included; null takes the
    run's. window, sinks: of a causal student, null takes the run's; block_steps: steps of its first block, its second,
    and so on, the last for all after; noisy_context: see `StreamConfig`. guidance, solver ('euler' or 'unipc'): of a
    many-step network; guidance_2: of the low-noise expert of two, null takes guidance. strength: share of the steps
    that are made where videos start from a clip."""

    steps: int | None = None
    frames: int | None = None
    window: int | None = None
    sinks: int | None = None
    guidance: float | None = None
    seed: int = 0
    guidance_2: float | None = None
    solver: str | None = None
    strength: float | None = None
    block_steps: tuple[int, ...] = ()
    noisy_context: bool = False


class Generator:
    """A trained network with its task, ready to sample. solver, guidance_2: of a many-step network, where the sampling
    names none. acceleration: changes the network in place. checkpoints: folders that it is of. Raises UserError
    for an acceleration that this machine cannot do."""

    def __init__(  # noqa: PLR0913 - what a run is sampled with, by name
        self,
        config: RunConfig,
        score: ScoreNet,
        device: torch.device,
        *,
        causal: bool | None = None,
        few_steps: bool | None = None,
        task: Task | None = None,
        solver: Solver = Solver.euler,
        guidance_2: float | None = None,
        acceleration: Acceleration = UNCHANGED,
        checkpoints: tuple[str, ...] = (),
    ) -> None:
        self.config, self.score, self.device, self.checkpoints = config, score, device, checkpoints
        self.causal = config.is_causal if causal is None else causal
        # whether this network is sampled by its own step list, and not by a many-step solver
        self.few_steps = self.causal or config.trainer.value != "diffusion" if few_steps is None else few_steps
        self.task = build_task(config, device) if task is None else task
        self.solver, self.guidance_2 = solver, guidance_2
        self.acceleration = acceleration
        self._idle: list[tuple[object, tuple[ScoreNet, KVCache]]] = []  # of ended recorded videos, with their geometry
        acceleration.apply([score.net.high, score.net.low] if isinstance(score.net, Experts) else [score.net], device)

    @property
    def model_type(self) -> str:
        return self.config.student.geometry().model_type

    @property
    def context_frames(self) -> int:
        """Latent frames of a video that this network goes on from: a block, or the one of image-to-video networks."""
        if not self.causal or self.model_type == "i2v":
            return 1
        return self.config.causal.num_frame_per_block + self.config.causal.independent_first_frame

    @classmethod
    def load(  # noqa: PLR0913 - what a run is sampled with, by name
        cls,
        path: Path,
        device: torch.device,
        *,
        weights: str = "ema",
        image_encoder: str | None = None,
        size: tuple[int, int] | None = None,
        loras: Sequence[LoraWeights] = (),
        lora_scale: float = 1.0,
        expert: str | None = None,
        tiny_decoder: str | None = None,
        acceleration: Acceleration = UNCHANGED,
    ) -> Generator:
        """From a run folder or one checkpoint; its average unless `weights` is 'raw'. image_encoder: in place of its
        data.image_encoder. size: height and width of videos in pixels, null for the run's. loras: added to the weights;
        lora_scale: by how much the run's own adapter counts. expert: 'high' or 'low', of two that go together.
        tiny_decoder: taehv's file, which decodes in place of the VAE. Raises UserError."""
        folder = None if str(path) in ("auto", "never") else checkpoint.resolve_resume(str(path), path)
        if folder is None:
            raise UserError(f"no run in {path}: give a run's folder, or a checkpoint's")
        state = checkpoint.load_state(folder)
        config = run_from_plain(state["config"])
        if image_encoder is not None:
            if config.student.geometry().image_dim is None:
                raise UserError("--image_encoder: this network sees no CLIP tokens: leave it out")
            config.data.image_encoder = image_encoder
        if lora_scale != 1 and config.student.lora is None:
            raise UserError(f"--lora_scale {lora_scale}: this run trained no adapter: give --lora, or leave it out")
        if size is not None:
            resize(config.data, *size)
        if tiny_decoder is not None:
            if config.data.kind != "wan":
                raise UserError(f"--tiny_decoder is for Wan's latents: this run's data are of kind {config.data.kind}")
            config.data.vae.tiny_decoder, config.data.vae.tiled = tiny_decoder, False
        network: NetworkConfig = replace(
            config.student,
            init=str(folder),
            init_weights=weights,
            init_lora_scale=lora_scale,
            expert=expert,
            loras=list(loras),
            checkpointing=Checkpointing.none,
        )
        net = build_for_inference(network, "student", device, compute_dtype(config))
        if net.sparse is not None:
            net.sparse.begin(max(state["step"] - 1, 0))  # as in the last iteration
        score = ScoreNet(net, "student", Evaluations(), compute_dtype(config), pins_initial=pins(net))
        task = task_to_sample(config, device)
        return cls(config, score, device, task=task, acceleration=acceleration, checkpoints=(str(folder.resolve()),))

    def with_low(self, low: Generator) -> Generator:
        """This high-noise expert and a low-noise one as one student. Raises UserError for what is no such pair."""
        config, boundary = joined(self.config, low.config)
        score = ScoreNet(
            Experts(self.score.net, low.score.net, boundary), "student", Evaluations(), self.score.compute_dtype,
            pins_initial=self.score.pins_initial,
        )  # fmt: skip
        both = self.checkpoints + low.checkpoints
        return Generator(config, score, self.device, task=self.task, checkpoints=both)

    def as_causal(self, student: RunConfig) -> Generator:
        """The same weights run as a causal student's are, its undistilled baseline: same blocks, levels, videos."""
        config = replace(student, student=self.config.student)
        task = self.task if student.data == self.config.data else None
        return Generator(config, self.score, self.device, causal=True, task=task)

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
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        ids: Sequence[int],
        first_frames: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> Tensor:
        """Latents [B, F, C, H, W]: all that `stream` yields, joined."""
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
        """Yields latents [B, f, C, H, W] as they are done: block by block from a causal student (given frames first),
        all at once from a bidirectional network.

        ids: key each video's draws beside the seed, so a video is the same in any batch. Pixels in [0, 1]:
        first_frames [B, T, C, h, w], that the videos start with, or [T, C, h, w] for all; clip [T, C, h, w], that all
        start from, noised as `sampling.strength` says. Raises UserError for what this network cannot do.
        """
        self._refuse_unused(sampling)
        self._refuse_given(sampling, first_frames, clip)
        conditioning = self._conditioning(prompts, sampling, first_frames, clip)
        source = Noise(sampling.seed, 0, ids, self.device)
        frames = self._frames(sampling, conditioning)
        kept = conditioning.initial_frames if self.causal else 0  # others make given frames again, or pin them
        causal = self._causal(sampling, frames, kept) if self.causal else None
        blocks = [] if causal is None else causal.split(kept, frames - kept)[1]
        noise = self._noise(source, frames - kept, blocks) if causal is None or clip is not None else None
        start = None if clip is None or noise is None else self._start(clip, noise)
        if not self.few_steps:
            assert noise is not None
            yield self._many_steps(noise, conditioning, sampling, start)
            return
        sigmas = self.step_list(sampling.steps)
        if start is None and not starts_from_noise(self.config):
            raise UserError(
                f"--run: its first step is at noise level {sigmas[0]:.3g}, so it cannot start from noise: give it as "
                "--low_run beside its high-noise expert's --run, or --video with --strength"
            )
        if noise is not None and start is not None and sampling.strength is not None:
            noise, sigmas = from_clip(start, noise, sigmas, sampling.strength)
        if causal is None:
            assert noise is not None
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
        """A causal student's videos without end, a block at a time: what `stream` yields, for as long as one asks; then
        `keep` may have it.

        A student that has no window gets one of as many frames as it was trained on. Raises UserError for what this
        network cannot do.
        """
        if not self.causal or self.model_type == "i2v":
            raise UserError("a video without end needs a causal student that takes given frames as latents (not i2v)")
        if sampling.frames is not None:
            raise UserError(f"--frames {sampling.frames}: this video has no end: leave it out")
        if sampling.window is None and self.config.causal.window_frames is None:
            sampling = replace(sampling, window=self.trained_frames)
        self._refuse_unused(sampling)
        self._refuse_given(sampling, first_frames, None)
        conditioning = self._conditioning(prompts, sampling, first_frames, None)
        given, own = conditioning.initial_frames, self.config.causal
        block = 1 if own.independent_first_frame and not given else own.num_frame_per_block
        causal = self._causal(sampling, given + block, given)
        source = Noise(sampling.seed, 0, ids, self.device)
        return self._open(conditioning, sampling, self.step_list(sampling.steps), causal, source, None)

    def keep(self, video: CausalStream, frames: int | None = None) -> None:
        """Of a video that has ended, its memory and what is recorded of its passes: the next one of its geometry begins
        at once. frames: that it was opened for. Nothing may use it afterwards."""
        if self.acceleration.records(self.device):
            self._idle.append((_geometry(video.conditioning, frames, video.causal), (video.student, video.cache)))

    def _take(self, geometry: object) -> tuple[ScoreNet, KVCache] | None:
        """What was kept of a video of this geometry. Those of others go: there may be no room beside a new one."""
        self._idle = [kept for kept in self._idle if kept[0] == geometry]
        return self._idle.pop()[1] if self._idle else None

    @property
    def trained_frames(self) -> int:
        """Latent frames of the longest video that this network was trained on."""
        return self.config.rollout.num_training_frames or self.task.latent_shape[0]

    def _open(
        self, given: Conditioning, sampling: Sampling, sigmas: Sequence[float], causal: CausalConfig, source: Noise,
        frames: int | None,
    ) -> CausalStream:  # fmt: skip
        schedules: list[Sequence[float]] = [self.step_list(steps) for steps in sampling.block_steps]
        config = StreamConfig(schedules or [sigmas], sampling.noisy_context)
        height, width = self.task.latent_shape[2:]
        return open_stream(
            self.score, given, config, causal, source, (height, width), frames, self.trained_frames,
            recorded=self.acceleration.records(self.device), kept=self._take(_geometry(given, frames, causal)),
        )  # fmt: skip

    def _noise(self, source: Noise, frames: int, blocks: Sequence[int]) -> Tensor:
        frame = self.task.latent_shape[1:]
        return block_noise(source, blocks, frame) if self.causal else source.normal("noise", (frames, *frame))

    def _frames(self, sampling: Sampling, conditioning: Conditioning) -> int:
        """Latent frames in all, given ones included."""
        given = conditioning.initial_frames
        frames = self.task.latent_shape[0] if sampling.frames is None else sampling.frames
        if sampling.frames is None and self.causal and not self.config.causal.independent_first_frame:
            frames += given
        if frames <= given:
            raise UserError(f"--frames {frames}: {given} of them are given, nothing is left to generate: ask for more")
        return frames

    def _refuse_unused(self, sampling: Sampling) -> None:
        """UserError for options that this network would silently ignore."""
        given: dict[str, object]
        if not self.causal:
            kind, given = "a bidirectional network", {"window": sampling.window, "sinks": sampling.sinks}
            given |= {"block_steps": sampling.block_steps or None, "noisy_context": sampling.noisy_context or None}
            instead = "use a causal student"
        else:
            kind, given, instead = "a causal student", {"guidance": sampling.guidance}, "leave it out"
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--{name}: {kind} takes none: {instead}")
        if odd := [steps for steps in sampling.block_steps if steps > len(self.config.schedule.denoising_step_list)]:
            most = len(self.config.schedule.denoising_step_list)
            raise UserError(f"--block_steps: {odd[0]}: this student has {most} steps: choose 1 to {most}")
        if sampling.block_steps and (sampling.steps is not None or sampling.strength is not None):
            raise UserError("--block_steps names the steps of every block: leave out --steps and --strength")
        if self.few_steps:
            for name in ("guidance", "guidance_2", "solver"):
                if getattr(sampling, name) is not None:
                    raise UserError(f"--{name}: a distilled student takes none: leave it out")
        if sampling.guidance_2 is not None and not isinstance(self.score.net, Experts):
            raise UserError("--guidance_2 is for models of two experts: this is one network: leave it out")
        if sampling.sinks is not None and sampling.window is None and self.config.causal.window_frames is None:
            raise UserError(f"--sinks {sampling.sinks}: without a window nothing is ever dropped: give --window too")

    def _refuse_given(self, sampling: Sampling, first_frames: Tensor | None, clip: Tensor | None) -> None:
        """UserError for an image or a clip that this network cannot take, or lacks."""
        strength = sampling.strength
        if (clip is None) != (strength is None) or (strength is not None and not 0 < strength <= 1):
            raise UserError(f"--strength {strength}: give a clip and a share of the steps in (0, 1], or neither")
        if clip is not None and first_frames is not None:
            raise UserError("--strength makes a clip anew, from its own first frame: leave the image out")
        if first_frames is not None and not self.causal and self.model_type == "t2v":
            raise UserError(
                "--image, --extend: a bidirectional network takes none unless it was made for it (model_type ti2v or "
                "i2v): use such a network, or a causal student"
            )
        if first_frames is None and clip is None and self.model_type == "i2v":
            raise UserError("this network makes videos from an image (model_type i2v): give --image")

    def _conditioning(
        self, prompts: Sequence[str], sampling: Sampling, first_frames: Tensor | None, clip: Tensor | None
    ) -> Conditioning:
        if first_frames is None and clip is not None and self.model_type == "i2v":
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

    def _many_steps(self, noise: Tensor, given: Conditioning, sampling: Sampling, start: Tensor | None) -> Tensor:
        validation, net = self.config.validation, self.score.net
        guidance = validation.guidance if sampling.guidance is None else sampling.guidance
        own = self.guidance_2 if sampling.guidance is None else None
        low = next((w for w in (sampling.guidance_2, own) if w is not None), guidance)
        steps = validation.steps if sampling.steps is None else sampling.steps
        if steps < 1:
            raise UserError(f"--steps {steps}: give at least 1")
        solver = self.solver if sampling.solver is None else Solver(sampling.solver)
        return many_step_sample(
            self.score,
            noise,
            given,
            self.task.negative(given.batch),
            grid=SolverGrid(steps, self.config.schedule.timestep_shift, solver),
            guidance=partial(net.each_step, high=guidance, low=low) if isinstance(net, Experts) else guidance,
            clip=start,
            strength=1.0 if sampling.strength is None else sampling.strength,
        )

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


def _geometry(given: Conditioning, frames: int | None, causal: CausalConfig) -> object:
    """What videos have in common whose passes have the same shapes."""
    return given.batch, frames, causal


def slug(prompt: str, most: int = 48) -> str:
    """A file name made of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:most].rstrip("-") or "empty"
