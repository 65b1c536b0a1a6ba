"""What a run's YAML may say. Sections that have an owner are defined beside it; this file joins them and refuses
combinations that cannot work. Every error is one line: key, value, remedy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from configs.given import check_given
from configs.objective import Features, Heads, ObjectiveConfig, ObjectiveKind
from configs.sections import (
    CheckpointConfig,
    ConsistencyConfig,
    DataConfig,
    DiffusionConfig,
    DiffusionMode,
    GuardConfig,
    LoggingConfig,
    ODEConfig,
    RolloutConfig,
    RolloutKind,
    TrainedConfig,
    TrainerKind,
    TrainingConfig,
    UpdateSchedule,
    ValidationConfig,
)
from configs.sizes import check_sizes
from model.ema import EMAConfig
from model.schedule import ScheduleConfig
from model.wan.config import NetworkConfig
from model.wan.vae import STRIDE_T
from pipeline.causal import CausalConfig
from pipeline.self_forcing_training import rollout_lengths
from utils.optim import OptimizerConfig
from utils.parallel.mesh import ParallelConfig
from utils.watchdog import WatchdogConfig


@dataclass
class RunConfig:
    """One run. student: the network that is trained, in every trainer. teacher: frozen. critic: the fake score."""

    name: str = "run"
    trainer: TrainerKind = TrainerKind.score_distillation
    seed: int = 0
    student: NetworkConfig = field(default_factory=NetworkConfig)
    teacher: NetworkConfig | None = None
    critic: NetworkConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    causal: CausalConfig = field(default_factory=CausalConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    ode: ODEConfig = field(default_factory=ODEConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    generator_training: TrainedConfig = field(default_factory=TrainedConfig)
    critic_training: TrainedConfig = field(default_factory=TrainedConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    @property
    def is_causal(self) -> bool:
        """Whether the trained network generates block by block."""
        match self.trainer:
            case TrainerKind.score_distillation:
                return self.rollout.kind.causal
            case TrainerKind.diffusion:
                return self.diffusion.mode is not DiffusionMode.bidirectional
            case TrainerKind.ode | TrainerKind.consistency:
                return True

    def __post_init__(self) -> None:
        if self.trainer is TrainerKind.score_distillation:
            self._check_distillation()
        if self.trainer is TrainerKind.ode and self.teacher is None and self.ode.path is None:
            raise ValueError("teacher is null: the ode trainer makes trajectories with one: set it, or ode.path")
        if self.trainer is TrainerKind.consistency and (self.teacher is None or self.ema.decay is None):
            raise ValueError("trainer consistency needs a causal teacher, and an average: set teacher and ema.decay")
        needs = self.needs_data()
        if needs and not self.data.real:
            raise ValueError(f"data.real is false, but {needs} needs real videos: set it to true")
        if needs and self.data.kind == "wan" and self.data.latents is None:
            raise ValueError(
                f"data.latents is null, but {needs} needs real videos: give a folder of preprocess.py video"
            )
        if self.data.kind == "wan" and self.data.vae.path is None and self.validation.every is not None:
            raise ValueError("data.vae.path is null: give the VAE's folder, or set validation.every to null")
        if self.is_causal:
            try:
                self.causal.blocks(self.data.frames)
            except ValueError as problem:
                kind, frames = self.data.kind, self.data.frames
                where = "data.kind digits" if kind == "digits" else f"data.{kind}.frames"
                video = (
                    "" if kind in ("toy", "digits") else f" (these are {STRIDE_T * (frames - 1) + 1} frames of video)"
                )
                raise ValueError(f"{where} and causal.num_frame_per_block disagree: {problem}{video}") from None
        self._check_networks()
        check_given(self, real=needs is not None)
        check_sizes(self)
        self._check_adapters()
        if self.parallel.engine == "deepspeed":
            self._check_deepspeed()

    def _check_deepspeed(self) -> None:
        """Its optimizers see flat parts of many matrices at a time."""
        for section in ("generator_training", "critic_training"):
            optimizer: OptimizerConfig = getattr(self, section).optimizer
            if optimizer.kind != "adamw":
                raise ValueError(
                    f"{section}.optimizer: kind {optimizer.kind} is not for engine deepspeed: choose adamw, or fsdp2"
                )
            if optimizer.clip_value is not None:
                raise ValueError(
                    f"{section}.optimizer: clip_value is not for engine deepspeed: set clip_norm, or choose fsdp2"
                )

    def _check_adapters(self) -> None:
        if self.teacher is not None and self.teacher.sparse is not None and self.teacher.sparse.ramp_step is not None:
            raise ValueError("teacher.sparse.ramp_step: a teacher does not change during a run: set it null")
        if self.teacher is not None and self.teacher.lora is not None:
            raise ValueError("teacher.lora: a teacher is never trained: set it null (LoRA files: teacher.loras)")
        if self.trainer is not TrainerKind.score_distillation and self.critic is not None and self.critic.lora:
            raise ValueError(f"critic.lora: trainer {self.trainer.value} has no critic: set it null")
        trained = {name: net for name, net in (("student", self.student), ("critic", self.critic)) if net and net.lora}
        if trained and self.parallel.engine == "deepspeed":
            raise ValueError(f"{next(iter(trained))}.lora is not for engine deepspeed: choose fsdp2")
        has_teacher = self.trainer is not TrainerKind.diffusion and self.ode.path is None
        if self.teacher is None or not has_teacher:
            return
        sharing = {name: net for name, net in trained.items() if net.lora and net.lora.share}
        for name, net in sharing.items():
            if odd := net.other_weights(self.teacher):
                mine, theirs = (n.preset if odd == "geometry" else getattr(n, odd) for n in (net, self.teacher))
                raise ValueError(
                    f"{name}.lora.share puts the adapter on the teacher's weights, but {name} has {odd} {mine} and the "
                    f"teacher {theirs}: give both the same, or set {name}.lora.share to false"
                )
        looks = {(net.attention, net.checkpointing) for net in sharing.values()}
        if len(looks) > 1:
            raise ValueError("student and critic share one copy of the weights: give them one attention, checkpointing")

    def needs_data(self) -> str | None:
        """What of the run needs real videos, in words; null where nothing does."""
        if self.trainer in (TrainerKind.diffusion, TrainerKind.consistency):
            return f"trainer {self.trainer.value}"
        if self.trainer is TrainerKind.score_distillation and self.rollout.kind.from_data:
            return f"rollout.kind {self.rollout.kind.value}"
        if self.trainer is TrainerKind.score_distillation and self.objective.gan is not None:
            return "objective.gan"
        return None

    def _check_distillation(self) -> None:
        self._check_roles()
        rollout, schedule = self.rollout, self.schedule
        by_exit = schedule.ts_schedule or schedule.ts_schedule_max
        if by_exit and not rollout.same_step_across_blocks and not rollout.last_step_only:
            raise ValueError(
                "schedule.ts_schedule needs one exit step for all blocks: set rollout.same_step_across_blocks to true"
            )
        if rollout.kind.by_block and (by_exit or rollout.last_step_only):
            raise ValueError(
                f"rollout.kind {rollout.kind.value} has no exit step: set schedule.ts_schedule, ts_schedule_max and "
                "rollout.last_step_only to false"
            )
        if schedule.ts_schedule_max and schedule.min_score_timestep / 1000 >= min(schedule.sigmas()):
            raise ValueError(
                f"schedule.min_score_timestep {schedule.min_score_timestep} is above the last step's level, which "
                "schedule.ts_schedule_max takes as the upper bound: lower it"
            )
        if rollout.num_training_frames is not None:
            if rollout.kind is not RolloutKind.self_forcing:
                raise ValueError(
                    f"rollout.num_training_frames needs kind self_forcing, not {rollout.kind.value}: set it null"
                )
            rollout_lengths(self.data.frames, rollout.num_training_frames, self.causal.num_frame_per_block)
        if rollout.self_gradient and rollout.kind is not RolloutKind.self_forcing:
            raise ValueError(
                f"rollout.self_gradient needs kind self_forcing, not {rollout.kind.value}: set it to false"
            )
        if rollout.reuse_rollout and self.training.update_schedule is UpdateSchedule.alternating:
            raise ValueError(
                "rollout.reuse_rollout needs iterations that train both networks: set training.update_schedule to joint"
            )
        if self.training.max_steps <= self.training.critic_warmup_steps:
            raise ValueError(
                f"training.max_steps {self.training.max_steps} ends within critic_warmup_steps "
                f"{self.training.critic_warmup_steps}: the student would never train"
            )

    def _check_roles(self) -> None:
        """Who takes part: scores compare teacher and critic; a discriminator alone needs only what it looks through."""
        objective, kind = self.objective, self.objective.kind.value
        alone = objective.kind in (ObjectiveKind.gan, ObjectiveKind.ladd)
        on_critic = objective.gan is not None and objective.gan.features is Features.critic
        needed = {"teacher": not (alone and on_critic), "critic": not alone or on_critic}
        for name, is_needed in needed.items():
            if is_needed and getattr(self, name) is None:
                raise ValueError(f"{name} is null, but objective.kind {kind} needs it: give it a preset and an init")
            if not is_needed and getattr(self, name) is not None:
                raise ValueError(f"{name} is not used by objective.kind {kind} on these features: set it to null")
        if objective.reward is not None and (self.rollout.kind.from_data or self.data.images is not None):
            raise ValueError("objective.reward judges samples of prompts alone: choose another rollout.kind, or none")
        if objective.kind is ObjectiveKind.phased_dmd and self.schedule.min_score_timestep <= 0:
            raise ValueError("objective.kind phased_dmd needs schedule.min_score_timestep, where its interval starts")
        if objective.gan is not None and objective.gan.heads is Heads.image and self.data.frames != 1:
            raise ValueError(
                f"objective.gan.heads image judges single images, not videos of {self.data.frames} latent frames: "
                "choose video or register"
            )
        if self.parallel.engine == "deepspeed" and (objective.gan or objective.critic_keep is not None):
            raise ValueError("objective.gan and critic_keep are not for engine deepspeed: choose fsdp2")

    def _check_networks(self) -> None:
        mine = self.student.geometry()
        heads = [mine.num_heads]
        for name, network in (("teacher", self.teacher), ("critic", self.critic)):
            if network is None:
                continue
            other = network.geometry()
            heads.append(other.num_heads)
            for field_name in ("in_dim", "out_dim", "text_dim", "text_len", "image_dim"):
                a, b = getattr(mine, field_name), getattr(other, field_name)
                if a != b:
                    raise ValueError(
                        f"{name} has {field_name} {b} and student {a}: they must see the same latents, text and image"
                    )
        networks = {"student": self.student, "teacher": self.teacher, "critic": self.critic}
        plain = [name for name, net in networks.items() if net is not None and net.attention == "plain"]
        if self.parallel.compile and plain:
            raise ValueError(f"parallel.compile is not for {plain[0]}.attention plain: choose sdpa, flex or flash")
        common = math.gcd(*heads)
        if common % self.parallel.sequence:
            legal = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ValueError(
                f"parallel.sequence {self.parallel.sequence} does not divide the heads of every network "
                f"({', '.join(map(str, heads))}): choose {legal}"
            )
