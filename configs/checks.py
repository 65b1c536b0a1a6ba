"""Combinations of sections that cannot work together. Every error is one line: key, value, remedy."""

from __future__ import annotations

import math

from configs.images import check_first_frames
from configs.rollout import SelfForcingConfig
from configs.schema import RunConfig
from configs.sections import TrainerKind, UpdateSchedule
from configs.sizes import check_sizes
from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.family import Trait
from model.gan_config import Features, Heads
from model.objective import Role, objectives
from pipeline.self_forcing_training import rollout_lengths
from utils.optim import OptimizerConfig
from utils.parallel.mesh import EngineKind
from utils.variants import check_kinds


def check_run(config: RunConfig) -> None:
    """Raises ValueError, one line, for a run that cannot work: key, value, remedy."""
    check_kinds(config)
    _check_family(config)
    if config.trainer is TrainerKind.score_distillation:
        _check_distillation(config)
    if config.trainer is TrainerKind.ode and config.teacher is None and config.ode.path is None:
        raise ValueError("teacher is null: the ode trainer makes trajectories with one: set it, or ode.path")
    if config.trainer is TrainerKind.consistency and (config.teacher is None or config.ema.decay is None):
        raise ValueError("trainer consistency needs a causal teacher, and an average: set teacher and ema.decay")
    needs = config.needs_data()
    config.data.check_use(needs, validates=config.validation.every is not None)
    if config.is_causal:
        try:
            config.causal.blocks(config.data.frames)
        except ValueError as problem:
            video = ""
            if config.data.through_codec:
                pixel_frames = config.student.codecs.time_stride * (config.data.frames - 1) + 1
                video = f" (these are {pixel_frames} frames of video)"
            raise ValueError(
                f"{config.data.frames_key} and causal.num_frame_per_block disagree: {problem}{video}"
            ) from None
    _check_networks(config)
    check_first_frames(config, real=needs is not None)
    check_sizes(config)
    _check_adapters(config)
    if config.parallel.engine is EngineKind.deepspeed:
        _check_deepspeed(config)


def _check_family(config: RunConfig) -> None:
    """What the run asks of its networks, their family must have."""
    traits, preset = config.student.family.traits, config.student.preset
    networks = [net for net in (config.student, config.teacher, config.critic) if net is not None]
    asked = {
        Trait.cache: ("a causal run", config.is_causal),
        Trait.features: ("objective.gan", config.objective.gan is not None),
        Trait.lora: ("lora", any(net.lora is not None or net.loras for net in networks)),
        Trait.sparse: ("sparse", any(net.sparse is not None for net in networks)),
        Trait.sequence: ("parallel.sequence", config.parallel.sequence > 1),
        Trait.replay: ("checkpointing", any(net.checkpointing is not Checkpointing.none for net in networks)),
    }
    for trait, (what, is_asked) in asked.items():
        if is_asked and trait not in traits:
            raise ValueError(
                f"student.preset {preset}: its family has no {trait.value}, which {what} needs: leave it out"
            )
    if not config.few_steps:  # a many-step network has no use for the list, which has a default
        return
    try:
        config.student.path.check_steps(config.schedule.sigmas())
    except ValueError as problem:
        raise ValueError(f"schedule.denoising_step_list: {problem}") from None


def _check_deepspeed(config: RunConfig) -> None:
    """Raises ValueError for options that DeepSpeed's optimizers lack: they see flat parts of many matrices."""
    for section in ("generator_training", "critic_training"):
        optimizer: OptimizerConfig = getattr(config, section).optimizer
        if optimizer.kind != "adamw":
            raise ValueError(
                f"{section}.optimizer: kind {optimizer.kind} is not for engine deepspeed: choose adamw, or fsdp2"
            )
        if optimizer.clip_value is not None:
            raise ValueError(
                f"{section}.optimizer: clip_value is not for engine deepspeed: set clip_norm, or choose fsdp2"
            )


def _check_adapters(config: RunConfig) -> None:
    if config.teacher is not None and config.teacher.sparse is not None and config.teacher.sparse.ramp_step is not None:
        raise ValueError("teacher.sparse.ramp_step: a teacher does not change during a run: set it null")
    if config.teacher is not None and config.teacher.lora is not None:
        raise ValueError("teacher.lora: a teacher is never trained: set it null (LoRA files: teacher.loras)")
    if config.trainer is not TrainerKind.score_distillation and config.critic is not None and config.critic.lora:
        raise ValueError(f"critic.lora: trainer {config.trainer.value} has no critic: set it null")
    trained = {name: net for name, net in (("student", config.student), ("critic", config.critic)) if net and net.lora}
    if trained and config.parallel.engine is EngineKind.deepspeed:
        raise ValueError(f"{next(iter(trained))}.lora is not for engine deepspeed: choose fsdp2")
    has_teacher = config.trainer is not TrainerKind.diffusion and config.ode.path is None
    if config.teacher is None or not has_teacher:
        return
    sharing = {name: net for name, net in trained.items() if net.lora and net.lora.share}
    for name, net in sharing.items():
        if key := net.other_weights(config.teacher):
            trained_value, frozen_value = (
                network.preset if key == "geometry" else getattr(network, key) for network in (net, config.teacher)
            )
            raise ValueError(
                f"{name}.lora.share puts the adapter on the teacher's weights, but {name} has {key} {trained_value} "
                f"and the teacher {frozen_value}: give both the same, or set {name}.lora.share to false"
            )
    pass_settings = {(net.attention, net.checkpointing) for net in sharing.values()}
    if len(pass_settings) > 1:
        raise ValueError("student and critic share one copy of the weights: give them one attention, checkpointing")


