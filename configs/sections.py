"""The sections of a run's YAML that have no owner elsewhere, each checked by itself; configs/schema.py joins them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from configs.video_size import VideoSize, check_values
from model.codec import ClipConfig, VAEConfig
from model.family import FirstFrame
from model.text_encoder import TextConfig
from utils.limits import BATCH, FRAMES, check_counts
from worlds.digits import DigitsConfig
from worlds.glyphs import GLYPH
from worlds.synthetic import SyntheticConfig
from worlds.toy import ToyWorldConfig

# Members are lower case because OmegaConf reads an enum by its name, and YAML is written in lower case.


class TrainerKind(Enum):
    score_distillation = "score_distillation"  # a student by distribution matching
    diffusion = "diffusion"  # a teacher, or a causal initialisation, by flow matching
    ode = "ode"  # a causal initialisation by regression on a teacher's trajectories
    consistency = "consistency"  # the same from a causal teacher's single steps, without trajectories


class RolloutKind(Enum):
    self_forcing = "self_forcing"  # causal, block by block over the KV cache
    backward_simulation = "backward_simulation"  # bidirectional, from noise
    noised_data = "noised_data"  # bidirectional, from real data
    diffusion_forcing = "diffusion_forcing"  # causal, from real data (CausVid)
    teacher_forcing = "teacher_forcing"  # the same, noisy blocks looking back at clean ones

    @property
    def from_data(self) -> bool:
        """Whether its inputs are real videos."""
        return self not in (RolloutKind.self_forcing, RolloutKind.backward_simulation)

    @property
    def causal(self) -> bool:
        return self in (RolloutKind.self_forcing, RolloutKind.diffusion_forcing, RolloutKind.teacher_forcing)

    @property
    def by_block(self) -> bool:
        """Whether each block has a noise level of its own, and there is no exit step."""
        return self in (RolloutKind.diffusion_forcing, RolloutKind.teacher_forcing)


class DiffusionMode(Enum):
    bidirectional = "bidirectional"
    diffusion_forcing = "diffusion_forcing"  # an own noise level for each block
    teacher_forcing = "teacher_forcing"  # noisy blocks look back at clean ones


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
class DataConfig:
    """What a run generates, and what it is trained on.

    kind: 'toy', the world made on the fly, 'digits', scikit-learn's handwriting as videos of one frame of 8x8,
        'synthetic', random numbers of a real geometry's sizes, or 'wan', Wan's text encoder and VAE.
    real: whether training may look at real videos; false is data-free, from prompts alone.
    toy: the world of kind toy.
    digits: the images of kind digits.
    synthetic, wan: sizes of that kind.
    text: where text embeddings of kind wan come from.
    vae: what decodes and encodes pixels of kind wan.
    image_encoder: a pipeline's folder or Hub name with CLIP, for networks with an image_dim.
    latents: real videos of kind wan, as a folder of `preprocess.py video`, of FastVideo's parquet files, or of
        Self-Forcing's LMDB.
    images: a folder of `preprocess.py images`, whose captions are the prompts: each video is made from an image and its
        caption.
    first_frame: whether networks are given the first frame of real videos; null gives it to image-to-video ones.
    prompts: a file of prompts to train on (.txt, .csv, .jsonl, .parquet), null for the kind's own.
    negative_prompt: what guidance leads away from.
    text_seed: of the tiny frozen text encoder of toy and digits, and of synthetic text embeddings.
    """

    kind: str = "toy"
    real: bool = True
    toy: ToyWorldConfig = field(default_factory=ToyWorldConfig)
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    wan: ClipConfig = field(default_factory=ClipConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    image_encoder: str | None = None
    latents: str | None = None
    images: str | None = None
    first_frame: bool | None = None
    prompts: str | None = None
    negative_prompt: str = ""
    text_seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("toy", "digits", "synthetic", "wan"):
            raise ValueError(f"kind '{self.kind}' is unknown: choose toy, digits, synthetic or wan")
        if self.latents is not None and self.kind != "wan":
            raise ValueError(f"latents '{self.latents}' are for kind wan, not {self.kind}: set them null")
        if self.images is not None and self.kind != "wan":
            raise ValueError(f"images '{self.images}' are for kind wan, not {self.kind}: set them null")
        if self.images is not None and self.prompts is not None:
            raise ValueError("images and prompts are both given, and images have captions of their own: set one null")
        if self.images is not None and self.first_frame is False:
            raise ValueError("first_frame is false, but images give the first frame: set one of them null")

    def has_first_frame(self, network: FirstFrame, *, real: bool) -> bool:
        """Whether samples come with a first frame: of real videos, or of images. network: how it takes one."""
        if self.first_frame is not None:
            return self.first_frame or network is FirstFrame.channels
        always = network is FirstFrame.channels or (real and network is FirstFrame.clean)
        return self.images is not None or always

    @property
    def frames(self) -> int:
        """Latent frames of a video."""
        return self.size[0]

    @property
    def size(self) -> tuple[int, int, int]:
        """Latent frames, height and width of a video."""
        side = self.toy.canvas // 2
        return {
            "toy": (self.toy.frames, side, side),
            "digits": (1, GLYPH, GLYPH),
            "synthetic": (self.synthetic.frames, self.synthetic.height, self.synthetic.width),
            "wan": (self.wan.frames, self.wan.height, self.wan.width),
        }[self.kind]


@dataclass
class RolloutConfig:
    """Where the student's samples come from.

    same_step_across_blocks: one exit step for all blocks, else one a block.
    last_step_only: always leave at the last step instead of a uniform draw over all steps.
    num_training_frames: latent frames of the longest rollout, null for the data's own; lengths are drawn in whole
        blocks and the last `data` frames are judged.
    self_gradient: later blocks' losses reach the keys and values that they looked back at (self-gradient forcing), for
    one more pass over the finished blocks and the exit steps' inputs.
    reuse_rollout: in iterations that train both networks the critic learns from the generator's sample (made before
    its update, for the same prompts) instead of making its own: the critic then sees the student of one update ago and
    the batch that the student was just judged on, and an iteration costs one rollout less.
    """

    kind: RolloutKind = RolloutKind.self_forcing
    same_step_across_blocks: bool = True
    last_step_only: bool = False
    num_training_frames: int | None = None
    self_gradient: bool = False
    reuse_rollout: bool = False

    def __post_init__(self) -> None:
        check_counts(self, {"num_training_frames": FRAMES})


@dataclass
class ConsistencyConfig:
    """Causal consistency distillation.

    steps: of the teacher's Euler grid, shifted by schedule.timestep_shift.
    guidance: of the teacher.
    huber: the constant c of the pseudo-Huber distance, null for the squared one.
    """

    steps: int = 48
    guidance: float = 4.0
    huber: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")
        if self.huber is not None and self.huber <= 0:
            raise ValueError(f"huber must be positive, or null for the squared distance, got {self.huber}")


@dataclass
class DiffusionConfig:
    """Flow-matching training.

    caption_dropout: share of samples trained with the negative prompt.
    clean_block_share: diffusion forcing's share of blocks given clean and left out of the loss.
    clean_noise_max: teacher forcing noises its clean half to U(0, this) timesteps.
    """

    mode: DiffusionMode = DiffusionMode.bidirectional
    caption_dropout: float = 0.1
    clean_block_share: float = 0.0
    clean_noise_max: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in [0, 1], got {self.caption_dropout}")
        if not 0 <= self.clean_block_share < 1:
            raise ValueError(f"clean_block_share must be in [0, 1), got {self.clean_block_share}")
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
        if self.pairs < 1 or self.steps < 1:
            raise ValueError(f"pairs and steps must be at least 1, got {self.pairs} and {self.steps}")


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
    scale_shift: whether the schedule's shifts grow with the root of a drawn video's tokens.
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
        if self.sizes is not None:
            check_values(self.sizes)
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, or null for torch's choice, got {self.threads}")
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
        if self.fps is not None and self.fps < 1:
            raise ValueError(f"fps must be at least 1, or null for the model's own, got {self.fps}")
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
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")


@dataclass
class LoggingConfig:
    """Where numbers go beside metrics.jsonl, which is always written. Neither can stop a run.

    tensorboard: whether TensorBoard events are written.
    wandb: whether W&B is told; it runs offline unless a key is set.
    """

    tensorboard: bool = True
    wandb: bool = False
