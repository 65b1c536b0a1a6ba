"""The sections of a run's YAML that have no owner elsewhere, each checked by itself; configs/schema.py joins them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from configs.video_size import VideoSize, check_values
from utils.fields import check_modes, show
from utils.limits import BATCH, FPS, SHIFT, STEPS, THREADS, check_counts, check_within, limits
from utils.webhook import check_url, hidden

# Members are lower case because OmegaConf reads an enum by its name, and YAML is written in lower case.


class TrainerKind(Enum):
    score_distillation = "score_distillation"  # a student by distribution matching
    diffusion = "diffusion"  # a teacher, or a causal initialisation, by flow matching
    ode = "ode"  # a causal initialisation by regression on a teacher's trajectories
    consistency = "consistency"  # the same from a causal teacher's single steps, without trajectories


class DiffusionMode(Enum):
    bidirectional = "bidirectional"
    diffusion_forcing = "diffusion_forcing"  # an own noise level for each block
    teacher_forcing = "teacher_forcing"  # noisy blocks look back at clean ones


class DroppedCaption(Enum):
    empty = "empty"
    negative = "negative"


class UpdateSchedule(Enum):
    joint = "joint"  # critic every iteration, student each `generator_update_interval`-th beside it
    alternating = "alternating"  # student each `generator_update_interval`-th instead of the critic


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # fp32 master weights of what is trained, bf16 autocast; frozen networks stored in bf16


class SampleWeights(Enum):
    ema = "ema"
    raw = "raw"
    both = "both"


@dataclass
class ConsistencyConfig:
    """Causal consistency distillation.

    steps: of the teacher's Euler grid, shifted by schedule.timestep_shift.
    guidance: of the teacher.
    huber: the constant c of the pseudo-Huber distance, null for the squared one.
    caption_dropout: share of samples trained with the negative prompt, which the teacher then sees too.
    """

    steps: int = 48
    guidance: float = 4.0
    huber: float | None = None
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_within(self, steps=f"[2, {STEPS}]")
        if self.huber is not None and self.huber <= 0:
            raise ValueError(f"huber must be positive, or null for the squared distance, got {self.huber}")
        check_within(self, caption_dropout="[0, 1)")


@dataclass
class DiffusionConfig:
    """Flow-matching training.

    caption_dropout: share of samples trained without their caption.
    dropped_caption: what they are trained with in its place, the empty text or data.negative_prompt. null is the empty
        text, but for a run that an earlier version began: it goes on with the negative prompt.
    clean_block_share: diffusion forcing's share of blocks given clean and left out of the loss.
    clean_noise_max: teacher forcing noises its clean half to U(0, this) timesteps.
    """

    mode: DiffusionMode = DiffusionMode.bidirectional
    caption_dropout: float = 0.1
    dropped_caption: DroppedCaption | None = None
    clean_block_share: float = 0.0
    clean_noise_max: float = 0.0

    def __post_init__(self) -> None:
        check_modes(self)
        check_within(self, caption_dropout="[0, 1]", clean_block_share="[0, 1)")
        if not 0 <= self.clean_noise_max < 1000:
            raise ValueError(f"clean_noise_max is a timestep in [0, 1000), got {self.clean_noise_max}")


@dataclass
class ODEConfig:
    """ODE initialisation (CausVid): trajectories of the teacher, and regression on their clean end.

    path: stored trajectories (parquet, safetensors, or Self-Forcing's LMDB), read as they are needed; null makes them
        before training.
    sigmas: noise levels of an LMDB's trajectories, which does not hold them, the last one 0.
    pairs: how many trajectories are made where path is null.
    steps, shift, guidance: of the teacher's Euler sampler.
    causal_teacher: the teacher generates block by block itself (Causal Forcing). A block's trajectory is its own given
        the clean ends of those before it, and that is what the student, which looks back at the same ends, learns.
    """

    path: str | None = None
    sigmas: list[float] | None = None

    pairs: int = 256
    steps: int = 48
    shift: float = 8.0
    guidance: float = 6.0
    causal_teacher: bool = False

    def __post_init__(self) -> None:
        check_counts(self, {"pairs": limits().rows, "steps": STEPS}, "no real teacher makes more")
        check_within(self, shift=f"(0, {SHIFT}]")
        levels = self.sigmas
        if levels is not None and not (
            len(levels) > 1 and levels[0] <= 1 and levels[-1] == 0 and all(a > b for a, b in pairwise(levels))
        ):
            raise ValueError(f"sigmas must strictly decrease from at most 1 to 0, got {show(levels)}")


@dataclass
class TrainingConfig:
    """The loop.

    max_steps: iterations.
    global_batch_size: samples an update, over all ranks and accumulation steps.
    micro_batch_size: samples a rank runs at once.
    update_schedule: which iterations train the critic.
    generator_update_interval: every how many iterations the student is trained.
    critic_warmup_steps: first iterations, in which only the critic learns.
    precision: of the passes through the networks.
    non_finite_limit: consecutive skipped updates that abort the run.
    log_every: iterations between two lines of metrics.jsonl.
    threads: CPU threads of a rank, null for torch's choice.
    sizes: sizes of videos, of which each update draws one, null for the data's own; stored latents of several buckets
        are read by shape.
    scale_shift: whether, with sizes, the schedule's shifts grow with the root of a video's tokens, in training and in
        sampling.
    """

    max_steps: int = 600
    global_batch_size: int = 64
    micro_batch_size: int = 1
    update_schedule: UpdateSchedule = UpdateSchedule.joint
    generator_update_interval: int = 5
    critic_warmup_steps: int = 0
    precision: Precision = Precision.bf16
    non_finite_limit: int = 10
    log_every: int = 1
    threads: int | None = None
    sizes: list[VideoSize] | None = None
    scale_shift: bool = True

    def __post_init__(self) -> None:
        check_modes(self)
        if self.sizes is not None:
            check_values(self.sizes)
        check_counts(self, {"threads": THREADS}, "no machine has more")
        if self.update_schedule is UpdateSchedule.alternating and self.generator_update_interval == 1:
            raise ValueError("generator_update_interval 1 leaves an alternating critic no iteration: use 2 or more")
        least = {"critic_warmup_steps": 0}
        check_counts(self, dict.fromkeys(("global_batch_size", "micro_batch_size"), BATCH), "no real batch is larger")
        for name in (
            "max_steps",
            "global_batch_size",
            "micro_batch_size",
            "generator_update_interval",
            "critic_warmup_steps",
            "non_finite_limit",
            "log_every",
        ):
            if getattr(self, name) < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, got {getattr(self, name)}")

    def generator_updates(self, steps: int) -> int:
        """How many of the first `steps` iterations train the student."""
        return max(0, -(-(steps - self.critic_warmup_steps) // self.generator_update_interval))

    def critic_updates(self, steps: int) -> int:
        return steps if self.update_schedule is UpdateSchedule.joint else steps - self.generator_updates(steps)

    def trains_generator(self, step: int) -> bool:
        after = step - self.critic_warmup_steps
        return after >= 0 and after % self.generator_update_interval == 0

    def trains_critic(self, step: int) -> bool:
        return self.update_schedule is UpdateSchedule.joint or not self.trains_generator(step)


@dataclass
class CheckpointConfig:
    """When the run is saved.

    every: iterations between saves.
    keep_last: how many checkpoints to keep.
    keep_every: checkpoints of multiples of this are kept for good, null for none.
    background: train on while a thread writes; the host then holds a copy of what its ranks write.
    """

    every: int = 100
    keep_last: int = 2
    keep_every: int | None = None
    background: bool = True

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1 or (self.keep_every is not None and self.keep_every < 1):
            raise ValueError(
                f"every, keep_last and keep_every must be at least 1, got {self.every}, {self.keep_last}, "
                f"{self.keep_every}"
            )


@dataclass
class ValidationConfig:
    """Videos sampled on a fixed prompt library and seed.

    every: iterations between them, null for none.
    prompts: a file of prompts; null takes the data's own.
    count: how many videos, sampled in micro-batches.
    seed: of their noise.
    steps, guidance: of many-step samplers (diffusion trainer).
    weights: which weights to sample with.
    fps: frames a second of the files, and of inference's; null for the model's own (Wan 16, its 5B 24) or 8 of others.
    """

    every: int | None = 100
    prompts: str | None = None
    count: int = 8
    seed: int = 1234
    steps: int = 50
    guidance: float = 1.0
    weights: SampleWeights = SampleWeights.ema
    fps: int | None = None

    def __post_init__(self) -> None:
        check_modes(self)
        check_counts(self, {"fps": FPS, "count": BATCH, "steps": STEPS}, "no video needs more")
        if (self.every is not None and self.every < 1) or self.count < 1 or self.steps < 1:
            raise ValueError(f"every, count and steps must be at least 1, got {self.every}, {self.count}, {self.steps}")


@dataclass
class GuardConfig:
    """Bounds of what a student's samples look like, null for none. A run whose samples are outside a bound for
    `patience` of the student's updates in a row is saved and ended, for its student will not recover.

    luma, saturation: [least, most], means in [0, 1].
    clipped: most, the share of values beyond what pixels can show.
    patience: how many of the student's updates in a row may be outside a bound.
    """

    luma: list[float] | None = None
    saturation: list[float] | None = None
    clipped: float | None = None
    patience: int = 20

    def __post_init__(self) -> None:
        for name in ("luma", "saturation"):
            bounds = getattr(self, name)
            if bounds is not None and (len(bounds) != 2 or not bounds[0] < bounds[1]):
                raise ValueError(f"{name} must be [least, most], or null for no bound, got {bounds}")
        check_within(self, clipped="[0, 1]")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")


@dataclass
class LoggingConfig:
    """Where numbers go beside metrics.jsonl, which is always written. None of these can stop a run.

    tensorboard: whether TensorBoard events are written.
    wandb: whether W&B is told; it runs offline unless a key is set.
    webhook: a URL that gets JSON at each validation and when the run ends; null for none. Prefer the environment
        variable FEWSTEP_WEBHOOK: a run keeps no more of this than the host.
    """

    tensorboard: bool = True
    wandb: bool = False
    webhook: str | None = field(default=None, repr=False, metadata={"saved_as": hidden})

    def __post_init__(self) -> None:
        if self.webhook is not None:
            try:
                check_url(self.webhook)
            except ValueError as problem:
                raise ValueError(f"webhook {problem}") from None