def _check_distillation(config: RunConfig) -> None:
    _check_roles(config)
    rollout, schedule = config.rollout, config.schedule
    by_exit = schedule.ts_schedule or schedule.ts_schedule_max
    self_forcing = rollout if isinstance(rollout, SelfForcingConfig) else None
    if by_exit and self_forcing and not self_forcing.same_step_across_blocks and not self_forcing.last_step_only:
        raise ValueError(
            "schedule.ts_schedule needs one exit step for all blocks: set rollout.same_step_across_blocks to true"
        )
    if by_exit and rollout.by_block:
        raise ValueError(
            f"rollout.kind {rollout.kind} has no exit step: set schedule.ts_schedule and ts_schedule_max to false"
        )
    if schedule.ts_schedule_max and schedule.min_score_timestep / 1000 >= min(schedule.sigmas()):
        raise ValueError(
            f"schedule.min_score_timestep {schedule.min_score_timestep} is above the last step's level, which "
            "schedule.ts_schedule_max takes as the upper bound: lower it"
        )
    if self_forcing and self_forcing.num_training_frames is not None:
        rollout_lengths(config.data.frames, self_forcing.num_training_frames, config.causal.num_frame_per_block)
    if rollout.reuse_rollout and config.training.update_schedule is UpdateSchedule.alternating:
        raise ValueError(
            "rollout.reuse_rollout needs iterations that train both networks: set training.update_schedule to joint"
        )
    if config.training.max_steps <= config.training.critic_warmup_steps:
        raise ValueError(
            f"training.max_steps {config.training.max_steps} ends within critic_warmup_steps "
            f"{config.training.critic_warmup_steps}: the student would never train"
        )


def _check_roles(config: RunConfig) -> None:
    """Raises ValueError for a network that the objective needs and lacks, or has and does not use.

    Score objectives compare teacher and critic. A discriminator alone needs only the network whose features it sees.
    """
    objective, kind = config.objective, config.objective.kind
    alone = Role.critic not in objectives()[kind].roles
    on_critic = objective.gan is not None and objective.gan.features is Features.critic
    needed = {"teacher": not (alone and on_critic), "critic": not alone or on_critic}
    for name, is_needed in needed.items():
        if is_needed and getattr(config, name) is None:
            raise ValueError(f"{name} is null, but objective.kind {kind} needs it: give it a preset and an init")
        if not is_needed and getattr(config, name) is not None:
            raise ValueError(f"{name} is not used by objective.kind {kind} on these features: set it to null")
    if objective.reward is not None and (config.rollout.from_data or config.data.images is not None):
        raise ValueError("objective.reward judges samples of prompts alone: choose another rollout.kind, or none")
    if objectives()[kind].in_interval and config.schedule.min_score_timestep <= 0:
        raise ValueError(f"objective.kind {kind} needs schedule.min_score_timestep, where its interval starts")
    if objective.gan is not None and objective.gan.heads is Heads.image and config.data.frames != 1:
        raise ValueError(
            f"objective.gan.heads image judges single images, not videos of {config.data.frames} latent frames: "
            "choose video or register"
        )
    if config.parallel.engine is EngineKind.deepspeed and (objective.gan or objective.critic_keep is not None):
        raise ValueError("objective.gan and critic_keep are not for engine deepspeed: choose fsdp2")


def _check_networks(config: RunConfig) -> None:
    student = config.student.geometry()
    heads = [student.num_heads]
    for name, network in (("teacher", config.teacher), ("critic", config.critic)):
        if network is None:
            continue
        if network.family is not config.student.family:
            raise ValueError(
                f"{name}.preset {network.preset} and student.preset {config.student.preset} are of two families: "
                "choose presets of one"
            )
        other = network.geometry()
        heads.append(other.num_heads)
        for field_name in config.student.family.shared:
            a, b = getattr(student, field_name), getattr(other, field_name)
            if a != b:
                raise ValueError(
                    f"{name} has {field_name} {b} and student {a}: they must see the same latents, text and image"
                )
    networks = {"student": config.student, "teacher": config.teacher, "critic": config.critic}
    plain = [name for name, net in networks.items() if net is not None and net.attention == Backend.PLAIN]
    if config.parallel.compile and plain:
        raise ValueError(f"parallel.compile is not for {plain[0]}.attention plain: choose sdpa, flex or flash")
    common = math.gcd(*heads)
    if common % config.parallel.sequence:
        legal = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(
            f"parallel.sequence {config.parallel.sequence} does not divide the heads of every network "
            f"({', '.join(map(str, heads))}): choose {legal}"
        )
